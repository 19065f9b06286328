"""What is compared. Every check measures and returns differences; `demand` decides. Tests, mutation tests and the report use these.

`got` names the side under test (a backend), `want` the side it must meet ("reference" or the other backend).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from smedjan_common.config import TrainConfig
from smedjan_common.model.ffns.experts import load_names
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import check_tree, parameter_table
from smedjan_common.reference import experts
from smedjan_common.reference import model as reference
from smedjan_common.reference import optim as reference_optim
from smedjan_common.reference.derivative import directional_derivative
from smedjan_common.training.optimizers import EMA, slot_names
from smedjan_common.training.schedule import learning_rate
from tests.conformance import subjects
from tests.conformance.cases import Case
from tests.conformance.compare import Difference, Mismatch, demand_equal_bits, largest, relative_l2, tensors
from tests.conformance.gates import FLOAT32, Gates

DIRECTIONS = 6


def tree(got: str, case: Case) -> None:
    """A train state holds exactly the tensors of the table, with its initial values bit for bit; so do the decode states of the rows."""
    side = subjects.backend(got, case.model, case.train)
    snapshot = side.save(side.init(case.params))
    if problems := check_tree(case.model, snapshot.params):
        raise Mismatch("; ".join(problems))
    demand_equal_bits(snapshot.params, case.params, f"{got}: ")
    slots, table = slot_names(case.model, case.train.optimizer, case.train.ema), parameter_table(case.model)
    zeros = {name: np.zeros(spec.shape, np.float32) for name, spec in table.items()}
    expected = {f"{slot}.{name}": (case.params if slot == EMA else zeros)[name] for slot, names in slots.items() for name in names}
    demand_equal_bits(snapshot.optimizer, expected, f"{got} optimizer: ")


def module_paths(got: str, case: Case) -> None:
    """Every tensor of the table is found in the model under the attribute path that its name spells."""
    params = subjects.on_device(got, case.params)
    model = subjects.module(got, "model").Model(case.model, params)
    for name, spec in parameter_table(case.model).items():
        node = model
        for part in name.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        if tuple(node.shape) != spec.shape:
            raise Mismatch(f"{got}: {name} has shape {tuple(node.shape)}, the table says {spec.shape}")


def decode_state(got: str, case: Case) -> None:
    """The decode state of each layer has the arrays of its row, by name and shape."""
    model = subjects.module(got, "model").Model(case.model, subjects.on_device(got, case.params))
    for layer, arrays in enumerate(model.init_state(3, 24)["layers"]):
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        expected = {spec.name: spec.shape for spec in MIXERS[case.model.mixer_of(layer)].state(case.model, 3, 24)}
        if shapes != expected:
            raise Mismatch(f"{got}: layer {layer} has the state {shapes}, its row says {expected}")


def forward(
    got: str, case: Case, want: str = "reference", tokens: np.ndarray | None = None, documents: np.ndarray | None = None
) -> list[Difference]:
    """Logits of the whole model."""
    tokens = case.tokens if tokens is None else tokens
    sides = (subjects.logits(side, case.model, case.params, tokens, case.train.dtype, documents=documents) for side in (got, want))
    return [Difference(f"{got} logits {tokens.shape}", largest(*sides), case.tolerance.forward)]


def loss(got: str, case: Case) -> list[Difference]:
    """Mean loss of a batch in which some targets do not count, from a training step and from an evaluation step."""
    batch = case.batches[0]
    expected = reference.loss(case.model, case.params, *batch)
    side = subjects.backend(got, case.model, case.train)
    state = side.init(case.params)
    counted = side.read(side.eval_step(state, *batch))
    trained = side.read(side.train_step(state, *batch, lr=0.0)[1])
    tokens = float((batch[1] >= 0).sum())
    return [
        Difference(f"{got} loss of train_step", abs(trained["loss"] / expected - 1), case.gates.loss),
        Difference(f"{got} loss of eval_step", abs(counted["loss_sum"] / counted["tokens"] / expected - 1), case.gates.loss),
        Difference(f"{got} counted tokens", abs(trained["tokens"] - tokens) + abs(counted["tokens"] - tokens), 0.0),
    ]


def gradient(got: str, case: Case, documents: np.ndarray | None = None) -> list[Difference]:
    """<gradient, direction> against central differences of the float64 loss, for every parameter along random directions.

    For a direction d of standard normals the mean square of <e, d> is ||e||^2, so the root mean square of the differences over
    ||g|| estimates the relative L2 error of the gradient, and it does not matter how small some <g, d> happens to be.
    """
    batch = case.batches[0]
    grads = subjects.loss_and_gradients(got, case.model, case.train, case.params, batch, documents)[1]
    differences = []
    for name, grad in grads.items():
        rng = np.random.default_rng(len(differences))
        errors, sizes = [], [float(np.linalg.norm(grad.astype(np.float64)))]
        for _ in range(DIRECTIONS if documents is None else 2):  # a reference that runs every document by itself is slow
            direction = rng.standard_normal(grad.shape)
            expected = _slope(case, name, direction, documents)
            errors.append(float((grad * direction).sum(dtype=np.float64)) - expected)
            sizes.append(abs(expected))
        error = float(np.sqrt(np.mean(np.square(errors)))) / (max(sizes) or 1.0)
        differences.append(Difference(f"{got} gradient of {name}", error, case.tolerance.gradient))
    return differences


def _slope(case: Case, name: str, direction: np.ndarray, documents: np.ndarray | None) -> float:
    params = {n: reference.as_float64(value) for n, value in case.params.items()}
    return directional_derivative(
        lambda p: reference.objective(case.model, case.train, p, *case.batches[0], documents), params, name, direction
    )


def gradients_between(got: str, want: str, case: Case) -> list[Difference]:
    """Every gradient of one backend against the other's."""
    sides = [subjects.loss_and_gradients(side, case.model, case.train, case.params, case.batches[0])[1] for side in (got, want)]
    return tensors(*sides, case.tolerance.gradient, "gradient of ")


