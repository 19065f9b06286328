"""Memory estimates: exact where a closed form is exact (state, weights), and ordered as they must be."""

import dataclasses

import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.memory import inference_bytes, state_bytes
from smedjan_common.model.adapters import adapter_table
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import count_params, parameter_table
from smedjan_common.model.presets import PRESETS
from smedjan_common.training.config import DTYPES, GRADIENT_CHECKPOINTING
from smedjan_common.training.memory import Place, checkpoint_bytes, final_bytes, training_bytes
from smedjan_common.training.memory import state_bytes as kept_bytes

MEDIUM = ModelConfig.preset("medium")
TRAIN = TrainConfig(steps=1, batch_size=64, seq_len=1024, lr=1e-3, dtype="bfloat16")


def test_the_decode_state_of_attention_is_its_keys_and_values():
    assert state_bytes(MEDIUM, 1, 1024, "bfloat16") == 2 * 12 * 1024 * 512 * 2
    grouped = dataclasses.replace(MEDIUM, kv_heads=2)
    assert state_bytes(grouped, 3, 100, "float32") == 2 * 12 * 3 * 100 * 128 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_takes_the_weights_and_the_state(dtype: str):
    width = {"float32": 4, "bfloat16": 2, "float8": 2}[dtype]
    assert inference_bytes(MEDIUM, 1, 256, dtype) == count_params(MEDIUM) * width + state_bytes(MEDIUM, 1, 256, dtype)


def test_training_holds_at_least_parameters_gradients_and_two_moments():
    small = dataclasses.replace(TRAIN, batch_size=1, seq_len=1, dtype="float32")
    assert count_params(MEDIUM) * 16 < training_bytes(MEDIUM, small) < count_params(MEDIUM) * 17


def test_an_optimizer_that_keeps_less_takes_less():
    total = {name: training_bytes(MEDIUM, dataclasses.replace(TRAIN, optimizer=name)) for name in ("adamw", "muon", "lion")}
    matrices = sum(spec.size for spec in parameter_table(MEDIUM).values() if spec.matrix)
    assert total["adamw"] - total["muon"] == 4 * matrices
    assert total["adamw"] - total["lion"] == 4 * count_params(MEDIUM)


def test_an_average_of_the_weights_takes_as_much_as_they_do():
    kept = dataclasses.replace(TRAIN, ema=0.999)
    assert training_bytes(MEDIUM, kept) - training_bytes(MEDIUM, TRAIN) == 4 * count_params(MEDIUM)


@pytest.mark.parametrize(("optimizer", "jax", "mlx"), [("adamw", 16, 18.6), ("muon", 18.2, 54.6), ("lion", 16, 18.1)])
def test_where_parameters_are_all_that_counts_the_update_of_the_optimizer_does(optimizer: str, jax: float, mlx: float):
    """Bytes a parameter; measured on a CPU with one sequence of 16 tokens: 16.3, 18.1 and 15.8 with JAX, as said with MLX."""
    small = TrainConfig(steps=1, batch_size=1, seq_len=1, lr=1e-3, optimizer=optimizer)
    for backend, bytes in (("jax", jax), ("mlx", mlx)):
        estimate = training_bytes(MEDIUM, small, place=Place(backend, "cpu", "0.11.2")) / count_params(MEDIUM)
        assert estimate == pytest.approx(bytes, rel=0.03)


@pytest.mark.parametrize("size", PRESETS)
def test_gradient_checkpointing_accumulation_and_narrow_types_save_memory(size: str):
    model = ModelConfig.preset(size)
    by_checkpointing = [training_bytes(model, dataclasses.replace(TRAIN, gradient_checkpointing=kept)) for kept in GRADIENT_CHECKPOINTING]
    assert by_checkpointing == sorted(by_checkpointing, reverse=True)
    assert len(set(by_checkpointing)) == 3
    assert training_bytes(model, dataclasses.replace(TRAIN, grad_accum=8)) < training_bytes(model, TRAIN)


CPU = Place(kind="cpu", version="0.11.2")


@pytest.mark.parametrize("place", [CPU, Place("mlx", "cpu")], ids=["jax", "mlx"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_only_attention_without_a_fused_kernel_takes_more_for_a_longer_sequence_of_as_many_tokens(mixer: str, place: Place):
    model = dataclasses.replace(MEDIUM, mixer=(mixer,))
    short = TrainConfig(steps=1, batch_size=16, seq_len=1024, lr=1e-3)
    long = dataclasses.replace(short, batch_size=2, seq_len=8192)
    grows = training_bytes(model, long, place=place) > 2 * training_bytes(model, short, place=place)
    assert grows == (mixer in ("attention", "mla"))
    assert training_bytes(model, dataclasses.replace(long, dtype="bfloat16")) == training_bytes(
        model, dataclasses.replace(short, dtype="bfloat16")
    )


def test_plain_attention_and_wide_heads_hold_their_scores_on_a_gpu_too():
    long = dataclasses.replace(TRAIN, batch_size=8, seq_len=8192)
    plain = dataclasses.replace(long, attention="plain")
    pairs = 8 * MEDIUM.heads * 8192 * 8192
    assert training_bytes(MEDIUM, plain) - training_bytes(MEDIUM, long) > 6 * MEDIUM.layers * pairs
    blocks = dataclasses.replace(MEDIUM, mixer=("block-sparse",))
    assert training_bytes(blocks, plain) > 4 * training_bytes(blocks, long)
    wide = dataclasses.replace(MEDIUM, heads=2, kv_heads=2)  # 256 features a head: more than cuDNN takes
    assert training_bytes(wide, long) > training_bytes(MEDIUM, long) + 6 * MEDIUM.layers * pairs // 4


def test_gradient_checkpointing_saves_nothing_where_the_compiler_undoes_it():
    full = dataclasses.replace(TRAIN, gradient_checkpointing="full", dtype="float32")
    none = dataclasses.replace(full, gradient_checkpointing="none")
    assert training_bytes(MEDIUM, full, place=CPU) < training_bytes(MEDIUM, none, place=CPU) / 3
    old = Place(kind="cpu", version="0.10.2")
    assert training_bytes(MEDIUM, full, place=old) == training_bytes(MEDIUM, none, place=old)


def test_adapters_spare_gradients_and_moments_and_make_checkpoints_small():
    small = dataclasses.replace(TRAIN, batch_size=1, seq_len=1, dtype="float32")
    train, whole = dataclasses.replace(small, lora_rank=8), count_params(MEDIUM)
    assert train.adapters
    adapters = sum(spec.size for spec in adapter_table(MEDIUM, train.adapters).values())
    assert kept_bytes(MEDIUM, train) == 4 * whole + 12 * adapters
    assert (checkpoint_bytes(MEDIUM, train), final_bytes(MEDIUM, train)) == (12 * adapters, 4 * adapters)
    assert checkpoint_bytes(MEDIUM, small) == kept_bytes(MEDIUM, small) == 12 * whole
    merged = 4 * whole  # for samples
    assert training_bytes(MEDIUM, train) == kept_bytes(MEDIUM, train) + merged
