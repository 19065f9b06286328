"""Memory estimates: exact where a closed form is exact (state, weights), and ordered as they must be."""

import dataclasses
import re

import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.inference.memory import inference_bytes, state_bytes
from smedjan_common.model.params import count_params, parameter_table
from smedjan_common.model.presets import PRESETS
from smedjan_common.training.config import DTYPES, GRADIENT_CHECKPOINTING
from smedjan_common.training.memory import activation_values_per_token, training_bytes

MEDIUM = ModelConfig.preset("medium")
TRAIN = TrainConfig(steps=1, batch_size=64, seq_len=1024, lr=1e-3, dtype="bfloat16")


def test_the_decode_state_of_attention_is_its_keys_and_values():
    assert state_bytes(MEDIUM, 1, 1024, "bfloat16") == 2 * 12 * 1024 * 512 * 2
    grouped = dataclasses.replace(MEDIUM, kv_heads=2)
    assert state_bytes(grouped, 3, 100, "float32") == 2 * 12 * 3 * 100 * 128 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_takes_the_weights_and_the_state(dtype: str):
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert inference_bytes(MEDIUM, 1, 256, dtype) == count_params(MEDIUM) * width + state_bytes(MEDIUM, 1, 256, dtype)


def test_training_holds_at_least_parameters_gradients_and_two_moments():
    small = dataclasses.replace(TRAIN, batch_size=1, seq_len=1, dtype="float32")
    assert count_params(MEDIUM) * 16 < training_bytes(MEDIUM, small) < count_params(MEDIUM) * 17


def test_an_optimizer_that_keeps_less_takes_less():
    small = dataclasses.replace(TRAIN, batch_size=1, seq_len=1, dtype="float32")
    total = {name: training_bytes(MEDIUM, dataclasses.replace(small, optimizer=name)) for name in ("adamw", "muon", "lion")}
    matrices = sum(spec.size for spec in parameter_table(MEDIUM).values() if spec.matrix)
    assert total["adamw"] - total["muon"] == 4 * matrices
    assert total["adamw"] - total["lion"] == 4 * count_params(MEDIUM)


@pytest.mark.parametrize("size", PRESETS)
def test_gradient_checkpointing_accumulation_and_narrow_types_save_memory(size: str):
    model = ModelConfig.preset(size)
    by_checkpointing = [training_bytes(model, dataclasses.replace(TRAIN, gradient_checkpointing=kept)) for kept in GRADIENT_CHECKPOINTING]
    assert by_checkpointing == sorted(by_checkpointing, reverse=True)
    assert len(set(by_checkpointing)) == 3
    assert training_bytes(model, dataclasses.replace(TRAIN, grad_accum=8)) < training_bytes(model, TRAIN)
    kept = [activation_values_per_token(model, name) for name in GRADIENT_CHECKPOINTING]
    assert kept[2] < kept[0]


@pytest.fixture
def mlx_backend(monkeypatch):
    """MLX's module on a CPU of 1 GiB."""
    pytest.importorskip("mlx.core")
    from smedjan_mlx import backend

    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    monkeypatch.setattr(backend, "_machine_memory", lambda: 1 << 30)
    return backend


SCORES = ModelConfig(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=4, ffn_dim=32, context_length=1 << 20)
LONG = TrainConfig(steps=1, batch_size=4, seq_len=8192, lr=1e-3, dtype="float32")  # 12 GiB of scores


@pytest.mark.parametrize(
    ("mixer", "attention"),
    [("attention", "auto"), ("attention", "plain"), ("mla", "auto"), ("linear attention", "auto"), ("block-sparse", "plain")],
)
def test_scores_that_a_cpu_cannot_hold_are_refused_before_anything_is_allocated_and_the_fix_helps(mlx_backend, mixer, attention):
    model, train = dataclasses.replace(SCORES, mixer=tuple(mixer.split())), dataclasses.replace(LONG, attention=attention)
    with pytest.raises(ConfigError, match=r"4 sequences at once.*12\.0 GiB") as caught:
        mlx_backend.training_backend(model, train)
    assert ("--attention plain" in caught.value.fix) == (mixer == "block-sparse")
    found = re.search(r"--seq-len (\d+) or less", caught.value.fix)
    assert found
    longest = dataclasses.replace(train, seq_len=int(found[1]))
    mlx_backend.training_backend(model, longest)
    with pytest.raises(ConfigError):
        mlx_backend.training_backend(model, dataclasses.replace(longest, seq_len=longest.seq_len + 1))
    mlx_backend.training_backend(model, dataclasses.replace(longest, seq_len=longest.seq_len * 2 - 2, grad_accum=4))


def test_only_training_that_holds_all_scores_on_a_cpu_is_refused(mlx_backend, monkeypatch):
    for mixer in ("linear", "block-sparse"):
        mlx_backend.training_backend(dataclasses.replace(SCORES, mixer=(mixer,)), LONG)
    mlx_backend.MlxBackend(SCORES, LONG)  # decodes, wherever the model was trained
    monkeypatch.setattr(mlx_backend, "on_gpu", lambda: True)
    mlx_backend.training_backend(SCORES, LONG)


def test_training_with_mlx_asks_for_the_backend_that_refuses(mlx_backend):
    from smedjan_mlx.train import load

    assert load()[0] is mlx_backend.training_backend