def same_step(got: str, case: Case, **changes: object) -> list[Difference]:
    """A training setting that must not change what is computed: loss and every gradient of a step stay the same."""
    batch = case.batches[0]
    plain_loss, plain = subjects.loss_and_gradients(got, case.model, case.train, case.params, batch)
    changed = dataclasses.replace(case.train, **changes)
    other_loss, other = subjects.loss_and_gradients(got, case.model, changed, case.params, batch)
    label = f"{got} {changes} "
    whole = (np.concatenate([grads[name].ravel() for name in plain]) for grads in (other, plain))
    return [
        Difference(f"{label}loss", abs(other_loss / plain_loss - 1), case.gates.same_arithmetic),
        Difference(f"{label}gradient", relative_l2(*whole), case.gates.same_arithmetic),
        *tensors(other, plain, max(case.gates.one_op, case.gates.same_arithmetic), f"{label}gradient of "),
    ]


def accumulation(got: str, case: Case, parts: int) -> list[Difference]:
    """`same_step` in parts, for all but the losses of routers: they are means over the tokens of a part, so they are off here."""
    if load_names(case.model):
        case = dataclasses.replace(case, train=dataclasses.replace(case.train, balance_loss=0.0, router_z_loss=0.0))
    return same_step(got, case, grad_accum=parts)


def runs(got: subjects.Run, want: subjects.Run, label: str = "", gates: Gates = FLOAT32) -> list[Difference]:
    """Two training runs: loss and gradient norm of every step, final parameters and optimizer state."""

    def worst(key: str) -> float:
        return max(abs(a / b - 1) for a, b in zip(getattr(got, key), getattr(want, key), strict=True))

    return [
        Difference(f"{label}loss of {len(want.losses)} steps", worst("losses"), gates.steps_loss),
        Difference(f"{label}gradient norm of {len(want.losses)} steps", worst("grad_norms"), gates.steps_params),
        *tensors(got.snapshot.params, want.snapshot.params, gates.steps_params, f"{label}trained "),
        *tensors(got.snapshot.optimizer, want.snapshot.optimizer, gates.steps_params, f"{label}optimizer's "),
    ]


