"""Kernels are taken by `auto` after the device gave the same with both forms: the comparison, its memory, what is said otherwise."""

import dataclasses
import os
import warnings

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import gated_deltanet

held = pytest.importorskip("smedjan_jax.held", reason="jax is not installed")
kernels = pytest.importorskip("smedjan_jax.kernels")

FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
MODEL = ModelConfig.build(vocab_size=300, dim=512, layers=4, heads=8, kv_heads=2, mixer=("linear", "attention"))


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "REFUSED", set())
    monkeypatch.setattr(kernels, "chosen", lambda mixer, *rest: "pallas" if mixer == "linear" else "plain")
    held._reason.cache_clear()


def layers(monkeypatch: pytest.MonkeyPatch, off: float) -> list[tuple[str, str]]:
    """A device whose bfloat16 is 1e-3 off, and whose kernels are `off`; gives what was computed."""
    asked = []
    right = np.ones(8, np.float32)

    def layer(mixer: str, model: ModelConfig, dtype: str, form: str) -> dict[str, np.ndarray]:
        asked.append((dtype, form))
        if form == "kernel" and off == np.inf:
            raise RuntimeError("out of shared memory\nand more")
        return {"the output": right * np.float32(1 + (0 if dtype == "float32" else off if form == "kernel" else 1e-3))}

    monkeypatch.setattr(held, "_layers", layer)
    return asked


def told(dtype: str = "bfloat16") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        held.ask(MODEL, dtype, 1024)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("off", [1e-3, 3e-3])
def test_kernels_as_near_as_the_plain_form_are_taken_and_the_answer_is_kept(off: float, monkeypatch: pytest.MonkeyPatch):
    asked = layers(monkeypatch, off)
    assert told() == []
    assert set() == kernels.REFUSED
    assert asked == [("float32", "plain"), ("bfloat16", "plain"), ("bfloat16", "kernel")]
    held._reason.cache_clear()  # another process
    assert told() == []
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("off", "why"), [(1e-2, "the output differs by 1.0e-02"), (np.nan, "differs by nan"), (np.inf, "they fail (out of")]
)
def test_kernels_that_differ_or_fail_are_not_taken_and_it_is_said_each_time(off: float, why: str, monkeypatch: pytest.MonkeyPatch):
    layers(monkeypatch, off)
    for _ in range(2):
        [said] = told()
        assert "the kernels of linear are not taken on this device" in said
        assert why in said
        assert {"linear"} == kernels.REFUSED
        held._reason.cache_clear()


def test_a_damaged_memory_is_none(tmp_path, monkeypatch: pytest.MonkeyPatch):
    asked = layers(monkeypatch, 0)
    (tmp_path / "smedjan").mkdir()
    (tmp_path / "smedjan/kernels.json").write_text('{"x": 5')
    assert told() == []
    assert len(asked) == 3


@pytest.mark.parametrize("name", ["kernels/rows.py", "mixers/rwkv.py", "float8.py"])
def test_another_source_of_what_kernels_compute_is_asked_anew(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(held, "FOLDER", tmp_path)
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    keys = set()
    for text in ("1", "2"):
        source.write_text(text)
        keys.add(held._key(MODEL, "bfloat16"))
    assert len(keys) == 2


def test_float8_is_asked_with_the_tiles_that_models_of_usual_sizes_take(monkeypatch: pytest.MonkeyPatch):
    from smedjan_jax.kernels.float8 import PLANS

    asked = []
    monkeypatch.setattr(held, "_compare", lambda mixer, model, dtype: asked.append(model) or "they differ")
    with pytest.warns(match="the kernels of float8 are not taken on this device: they differ"):
        held.float8("bfloat16")
    assert {held.FLOAT8} == kernels.REFUSED
    [model] = asked
    assert all(side % plan.columns == 0 for plans in PLANS.values() for plan in plans for side in (model.dim, model.ffn_dim))


def test_the_layer_has_the_heads_and_states_of_the_model_and_both_forms_compute_it():
    """On a CPU the plain form stands on both sides: the layer itself, its documents and gradients work for every mixer."""
    for mixer, more in {"linear": {}, "ssm": {"ssm_head_dim": 64}, "rwkv": {}, "gated-deltanet": {}, "block-sparse": {}}.items():
        model = dataclasses.replace(MODEL, mixer=(mixer,), kv_heads=8, **more)
        small = held.small(mixer, model)
        assert small.head_dim == model.head_dim
        small.validate()
    small = held.small("gated-deltanet", dataclasses.replace(MODEL, mixer=("gated-deltanet",)))
    assert gated_deltanet.heads(small) == (2, 4, MODEL.head_dim, MODEL.head_dim), "grouped as the model is"


@pytest.mark.parametrize("mixer", ["gated-deltanet", "rwkv"])
def test_nothing_of_the_layer_is_compared_as_zeros(mixer: str):
    """RWKV-7 begins with matrices of zeros, behind which every gradient is zero in whatever form."""
    small = held.small(mixer, dataclasses.replace(MODEL, mixer=(mixer,), kv_heads=8 if mixer == "rwkv" else 2))
    found = held._layers(mixer, small, "float32", "plain")
    assert len(found["the output"]) == held.DRAWS
    for name, value in found.items():
        assert np.isfinite(value).all(), name
        assert all(draw.any() for draw in value) or "embed" in name, name


def test_a_step_of_decoding_is_compared_in_both_forms():
    """On a CPU the kernel is interpreted: it is the plain form, and a ring that it left alone would not be."""
    grouped = dataclasses.replace(MODEL, mixer=("attention",), kv_heads=2)
    assert held.decoding(grouped, "bfloat16", 200)
    [found] = held._read(held._file()).values()
    assert found == ""


@pytest.mark.parametrize("mixer", ["linear", "ssm", "rwkv", "gated-deltanet"] if FULL else ["ssm", "gated-deltanet"])  # dear: interpreted
def test_the_kernels_as_they_are_pass_in_bfloat16(mixer: str, monkeypatch: pytest.MonkeyPatch):
    """Interpreted on a CPU. A sum over positions that cancels, as the gradient of a decay, must not be what its parts were rounded by."""
    monkeypatch.setattr(kernels, "_no_device", lambda: "")
    monkeypatch.setattr(held, "LENGTH", 70)
    monkeypatch.setattr(held, "ROWS", 1)
    model = dataclasses.replace(MODEL, mixer=(mixer,), kv_heads=8, ssm_head_dim=64)
    assert held._compare(mixer, dataclasses.replace(held.small(mixer, model), context_length=70), "bfloat16") == ""
