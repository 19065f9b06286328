"""Fast paths and their plain twins: attention kernels, compiled MLX, rotary embedding far out. An explicit name never falls back."""

import dataclasses
import shutil

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.rope import turnings
from smedjan_common.training.config import ATTENTION
from tests import conftest
from tests.conformance import checks, subjects
from tests.conformance.cases import CASES, CHUNK, Case, train_config
from tests.conformance.compare import Difference, demand, demand_equal_bits, largest, tensors
from tests.conformance.gates import FLOAT32

WITH_KERNELS = [name for name, case in CASES.items() if any(MIXERS[mixer].rope for mixer in case.model.mixer)]


@pytest.mark.parametrize("key", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in WITH_KERNELS])
def test_every_attention_that_runs_here_gives_the_logits_of_the_plain_one(backend: str, key: str):
    case = CASES[key]
    plain = subjects.logits(backend, case.model, case.params, case.tokens)
    compared = []
    for name in ATTENTION:
        try:
            got = subjects.logits(backend, case.model, case.params, case.tokens, attention=name)
        except ConfigError:
            if name != "fused":  # only a kernel asked for by name may refuse
                raise
            continue
        compared.append(Difference(f"{backend} logits with {name} attention", largest(got, plain), case.tolerance.forward))
    demand(compared)


def test_every_attention_that_runs_here_gives_the_gradients_of_the_plain_one(backend: str, default_case: Case):
    case, batch = default_case, default_case.batches[0]
    plain = subjects.loss_and_gradients(backend, case.model, case.train, case.params, batch)[1]
    auto = subjects.loss_and_gradients(backend, case.model, train_config(attention="auto"), case.params, batch)[1]
    demand(tensors(auto, plain, case.tolerance.gradient, f"{backend}, auto attention, gradient of "))


def test_rotary_embedding_is_the_same_in_both_backends_far_out(both_backends):
    model = ModelConfig.build(vocab_size=64, dim=256, layers=1, heads=4, context_length=65536)
    x_BTHK = np.random.default_rng(0).standard_normal((1, 8, model.heads, model.head_dim)).astype(np.float32)
    turned, (turning,) = {}, turnings(model)
    for name in both_backends:
        heads_first = name == "mlx"
        x = framework_array(name, x_BTHK.swapaxes(1, 2) if heads_first else x_BTHK)
        out = np.asarray(subjects.module(name, "modules").Rope(model, 8, framework_array(name, np.array([60_000], np.int32)))(x, turning))
        turned[name] = out.swapaxes(1, 2) if heads_first else out
    demand([Difference("turned", largest(turned["mlx"], turned["jax"]), FLOAT32.one_op)])


def framework_array(name: str, value: np.ndarray):
    return subjects.framework(name).array(value)


@pytest.mark.skipif(shutil.which("g++") is None and conftest.DEVICE == "cpu", reason="mx.compile on a CPU needs g++")
def test_compiled_mlx_trains_as_the_uncompiled(default_case: Case, monkeypatch: pytest.MonkeyPatch):
    """On a GPU MLX compiles its steps. Here one layer is compiled for the CPU (cold: about 20 s), and must give the same run."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed here")
    case = default_case
    model = dataclasses.replace(case.model, layers=max(1, len(case.model.mixer)))
    params = {name: value for name, value in case.params.items() if name in subjects.tensor_names(model)}
    plain = subjects.train("mlx", model, case.train, params, case.batches[:3])
    backend, built = subjects.module("mlx", "backend"), []
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(backend, "Model", lambda *args, model_class=backend.Model: built.append(args) or model_class(*args))
    mx.enable_compile()
    try:
        side = subjects.make_backend("mlx", model, case.train)
        state, losses = side.init(params), []
        for step, batch in enumerate(case.batches[:3]):
            state, metrics = side.train_step(state, *batch, lr=subjects.learning_rate(case.train, step))
            losses.append(side.read(metrics)["loss"])
        snapshot = side.save(state)
    finally:
        if conftest.DEVICE == "cpu":
            mx.disable_compile()
    assert len(built) == 1, "a compiled step is traced once"
    worst = max(abs(a / b - 1) for a, b in zip(losses, plain.losses, strict=True))
    demand([Difference("loss", worst, FLOAT32.loss), *tensors(snapshot.params, plain.snapshot.params, FLOAT32.loss)])


def test_loss_in_chunks_is_the_loss_in_one(backend: str, default_case: Case, monkeypatch: pytest.MonkeyPatch):
    """Too many logits at once are made in pieces, the last perhaps shorter, down to one token each: loss and gradients stay."""
    case, batch = default_case, default_case.batches[0]
    whole_loss, whole = subjects.loss_and_gradients(backend, case.model, case.train, case.params, batch)
    for chunks in (4, 7, batch[0].size):
        monkeypatch.setattr(subjects.module(backend, "loss"), "loss_chunks", lambda tokens, vocab, chunks=chunks: chunks)
        config = dataclasses.replace(case.train, seed=chunks)  # another configuration, so nothing compiled before is used
        part_loss, part = subjects.loss_and_gradients(backend, case.model, config, case.params, batch)
        demand([Difference("loss", abs(part_loss / whole_loss - 1), FLOAT32.same_arithmetic), *tensors(part, whole, FLOAT32.one_op)])


def test_logits_do_not_depend_on_the_chunk_size(backend: str, default_case: Case):
    demand(checks.chunk_sizes(backend, default_case, [CHUNK, 2, 7, 64]))


def test_asking_twice_gives_the_same_bits(backend: str, default_case: Case):
    sides = [subjects.logits(backend, default_case.model, default_case.params, default_case.tokens) for _ in range(2)]
    demand_equal_bits({"logits": sides[0]}, {"logits": sides[1]})
