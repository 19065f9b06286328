"""The states of the delta rules' chunks: one after the other, and in groups side by side, which long sequences take."""

import numpy as np
import pytest

from tests.conformance import subjects
from tests.conformance.compare import Difference, demand, largest
from tests.conformance.gates import FLOAT32

B, H, K, V = 2, 3, 4, 5


def states(N: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """An initial state, and keep, change and add of N chunks, [N, B, H, ...]; decays that forget everything among them."""
    keep = rng.uniform(0.3, 1.0, (N, B, H, 1, K)) * (rng.random((N, B, H, 1, K)) > 0.05)
    change = 0.3 * rng.standard_normal((N, B, H, K, K))
    return rng.standard_normal((B, H, V, K)), keep, change, rng.standard_normal((N, B, H, V, K))


@pytest.mark.parametrize("N", [1, 32, 33, 64, 70, 129])
def test_states_before_every_chunk_are_those_of_the_recurrence(backend: str, N: int):
    state, *chunks = states(N, np.random.default_rng(N))
    expected, S = [], state
    for keep, change, add in zip(*chunks, strict=True):
        expected.append(S)
        S = S * keep + S @ change + add
    array = subjects.framework(backend).array
    heads_first = backend == "mlx"  # [B, H, N, ...]
    arranged = (np.moveaxis(each, 0, 2) if heads_first else each for each in chunks)
    start, *arrays = (array(each.astype(np.float32)) for each in (state, *arranged))
    before, last = subjects.module(backend, "mixers.chunks").scan_states(start, *arrays, start.dtype)
    before = np.moveaxis(np.asarray(before), 2, 0) if heads_first else np.asarray(before)
    gate = 5 * FLOAT32.one_op  # up to 129 products one after the other
    demand(
        [
            Difference("states", largest(before, np.stack(expected)), gate),
            Difference("the last state", largest(np.asarray(last), S), gate),
        ]
    )


@pytest.mark.parametrize("mixer", ["rwkv", "gated-deltanet"])
def test_logits_and_gradients_do_not_depend_on_the_groups(backend: str, mixer: str, monkeypatch: pytest.MonkeyPatch):
    import dataclasses

    from tests.conformance.cases import CASES
    from tests.conformance.compare import tensors

    case = CASES[f"{mixer}-swiglu-mha"]
    plain = subjects.loss_and_gradients(backend, case.model, case.train, case.params, case.batches[0], case.documents)
    monkeypatch.setattr(subjects.module(backend, "mixers.chunks"), "LONGEST_SCAN", 2)
    fresh = dataclasses.replace(case.train, seed=99)  # another configuration, so nothing compiled before is used
    grouped = subjects.loss_and_gradients(backend, case.model, fresh, case.params, case.batches[0], case.documents)
    demand([Difference("loss", abs(grouped[0] / plain[0] - 1), FLOAT32.same_arithmetic), *tensors(grouped[1], plain[1], 1e-5)])


@pytest.mark.parametrize("mixer", ["rwkv", "gated-deltanet"])
def test_groups_train_in_bfloat16(mixer: str, monkeypatch: pytest.MonkeyPatch):
    """JAX only: MLX has no bfloat16 on a CPU."""
    import dataclasses

    from tests.conformance.cases import CASES
    from tests.conformance.gates import BFLOAT16

    case = CASES[f"{mixer}-swiglu-mha"]
    losses = []
    for seed, longest in ((97, 32), (98, 2)):
        monkeypatch.setattr(subjects.module("jax", "mixers.chunks"), "LONGEST_SCAN", longest)
        train = dataclasses.replace(case.train, dtype="bfloat16", seed=seed)
        losses.append(subjects.train("jax", case.model, train, case.params, case.batches[:3]).losses)
    np.testing.assert_allclose(*losses, rtol=BFLOAT16.loss)
