"""The kernels of float8: the bits of the plain form, SwiGLU by them beside the same without, and where they are taken."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.params import initial_params
from tests.conformance.cases import train_config
from tests.conformance.compare import Difference, demand, relative_l2
from tests.conformance.gates import FLOAT32

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

FORMATS = "float8_e4m3fn", "float8_e5m2"
SIDES = (48, 16), (64, 320)  # tiles of 16 x 16, and several along a side
SIZES = 1.0, 3e4, 1e-25, 1e37, 1e-42, 0.0


def same_bits(a: Any, b: Any) -> bool:
    """What is no number has many bits."""
    a, b = np.asarray(a), np.asarray(b)
    bits = [each.view(f"uint{8 * each.dtype.itemsize}") for each in (a, b)]
    return a.shape == b.shape and bool(((bits[0] == bits[1]) | (np.isnan(a) & np.isnan(b))).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("to", FORMATS)
def test_the_numbers_of_the_kernels_are_those_of_the_plain_form(to: str, dtype: str):
    """Both ways, and the scale; of float32 as rounded to bfloat16 first."""
    from smedjan_jax.products import numbers

    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(SIDES[i % 2]) * size, jnp.float32).astype(dtype) for i, size in enumerate(SIZES)]
    arrays += [arrays[i % 2].at[3, 5].set(bad) for i, bad in enumerate((np.inf, -np.inf, np.nan))]
    for x in arrays:
        plain, kernel = (numbers(x, getattr(jnp, to), form, jnp.bfloat16) for form in ("plain", "pallas"))
        for name, a, b in zip(plain._fields, plain, kernel, strict=True):
            assert same_bits(a, b), (x.shape, float(jnp.max(x)), name)
    assert numbers(x, getattr(jnp, to), "pallas", turned=False).turned is None


def test_a_linear_map_by_the_kernels_has_the_bits_of_the_plain_one():
    from smedjan_jax.products import linear

    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((2, 32, width)), jnp.bfloat16) for width in (128, 192))
    weights = [jnp.asarray(0.02 * rng.standard_normal((rows, 128)), jnp.float32) for rows in (64, 128)]
    for some, gradient in ((weights, dy), (weights[1:], dy[..., :128])):
        plain, kernel = (
            _with_gradients(lambda x, w, form=form: linear(x, list(w), form), gradient, x, tuple(some)) for form in ("plain", "pallas")
        )
        assert all(map(same_bits, plain, kernel))


def test_sides_that_no_tile_divides_and_matrices_too_large_for_pallas_take_the_plain_form():
    from smedjan_jax.float8 import fitting

    assert fitting("pallas", (128, 64)) == "pallas"
    for shape in ((128, 48), (80, 64), (1 << 20, 4096)):
        assert fitting("pallas", (64, 64), shape) == fitting("plain", shape) == "plain"
        assert fitting("", shape) == ""


def test_swiglu_by_kernels_is_swiglu_of_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    """Beside itself with what the kernels make made outside of them: the same formulas, rounded at the same places."""
    from smedjan_jax import swiglu
    from smedjan_jax.kernels import float8 as kernels
    from smedjan_jax.products import numbers

    def outside(made, inputs, to, dtype, turned=True):
        width = inputs[-1].shape[1] // (made.begins[-1] + 1)
        parts = made.make(*(x[:, begin * width : (begin + 1) * width] for x, begin in zip(inputs, made.begins, strict=True)))
        return numbers(jnp.concatenate([part.astype(dtype) for part in parts], axis=1), to, "plain", turned=turned)

    def given() -> list[Any]:
        return _with_gradients(lambda x, gate, up, down: swiglu.swiglu_by_kernels(x, (gate, up), down), dy, *arrays)

    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((2, 64, 128)), jnp.bfloat16) for _ in range(2))
    arrays = x, *(jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for shape in ((192, 128), (192, 128), (128, 192)))
    found = given()
    monkeypatch.setattr(kernels, "numbers", outside)
    wanted = given()
    demand([Difference(f"array {i}", relative_l2(a, b), FLOAT32.one_op) for i, (a, b) in enumerate(zip(found, wanted, strict=True))])


def test_the_formulas_of_swiglu_are_those_of_autodiff():
    from smedjan_jax.ffn import swiglu
    from smedjan_jax.kernels.float8 import SWIGLU, SWIGLU_BACK

    gate, up, dh = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((3, 16, 32)))
    h, pull = jax.vjp(swiglu, gate, up)
    found = *SWIGLU.make(gate, up), *SWIGLU_BACK.make(gate, up, dh)
    names = "h", "d gate", "d up"
    demand(
        [
            Difference(name, relative_l2(np.asarray(a), np.asarray(b)), FLOAT32.one_op)
            for name, a, b in zip(names, found, (h, *pull(dh)), strict=True)
        ]
    )


def test_the_device_is_asked_with_both_forms():
    from smedjan_jax import held

    feed = ModelConfig.build(vocab_size=64, layers=1, dim=64, heads=1, ffn_dim=64, context_length=16)
    assert held._compare(held.FLOAT8, feed, "bfloat16") == ""


def test_a_training_step_takes_them_where_it_may(monkeypatch: pytest.MonkeyPatch):
    """And has the loss of the plain form but for SwiGLU's roundings."""
    from smedjan_jax import model as models
    from smedjan_jax import swiglu
    from smedjan_jax.backend import JaxBackend

    model = ModelConfig.build(vocab_size=97, context_length=64, dim=128, layers=1, heads=2, ffn_dim=192, mixer=("attention",))
    train = train_config(dtype="float8", batch_size=2, seq_len=32)
    tokens, calls, losses = np.random.default_rng(0).integers(0, 97, (2, 33)).astype(np.int32), [], []
    monkeypatch.setattr(swiglu, "fits", lambda x, gate: calls.append(x.shape) or True)
    for taken in (False, True):
        monkeypatch.setattr(models, "for_float8", lambda train, devices, taken=taken: taken)
        backend = JaxBackend(model, train)
        _, metrics = backend.train_step(backend.init(initial_params(model, 0)), tokens[:, :-1], tokens[:, 1:], 1e-3)
        losses.append((backend.read(metrics)["loss"], backend.read(metrics)["grad_norm"]))
        assert bool(calls) == taken
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)


