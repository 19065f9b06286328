"""FLOPs per token: the figures of the design, and an independent count of every matmul."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan_common.config import ModelConfig
from smedjan_common.model import flops
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.flops import PEAK_FLOPS, active_params, forward_flops_per_token, peak_flops, train_flops_per_token
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import count_params, parameter_table

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


def test_a_window_saves_only_in_the_layers_that_have_it():
    def cost(**more) -> int:
        return forward_flops_per_token(ModelConfig.build(vocab_size=64, dim=64, layers=4, heads=4, **more), 512)

    every, none = cost(window=32), cost()
    assert cost(window=32, window_layers=("on", "on", "on", "off")) == every + (none - every) // 4


def test_the_full_square_counts_attention_twice():
    half, full = (forward_flops_per_token(MEDIUM, 1024, full_square=square) for square in (False, True))
    assert full - half == half - 2 * count_params(MEDIUM)
    assert train_flops_per_token(MEDIUM, 1024, full_square=True) == 3 * full


def test_every_parameter_of_a_dense_model_is_active():
    assert active_params(MEDIUM) == count_params(MEDIUM)


def test_a_head_of_its_own_costs_what_a_tied_one_does():
    untied = dataclasses.replace(MEDIUM, tied_head=False)
    assert count_params(untied) == count_params(MEDIUM) + 8192 * 512
    assert train_flops_per_token(untied, 1024) == train_flops_per_token(MEDIUM, 1024)


def test_experts_count_as_far_as_a_token_meets_them():
    model = ModelConfig.preset("medium", vocab_size=8192, ffn=("swiglu", "experts"), experts=8)
    table = parameter_table(model)
    stored = [sum(spec.size for name, spec in table.items() if name.startswith(f"layers.{i}.ffn.")) for i in range(model.layers)]
    active = sum(FFNS[model.ffn_of(layer)].active(model) - stored[layer] for layer in range(model.layers))
    assert active_params(model) == count_params(model) + active < count_params(model)


def test_counting_active_parameters_walks_the_table_once_however_many_layers(monkeypatch):
    walks = []

    class Table(dict):
        def items(self):
            walks.append("items")
            return super().items()

        def values(self):
            walks.append("values")
            return super().values()

    monkeypatch.setattr(flops, "parameter_table", lambda config: Table(parameter_table(config)))
    model = dataclasses.replace(MEDIUM, layers=64)
    assert active_params(model) == count_params(model)
    assert len(walks) == 1


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 40))
def test_block_sparse_costs_what_a_walk_over_its_blocks_adds_up_to(seq_len: int, block: int, topk: int):
    model = dataclasses.replace(MEDIUM, mixer=("block-sparse",), block_size=block, block_topk=topk)
    blocks = -(-seq_len // block)
    others = sum(min(topk - 1, earlier) for earlier in range(blocks)) / blocks
    pairs = min(block, seq_len) / 2 + others * block
    choice = 2 * model.kv_heads * model.head_dim * (blocks - 1) / 2
    assert MIXERS["block-sparse"].flops(model, seq_len) == round(4 * model.dim * pairs + choice)


def test_the_cost_of_block_sparse_is_no_walk_over_the_blocks_of_a_sequence():
    model = dataclasses.replace(MEDIUM, mixer=("block-sparse",), block_size=1, block_topk=3)
    assert MIXERS["block-sparse"].flops(model, 1 << 50) > 1 << 50


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
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Apple M4 Max", 34e12),
        ("Some CPU", None),
        ("cpu", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A1000 Laptop GPU", None),
        ("NVIDIA A100X", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L400", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Apple M4 Pro", None),
        ("AMD Ryzen AI Max 395", None),
    ],
)
def test_known_devices_have_a_peak_and_unknown_ones_none(name: str, peak: float | None):
    assert peak_flops(name) == peak


def test_no_row_of_the_device_table_gives_a_later_one_another_peak():
    for index, (part, peak) in enumerate(PEAK_FLOPS):
        assert not [earlier for earlier, other in PEAK_FLOPS[:index] if f" {earlier} " in f" {part} " and other != peak], part
        assert peak_flops(part) == peak
