"""Experts: parameters, refusals, layouts of rows, grouped matmuls in every implementation, ties, bfloat16."""

import itertools
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.activations import Course
from smedjan_common.model.ffns import experts as experts_row
from smedjan_common.model.ffns.experts import block_rows, load_names, padded_rows
from smedjan_common.model.flops import active_params
from smedjan_common.model.params import initial_params, parameter_table
from smedjan_common.reference import experts as reference
from smedjan_common.reporting.metrics import routing
from smedjan_common.training.optimizers import OPTIMIZERS
from tests.conformance import subjects

SHAPE: dict[str, Any] = {"vocab_size": 64, "dim": 32, "layers": 2, "heads": 4, "ffn_dim": 64, "ffn": ("experts",)}


@pytest.fixture(params=subjects.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[request.param])
    return request.param


def model(**changes: object) -> ModelConfig:
    return ModelConfig.build(**{**SHAPE, "experts": 4, **changes})


# The row


def test_tensors_of_all_experts_stand_together():
    table = parameter_table(model(expert_dim=48, shared_experts=2, router="bias"))
    shapes = {name.removeprefix("layers.1.ffn."): spec.shape for name, spec in table.items() if name.startswith("layers.1.ffn.")}
    assert shapes == {
        "router.weight": (4, 32),
        "router.bias": (4,),
        "gate_proj.weight": (4, 48, 32),
        "up_proj.weight": (4, 48, 32),
        "down_proj.weight": (4, 32, 48),
        "shared.gate_proj.weight": (96, 32),
        "shared.up_proj.weight": (96, 32),
        "shared.down_proj.weight": (32, 96),
    }
    assert table["layers.0.ffn.down_proj.weight"].axes == ("experts", "embed", "ffn")
    bias = table["layers.0.ffn.router.bias"]
    assert not bias.decay
    assert bias.lr_scale == 0.0
    assert not initial_params(model(router="bias"), 0)["layers.0.ffn.router.bias"].any()


def test_a_token_meets_its_experts_the_shared_ones_and_the_router():
    config, dense = model(expert_dim=48, shared_experts=1), ModelConfig.build(**{**SHAPE, "ffn": ("swiglu",)})
    one = 3 * 32 * 48
    assert active_params(config) - active_params(dense) == 2 * (3 * one + 4 * 32 - 3 * 32 * 64)
    assert config.num_params() - active_params(config) == 2 * 2 * one


@pytest.mark.parametrize("platform", experts_row.MEASURED)
def test_activations_grow_with_the_experts_of_a_token_and_the_shared_ones_and_not_with_all(platform: str):
    def kept(**options: int) -> float:
        return experts_row.ROW.activations(model(**options), Course(platform, 64)).kept

    two = kept(experts=4, experts_per_token=2)
    assert kept(experts=5, experts_per_token=2) == two < kept(experts=5, experts_per_token=3)
    assert kept(experts=4, experts_per_token=2, shared_experts=1) > two


def test_only_layers_that_route_have_a_load():
    assert load_names(model(layers=4, ffn=("swiglu", "experts"))) == ["layers.1.ffn.load", "layers.3.ffn.load"]
    assert load_names(ModelConfig.build(**{**SHAPE, "ffn": ("swiglu",)})) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"experts": 0}, "--experts is 0"),
        ({"experts": 1}, "--experts is 1"),
        ({"experts_per_token": 5}, "--experts-per-token 5 of --experts 4"),
        ({"experts_per_token": 1}, "the router would learn nothing"),
        ({"shared_experts": -1}, "--shared-experts is -1"),
        ({"expert_dim": -8}, "--expert-dim is -8"),
        ({"router": "softmx"}, "softmax"),
        ({"expert_groups": 3}, "--experts 4 does not divide into --expert-groups 3"),
        ({"expert_groups": 2, "expert_groups_per_token": 3}, "--expert-groups-per-token 3 of --expert-groups 2"),
        ({"expert_groups": 4}, "--expert-groups-per-token 1 has only 1 experts"),
        ({"experts": 8, "expert_groups": 8, "expert_groups_per_token": 2, "router": "bias"}, "has one expert in each"),
        ({"norm_topk_prob": False, "experts_per_token": 0}, "--experts-per-token is 0"),
        ({"routed_scaling_factor": 0.0}, "--routed-scaling-factor is 0"),
    ],
)
def test_what_cannot_route_is_refused_with_the_fix(changes: dict, what: str):
    with pytest.raises(ConfigError, match=what) as caught:
        model(**changes)
    assert any(word in str(caught.value) for word in ("Take", "Leave", "Did you mean"))


