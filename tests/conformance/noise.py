"""The rounding noise of a combination in bfloat16, which is the gate of its figures: how far they move in float32 by roundings of weights.

Computing in bfloat16 rounds a weight once, and what it is multiplied with some ten to sixteen times more on the way through a block: to
norms, queries, scores, products, sums. Errors of sixteen roundings are together four times that of one. So each weight is rounded to
`FEWER` bits less than bfloat16 has, which is four times its rounding, up or down with the probabilities that keep it on average
(stochastic rounding), `DRAWS` times anew. The noise is the largest of the draws: a combination that chooses (blocks, experts) chooses
otherwise in some of them, and has that in it.

Nothing in it depends on how bfloat16 is computed, nor on where: what a backend does wrong in bfloat16 is in no gate.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from smedjan_common.training.schedule import learning_rate
from tests.conformance import subjects
from tests.conformance.cases import STEPS, Case
from tests.conformance.compare import largest, relative_l2

FEWER = 2  # bits
DRAWS = 8
RUNS = 32  # draws of 20 steps, each with roundings of its own at every step

Params = dict[str, np.ndarray]


def rounded(params: Params, seed: int) -> Params:
    """float32 values of `FEWER` bits less than bfloat16 has: those above or below, at random, so that the mean stays."""
    rng, cut = np.random.default_rng((41, seed)), 16 + FEWER
    found = {}
    for name, value in params.items():
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        up = rng.integers(0, 1 << cut, bits.shape, dtype=np.uint32)  # carries with the probability of the bits that are cut
        found[name] = ((bits + up) & np.uint32((1 << 32) - (1 << cut))).view(np.float32)
    return found


def noise(case: Case, backend: str) -> dict[str, float]:
    """Check of bench/conformance.py -> noise, of those that are relative differences in bfloat16. `backend` computes in float32."""
    train = dataclasses.replace(case.train, dtype="float32")
    case = dataclasses.replace(case, train=train)

    def logits(params: Params, documents: np.ndarray | None = None) -> np.ndarray:
        return subjects.logits(backend, case.model, params, case.tokens, documents=documents)

    def moved(of: Callable[[Params], float]) -> float:
        return max(of(rounded(case.params, draw)) for draw in range(DRAWS))

    exact, apart = logits(case.params), logits(case.params, case.documents) if case.takes_documents else None
    loss, gradients = subjects.loss_and_gradients(backend, case.model, train, case.params, case.batches[0])

    def of_step(params: Params) -> tuple[float, float]:
        other_loss, other = subjects.loss_and_gradients(backend, case.model, train, params, case.batches[0])
        return abs(other_loss / loss - 1), max(relative_l2(other[name], gradients[name]) for name in gradients)

    steps = [of_step(rounded(case.params, draw)) for draw in range(DRAWS)]
    forward, gradient = moved(lambda params: largest(logits(params), exact)), max(step[1] for step in steps)
    found = {"forward": forward, "decoding": forward, "chunk sizes": forward, "loss": max(step[0] for step in steps)}
    if apart is not None:
        found["documents"] = moved(lambda params: largest(logits(params, case.documents), apart))
    return found | {"gradients": gradient, "accumulation": gradient, "checkpointing": gradient} | _of_runs(case, backend)


def _of_runs(case: Case, backend: str) -> dict[str, float]:
    """20 steps, each from weights that are rounded anew, beside those of the weights as they are. What a step adds goes to weights that are
    not rounded, as it does in bfloat16."""
    exact = subjects.train(backend, case.model, case.train, case.start, case.batches)
    found = dict.fromkeys(("20 steps loss", "20 steps gradient norm", "20 steps parameters", "20 steps moments"), 0.0)
    for draw in range(RUNS):
        run = _rounding_run(case, backend, draw)
        pairs = ((run.snapshot.params, exact.snapshot.params), (run.snapshot.optimizer, exact.snapshot.optimizer))
        tensors = [max(relative_l2(got[name], want[name]) for name in want) for got, want in pairs]
        scalars = [
            max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
            for got, want in ((run.losses, exact.losses), (run.grad_norms, exact.grad_norms))
        ]
        found = {name: max(found[name], value) for name, value in zip(found, (*scalars, *tensors), strict=True)}
    return found


def _rounding_run(case: Case, backend: str, draw: int) -> subjects.Run:
    side = subjects.backend(backend, case.model, case.train)
    snapshot, told = side.save(side.init(case.start)), []
    for step, batch in enumerate(case.batches):
        masters, used = snapshot.params, rounded(snapshot.params, STEPS * draw + step)
        state, metrics = side.train_step(side.restore(dataclasses.replace(snapshot, params=used)), *batch, learning_rate(case.train, step))
        after = side.save(state)
        snapshot = dataclasses.replace(after, params={name: after.params[name] + (masters[name] - used[name]) for name in masters})
        told.append(side.read(metrics))
    return subjects.Run(*([row[key] for row in told] for key in ("loss", "grad_norm", "tokens")), snapshot)
