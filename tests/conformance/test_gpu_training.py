"""Every kind of training on a GPU with the kernels, beside the same with the plain forms: adapters, a teacher, answers, pairs, and each in
float8. A CPU holds the kernels against their twins one by one (test_kernels.py); here whole runs have them, compiled.

SMEDJAN_TEST_DEVICE=gpu python -m pytest -m gpu tests/conformance/test_gpu_training.py
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import initial_params
from smedjan_common.training.preferences import document_sums
from tests.conformance import subjects
from tests.conformance.gates import BFLOAT16

pytestmark = pytest.mark.gpu

# a mixer with kernels, and one that has cuDNN in both runs; tiles of 64 features, for which the kernels were measured
MODEL = ModelConfig.build(vocab_size=512, dim=256, layers=2, heads=4, mixer=("linear", "attention"), context_length=128)
TEACHER = dataclasses.replace(MODEL, layers=1, mixer=("attention",))
ROWS, LENGTH, ANSWER, STEPS = 8, 128, 16, 6
DOCUMENTS = np.repeat(np.arange(LENGTH // ANSWER), ANSWER)[None].repeat(ROWS, 0)
MOST = LENGTH // ANSWER
# the loss of pairs is of differences of sums over an answer, in which the roundings of its tokens add up
GATES = {"adapters": BFLOAT16.loss, "teacher": BFLOAT16.loss, "sft": BFLOAT16.loss, "dpo": 2 * BFLOAT16.loss}
FLOAT8 = 4  # times these: its rounding is 16 times bfloat16's; dpo was 4.0e-3 apart on an H200, the others 6.5e-4 and less


def train_of(kind: str, dtype: str, kernels: str) -> TrainConfig:
    options: dict[str, dict[str, Any]] = {
        "adapters": {"lora_rank": 8},
        "teacher": {"distill_temperature": 2.0, "distill_alpha": 0.6},
        "sft": {"objective": "sft", "mask_documents": True, "packing": "documents"},
        "dpo": {"objective": "dpo", "beta": 0.1, "mask_documents": True, "packing": "documents"},
    }
    shape = {"steps": STEPS, "batch_size": ROWS, "seq_len": LENGTH, "lr": 1e-3, "dtype": dtype, "kernels": kernels}
    return TrainConfig(**shape, **options[kind])


def batch(kind: str, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets; of answers and pairs the first half of each document is the question."""
    tokens = np.random.default_rng((7, step)).integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    targets = tokens[:, 1:].copy()
    if kind in ("sft", "dpo"):
        place = np.arange(LENGTH) % ANSWER
        targets[:, (place < ANSWER // 2) | (place == ANSWER - 1)] = -1
    return tokens[:, :-1].copy(), targets


def losses(kind: str, dtype: str, kernels: str) -> list[float]:
    """Of each step, from one start."""
    backend = subjects.make_backend("jax", MODEL, train_of(kind, dtype, kernels))
    assert kernels in backend.describe().kernels
    start = initial_params(MODEL, 0)
    if kind == "teacher":
        backend.learn_from(TEACHER, {name: 4 * value for name, value in initial_params(TEACHER, 3).items()}, TEACHER.vocab_size)
    state, fixed, found = backend.init(start), backend.place(start) if kind == "dpo" else None, []
    for step in range(STEPS):
        inputs, targets = batch(kind, step)
        documents = DOCUMENTS if kind in ("sft", "dpo") else None
        reference = None
        if fixed is not None:
            reference = -document_sums(np, backend.token_losses(fixed, inputs, targets, documents), documents, MOST)
        state, metrics = backend.train_step(state, inputs, targets, 1e-3, documents, reference)
        found.append(backend.read(metrics)["loss"])
    return found


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_training_with_kernels_is_the_plain_one(kind: str, dtype: str, record_property):
    plain, fast = (losses(kind, dtype, kernels) for kernels in ("plain", "pallas"))
    apart = float(np.max(np.abs(np.divide(fast, plain) - 1)))
    record_property("apart", apart)
    print(f"{kind} {dtype}: {apart:.1e} apart, losses {plain[0]:.4f} to {plain[-1]:.4f}")
    assert np.isfinite(fast).all()
    assert len(set(plain)) == STEPS, "it learns"
    assert apart <= GATES[kind] * (FLOAT8 if dtype == "float8" else 1)