def test_rows_of_metrics_have_loads_only_where_something_routes():
    assert routing({"loss": 1.0}) == {}
    told = routing({"loss": 1.0, "expert_load": [[0.123456789, 0.876543211]]})
    assert told == {"balance_loss": None, "router_z_loss": None, "expert_load": [[0.12346, 0.87654]]}


# Blocks of rows


def test_padded_rows_is_the_worst_case_and_no_more():
    for pairs, experts, block in itertools.product((1, 2, 5, 9), (1, 2, 3), (1, 2, 4)):
        splits = (counts for counts in itertools.product(range(pairs + 1), repeat=experts) if sum(counts) == pairs)
        assert padded_rows(pairs, experts, block) == max(sum(-(-count // block) * block for count in counts) for counts in splits)


def test_blocks_waste_little():
    for pairs, experts in itertools.product((1, 100, 4096, 10**6), (2, 8, 64)):
        block = block_rows(pairs, experts)
        assert block & (block - 1) == 0
        assert experts * (block - 1) <= pairs / 4


# Routing


@pytest.mark.parametrize("bias", [None, [0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
def test_equal_scores_go_to_the_lowest_index(backend: str, bias: list[float] | None):
    logits = np.array([[1, 1, 1, 1], [0, 2, 2, 2], [3, 0, 3, 0], [-1, 0, 0, -1]], np.float32)
    array, choose = subjects.framework(backend).array, subjects.module(backend, "experts").choose
    values, router = (None, "softmax") if bias is None else (np.array(bias, np.float32), "bias")
    chosen, weights = choose(model(router=router), array(logits), None if values is None else array(values))
    expected, expected_weights = reference.route(model(router=router), logits.astype(np.float64), values)
    assert np.array_equal(np.asarray(chosen), expected)
    assert np.abs(np.asarray(weights) - expected_weights).max() < 1e-6


def test_scores_that_vanish_have_weights_and_gradients(backend: str):
    """Sigmoids of -200 are zero in float32, and so is their sum."""
    array, choose = subjects.framework(backend).array, subjects.module(backend, "experts").choose
    logits, bias, config = array(np.full((3, 4), -200, np.float32)), array(np.zeros(4, np.float32)), model(router="bias")
    assert np.allclose(np.asarray(choose(config, logits, bias)[1]), 0.5)
    grad = subjects.framework(backend).grad(lambda values: choose(config, values, bias)[1].sum())(logits)
    assert np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("experts", [2, 5])
def test_every_pair_has_one_row_in_the_blocks_of_its_expert(backend: str, block: int, experts: int):
    rng = np.random.default_rng(block)
    chosen = np.stack([rng.permutation(experts)[:2] for _ in range(9)]).astype(np.int32)
    load = np.bincount(chosen.ravel(), minlength=experts)
    array, arrange = subjects.framework(backend).array, subjects.module(backend, "experts").arrange
    pair_R, row_NK, sizes_E = (np.asarray(part) for part in arrange(array(chosen), array(load.astype(np.int32)), block))
    assert np.array_equal(sizes_E, -(-load // block) * block)
    assert len(pair_R) == padded_rows(chosen.size, experts, block)
    assert np.array_equal(pair_R[row_NK.ravel()], np.arange(chosen.size)), "the row of a pair holds that pair"
    assert np.count_nonzero(pair_R < chosen.size) == chosen.size, "all other rows are empty"
    starts = np.cumsum(sizes_E) - sizes_E
    for expert in range(experts):
        rows = row_NK[chosen == expert]
        assert np.array_equal(rows, starts[expert] + np.arange(load[expert])), "in the order of the tokens, from the expert's first row"


# Grouped matmul


@pytest.mark.parametrize("sizes", [[4, 8, 0, 4], [0, 0, 16, 0], [8, 4, 4, 8], [0, 0, 0, 0]], ids=str)
def test_every_implementation_is_the_sum_written_out_and_has_its_gradients(backend: str, sizes: list[int]):
    rng, rows, block = np.random.default_rng(0), 24, 4
    x, weight = rng.standard_normal((rows, 6)).astype(np.float32), rng.standard_normal((4, 5, 6)).astype(np.float32)
    outer = rng.standard_normal((rows, 5)).astype(np.float32)
    x[sum(sizes) :], outer[sum(sizes) :] = 0, 0
    expert = np.repeat(np.arange(4), sizes)
    y, dx, dweight = np.zeros((rows, 5)), np.zeros_like(x), np.zeros_like(weight)
    for row, e in enumerate(expert):
        y[row], dx[row] = weight[e] @ x[row], weight[e].T @ outer[row]
        dweight[e] += np.outer(outer[row], x[row])
    module, frame = subjects.module(backend, "grouped_matmul"), subjects.framework(backend)
    counts, factor = frame.array(np.array(sizes, np.int32)), frame.array(outer)
    for name in module.IMPLEMENTATIONS:
        size = 1 if name in module.UNBLOCKED else block

        def product(values: Any, name: str = name, size: int = size) -> Any:
            return module.grouped_matmul(values["x"], values["weight"], counts, size, name)

        values = subjects.on_device(backend, {"x": x, "weight": weight})
        grads = frame.grad(lambda values, product=product: (product(values) * factor).sum())(values)
        for got, want in ((product(values), y), (grads["x"], dx), (grads["weight"], dweight)):
            assert np.abs(np.asarray(got) - want).max() < 1e-5, name


def test_the_default_implementation_is_one_of_the_table(backend: str):
    module = subjects.module(backend, "grouped_matmul")
    assert module.preferred_implementation() in module.IMPLEMENTATIONS
    array = subjects.framework(backend).array(np.zeros((2, 2), np.float32))
    with pytest.raises(KeyError):
        module.grouped_matmul(array, array[None], array, 1, "fastest")


# bfloat16


def test_bfloat16_keeps_the_router_in_float32_and_is_near_float32():
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")
    config = model(expert_dim=48, shared_experts=1, init_std=0.15)
    params = subjects.on_device("jax", initial_params(config, 1))
    build = subjects.module("jax", "experts").Experts
    project = jax.jit(lambda params, x: build(config, params, "layers.0.ffn").project(x))  # one compilation, not one for each operation
    layer = jax.jit(lambda params, x: build(config, params, "layers.0.ffn")(x, {}))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 32)), jnp.bfloat16)
    logits, gate, *_ = project(params, x)
    assert (logits.dtype, gate.dtype) == (jnp.float32, jnp.bfloat16)
    (low, carried), (high, _) = layer(params, x), layer(params, x.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16
    assert {value.dtype for value in carried.values()} == {jnp.dtype("float32")}
    assert float(jnp.abs(low.astype(jnp.float32) - high).max() / jnp.abs(high).max()) < 2e-2


def test_training_in_bfloat16_is_finite_and_moves_the_bias():
    pytest.importorskip("jax")
    config = model(router="bias", layers=1)
    train = TrainConfig(steps=2, batch_size=2, seq_len=8, lr=1e-3, dtype="bfloat16")
    side, tokens = subjects.make_backend("jax", config, train), np.arange(16, dtype=np.int32).reshape(2, 8)
    state, metrics = side.train_step(side.init(initial_params(config, 0)), tokens, tokens, lr=1e-3)
    assert np.isfinite([side.read(metrics)["loss"], side.read(metrics)["grad_norm"]]).all()
    biases = side.save(state).params["layers.0.ffn.router.bias"]
    load = np.array(side.read(metrics)["expert_load"][0])
    assert np.allclose(biases, 1e-3 * np.sign(0.25 - load))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_the_bias(backend: str, optimizer: str):
    """Its rate is zero: it stays to the bit whatever gradients, decay and momenta do with the rest."""
    config = model(router="bias", layers=1)
    start = initial_params(config, 0)
    start["layers.0.ffn.router.bias"] = start["layers.0.ffn.router.bias"] + np.float32(0.25)
    rng = np.random.default_rng(0)
    grads = [{name: rng.standard_normal(value.shape).astype(np.float32) for name, value in start.items()} for _ in range(2)]
    train = TrainConfig(steps=3, batch_size=2, seq_len=8, lr=1e-2, weight_decay=0.1, optimizer=optimizer)
    after = subjects.optimizer_run(backend, config, train, start, grads).params
    assert np.array_equal(after["layers.0.ffn.router.bias"], start["layers.0.ffn.router.bias"])
    assert not np.array_equal(after["layers.0.ffn.router.weight"], start["layers.0.ffn.router.weight"])
