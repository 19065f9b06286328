"""The combinations that the suite walks, from the rows of smedjan_common.model.mixers: a new row is in every test by itself.

Every mixer meets every feed-forward; key/value heads, RoPE scaling and the variants of a row go with the first feed-forward, and all
mixers together make one repeating pattern. What a row's own `validate` refuses is no combination. The models are tiny, because what
is compared is arithmetic and not scale, and their weights are wider than in training (init_std 0.15), so that attention is
far from uniform and an error in it shows.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_common.model.shape import ROPE_SCALINGS
from smedjan_common.model.spec import Tolerance
from tests.conformance.gates import BFLOAT16, BFLOAT16_TOLERANCE, FLOAT32, Gates
from tests.conformance.models import SMALL, VARIANTS
from tests.conformance.routing import separated
from tests.conformance.untied import untied

HEADS = {"mha": 4, "gqa": 2}  # key/value heads for 4 query heads
BATCH, LENGTH, STEPS = 4, 17, 20  # an odd length: no chunk divides it
SEED = 1  # of initial values
CHUNK = 4  # mixers of linear cost go through several chunks
NORM_EPS = {  # of (mixers, heads) that are worse conditioned than the models of their rows
    # the rounding of the parameters alone moved the gradient of a decay_bias by 5.2e-6 in float64 at linear's 0.03, here by 1.3e-6;
    # in linear's other models 0.08 would hide some mutations
    (("linear",), "gqa"): 0.08,
    # at gated-deltanet's 1e-3 it moved the whole gradient by 9.8e-7, as much as same_arithmetic allows, here by 3.7e-7; at 0.08
    # some gradients are so small (1e-7) that differences of the loss lose them
    (tuple(MIXERS), "mha"): 0.02,
}


@dataclass(frozen=True)
class Case:
    """One combination: a model and how the 20-step runs train it."""

    id: str
    model: ModelConfig
    train: TrainConfig
    default: bool = False  # the plain form of a row

    @cached_property
    def params(self) -> dict[str, np.ndarray]:
        """Initial values; those that start constant (norms) are perturbed, so that a forgotten weight shows."""
        rng = np.random.default_rng(0)
        start = initial_params(self.model, SEED)
        perturbed = {
            name: value if np.ptp(value) else (value + 0.2 * rng.standard_normal(value.shape)).astype(np.float32)
            for name, value in start.items()
        }
        return untied(self.model, separated(self.model, perturbed), self.tokens)

    @property
    def start(self) -> dict[str, np.ndarray]:
        """Where training runs begin: plain initial values."""
        return untied(self.model, separated(self.model, initial_params(self.model, SEED)), self.tokens)

    @cached_property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of every step, int32 [BATCH, LENGTH]; some targets, unevenly spread over the rows, do not count."""
        rng = np.random.default_rng(7)
        batches = []
        for _ in range(self.train.steps):
            tokens = rng.integers(0, self.model.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
            targets = tokens[:, 1:].copy()
            targets[rng.random(targets.shape) < np.linspace(0.0, 0.5, BATCH)[:, None]] = -1
            batches.append((tokens[:, :-1].copy(), targets))
        return batches

    @cached_property
    def documents(self) -> np.ndarray:
        """A document number for every input token, int32 [BATCH, LENGTH]: documents of one token, of many, and a row that is one."""
        borders = np.zeros((BATCH, LENGTH), np.int32)
        for row, starts in enumerate(([], [1, 2, 10], [3, 4, 5, 12], [8, LENGTH - 1])):
            borders[row, starts] = 1
        return np.cumsum(borders, axis=1, dtype=np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """The inputs of the first step, [BATCH, LENGTH]."""
        return self.batches[0][0]

    @property
    def tolerance(self) -> Tolerance:
        """The widest gates among the rows in use. In bfloat16 those of bench/bfloat16.py are in their place, where they were measured."""
        if self.train.dtype == "bfloat16":
            return BFLOAT16_TOLERANCE
        rows = [MIXERS[name].tolerance for name in self.model.mixer] + [FFNS[name].tolerance for name in self.model.ffn]
        return Tolerance(max(row.forward for row in rows), max(row.gradient for row in rows))

    @property
    def takes_documents(self) -> bool:
        """Whether its mixers can keep documents apart."""
        return all(MIXERS[name].documents for name in self.model.mixer)

    @property
    def gates(self) -> Gates:
        """The gates that do not belong to a row."""
        return BFLOAT16 if self.train.dtype == "bfloat16" else FLOAT32


def train_config(**changes: object) -> TrainConfig:
    """20 steps in which warm-up, decay, clipping and weight decay all do something."""
    defaults = {"lr": 3e-3, "warmup": 4, "weight_decay": 0.1, "clip_norm": 0.5, "attention": "plain", "chunk_size": CHUNK}
    config = TrainConfig(**{"steps": STEPS, "batch_size": BATCH, "seq_len": LENGTH, **defaults, **changes})
    config.validate()
    return config


def model_config(
    mixer: tuple[str, ...], ffn: str, heads: str = "mha", rope: str = "none", options: Mapping[str, object] | None = None
) -> ModelConfig | None:
    """A tiny model, or None where the rows refuse the combination. Its vocabulary is no multiple of 64: the head has padding rows."""
    chosen = {name: value for row in (*mixer, ffn) for name, value in SMALL.get(row, {}).items()} | dict(options or {})
    if (mixer, heads) in NORM_EPS:
        chosen["norm_eps"] = NORM_EPS[mixer, heads]
    scaling = {} if rope == "none" else {"rope_factor": 4.0, "rope_original_len": 1024, "context_length": 4096}
    model = ModelConfig(
        vocab_size=60, dim=32, layers=max(2, len(mixer)), heads=4, kv_heads=HEADS[heads], ffn_dim=64, mixer=mixer, ffn=(ffn,), init_std=0.15
    )
    try:
        model = ModelConfig.from_dict({**model.to_dict(), "rope_scaling": rope, **scaling, **chosen})
    except ConfigError:
        return None
    return model


def _combinations() -> dict[str, Case]:
    patterns = [(name,) for name in MIXERS] + ([tuple(MIXERS)] if len(MIXERS) > 1 else [])
    first, *others = FFNS
    plain = [(mixer, ffn, "mha", "none", "") for mixer in patterns for ffn in FFNS]
    turned = [mixer for mixer in patterns if all(MIXERS[name].rope for name in mixer)]
    choices = [
        *plain,
        *itertools.product(patterns, [first], ["gqa"], ["none"], [""]),
        *itertools.product(turned, [first], ["mha"], ["ntk", "yarn"], [""]),
        *itertools.product(turned[:1], [first], ["gqa"], ROPE_SCALINGS[1:], [""]),  # all mixers read the same tables
        *(((name,), first, "mha", "none", variant) for name in MIXERS for variant in VARIANTS.get(name, {})),
        *((patterns[0], ffn, "mha", "none", variant) for ffn in others for variant in VARIANTS.get(ffn, {})),
    ]
    cases = {}
    for choice in choices:
        mixer, ffn, heads, rope, variant = choice
        model = model_config(mixer, ffn, heads, rope, {**VARIANTS.get(mixer[0], {}), **VARIANTS.get(ffn, {})}.get(variant))
        if model is not None:
            name = "-".join(["+".join(mixer) if len(mixer) < 3 else "all", ffn, heads, *filter(None, [rope.replace("none", ""), variant])])
            cases[name] = Case(name, model, train_config(), choice in plain and (ffn == first or mixer == patterns[0]))
    return cases


assert SMALL.keys() | VARIANTS.keys() <= MIXERS.keys() | FFNS.keys(), "a model of a row that is gone"
CASES = _combinations()
DEFAULT_CASES = {name: case for name, case in CASES.items() if case.default}
OTHER_CASES = {name: case for name, case in CASES.items() if not case.default}
