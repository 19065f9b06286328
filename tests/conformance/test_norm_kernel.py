"""Norms that lie in the matrices which read them, and their kernel: loss and gradients of the plain form, and where they are taken."""

import dataclasses
import functools

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.params import initial_params
from tests.conformance import subjects
from tests.conformance.cases import train_config
from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2, tensors
from tests.conformance.gates import FLOAT32
from tests.conformance.models import SMALL

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

MODELS = {
    "attention": {"qk_norm": True, "attention_gate": True, "window": 5, "kv_heads": 2},
    "block-sparse": {"kv_heads": 2},
    "mla": {"mla_q_rank": 12, "residual_multiplier": 0.5, "tied_head": False},
    "linear": {"kv_heads": 2},
}
WITH_KERNELS = [name for name, row in MIXERS.items() if row.training is Chunked]


def _model(mixer: str, **changes: int) -> ModelConfig:
    """norm_eps is the suite's: at 1e-5 `linear` magnifies float32's rounding (models.py). In 16 draws of weights with documents the forms
    differed by 4e-14 in float64; in float32 either was up to 2.4e-5 from that, which roundings of the weights alone moved by 2.1e-5. At
    0.03 both were within 1.6e-6."""
    sizes = {"vocab_size": 67, "dim": 32, "heads": 4, "context_length": 16, "init_std": 0.1, "layers": 1}
    return ModelConfig.build(**{**sizes, "mixer": (mixer,), **SMALL.get(mixer, {}), **MODELS.get(mixer, {}), **changes})


def _params(model: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: (value * rng.uniform(0.5, 1.5, value.shape)).astype(np.float32) for name, value in initial_params(model, 0).items()}


@pytest.mark.parametrize("mixer", MODELS)
def test_a_model_with_folded_norms_has_the_loss_and_gradients_of_the_plain_one(mixer: str, monkeypatch: pytest.MonkeyPatch):
    """In parts of a batch, with documents; what is folded is a factor of its own in every norm. `linear` takes its kernels too."""
    model, rng = _model(mixer), np.random.default_rng(0)
    fast = "pallas" if mixer in WITH_KERNELS else "auto"
    params = _params(model, rng)
    tokens, documents = rng.integers(0, 67, (2, 16)).astype(np.int32), np.cumsum(rng.random((2, 15)) < 0.2, axis=1).astype(np.int32)
    batch, given, block = (tokens[:, :-1], tokens[:, 1:]), [], subjects.module("jax", "modules").Block
    folds, fold = [], block.fold
    monkeypatch.setattr(block, "fold", lambda self: folds.append(fold(self)))
    monkeypatch.setattr(subjects.module("jax", "model"), "for_norms", lambda _, train, devices: train.kernels != "plain")
    monkeypatch.setattr(subjects.module("jax", "kernels"), "_obstacle", lambda *args: "")
    for kernels in ("plain", fast):
        train = train_config(kernels=kernels, grad_accum=2, batch_size=2, seq_len=15)
        side = subjects.make_backend("jax", model, dataclasses.replace(train, optimizer="adamw", beta1=0.0, clip_norm=0.0))
        for _ in range(1 if kernels == "plain" else 2):
            state, metrics = side.train_step(side.init(params), *batch, lr=1e-3, documents=documents if MIXERS[mixer].documents else None)
            moments = side.save(state).optimizer
            given.append((side.read(metrics)["loss"], {each: np.asarray(moments[f"mu.{each}"]) for each in params}))
        assert bool(folds) == (kernels != "plain")
    (plain, wanted), (got, found), again = given
    gate = MIXERS[mixer].tolerance.gradient
    demand([Difference("loss", abs(plain - got) / plain, FLOAT32.loss), *tensors(found, wanted, gate, "gradient of ")])
    demand_equal_bits(again[1], found)


@pytest.mark.parametrize("mixer", [name for name in WITH_KERNELS if name not in MODELS])
def test_kernels_are_given_the_same_of_folded_norms(mixer: str, monkeypatch: pytest.MonkeyPatch):
    """What is projected for them, of a second layer (whose values rwkv blends), with documents, and the gradients of that."""
    from smedjan_jax.model import Model
    from smedjan_jax.modules import Context, Rope

    monkeypatch.setattr(subjects.module("jax", "kernels"), "_obstacle", lambda *args: "")
    model, rng = _model(mixer, layers=2), np.random.default_rng(0)
    params = {name: jnp.asarray(value) for name, value in _params(model, rng).items()}
    x, documents = jnp.asarray(rng.standard_normal((1, 15, 32)), jnp.float32), jnp.asarray([[0] * 4 + [1] * 11], jnp.int32)

    def projected(params, x, fold: bool):
        block = Model(model, params, kernels="pallas").layers[1]
        if fold:
            block.fold()
        _, read = block._read(block.mixer_norm, x)
        return block.mixer.project(read, Context(Rope(model, 15), None, documents, 4))

    def weighed(params, x, fold: bool):
        found = projected(params, x, fold)
        return sum(jnp.vdot(each, jnp.sin(jnp.arange(each.size)).reshape(each.shape)) for each in found), found

    def both(params, x):
        return [jax.grad(functools.partial(weighed, fold=fold), (0, 1), has_aux=True)(params, x) for fold in (False, True)]

    wanted, found = ([np.asarray(each) for each in jax.tree.leaves(side)] for side in jax.jit(both)(params, x))
    demand([Difference(f"array {i}", relative_l2(a, b), FLOAT32.one_op) for i, (a, b) in enumerate(zip(found, wanted, strict=True))])


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


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_names_what_reads_its_input(mixer: str):
    from smedjan_jax.model import Model

    model = ModelConfig.build(vocab_size=64, dim=64, layers=2, heads=4, mixer=(mixer,), ffn=("swiglu", "experts"), experts=2)
    params = {name: jnp.asarray(value) for name, value in initial_params(model, 0).items()}
    blocks = list(Model(model, params).layers)
    for block in blocks:
        block.fold()
    dense, routed = blocks
    assert all(norm.folded for norm in (dense.mixer_norm, dense.ffn_norm, routed.mixer_norm))
    assert not routed.ffn_norm.folded, "a router reads its input in float32"


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
