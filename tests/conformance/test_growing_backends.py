"""`smedjan grow` in both backends: float32 logits stay, and after a step no copy is like another."""

import numpy as np

from smedjan_common.checkpoint.growing import grown
from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.model.growth import Growth, Wanted, plan
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from tests.conformance import subjects
from tests.conformance.cases import train_config
from tests.fakes import models

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 17)).astype(np.int32)
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
OPTIONS = {"rwkv_head_dim": 16, "ssm_head_dim": 16, "ssm_state": 8, "block_size": 4, "block_topk": 2}
EVERY = models.model(dim=32, heads=2, ffn_dim=24, layers=len(MIXERS), mixer=tuple(MIXERS), **OPTIONS)
HEADS = models.model(dim=32, heads=2, kv_heads=1, ffn_dim=24, layers=1)


def both(config, **wanted) -> tuple[Growth, dict, dict]:
    """A model after some training, as it were, and the larger one."""
    rng, growth = np.random.default_rng(1), plan(config, Wanted(**wanted))
    values = {name: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) for name, v in initial_params(config, 1).items()}
    weights = {name: Lazy(value.dtype, value.shape, lambda value=value: value) for name, value in values.items()}
    return growth, values, {name: np.asarray(lazy) for name, lazy in grown(weights, growth, 0).items()}


def off(backend: str, growth: Growth, values: dict, made: dict) -> float:
    """The largest difference of logits over the largest logit."""
    before, after = (subjects.logits(backend, *of, INPUTS) for of in ((growth.old, values), (growth.new, made)))
    return float(np.abs(after - before).max() / np.abs(before).max())


def test_logits_of_a_model_of_every_mixer_stay(backend: str):
    assert off(backend, *both(EVERY, layers=len(MIXERS) + 1, ffn_dim=40, experts=3)) < 1e-6


def test_logits_stay_and_after_two_steps_all_copies_differ(backend: str):
    growth, values, made = both(HEADS, layers=3, ffn_dim=48, heads=4)
    assert off(backend, growth, values, made) < 1e-6
    train = train_config(steps=2, warmup=0, lr=1e-3, lr_schedule="constant")
    after = subjects.train(backend, growth.new, train, made, [(INPUTS, TARGETS)] * 2).snapshot.params
    gate, query = (after[f"layers.0.{name}_proj.weight"] for name in ("ffn.gate", "mixer.q"))
    for first, second in ((gate[::2], gate[1::2]), (query[:16], query[32:48]), (query[16:32], query[48:])):
        moved = np.sqrt(np.mean((first - second) ** 2))
        assert moved > 0.5e-3  # of two steps of 1e-3; twins would have moved alike
    for name in ("ffn.down", "mixer.o"):
        first, second = (after[f"layers.{layer}.{name}_proj.weight"] for layer in (1, 2))
        assert np.sqrt(np.mean((first - second) ** 2)) > 0.5e-3  # two new layers after the same one