def optimizer(got: str, case: Case, config: TrainConfig | None = None) -> list[Difference]:
    """Clipping and the optimizer against the float64 definition, 20 steps on the same gradients: large and small (see below)."""
    grads = optimizer_gradients(case)
    snapshot = subjects.optimizer_run(got, case.model, config or case.train, case.params, grads)
    params, state = reference_optimizer_run(case, grads)
    moments = {f"{slot}.{name}": value for slot, tensors in state.slots.items() for name, value in tensors.items()}
    moved = {name: snapshot.params[name] - case.params[name].astype(np.float64) for name in params}
    expected = {name: params[name] - case.params[name] for name in params}
    # the movement is a small difference of float32 parameters: one rounding per step, each half a unit of the last place
    gate = {name: FLOAT32.one_op + 20 * 2.0**-24 * norm(case.params[name]) / norm(expected[name]) for name in expected}
    return [
        *tensors(snapshot.params, params, FLOAT32.one_op, f"{got} "),
        *tensors(snapshot.optimizer, moments, FLOAT32.one_op, f"{got} "),
        *(Difference(f"{got} movement of {name}", relative_l2(moved[name], expected[name]), gate[name]) for name in expected),
    ]


def optimizer_gradients(case: Case) -> list[dict[str, np.ndarray]]:
    """Gradients of 20 steps whose scales span six orders, so that clipping bites at some steps and eps counts in others."""
    rng = np.random.default_rng(11)
    scale = {name: 10.0 ** rng.uniform(-7, -1) for name in case.params}
    return [
        {
            name: (rng.standard_normal(value.shape) * scale[name] * (1.0, 0.1)[step % 2]).astype(np.float32)
            for name, value in case.params.items()
        }
        for step in range(case.train.steps)
    ]


def reference_optimizer_run(
    case: Case, grads: Sequence[dict[str, np.ndarray]]
) -> tuple[dict[str, np.ndarray], reference_optim.OptimizerState]:
    """The float64 definition over the same gradients."""
    params, specs = {name: reference.as_float64(value) for name, value in case.params.items()}, parameter_table(case.model)
    state = reference_optim.init(case.train, specs, params)
    for step, grad in enumerate(grads):
        clipped, _ = reference_optim.clip_by_global_norm(grad, case.train.clip_norm)
        rate = learning_rate(case.train, step)
        params, state = reference_optim.update(case.train, specs, params, clipped, state, rate)
    return params, state


def decoding(got: str, case: Case, lengths: Sequence[int]) -> list[Difference]:
    """Logits after chunks of these lengths, through the decode state, against the whole sequence at once (the reference's)."""
    expected = subjects.logits("reference", case.model, case.params, case.tokens)
    ends = np.cumsum(lengths)
    assert ends[-1] <= case.tokens.shape[1]
    chunks = [case.tokens[:, end - length : end] for length, end in zip(lengths, ends, strict=True)]
    out = subjects.decode(got, case.model, case.params, chunks, 24, case.train.dtype)
    return [
        Difference(f"{got} logits after token {end}", largest(out[i], expected[:, end - 1]), case.tolerance.forward)
        for i, end in enumerate(ends)
    ]


