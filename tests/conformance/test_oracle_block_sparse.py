"""The outside: block-sparse is ordinary attention under a mask that is built here from its definition (torch, float64), weights alike.

Output and every gradient, of the mask form and of the gathered one, for lengths that no block divides. With every block chosen it is
the mixer attention. And what the inputs of these tests and of the suite need: no choice is close to a tie.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.reference import block_sparse as reference
from tests.conformance import one_mixer, subjects
from tests.conformance.cases import CASES, Case
from tests.conformance.compare import Difference, Mismatch, demand, demand_equal_bits, largest, tensors
from tests.conformance.gates import FLOAT32
from tests.conformance.untied import ENOUGH, margin

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

FORMS: dict[str, tuple[dict[str, Any], int, int]] = {  # options, batch, length
    "every head chooses": ({"block_size": 4, "block_topk": 2}, 2, 33),
    "groups choose": ({"block_size": 8, "block_topk": 3, "kv_heads": 2}, 2, 61),
    "one group, normed": ({"block_size": 5, "block_topk": 3, "kv_heads": 1, "qk_norm": True}, 1, 40),
    "own block only": ({"block_size": 8, "block_topk": 1}, 2, 29),
    "shorter than a block": ({"block_size": 16, "block_topk": 4}, 2, 7),
    "one token": ({"block_size": 4, "block_topk": 2}, 3, 1),
    "blocks of one": ({"block_size": 1, "block_topk": 5, "kv_heads": 2}, 1, 24),
}
IMPLEMENTATIONS = ("plain", "auto")
CHOOSING = [pytest.param(case, id=key) for key, case in CASES.items() if "block-sparse" in case.model.mixer]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[ModelConfig, np.ndarray]:
    """A model and an input under which no choice is close: float32 errs by 1e-6 of a score."""
    options, batch, length = FORMS[request.param]
    model = one_mixer.config("block-sparse", **options)
    inputs = (one_mixer.normal(model, batch, length, seed) for seed in range(50))
    return model, next(x for x in inputs if nearest(model, x) > 1e-4)


def nearest(model: ModelConfig, x: np.ndarray) -> float:
    """The smallest distance between the last chosen and the first not chosen block, over the standard deviation of the scores."""
    carried: dict[str, Any] = {}
    reference.forward(model, {n: v.astype(np.float64) for n, v in one_mixer.tensors(model).items()}, x.astype(np.float64), carried)
    scores, others, gaps = carried["block_scores"][0], model.block_topk - 1, [np.inf]
    for position in range((others + 1) * model.block_size, x.shape[1] if others else 0):
        ranked = np.sort(scores[:, :, position, : position // model.block_size])
        gaps.append(float((ranked[..., -others] - ranked[..., -others - 1]).min() / scores.std()))
    return min(gaps)


def oracle(model: ModelConfig, params: dict[str, Any], x: Any) -> Any:
    """The mixer in torch, one query at a time, as the paper writes it."""
    (B, T, _), K, S = x.shape, model.head_dim, model.block_size
    query, key, value = ((x @ params[f"{n}_proj.weight"].T).reshape(B, T, -1, K) for n in "qkv")
    if model.qk_norm:
        query, key = (
            torch.nn.functional.rms_norm(h, (K,), params[f"{n}_norm.weight"], model.norm_eps) for n, h in (("q", query), ("k", key))
        )
    query, key, serves = turn(model, query), turn(model, key), model.heads // model.kv_heads
    out = torch.zeros_like(query)
    for b, t, group in np.ndindex(B, T, model.kv_heads):
        heads = slice(group * serves, (group + 1) * serves)
        means = [key[b, j * S : (j + 1) * S, group].mean(0) for j in range(t // S)]
        scores = torch.stack([(query[b, t, heads] @ mean).sum() for mean in means]) if means else torch.zeros(0)
        chosen = [*scores.topk(min(model.block_topk - 1, len(means))).indices.tolist(), t // S]
        seen = [s for j in chosen for s in range(j * S, min((j + 1) * S, t + 1))]
        weights = torch.softmax(query[b, t, heads] @ key[b, seen, group].T / K**0.5, dim=-1)
        out[b, t, heads] = weights @ value[b, seen, group]
    return out.reshape(B, T, -1) @ params["o_proj.weight"].T


def turn(model: ModelConfig, x: Any) -> Any:
    """RoPE of heads [B, T, H, K], written with complex numbers."""
    frequencies = model.rope_base ** (-torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_output_and_every_gradient_equal_torch(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    host, outer = one_mixer.tensors(model), one_mixer.normal(model, *x.shape[:2], seed=99)
    params = {name: torch.tensor(value).double().requires_grad_() for name, value in host.items()}
    leaf = torch.tensor(x).double().requires_grad_()
    expected = oracle(model, params, leaf)
    (expected * torch.tensor(outer)).sum().backward()
    slopes = {name: np.zeros(v.shape) if v.grad is None else v.grad.numpy() for name, v in (*params.items(), ("x", leaf))}
    slopes = {name: value for name, value in slopes.items() if np.abs(value).max() > 1e-12}  # one token: nothing is weighed
    demand([Difference("definition", largest(one_mixer.reference_output(model, host, x), expected.detach().numpy()), 1e-12)])
    for how in IMPLEMENTATIONS:
        got = one_mixer.output(backend, model, host, x, how)
        grads = one_mixer.gradients(backend, model, host, x, outer, how)
        demand([Difference(f"{how} output", largest(got, expected.detach().numpy()), FLOAT32.oracle)])
        demand(tensors({name: grads[name] for name in slopes}, slopes, FLOAT32.oracle, f"{how} gradient of "))


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_with_every_block_chosen_it_is_attention(backend: str, how: str):
    model = one_mixer.config("block-sparse", block_size=4, block_topk=9, kv_heads=2)
    full, params, x = dataclasses.replace(model, mixer=("attention",)), one_mixer.tensors(model), one_mixer.normal(model, 2, 33)
    sides = [one_mixer.output(backend, side, params, x, how) for side in (model, full)]
    demand([Difference("output", largest(*sides), FLOAT32.one_op)])
    slopes = [one_mixer.gradients(backend, side, params, x, one_mixer.normal(model, 2, 33, 1), how) for side in (model, full)]
    demand(tensors(*slopes, FLOAT32.oracle, "gradient of "))


def test_parts_of_any_size_give_the_same(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Choices and tiles are computed some at once, to bound memory; here one at a time, two, and all."""
    model = one_mixer.config("block-sparse", block_size=4, block_topk=3, kv_heads=2)
    params, x = one_mixer.tensors(model), one_mixer.normal(model, 2, 41)
    module, values = subjects.module(backend, "mixers.block_sparse"), []
    for at_once in (1, 2 * 4 * 4 * 2, 1 << 24):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
        values.append(one_mixer.output(backend, model, params, x, "auto"))
    demand(Difference("output", largest(value, values[-1]), FLOAT32.one_op) for value in values[:-1])


