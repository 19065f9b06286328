"""Every check can fail: each mutation below is a bug that somebody could write, and the check that is named must catch it.

A mutation changes one side only: a constant or a tensor that one side is given, or a piece of the float64 definition. That the
definition is the mutated side is a matter of cost (a mutated backend would have to be compiled anew for each); a comparison does
not know which of its sides is wrong.
"""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from smedjan_common.errors import CheckpointError
from smedjan_common.model.params import parameter_table
from smedjan_common.reference import attention, ffn
from smedjan_common.reference import loss as reference_loss
from smedjan_common.reference import model as reference
from smedjan_common.reference import optim as reference_optim
from smedjan_common.reference import rope as reference_rope
from tests.conformance import checks, rows, subjects
from tests.conformance.cases import CASES, Case, train_config
from tests.conformance.compare import Mismatch, demand, demand_equal_bits
from tests.conformance.mutate import (
    GQA,
    OFF,
    Patch,
    demand_decoding,
    demand_forward,
    demand_gradient,
    demand_loss,
    demand_optimizer,
    model_constant_off,
    on,
    swap,
    tensor_off,
)

YARN = CASES["attention-swiglu-gqa-yarn"]
TENSORS = list(parameter_table(GQA.model))


def sees_one_token_ahead(right: Callable) -> Callable:
    def attend(config, query, key, value, visible_TxS):
        length = visible_TxS.shape[1]
        return right(config, query, key, value, visible_TxS=np.tril(np.ones((len(visible_TxS), length), bool), 1))

    return attend


def groups_interleaved(right: Callable) -> Callable:
    """Query head h reads key/value head h % Hk instead of h // (H / Hk)."""

    def attend(config, query, key, value, visible_TxS):
        wrong = np.arange(config.heads).reshape(-1, config.kv_heads).T.ravel()
        return right(config, query[:, :, wrong], key, value, visible_TxS)[:, :, np.argsort(wrong)]

    return attend


def gate_and_up_swapped(right: Callable) -> Callable:
    return lambda config, params, *rest: right(
        config, {**params, "gate_proj.weight": params["up_proj.weight"], "up_proj.weight": params["gate_proj.weight"]}, *rest
    )


def rotates_the_other_way(right: Callable) -> Callable:
    return lambda x, *args: np.flip(right(np.flip(x, -1), *args), -1)


def interleaved_pairs(right: Callable) -> Callable:
    """GPT-J's layout: feature 2i turns with 2i + 1."""

    def rotate(x, *args):
        halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        turned = right(halves, *args)
        return np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(x.shape)

    return rotate


def positions_from_one(right: Callable) -> Callable:
    return lambda x, config, start=0, *dim: right(x, config, start + (start > 0), *dim)


def counts_ignored_targets(right: Callable) -> Callable:
    return lambda logits, targets: right(logits, np.maximum(targets, 0))


