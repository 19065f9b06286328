"""Memory estimates: exact where a closed form is exact (state, weights), and ordered as they must be."""

import dataclasses

import pytest

from smedjan_common.config import DTYPES, GRADIENT_CHECKPOINTING, ModelConfig, TrainConfig
from smedjan_common.memory import activation_values_per_token, inference_bytes, state_bytes, training_bytes
from smedjan_common.params import count_params, parameter_table
from smedjan_common.presets import PRESETS

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