def test_ties_go_to_the_lowest_block(backend: str):
    """Keys that are all the same: every earlier block scores alike, and the first ones are chosen."""
    module, array = subjects.module(backend, "mixers.block_sparse"), subjects.framework(backend).array
    query, mean = np.ones((1, 6, 1, 4) if backend == "jax" else (1, 1, 6, 4), np.float32), np.ones((1, 1, 6, 4), np.float32)
    chosen = np.asarray(module.choose(array(query), array(mean), array(np.arange(6, dtype=np.int32)), 4))[0, 0]
    expected = np.array([[6, 6, 6], [0, 6, 6], [0, 1, 6], [0, 1, 2], [0, 1, 2], [0, 1, 2]])
    demand_equal_bits({"chosen": np.sort(chosen).astype(np.int64)}, {"chosen": expected})


@pytest.mark.parametrize("choosing", CHOOSING)
def test_choices_of_the_suite_are_far_from_ties(choosing: Case):
    for values in (choosing.params, choosing.start):
        assert margin(choosing.model, values, choosing.tokens) > ENOUGH


@pytest.mark.parametrize("changed", ["block_size", "block_topk", "k_proj.weight"])
def test_a_mixer_that_is_off_is_caught_by_the_oracle(backend: str, changed: str):
    options, batch, length = FORMS["groups choose"]
    model = one_mixer.config("block-sparse", **options)
    params, wrong, x = one_mixer.tensors(model), model, one_mixer.normal(model, batch, length)
    off = {name: value * np.float32(1.001 if name == changed else 1) for name, value in params.items()}
    if changed not in params:
        wrong = dataclasses.replace(model, **{changed: getattr(model, changed) + 1})
    expected = oracle(model, {name: torch.tensor(value).double() for name, value in params.items()}, torch.tensor(x).double()).numpy()
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(one_mixer.output(backend, wrong, off, x), expected), FLOAT32.oracle)])