MODEL_MUTATIONS: dict[str, tuple[Callable, Patch]] = {
    **{f"{name} off": (demand_forward, tensor_off(name)) for name in TENSORS},
    **{f"one element of {name} off": (demand_forward, tensor_off(name, (0,))) for name in TENSORS},
    "eps of the norm": (demand_forward, model_constant_off("norm_eps", 1.1)),
    "rope base": (demand_forward, model_constant_off("rope_base")),
    "softmax scale": (
        demand_forward,
        swap(attention, "project", lambda right: lambda *a, **k: (right(*a, **k)[0] * OFF, *right(*a, **k)[1:])),
    ),
    "causal mask": (demand_forward, swap(attention, "_attend", sees_one_token_ahead)),
    "grouping of the heads": (demand_forward, swap(attention, "_attend", groups_interleaved)),
    "gate and up swapped": (demand_forward, swap(ffn, "forward", gate_and_up_swapped)),
    "rope turned the other way": (demand_forward, swap(attention, "rotate", rotates_the_other_way)),
    "rope's layout": (demand_forward, swap(attention, "rotate", interleaved_pairs)),
    "yarn's attention factor": (
        on(demand_forward, YARN),
        swap(reference_rope, "attention_factor", lambda right: lambda config: 1 + (right(config) - 1) * 1.01),
    ),
    "yarn's factor": (on(demand_forward, YARN), model_constant_off("rope_factor")),
    "norm without its mean": (
        demand_forward,
        swap(reference, "rms_norm", lambda right: lambda x, w, eps: right(x - x.mean(-1, keepdims=True), w, eps)),
    ),
    "loss counts ignored targets": (demand_loss, swap(reference_loss, "cross_entropy", counts_ignored_targets)),
    "loss divided by all targets": (
        demand_loss,
        swap(reference_loss, "cross_entropy", lambda right: lambda logits, targets: (right(logits, targets)[0], targets.size)),
    ),
    "gradient of the ignored targets": (demand_gradient, swap(reference_loss, "cross_entropy", counts_ignored_targets)),
    "gradient with a wrong mask": (demand_gradient, swap(attention, "_attend", sees_one_token_ahead)),
    **{f"gradient with {name} off": (demand_gradient, tensor_off(name)) for name in TENSORS[:: len(TENSORS) // 3]},
    "decoding with a wrong mask": (demand_decoding, swap(attention, "_attend", sees_one_token_ahead)),
    "decoding with the rope base off": (demand_decoding, model_constant_off("rope_base")),
    **{
        f"{path.stem.removeprefix('mutations_')}: {name}": mutation
        for path in sorted(pathlib.Path(__file__).parent.glob("mutations_*.py"))
        for name, mutation in importlib.import_module(f"tests.conformance.{path.stem}").MUTATIONS.items()
    },
}


@functools.cache
def passes(check: Callable, backend: str) -> None:
    """The check without a mutation, once: a failure after it is the mutation's."""
    check(backend)


@pytest.mark.parametrize("mutation", MODEL_MUTATIONS)
def test_a_wrong_model_is_caught(backend: str, mutation: str, monkeypatch: pytest.MonkeyPatch):
    check, patch = MODEL_MUTATIONS[mutation]
    passes(check, backend)
    patch(monkeypatch)
    with pytest.raises(Mismatch):
        check(backend)


def changed(**fields: object) -> Callable:
    return lambda right: lambda config, *rest: right(dataclasses.replace(config, **fields), *rest)


def setting(**fields: object) -> Patch:
    """The definition is given another setting."""
    return swap(reference_optim, "update", changed(**fields))


def counted(wrong: Callable[[int], int]) -> Patch:
    """The definition counts the steps wrongly."""
    return swap(
        reference_optim,
        "update",
        lambda right: (
            lambda config, specs, params, grads, state, lr: right(
                config, specs, params, grads, state._replace(count=wrong(state.count)), lr
            )
        ),
    )


def parameters(**fields: object) -> Patch:
    """The definition finds something else of every parameter in the table."""
    return swap(
        reference_optim,
        "update",
        lambda right: lambda config, specs, *rest: right(config, {name: spec._replace(**fields) for name, spec in specs.items()}, *rest),
    )


def direction(optimizer: str, wrong: Callable) -> Patch:
    """`wrong(right)` takes the place of the rule of an optimizer."""
    return lambda monkeypatch: monkeypatch.setitem(reference_optim.DIRECTIONS, optimizer, wrong(reference_optim.DIRECTIONS[optimizer]))


def steps_along_the_new_momentum(right: Callable) -> Callable:
    def lion(config, grad, kept, count):
        kept = right(config, grad, kept, count)[1]
        return np.sign(kept["mu"]), kept

    return lion


def scaled_by_the_rows(right: Callable) -> Callable:
    return lambda matrix, steps, eps: right(matrix, steps, eps) * (len(matrix) / max(matrix.shape)) ** 0.5


ADAMW_MUTATIONS: dict[str, Patch] = {
    "beta1": setting(beta1=0.9 * OFF),
    "beta2": setting(beta2=0.95 * OFF),
    "eps": setting(eps=1e-8 * OFF),
    "weight decay": setting(weight_decay=0.1 * 1.01),
    "weight decay on norms": parameters(decay=True),
    "weight decay off": setting(weight_decay=0.0),
    "learning-rate multiplier": parameters(lr_scale=OFF),
    "clipping off": swap(reference_optim, "clip_by_global_norm", lambda right: lambda grads, limit: right(grads, 0.0)),
    "clipping per tensor": swap(
        reference_optim,
        "clip_by_global_norm",
        lambda right: lambda grads, limit: ({name: right({name: g}, limit)[0][name] for name, g in grads.items()}, 0.0),
    ),
    "clipping limit": swap(reference_optim, "clip_by_global_norm", lambda right: lambda grads, limit: right(grads, limit * OFF)),
    "no bias correction": counted(lambda count: 10**6),
    "step counted from 1": counted(lambda count: count + (count == 0)),
    "learning rate": swap(checks, "learning_rate", lambda right: lambda config, step: right(config, step) * OFF),
    "schedule one step late": swap(checks, "learning_rate", lambda right: lambda config, step: right(config, step + 1)),
}
MUON_MUTATIONS: dict[str, Patch] = {
    "momentum": setting(muon_momentum=0.95 * OFF),
    "one iteration less": setting(muon_steps=4),
    "no look ahead": setting(muon_nesterov=False),
    "first step counted twice": counted(lambda count: max(count, 1)),
    "moments of the rest": setting(beta2=0.95 * OFF),
    "weight decay": setting(weight_decay=0.1 * 1.01),
    "scale": swap(reference_optim, "MUON_RMS", lambda right: right * OFF),
    "scale by the rows": swap(reference_optim, "orthogonalized", scaled_by_the_rows),
    **{
        f"coefficient {'abc'[i]}": swap(
            reference_optim, "NEWTON_SCHULZ", lambda right, i=i: tuple(value * (OFF if i == j else 1) for j, value in enumerate(right))
        )
        for i in range(3)
    },
    "the embedding as a matrix": swap(
        reference_optim,
        "update",
        lambda right: (
            lambda config, specs, *rest: right(
                config, {**specs, "embed.weight": specs["embed.weight"]._replace(axes=("heads", "embed"))}, *rest
            )
        ),
    ),
}
LION_MUTATIONS: dict[str, Patch] = {
    "beta1": setting(beta1=0.9 * OFF),
    "beta2": setting(beta2=0.95 * OFF),
    "weight decay": setting(weight_decay=0.1 * 1.01),
    "sign of the new momentum": direction("lion", steps_along_the_new_momentum),
    "no sign": direction("lion", lambda right: lambda config, grad, kept, count: (grad, right(config, grad, kept, count)[1])),
}
OPTIMIZER_MUTATIONS = {
    f"{optimizer}: {name}": (optimizer, patch)
    for optimizer, patches in (("adamw", ADAMW_MUTATIONS), ("muon", MUON_MUTATIONS), ("lion", LION_MUTATIONS))
    for name, patch in patches.items()
}
OPTIMIZER_CHECKS = {
    name: on(demand_optimizer, dataclasses.replace(GQA, train=train_config(optimizer=name))) for name in reference_optim.DIRECTIONS
}


@pytest.mark.parametrize("mutation", OPTIMIZER_MUTATIONS)
def test_a_wrong_optimizer_is_caught(backend: str, mutation: str, monkeypatch: pytest.MonkeyPatch):
    optimizer, patch = OPTIMIZER_MUTATIONS[mutation]
    check = OPTIMIZER_CHECKS[optimizer]
    passes(check, backend)
    patch(monkeypatch)
    with pytest.raises(Mismatch):
        check(backend)


RUN_MUTATIONS = {
    "beta2": train_config(beta2=0.951),
    "weight decay": train_config(weight_decay=0.2),
    "clipping off": train_config(clip_norm=0.0),
    "clipping limit": train_config(clip_norm=0.5 * OFF),
    "learning rate": train_config(lr=3e-3 * OFF),
    "schedule": train_config(lr_schedule="linear"),
    "warm-up": train_config(warmup=5),
}


@pytest.mark.parametrize("mutation", RUN_MUTATIONS)
def test_a_20_step_run_with_another_setting_is_caught(both_backends, mutation: str):
    """The comparison of whole runs sees every setting: one backend runs with it changed."""
    other = subjects.train("mlx", GQA.model, RUN_MUTATIONS[mutation], GQA.start, GQA.batches)
    with pytest.raises(Mismatch):
        demand(checks.runs(other, rows.run("jax", GQA)))


def test_accumulation_that_weighs_parts_instead_of_tokens_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch):
    plain = subjects.loss_and_gradients

    def mean_of_means(name, model, train, params, batch):
        if train.grad_accum == 1:
            return plain(name, model, train, params, batch)
        inputs, targets = batch
        half = len(inputs) // 2
        parts = [np.where((np.arange(len(inputs)) < half)[:, None] == first, targets, -1) for first in (True, False)]
        (loss_a, a), (loss_b, b) = (plain(name, model, dataclasses.replace(train, grad_accum=1), params, (inputs, part)) for part in parts)
        return (loss_a + loss_b) / 2, {key: (a[key] + b[key]) / 2 for key in a}

    monkeypatch.setattr(subjects, "loss_and_gradients", mean_of_means)
    with pytest.raises(Mismatch):
        demand(checks.same_step(backend, GQA, grad_accum=2))


def test_one_gradient_off_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Each tensor's gradient a thousandth too large is named by the check, and no other."""
    plain, slope, slopes = subjects.loss_and_gradients, checks._slope, {}

    def remembered(case: Case, name: str, direction: np.ndarray, documents: np.ndarray | None) -> float:
        key = name, direction.tobytes()
        if key not in slopes:
            slopes[key] = slope(case, name, direction, documents)
        return slopes[key]

    monkeypatch.setattr(checks, "_slope", remembered)
    for wrong in TENSORS:

        def one_off(*args, wrong=wrong):
            value, grads = plain(*args)
            return value, {name: grad * np.float32(OFF if name == wrong else 1) for name, grad in grads.items()}

        monkeypatch.setattr(subjects, "loss_and_gradients", one_off)
        with pytest.raises(Mismatch, match=f"1 of {len(TENSORS)}[^\n]*\n[^\n]*gradient of {wrong}"):
            demand_gradient(backend)


def test_a_leak_from_the_future_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch):
    """A billionth of the next token's logits is enough, and so is any gradient."""
    logits, gradient = subjects.logits, subjects.hidden_gradient

    def leaking(*args):
        out = logits(*args)
        return out + 1e-6 * np.roll(out, -1, axis=1)

    with monkeypatch.context() as patch:
        patch.setattr(subjects, "logits", leaking)
        with pytest.raises(Mismatch, match="logits of the past"):
            checks.causality(backend, GQA, 3)
    monkeypatch.setattr(subjects, "hidden_gradient", lambda *args: gradient(*args) + np.float32(1e-30))
    with pytest.raises(Mismatch, match="gradient"):
        checks.causality(backend, GQA, 3)


def test_a_tree_with_another_name_shape_or_bit_is_caught(backend: str):
    params = GQA.params
    renamed = {name.replace("q_proj", "wq"): value for name, value in params.items()}
    transposed = {name: value.T if name.endswith("ffn.up_proj.weight") else value for name, value in params.items()}
    nudged = {name: np.nextafter(value, np.float32(9)) if name == "norm.weight" else value for name, value in params.items()}
    for wrong in (renamed, transposed, nudged):
        case = dataclasses.replace(GQA)
        case.__dict__["params"] = wrong
        side = subjects.backend(backend, GQA.model, GQA.train)
        if wrong is nudged:
            with pytest.raises(Mismatch):
                demand_equal_bits(side.save(side.init(wrong)).params, params)
        else:
            with pytest.raises(CheckpointError, match="not those of the model"):
                checks.tree(backend, case)


def test_a_nan_is_over_every_gate():
    with pytest.raises(Mismatch, match="nan"):
        demand([checks.Difference("logits", float("nan"), 1e9)])