def causality(got: str, case: Case, position: int) -> None:
    """Nothing after `position` reaches it: other tokens there leave its logits bit-identical, and its gradient is exactly zero."""
    rng = np.random.default_rng(position)
    tokens = rng.permutation(case.model.vocab_size)[None, : case.tokens.shape[1]].astype(np.int32)  # all different
    changed = tokens.copy()
    changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % case.model.vocab_size
    before, after = (subjects.logits(got, case.model, case.params, t)[:, : position + 1] for t in (tokens, changed))
    demand_equal_bits({"logits of the past": after}, {"logits of the past": before}, f"{got}: ")
    grad = subjects.hidden_gradient(got, case.model, case.params, tokens, position)
    past, future = tokens[0, : position + 1], tokens[0, position + 1 :]
    if np.any(grad[future]):
        raise Mismatch(f"{got}: the output at {position} has a gradient of {np.abs(grad[future]).max():.3g} from later tokens")
    if not np.all(np.any(grad[past], axis=1)):
        raise Mismatch(f"{got}: the output at {position} does not depend on all earlier tokens")


def chunk_sizes(got: str, case: Case, sizes: Sequence[int]) -> list[Difference]:
    """Logits do not depend on how many positions are taken at once."""
    sides = [subjects.logits(got, case.model, case.params, case.tokens, chunk_size=size) for size in sizes]
    return [
        Difference(f"{got} logits in chunks of {size}", largest(side, sides[0]), case.tolerance.forward)
        for size, side in zip(sizes, sides, strict=True)
    ]


def isolation(got: str, case: Case) -> None:
    """Nothing crosses the border of a document: other tokens before and after it leave its logits bit-identical."""
    rng = np.random.default_rng(3)
    tokens, row, inside = case.tokens.copy(), 2, slice(5, 12)
    changed = tokens.copy()
    outside = np.ones(tokens.shape[1], bool)
    outside[inside] = False
    changed[row, outside] = rng.integers(0, case.model.vocab_size, int(outside.sum()))
    sides = [subjects.logits(got, case.model, case.params, t, documents=case.documents)[row, inside] for t in (tokens, changed)]
    demand_equal_bits({"logits of a document": sides[1]}, {"logits of a document": sides[0]}, f"{got}: ")


def routing(got: str, case: Case, parts: int = 1, wrong: subjects.Params | None = None) -> list[Difference]:
    """Loads, losses and new biases of one training step against the definition (whose parameters are `wrong`, where given)."""
    model, train, (inputs, targets) = case.model, dataclasses.replace(case.train, grad_accum=parts), case.batches[0]
    side = subjects.backend(got, model, train)
    state, metrics = side.train_step(side.init(case.params), inputs, targets, lr=1e-3)
    told, after, params = side.read(metrics), side.save(state).params, wrong or case.params
    logits = reference.router_logits(model, params, inputs)
    names = [name.replace(".load", ".router.bias") for name in load_names(model)]
    loads = [experts.load(model, experts.route(model, scores, params.get(name))[0]) for name, scores in zip(names, logits, strict=True)]
    differences = [
        Difference("load", largest(np.array(told["expert_load"]), np.array([load / load.sum() for load in loads])), FLOAT32.one_op)
    ]
    if model.router == "bias":
        expected = {name: experts.next_bias(params[name], load, train.router_bias_rate) for name, load in zip(names, loads, strict=True)}
        return differences + [Difference(name, largest(after[name], value), 1e-7) for name, value in expected.items()]
    counted = [(part >= 0).sum() / (targets >= 0).sum() for part in np.split(targets, parts)]
    pieces = [reference.router_logits(model, params, part) for part in np.split(inputs, parts)]
    for name, function in (("balance_loss", lambda scores: experts.balance_loss(model, scores)), ("router_z_loss", experts.router_z_loss)):
        expected = sum(share * np.mean([function(scores) for scores in piece]) for share, piece in zip(counted, pieces, strict=True))
        differences.append(Difference(name, abs(told[name] / expected - 1), FLOAT32.loss))
    return differences


def norm(value: np.ndarray) -> float:
    """Euclidean norm; tiny instead of zero."""
    return float(np.linalg.norm(np.asarray(value, np.float64))) or 1e-300
