"""FLOPs per token: the figures of the design, and an independent count of every matmul."""

import dataclasses

import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.flops import PEAK_FLOPS, active_params, forward_flops_per_token, peak_flops, train_flops_per_token
from smedjan_common.params import count_params

MEDIUM = ModelConfig.preset("medium", vocab_size=8192)


def test_medium_takes_308_megaflops_a_token_at_context_1024():
    assert train_flops_per_token(MEDIUM, 1024) == 308_358_144


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("seq_len", [1, 1024, 4096])
def test_forward_flops_are_those_of_the_matmuls(seq_len: int, kv_heads: int):
    """Counted anew: each matmul of the forward pass for one sequence, the causal half of q k^T and p v."""
    model = dataclasses.replace(MEDIUM, kv_heads=kv_heads)
    D, F, kv = model.dim, model.ffn_dim, model.head_dim * kv_heads
    projections = 2 * seq_len * (2 * D * D + 2 * D * kv + 3 * D * F)
    pairs = 2 * 2 * D * seq_len * seq_len / 2
    head = 2 * seq_len * D * model.padded_vocab_size
    counted = (model.layers * (projections + pairs) + head) / seq_len
    norms = 2 * (2 * model.layers + 1) * D  # the norms' weights count as parameters
    assert forward_flops_per_token(model, seq_len) == counted + norms


def test_the_full_square_counts_attention_twice():
    half, full = (forward_flops_per_token(MEDIUM, 1024, full_square=square) for square in (False, True))
    assert full - half == half - 2 * count_params(MEDIUM)
    assert train_flops_per_token(MEDIUM, 1024, full_square=True) == 3 * full


def test_every_parameter_of_a_dense_model_is_active():
    assert active_params(MEDIUM) == count_params(MEDIUM)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("Apple M4 Max", 34e12),
        ("Some CPU", None),
    ],
)
def test_known_devices_have_a_peak_and_unknown_ones_none(name: str, peak: float | None):
    assert peak_flops(name) == peak


def test_no_row_of_the_device_table_gives_a_later_one_another_peak():
    for index, (part, peak) in enumerate(PEAK_FLOPS):
        assert not [earlier for earlier, other in PEAK_FLOPS[:index] if earlier in part and other != peak], part
