"""What XLA makes of a training step on a CPU, for each mixer: operations, memory and kernels against stored figures.

A change that makes steps dearer is seen here before anyone measures time. Figures hold for one version of JAX. To store those of a change
that is meant: SMEDJAN_STORE_STEPS=1 python -m pytest tests/conformance/test_compiled_step.py
"""

import json
import os
import pathlib
import re

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params

jax = pytest.importorskip("jax", reason="jax is not installed here")

STORED = pathlib.Path(__file__).parents[1] / "fixtures" / "compiled-steps.json"
SLACK = {"flops": 0.01, "temp_bytes": 0.1, "kernels": 0.1}  # parts of the figure
BATCH, LENGTH = 2, 96


def train_step_of(mixer: str):
    """Backend, state and batch of one layer like those of the presets, and the compiled step."""
    from smedjan_jax.backend import JaxBackend

    model = ModelConfig.build(
        vocab_size=256, dim=64, layers=1, heads=2, mixer=(mixer,), context_length=LENGTH, rwkv_head_dim=32, ssm_state=32, block_size=16
    )
    backend = JaxBackend(model, TrainConfig(steps=10, lr=1e-3, batch_size=BATCH, seq_len=LENGTH, dtype="float32", chunk_size=32))
    tokens = np.random.default_rng(0).integers(0, 256, (BATCH, LENGTH + 1)).astype(np.int32)
    return backend, backend.init(initial_params(model, 0)), (tokens[:, :-1], tokens[:, 1:])


def figures(compiled) -> dict[str, int]:
    """Operations, bytes laid out beside arguments and results, and what is run one after the other: fusions, products, loops, …"""
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    instructions = re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", entry, re.MULTILINE)
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    return {
        "flops": round(compiled.cost_analysis()["flops"]),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": sum(each not in free for each in instructions),
    }


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_takes_no_more_than_it_did_and_asks_the_host_for_nothing(mixer: str):
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    version = jax.__version__
    if version not in stored and not os.environ.get("SMEDJAN_STORE_STEPS"):
        pytest.skip(f"no figures are stored for JAX {version}")
    if jax.default_backend() != "cpu":
        pytest.skip("the figures are those of a CPU")
    backend, state, (inputs, targets) = train_step_of(mixer)
    compiled = backend._train_step.lower(state, (inputs, targets, None, None), np.float32(1e-3)).compile()
    found = figures(compiled)
    if os.environ.get("SMEDJAN_STORE_STEPS"):
        stored.setdefault(version, {})[mixer] = found
        STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    dearer = {name: (value, found[name]) for name, value in stored[version][mixer].items() if found[name] > value * (1 + SLACK[name])}
    assert not dearer, f"stored and found: {dearer}"
    assert not re.search(r"\b(infeed|outfeed|send|recv|custom-call.*callback)\b", compiled.as_text())


def test_steps_after_the_first_are_not_compiled_again():
    backend, state, (inputs, targets) = train_step_of("attention")
    for lr in (1e-3, 9e-4, 8e-4):
        state, metrics = backend.train_step(state, inputs, targets, lr)
    backend.read(metrics)
    assert backend._train_step._cache_size() == 1
