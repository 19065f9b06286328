"""Kernels and their plain twins: outputs, states and every gradient, on a CPU in the interpreter; on a GPU: test_kernels_gpu.py."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from tests.conformance import subjects
from tests.conformance.cases import CASES, train_config
from tests.conformance.compare import Difference, demand, relative_l2, tensors
from tests.conformance.conftest import FULL
from tests.conformance.gates import FLOAT32
from tests.conformance.kernel_twins import (
    AROUND,
    around,
    by_blocks,
    compare,
    compare_around,
    core,
    jax,
    jnp,
    outputs_and_gradients,
    scalar_arrays,
    wide,
)

WITH_KERNELS = [name for name, row in MIXERS.items() if row.training is Chunked]
SMALL = {
    "linear-groups-documents-odd": ("linear", {"chunk": 16, "segments": 1}, {"B": 1, "T": 37, "K": 8, "V": 9, "Q": 2}, True),
    "linear-segments": ("linear", {"chunk": 16, "segments": 2}, {"B": 1, "T": 50, "K": 8, "V": 8}, True),
    "ssm-segments-documents-odd": ("ssm", {"chunk": 16, "segments": 2, "parts": 2}, {"B": 1, "T": 37, "K": 8, "V": 9, "R": 3}, True),
    "gated-deltanet-halves-parts-odd": ("gated-deltanet", {"chunk": 32, "parts": 2}, {"B": 1, "T": 37, "K": 8, "V": 32}, True),
    "gated-deltanet-segments": (
        "gated-deltanet",
        {"chunk": 16, "parts": 1, "segments": 2, "chunks": 2},
        {"B": 1, "T": 50, "K": 8, "V": 32},
        True,
    ),
    "rwkv-segments-parts-odd": ("rwkv", {"chunk": 16, "parts": 2, "segments": 2}, {"B": 1, "T": 37, "K": 32, "V": 32}, True),
}


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.xdist_group(key)) for key in SMALL])
def test_a_kernel_is_its_twin_with_every_gradient(key: str):
    name, plan, shape, documents = SMALL[key]
    compare(name, plan, shape, documents, "float32", FLOAT32.one_op)


@pytest.mark.parametrize("shape", [{"K": 8, "V": 8, "R": 3}, {"K": 8, "V": 8}], ids=["shared-key", "own-key"])
def test_steps_and_skips_inside_of_the_kernel_are_those_outside(shape: dict[str, int]):
    """In two segments, with documents; the last two arguments are the steps and the skips."""
    from smedjan_jax.kernels.scalar_decay import scalar_decay
    from smedjan_jax.kernels.shared_keys import Plan, Scale
    from smedjan_jax.mixers import decay

    rng = np.random.default_rng(0)
    R = shape.get("R", 1)
    host = *scalar_arrays(rng, 1, 33, **shape), rng.uniform(0.5, 2, (1, 33, 2, R)), rng.standard_normal((2, R))
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in host)
    state = jnp.asarray(rng.standard_normal((1, 2, R, shape["K"], shape["V"])), jnp.float32)
    documents = jnp.asarray(np.cumsum(rng.random((1, 33)) < 0.1, axis=1), jnp.int32)

    def kernel(arrays: Any, state: Any, documents: Any) -> Any:
        return scalar_decay(*arrays[:4], state, documents, Plan(16, 2), Scale(*arrays[4:]))

    def twin(arrays: Any, state: Any, documents: Any) -> Any:
        query, key, value, log_decay, step, skip = arrays
        out, last = decay.scalar_decay(query, key, value * step[..., None], log_decay, 16, state, documents)
        return out + skip[:, None, :, None] * value[:, :, :, None], last

    got, want = (outputs_and_gradients(function, arrays, state, documents) for function in (kernel, twin))
    demand([Difference(what, relative_l2(got[what], value), FLOAT32.one_op) for what, value in want.items()])


@pytest.mark.parametrize("name", AROUND)
def test_a_kernel_around_a_core_is_its_twin_with_every_gradient(name: str):
    """Documents, a length that no tile divides, and features that fill no tile."""
    compare_around(around(name, rows=16), {"B": 2, "T": 37, "K": 24}, True, "float32", FLOAT32.one_op)


def test_the_kernel_over_key_blocks_is_attention_under_the_mask_with_every_gradient():
    """Two heads for each key, a last block that is short, and early queries that find fewer blocks than they may see."""
    got, want = (by_blocks(form, 2, 70, (4, 2), 16, 16, "float32") for form in ("pallas", "plain"))
    demand([Difference(f"array {i}", relative_l2(a, b), FLOAT32.one_op) for i, (a, b) in enumerate(zip(got, want, strict=True))])


def test_how_block_sparse_attends_is_chosen_by_length_and_said(monkeypatch: pytest.MonkeyPatch):
    kernels = subjects.module("jax", "kernels")
    model = ModelConfig.build(vocab_size=64, dim=64, layers=1, heads=2, mixer=("block-sparse",), block_size=16)
    assert kernels.for_blocks("auto", model, "bfloat16", 64) in ("gathered", "masked")  # a CPU, or a GPU
    monkeypatch.setattr(kernels, "_no_device", lambda: "")
    monkeypatch.setattr(kernels, "MEASURED", ("bfloat16", getattr(jax.devices()[0], "compute_capability", "")))
    short, long = kernels.LONGEST_MASKED, kernels.LONGEST_MASKED + 1
    assert kernels.blocks_summary("auto", model, "bfloat16", short) == "cuDNN with a mask for block-sparse"
    assert kernels.blocks_summary("auto", model, "bfloat16", long) == "pallas for block-sparse"
    assert kernels.for_blocks("reproducible", model, "bfloat16", short) == "pallas", "cuDNN's gradients differ from run to run"
    assert kernels.for_blocks("plain", model, "bfloat16", long) == "plain"
    odd = dataclasses.replace(model, block_size=24)
    assert kernels.for_blocks("auto", odd, "bfloat16", long) == "gathered", "tiles are powers of two"
    assert kernels.blocks_summary("auto", dataclasses.replace(model, mixer=("attention",)), "bfloat16", long) == ""


@pytest.mark.parametrize("vocabulary", [64, 300])
def test_the_loss_by_a_kernel_is_the_loss_with_every_gradient(vocabulary: int):
    from smedjan_jax.loss import cross_entropy, cross_entropy_by_kernel

    rng = np.random.default_rng(0)
    hidden, embed = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 11, 16), (vocabulary, 16)))
    targets = jnp.asarray(rng.integers(-1, vocabulary, (2, 11)), jnp.int32)
    for z_loss in (0.0, 1e-3):
        found = [
            jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *x, f=f: f(*x, targets, z_loss), (0, 1), has_aux=True))(hidden, embed))  # noqa: B023
            for f in (cross_entropy_by_kernel, cross_entropy)
        ]
        pairs = enumerate(zip(*found, strict=True))
        demand([Difference(f"leaf {i}", relative_l2(np.asarray(a), np.asarray(b)), FLOAT32.one_op) for i, (a, b) in pairs])


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_products_in_kernels_stay_on_tensor_cores_whatever_the_precision_of_float32_is(name: str, monkeypatch: pytest.MonkeyPatch):
    """A product that says nothing takes jax_default_matmul_precision, which runs ask to be exact: on a GPU that is tens of times slower."""
    it, rng = core(name), np.random.default_rng(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shape = {"B": 1, "T": 64, "K": 16, "V": 16}
    arrays = tuple(jnp.asarray(x, "float32" if i in wide(name) else "bfloat16") for i, x in enumerate(it.arrays(rng, **shape)))
    state = jnp.zeros(it.state(B=1, K=16, V=16))
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(jax.grad(lambda arrays: it.kernel(arrays, state, None)[0].astype(jnp.float32).sum()))(arrays)
    products = [eqn for eqn in inside_kernels(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert products
    slow = [eqn for eqn in products if eqn.params["precision"] in (None, (jax.lax.Precision.HIGHEST,) * 2)]
    assert not slow, slow[:2]


@pytest.mark.parametrize("name", ["exp", "rsqrt", "sigmoid", "silu"])
def test_functions_of_kernels_have_the_derivatives_of_what_they_stand_for(name: str):
    from smedjan_jax.kernels import special

    x = jnp.linspace(0.1, 5.0, 50) * (1 if name == "rsqrt" else jnp.resize(jnp.asarray([1.0, -1.0]), 50))
    twin = {"exp": jnp.exp, "rsqrt": jax.lax.rsqrt, "sigmoid": jax.nn.sigmoid, "silu": jax.nn.silu}[name]
    found, wanted = ([f(x), jax.vmap(jax.grad(f))(x)] for f in (getattr(special, name), twin))
    demand([Difference(what, relative_l2(a, b), 1e-6) for what, a, b in zip(("value", "slope"), found, wanted, strict=True)])


def test_each_product_of_a_copy_adds_to_those_before_it():
    """The product stands first in every sum: so XLA makes none of these a pass of its own."""
    from smedjan_jax.products import copies

    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.standard_normal((4, 8))), [jnp.asarray(rng.standard_normal((8, n))) for n in (3, 2, 5)]

    def loss(arrays: Any) -> jax.Array:
        return sum((jnp.sum(jax.lax.dot(x, w) ** 2) for x, w in zip(arrays, weights, strict=True)), jnp.zeros(()))

    def copied(x: jax.Array) -> jax.Array:
        return loss(copies(x, 3))

    equations = jax.make_jaxpr(jax.grad(copied))(x).eqns
    made = {out: eqn.primitive.name for eqn in equations for out in eqn.outvars}
    sums = [eqn for eqn in equations if eqn.primitive.name.startswith("add") and eqn.outvars[0].aval.shape == x.shape]
    assert [made[eqn.invars[0]] for eqn in sums] == ["dot_general"] * 2
    demand([Difference("gradient", relative_l2(jax.grad(copied)(x), sum(jax.grad(loss)([x] * 3))), 1e-6)])


def inside_kernels(jaxpr: Any, inside: bool = False) -> Iterator[Any]:
    """The equations of the kernels that a jaxpr calls."""
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inside_kernels(inner, inside or eqn.primitive.name == "pallas_call")


OWN_HEADS = ("gated-deltanet", "-own-heads")  # of which heads as the model has them are a part: those alone in the whole suite


@pytest.mark.parametrize(("mixer", "variant"), [*((mixer, "") for mixer in WITH_KERNELS if FULL or mixer != OWN_HEADS[0]), OWN_HEADS])
def test_a_model_with_kernels_has_the_loss_and_gradients_of_the_plain_one(mixer: str, variant: str, monkeypatch: pytest.MonkeyPatch):
    """Through the backend as a run takes them; here nothing stands in the way of the interpreter."""
    case = CASES[f"{mixer}-swiglu-mha{variant}"]
    model = dataclasses.replace(case.model, layers=1)
    params = {name: value for name, value in case.params.items() if name in subjects.tensor_names(model)}
    plain = subjects.loss_and_gradients("jax", model, train_config(kernels="plain"), params, case.batches[0], case.documents)
    monkeypatch.setattr(subjects.module("jax", "kernels"), "_obstacle", lambda *args: "")
    fast = subjects.loss_and_gradients("jax", model, train_config(kernels="pallas"), params, case.batches[0], case.documents)
    tolerance = MIXERS[mixer].tolerance.gradient
    demand([Difference("loss", abs(fast[0] / plain[0] - 1), FLOAT32.same_arithmetic), *tensors(fast[1], plain[1], tolerance)])


@pytest.mark.parametrize("mixer", WITH_KERNELS)
def test_a_prompt_through_the_kernels_leaves_the_state_of_the_plain_forms(mixer: str, monkeypatch: pytest.MonkeyPatch):
    from smedjan_jax.model import Model

    case = CASES[f"{mixer}-swiglu-mha"]
    model = dataclasses.replace(case.model, layers=1)
    params = {name: jnp.asarray(value) for name, value in case.params.items() if name in subjects.tensor_names(model)}
    kernels, module = subjects.module("jax", "kernels"), subjects.module("jax", f"mixers.{MIXERS[mixer].module}")
    monkeypatch.setattr(kernels, "_obstacle", lambda *args: "")
    monkeypatch.setattr(module, "SHORTEST", 2)
    tokens, found = jnp.asarray(case.tokens), {}
    for name in ("plain", "pallas"):
        built = Model(model, params, kernels=name)
        state = built.init_state(len(tokens), tokens.shape[1])
        logits, state = jax.jit(lambda t, s, built=built: built.step(t, s))(tokens, state)
        found[name] = {"logits": np.asarray(logits)} | {each: np.asarray(value) for each, value in state["layers"][0].items()}
    demand(tensors(found["pallas"], found["plain"], MIXERS[mixer].tolerance.forward))


def test_kernels_by_name_are_refused_where_they_cannot_run(backend: str):
    model = ModelConfig.build(vocab_size=64, dim=32, layers=2, heads=4, mixer=("linear", "attention"))
    if backend == "mlx" or jax.default_backend() != "gpu":
        with pytest.raises(ConfigError, match="--kernels pallas cannot run"):
            subjects.make_backend(backend, model, train_config(kernels="pallas"))
    assert subjects.make_backend(backend, model, train_config(kernels="auto")).describe().kernels in ("plain", "pallas")
    attention = dataclasses.replace(model, mixer=("attention",))
    assert subjects.make_backend(backend, attention, train_config(kernels="auto")).describe().kernels == ""


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_kernels_are_lowered_for_a_gpu_by_the_installed_jax(name: str, monkeypatch: pytest.MonkeyPatch):
    """No GPU is needed to see that this JAX still takes everything that the kernels are made of, for the usual sizes and the largest."""
    from jax import export

    it, rng = core(name), np.random.default_rng(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for size in (64, 128):
        shape = {"B": 1, "T": 70, "K": size, "V": 64 if name == "ssm" else size} | ({"R": 2} if name == "ssm" else {})
        arrays = tuple(jnp.asarray(x, "float32" if i in wide(name) else "bfloat16") for i, x in enumerate(it.arrays(rng, **shape)))
        state = jnp.zeros(it.state(**{key: value for key, value in shape.items() if key != "T"}))
        documents = jnp.zeros((1, 70), jnp.int32)

        def total(arrays: Any, state: Any, documents: Any) -> Any:
            return jax.grad(lambda arrays: it.kernel(arrays, state, documents)[0].astype(jnp.float32).sum())(arrays)

        allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
        exported = export.export(jax.jit(total), platforms=["cuda"], disabled_checks=allowed)(arrays, state, documents)
        assert "triton" in exported.mlir_module()