def test_the_kernels_are_lowered_for_a_gpu_by_the_installed_jax(monkeypatch: pytest.MonkeyPatch):
    from jax import export

    from smedjan_jax.swiglu import swiglu_by_kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def gradient(x, gate, up, down):
        return jax.grad(lambda *all: swiglu_by_kernels(all[0], all[1:3], all[3]).astype(jnp.float32).sum(), range(4))(x, gate, up, down)

    allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    shapes = [
        jax.ShapeDtypeStruct((192, 128), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((320, 128), (320, 128), (128, 320))),
    ]
    assert "triton" in export.export(jax.jit(gradient), platforms=["cuda"], disabled_checks=allowed)(*shapes).mlir_module()


def test_where_they_are_taken(monkeypatch: pytest.MonkeyPatch):
    from smedjan_jax import kernels

    train = train_config(dtype="float8")
    assert not kernels.for_float8(train), "there is no GPU"
    monkeypatch.setattr(kernels, "_no_device", lambda: "")
    monkeypatch.setattr(jax, "devices", lambda *_: [type("Device", (), {"compute_capability": "9.0"})()])
    assert kernels.for_float8(train)
    assert not kernels.for_float8(train, devices=2)
    for change in ({"kernels": "plain"}, {"dtype": "bfloat16"}):
        assert not kernels.for_float8(dataclasses.replace(train, **change)), change
    monkeypatch.setattr(kernels, "REFUSED", {"float8"})
    assert not kernels.for_float8(train)


def _with_gradients(function: Any, dy: Any, *arrays: Any) -> list[np.ndarray]:
    """What it gives and every gradient."""
    y, pull = jax.vjp(function, *arrays)
    return [np.asarray(each, np.float32) for each in jax.tree.leaves((y, pull(dy)))]
