"""What only a GPU shows: cuDNN and CUDA kernels, bfloat16, and a resumed run with the bits of a whole one.

SMEDJAN_TEST_DEVICE=gpu python -m pytest -m gpu tests/conformance
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.params import initial_params
from smedjan_common.training.mesh import parse_mesh
from tests.conformance import subjects
from tests.conformance.compare import demand_equal_bits
from tests.conformance.gates import BFLOAT16

pytestmark = pytest.mark.gpu

MODEL = ModelConfig.build(vocab_size=512, dim=256, layers=2, heads=4, kv_heads=2, context_length=256)
BACKENDS = [name for name, package in (("jax", "jax"), ("mlx", "mlx")) if importlib.util.find_spec(package)]


def make(name: str, **changes):
    """A backend for a small model and the batches of a short run."""
    train = TrainConfig(**{"steps": 20, "batch_size": 8, "seq_len": 256, "lr": 1e-3, "dtype": "bfloat16"} | changes)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, MODEL.vocab_size, (8, 257)).astype(np.int32) for _ in range(20)]
    return subjects.make_backend(name, MODEL, train), [(draw[:, :-1], draw[:, 1:]) for draw in draws]


def run(backend, state, batches):
    """Train over the batches; the state and the losses."""
    losses = []
    for batch in batches:
        state, metrics = backend.train_step(state, *batch, 1e-3)
        losses.append(backend.read(metrics)["loss"])
    return state, losses


@pytest.mark.parametrize("name", BACKENDS)
def test_the_device_is_a_gpu_with_known_peak_and_memory(name):
    device = make(name)[0].describe()
    assert device.kind == "gpu"
    assert device.memory_bytes
    assert device.peak_flops


CHANGES = [
    {"attention": "plain"},
    {"dtype": "float32"},
    {"gradient_checkpointing": "full"},
    {"grad_accum": 4},
    {"deterministic": True},
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_fast_bfloat16_training_is_the_plain_one_within_bfloat16(name, change):
    start = initial_params(MODEL, 0)
    fast, batches = make(name)
    other, _ = make(name, **change)
    fast_losses, other_losses = (run(b, b.init(start), batches[:5])[1] for b in (fast, other))
    np.testing.assert_allclose(fast_losses, other_losses, rtol=BFLOAT16.loss)


@pytest.mark.parametrize("length", [128, 100], ids=["kernel", "products"])
@pytest.mark.parametrize("documents", [False, True])
def test_reproducible_attention_is_cudnns_with_gradients_of_the_same_bits(length, documents):
    import jax
    import jax.numpy as jnp

    from smedjan_jax.mixers import cudnn

    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 64) for heads in (4, 2, 2, 4)]
    *tensors, weight = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    numbers = jnp.asarray(np.cumsum(rng.random((2, length)) < 0.1, axis=1), jnp.int32) if documents else None

    def gradients(reproducible):
        def total(*tensors):
            return (cudnn.attention(*tensors, numbers, 0, reproducible) * weight).sum().astype(jnp.float32)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*tensors)

    first, second, plain = gradients(True), gradients(True), gradients(False)
    for a, b, c in zip(jax.tree.leaves(first), jax.tree.leaves(second), jax.tree.leaves(plain), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        a, c = np.asarray(a, np.float32), np.asarray(c, np.float32)
        assert np.abs(a - c).max() <= 0.02 * np.abs(c).max()


@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2", "tensor=2"])
def test_two_gpus_train_as_one_does_within_bfloat16(mesh):
    jax = pytest.importorskip("jax")
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    start = initial_params(MODEL, 0)
    one, batches = make("jax")
    two = type(one)(MODEL, one.train, parse_mesh(mesh))
    assert two.describe().count == 2
    losses = [run(b, b.init(start), batches[:5])[1] for b in (two, one)]
    np.testing.assert_allclose(*losses, rtol=BFLOAT16.loss)


def test_fused_attention_by_name_refuses_float32_in_jax():
    backend, batches = make("jax", dtype="float32", attention="fused")
    with pytest.raises(ConfigError, match="bfloat16"):
        run(backend, backend.init(initial_params(MODEL, 0)), batches[:1])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_resumed_run_has_the_bits_of_a_whole_one(name):
    """With --deterministic, in a process of its own, since XLA takes its flags when the device starts."""
    script = f"import tests.conftest; from tests.conformance import test_gpu; test_gpu.resume_and_compare({name!r})"
    env = os.environ | {"SMEDJAN_TEST_DETERMINISTIC": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def resume_and_compare(name: str) -> None:
    """20 steps at once, and 10 + save + restore + 10: the same losses and the same bits."""
    changes = {"gradient_checkpointing": "dots", "grad_accum": 2, "deterministic": True}
    backend, batches = make(name, **changes)
    whole, losses = run(backend, backend.init(initial_params(MODEL, 0)), batches)
    half, first = run(backend, backend.init(initial_params(MODEL, 0)), batches[:10])
    again, _ = make(name, **changes)
    resumed, second = run(again, again.restore(backend.save(half)), batches[10:])
    assert losses == first + second
    demand_equal_bits(again.save(resumed).params, backend.save(whole).params)


@pytest.mark.parametrize("name", BACKENDS)
def test_decoding_in_bfloat16_follows_the_whole_forward_pass(name):
    backend, _ = make(name)
    params = initial_params(MODEL, 0)
    ids = np.random.default_rng(1).integers(0, MODEL.vocab_size, 100).tolist()
    at_once, one_by_one = backend.decoder(params, 128), backend.decoder(params, 128)
    want = at_once.feed(ids)
    for token in ids:
        got = one_by_one.feed([token])
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
