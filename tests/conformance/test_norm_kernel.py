"""Norms that lie in the matrices which read them, and their kernel: loss and gradients of the plain form, and where they are taken."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from tests.conformance import subjects
from tests.conformance.cases import train_config
from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2, tensors
from tests.conformance.gates import FLOAT32

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

MODELS = {
    "of attention alone": {"layers": 1, "qk_norm": True, "attention_gate": True, "window": 5},
    "of several mixers": {"layers": 2, "mixer": ("attention", "mla"), "residual_multiplier": 0.5, "tied_head": False},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_folded_norms_has_the_loss_and_gradients_of_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch):
    """In parts of a batch, with documents; what is folded is a factor of its own in every norm."""
    sizes = {"vocab_size": 67, "dim": 32, "heads": 4, "kv_heads": 2, "context_length": 16, "init_std": 0.1}
    model, rng = ModelConfig.build(**sizes, **MODELS[name]), np.random.default_rng(0)
    params = {name: (value * rng.uniform(0.5, 1.5, value.shape)).astype(np.float32) for name, value in initial_params(model, 0).items()}
    tokens, documents = rng.integers(0, 67, (4, 16)).astype(np.int32), np.cumsum(rng.random((4, 15)) < 0.2, axis=1).astype(np.int32)
    batch, given, block = (tokens[:, :-1], tokens[:, 1:]), [], subjects.module("jax", "modules").Block
    folds, fold = [], block.fold
    monkeypatch.setattr(block, "fold", lambda self: folds.append(fold(self)))
    monkeypatch.setattr(subjects.module("jax", "model"), "for_norms", lambda _, train, devices: train.kernels == "auto")
    for kernels in ("plain", "auto"):
        train = train_config(kernels=kernels, grad_accum=2, batch_size=4, seq_len=15)
        side = subjects.make_backend("jax", model, dataclasses.replace(train, optimizer="adamw", beta1=0.0, clip_norm=0.0))
        for _ in range(1 if kernels == "plain" else 2):
            state, metrics = side.train_step(side.init(params), *batch, lr=1e-3, documents=documents)
            moments = side.save(state).optimizer
            given.append((side.read(metrics)["loss"], {each: np.asarray(moments[f"mu.{each}"]) for each in params}))
        assert bool(folds) == (kernels == "auto")
    (plain, wanted), (fast, found), again = given
    gate = max(MIXERS[mixer].tolerance.gradient for mixer in model.mixer)
    demand([Difference("loss", abs(plain - fast) / plain, FLOAT32.loss), *tensors(found, wanted, gate, "gradient of ")])
    demand_equal_bits(again[1], found)


@pytest.mark.parametrize("shape", [(2, 7, 64), (3, 128)])
def test_the_kernel_is_its_formula_in_bfloat16(shape: tuple[int, ...]):
    from smedjan_jax.kernels.norm import normalized

    def plain(x, _):
        return x, x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)

    rng = np.random.default_rng(0)
    x, *weights = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(3))
    found, wanted = [], []
    for form, dtype, to in ((normalized, jnp.bfloat16, found), (plain, jnp.float32, wanted)):
        out, pull = jax.vjp(lambda x, form=form: form(x, 1e-5), x.astype(dtype))
        to += [np.asarray(each, np.float32) for each in (*out, *pull(tuple(w.astype(dtype) for w in weights)))]
    demand([Difference(f"array {i}", relative_l2(a, b), 5e-3) for i, (a, b) in enumerate(zip(found, wanted, strict=True))])


def test_the_kernels_are_lowered_for_a_gpu_by_the_installed_jax(monkeypatch: pytest.MonkeyPatch):
    from jax import export

    from smedjan_jax.kernels import NORMED
    from smedjan_jax.kernels.norm import normalized

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def gradient(x):
        return jax.grad(lambda x: sum(each.astype(jnp.float32).sum() for each in normalized(x, 1e-6)))(x)

    allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    for width in NORMED["bfloat16"]:
        x = jax.ShapeDtypeStruct((3, 40, width), jnp.bfloat16)
        assert "triton" in export.export(jax.jit(gradient), platforms=["cuda"], disabled_checks=allowed)(x).mlir_module()


def test_where_norms_are_folded(monkeypatch: pytest.MonkeyPatch):
    from smedjan_jax import kernels

    model, train = ModelConfig.build(vocab_size=97, dim=512, layers=2, heads=8), train_config(dtype="bfloat16")
    assert not kernels.for_norms(model, train), "there is no GPU"
    monkeypatch.setattr(kernels, "_no_device", lambda: "")
    monkeypatch.setattr(jax, "devices", lambda *_: [type("Device", (), {"compute_capability": "9.0"})()])
    assert kernels.for_norms(model, train)
    assert not kernels.for_norms(model, train, devices=2)
    assert not kernels.for_norms(dataclasses.replace(model, dim=768, head_size=64), train)
    assert not kernels.for_norms(dataclasses.replace(model, norms="sandwich"), train)
    for change in (
        {"kernels": "plain"},
        {"dtype": "float32"},
        {"gradient_checkpointing": "dots"},
        {"lora_rank": 4},
    ):
        assert not kernels.for_norms(model, dataclasses.replace(train, **change)), change
