"""RoPE's closed forms against the papers, written here a second time and another way; transformers' are in the conformance suite."""

import math

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.rope import attention_factor, frequencies, original_length, tables
from smedjan_common.reference.rope import rotate


def config(head_dim: int = 64, scaling: str = "none", factor: float = 1.0, base: float = 10000.0, original: int = 1024) -> ModelConfig:
    stretched = {} if scaling == "none" else {"rope_scaling": scaling, "rope_factor": factor, "rope_original_len": original}
    return ModelConfig.build(vocab_size=64, dim=4 * head_dim, layers=1, heads=4, rope_base=base, **stretched)


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [2, 8, 64, 128])
def test_plain_frequencies_fall_geometrically_from_one(head_dim: int, base: float):
    theta = frequencies(config(head_dim, base=base))
    assert theta.dtype == np.float64
    assert theta == pytest.approx([math.exp(-math.log(base) * 2 * i / head_dim) for i in range(head_dim // 2)], rel=1e-14)


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0])
def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest_by_the_whole_factor(factor: float):
    plain, stretched = frequencies(config()), frequencies(config(scaling="ntk", factor=factor))
    assert stretched[0] == plain[0] == 1
    assert plain[-1] / stretched[-1] == pytest.approx(factor, rel=1e-12)
    assert np.all(np.diff(plain / stretched) > 0)


def test_linear_stretches_every_period_alike():
    assert frequencies(config(scaling="linear", factor=4.0)) == pytest.approx(frequencies(config()) / 4, rel=1e-15)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_keeps_short_periods_stretches_long_ones_and_blends_between(factor: float):
    """Llama 3.1 and 3.2: the bounds are the original context over 4 and over 1; between them the share falls with 1 / period."""
    model = config(128, scaling="llama3", factor=factor, base=5e5, original=8192)
    plain, stretched = frequencies(config(128, base=5e5)), frequencies(model)
    period = 2 * math.pi / plain
    assert {"short", "between", "long"} == {"short" if p < 2048 else "long" if p > 8192 else "between" for p in period}
    for before, after, length in zip(plain, stretched, period, strict=True):
        kept = min(max((8192 / length - 1) / 3, 0), 1)
        assert after == pytest.approx(kept * before + (1 - kept) * before / factor, rel=1e-12)


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_yarn_blends_by_how_often_a_pair_turns_in_the_original_context(factor: float):
    """Pairs that turn over 32 times keep their frequency, those under once are interpolated; between them a linear ramp over the index."""
    model = config(scaling="yarn", factor=factor)
    plain, stretched = frequencies(config()), frequencies(model)
    turns = 1024 * plain / (2 * math.pi)
    kept, interpolated = turns > 40, turns < 0.8
    assert kept.any()
    assert interpolated.any()
    assert stretched[kept] == pytest.approx(plain[kept], rel=1e-14)
    assert stretched[interpolated] == pytest.approx(plain[interpolated] / factor, rel=1e-14)
    weight = (plain - stretched) / (plain - plain / factor)
    inside = (weight > 1e-9) & (weight < 1 - 1e-9)
    assert np.diff(weight[inside], 2) == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(weight) >= -1e-12)


def test_yarn_scales_cos_and_sin_and_the_others_do_not():
    assert attention_factor(config(scaling="yarn", factor=4.0)) == pytest.approx(1.1386294361, rel=1e-10)
    assert attention_factor(config(scaling="ntk", factor=4.0)) == attention_factor(config()) == 1.0
    cos, _ = tables(config(scaling="yarn", factor=4.0), 1)
    assert cos[0] == pytest.approx(1.1386294, rel=1e-6)


def test_the_original_length_is_the_context_over_the_factor_unless_it_is_given():
    model = ModelConfig.preset("tiny", context_length=4096, rope_scaling="yarn", rope_factor=4.0)
    assert original_length(model) == 1024
    assert original_length(config(scaling="yarn", factor=4.0, original=777)) == 777


@pytest.mark.parametrize("scaling", ["none", "ntk", "yarn"])
def test_tables_are_the_float64_angles_but_for_three_roundings(scaling: str):
    """cos and sin of a float32 angle, as mx.fast.rope has it: period, frequency and product are each rounded once."""
    model = config(scaling=scaling, factor=4.0 if scaling != "none" else 1.0)
    cos, sin = tables(model, 5000)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == (5000, 32)
    angle, m = np.arange(5000.0)[:, None] * frequencies(model), attention_factor(model)
    allowed = m * (angle * 3 * 2.0**-24 + 2.0**-23)
    assert np.all(np.abs(cos - m * np.cos(angle)) <= allowed)
    assert np.all(np.abs(sin - m * np.sin(angle)) <= allowed)


def test_rotation_is_a_complex_product_and_scores_depend_on_the_distance_alone():
    model, rng = config(8), np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 1, 1, 8))

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        return rotate(x, model, start=position)[0, 0, 0]

    numbers = (query[0, 0, 0, :4] + 1j * query[0, 0, 0, 4:]) * np.exp(1j * 5 * frequencies(model))
    assert turn(query, 5) == pytest.approx(np.concatenate([numbers.real, numbers.imag]))
    assert turn(query, 9) @ turn(key, 2) == pytest.approx(turn(query, 107) @ turn(key, 100))


@pytest.mark.parametrize("scaling", ["none", "ntk", "yarn"])
@pytest.mark.parametrize("head_dim", [2, 4, 64])
def test_tables_are_finite_at_the_ends_of_the_ranges(scaling: str, head_dim: int):
    for base, factor in ((1.0000001, 1e6), (1e24, 1.0000001), (1e24, 1e6)):
        for table in tables(config(head_dim, scaling, factor, base), 20):
            assert np.isfinite(table).all()
