"""One mixer by itself, outside a model: its output, and the gradients of its input and tensors. For the tests against other programs.

Inputs are normal, [B, T, D], and the gradients are those of <output, a fixed random array>. `params` are named as in the mixer.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_common.reference import model as reference
from tests.conformance import subjects


def config(mixer: str, **changes: Any) -> ModelConfig:
    """A model of one layer, width 32 and 4 heads if not said otherwise, with wide weights, so that attention is far from uniform."""
    return ModelConfig.build(**{"vocab_size": 64, "dim": 32, "layers": 1, "heads": 4, "mixer": (mixer,), "init_std": 0.25, **changes})


def tensors(model: ModelConfig) -> subjects.Params:
    """Initial values of the mixer's tensors; those that start constant (norms) are perturbed."""
    rng = np.random.default_rng(4)
    start = reference.under(initial_params(model, 2), "layers.0.mixer.")
    return {n: v if np.ptp(v) else (v + 0.3 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in start.items()}


def normal(model: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """An input or an outer weight, float32 [batch, length, D]."""
    return np.random.default_rng([seed, batch, length]).standard_normal((batch, length, model.dim)).astype(np.float32)


def reference_output(model: ModelConfig, params: subjects.Params, x: np.ndarray) -> np.ndarray:
    """What the float64 definition gives."""
    wide = {name: reference.as_float64(value) for name, value in params.items()}
    return reference.mixer_module(model, 0).forward(model, wide, reference.as_float64(x), {})


def output(name: str, model: ModelConfig, params: subjects.Params, x: np.ndarray, implementation: str = "plain") -> np.ndarray:
    """What a backend gives."""
    run = subjects.framework(name).compile(_mixer(name, model, implementation))
    return np.asarray(run(subjects.on_device(name, params), subjects.framework(name).array(x)))


def gradients(
    name: str, model: ModelConfig, params: subjects.Params, x: np.ndarray, outer: np.ndarray, implementation: str = "plain"
) -> subjects.Params:
    """d <output, outer> by the mixer's tensors, and by "x"."""
    framework, run = subjects.framework(name), _mixer(name, model, implementation)
    weight = framework.array(outer)
    slope = framework.compile(framework.grad(lambda tree: (run(tree["params"], tree["x"]) * weight).sum()))
    found = subjects.on_host(slope({"params": subjects.on_device(name, params), "x": framework.array(x)}))
    return {**found["params"], "x": found["x"]}


@functools.cache
def _mixer(name: str, model: ModelConfig, implementation: str) -> Callable[[Any, Any], Any]:
    modules, row = subjects.module(name, "modules"), MIXERS[model.mixer_of(0)]
    mixer_class = getattr(subjects.module(name, f"mixers.{row.module}"), row.class_name)

    def run(params: Any, x: Any) -> Any:
        mixer = mixer_class(model, {f"it.{tensor}": value for tensor, value in params.items()}, "it", implementation)
        return mixer(x, modules.Context(modules.Rope(model, x.shape[1]), None, None, 4), {})[0]

    return run
