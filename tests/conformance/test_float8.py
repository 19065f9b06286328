"""float8 by its formula: what is multiplied, what each product gives, what takes part, and a run that goes on bit for bit.

A CPU has no float8 matmul; there the same numbers of 8 bits are multiplied in bfloat16, and this is that form beside ml_dtypes.
"""

import dataclasses
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.params import initial_params
from tests.conformance.compare import demand_equal_bits
from tests.fakes.runs import ROOT, arguments, write_text

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

MODEL = ModelConfig.build(vocab_size=300, context_length=32, dim=128, layers=1, heads=2, kv_heads=2, ffn_dim=256, mixer=("attention",))
TRAIN = TrainConfig(steps=4, batch_size=2, seq_len=16, lr=1e-3, dtype="float8")
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def formula(x: np.ndarray, dtype: str) -> tuple[np.ndarray, float]:
    """The numbers of 8 bits, widened, and the scale, by ml_dtypes."""
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max() / LARGEST[dtype])) + 1)
    return np.clip(x / scale, -LARGEST[dtype], LARGEST[dtype]).astype(getattr(ml_dtypes, dtype)).astype(np.float64), scale


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((3, 16, 128)), 1e-7 * rng.standard_normal((3, 16, 256))
    return x, 0.02 * rng.standard_normal((256, 128)), dy


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("size", [1e-25, 3e-9, 1.0, 448.0, 7e6])
def test_numbers_of_8_bits_are_those_of_ml_dtypes_and_the_scale_a_power_of_two(dtype: str, size: float):
    from smedjan_jax.float8 import quantised

    x = (np.random.default_rng(1).standard_normal((64, 32)) * size).astype(np.float32)
    got, scale = quantised(jnp.asarray(x), getattr(jnp, dtype))
    want, power = formula(x.astype(np.float64), dtype)
    assert float(scale) == power
    assert np.log2(power) % 1 == 0
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got).astype(np.float64), want)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad: float):
    from smedjan_jax.products import linear

    x = jnp.ones((2, 128), jnp.bfloat16).at[1, 3].set(bad)
    assert not np.isfinite(np.asarray(linear(x, [jnp.ones((128, 128))], float8="plain"), np.float32)).all()


def test_zeros_are_zeros():
    from smedjan_jax.products import linear

    assert not np.asarray(linear(jnp.zeros((2, 128), jnp.bfloat16), [jnp.zeros((128, 128))], float8="plain"), np.float32).any()


def test_the_three_products_are_those_of_the_formula():
    """Against float64; the products are rounded to bfloat16 once, which is 2^-9 of each."""
    from smedjan_jax.products import linear

    x, weight, dy = (each.astype(ml_dtypes.bfloat16) for each in arrays())
    y, backward = jax.vjp(lambda x, w: linear(x, [w], float8="plain"), jnp.asarray(x), jnp.asarray(weight, jnp.float32))
    dx, dweight = backward(jnp.asarray(dy))
    (x8, a), (w8, b) = (formula(each.astype(np.float64), "float8_e4m3fn") for each in (x, weight))
    dy8, c = formula(dy.astype(np.float64), "float8_e5m2")
    pairs = {
        "y": (y, a * b * (x8 @ w8.T)),
        "dx": (dx, c * b * (dy8 @ w8)),
        "dW": (dweight, c * a * np.tensordot(dy8, x8, ((0, 1), (0, 1)))),
    }
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for name, (got, want) in pairs.items():
        off = np.abs(np.asarray(got, np.float64) - want) / np.abs(want).max()
        assert off.max() < 2**-8, name


def test_large_matrices_of_the_blocks_take_part_and_nothing_else():
    from flax import nnx

    from smedjan_jax.model import Model
    from smedjan_jax.modules import Linear

    model = dataclasses.replace(MODEL, mixer=("linear",), layers=1, ffn=("experts",), experts=4, experts_per_token=2, shared_experts=1)
    params = {name: jnp.asarray(value) for name, value in initial_params(model, 0).items()}

    def taken(dtype: str) -> set[str]:
        modules = nnx.iter_modules(Model(model, params, dtype))
        return {str(path[-1]) for path, module in modules if isinstance(module, Linear) and module.float8}

    assert taken("float8") == {"q_proj", "k_proj", "v_proj", "gate_proj", "o_proj"} | {"up_proj", "down_proj"}
    assert taken("bfloat16") == set()
    built = Model(model, params, "float8")
    assert not built.layers[0].mixer.decay_proj.float8, "two rows: small"
    assert not built.layers[0].ffn.gate_proj.float8, "stacked matrices of experts: grouped products stay bfloat16"


def test_training_in_float8_follows_bfloat16_and_goes_on_bit_for_bit():
    from smedjan_jax.backend import JaxBackend

    rows = np.random.default_rng(0).integers(0, 300, (4, 2, 17)).astype(np.int32)

    def steps(backend, state, some):
        losses = []
        for batch in some:
            state, metrics = backend.train_step(state, batch[:, :-1], batch[:, 1:], 1e-3)
            losses.append(backend.read(metrics)["loss"])
        return state, losses

    start, ends = initial_params(MODEL, 0), {}
    for dtype in ("bfloat16", "float8"):
        backend = JaxBackend(MODEL, dataclasses.replace(TRAIN, dtype=dtype))
        state, losses = steps(backend, backend.init(start), rows)
        ends[dtype] = backend.save(state), losses
    assert ends["float8"][1] != ends["bfloat16"][1]
    np.testing.assert_allclose(ends["float8"][1], ends["bfloat16"][1], rtol=2e-3)
    half = backend.save(steps(backend, backend.init(start), rows[:2])[0])
    went_on = backend.save(steps(backend, backend.restore(half), rows[2:])[0])
    for kind in ("params", "optimizer"):
        demand_equal_bits(getattr(went_on, kind), getattr(ends["float8"][0], kind), kind)


def test_weights_are_quantised_once_a_step():
    """Counted in the program: each joined matrix and each input once, the gradients once: 3 for each of the 4 products of a block."""
    from smedjan_jax.backend import JaxBackend

    backend = JaxBackend(MODEL, TRAIN)
    tokens, rate = jax.ShapeDtypeStruct((2, 16), np.int32), jax.ShapeDtypeStruct((), np.float32)
    program = backend._train_step.lower(backend.shapes, (tokens, tokens, None, None), rate).as_text()
    count = {name: program.count(f"xf32>) -> tensor<{shape}x{name}>") for name in ("f8E4M3FN",) for shape in ("384x128",)}
    assert count == {"f8E4M3FN": 1}
    assert sum("stablehlo.convert" in line and line.rstrip().endswith("xf8E4M3FN>") for line in program.splitlines()) == 8
    assert sum("stablehlo.convert" in line and line.rstrip().endswith("xf8E5M2>") for line in program.splitlines()) == 4


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may have it")
def test_float8_is_refused_by_name_where_it_is_not(tmp_path):
    words = arguments(write_text(tmp_path), tmp_path / "run", 1, "--dtype", "float8", "--dim", 128)
    done = subprocess.run([sys.executable, "-m", "smedjan_jax.train", *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    for words in ("--dtype float8 cannot run here.", "Hopper", "Take --dtype bfloat16"):
        assert words in done.stderr


def test_mlx_refuses_float8_before_it_looks_at_the_data():
    from smedjan_common.training.precision import PRECISIONS, check_precision

    for dtype in PRECISIONS.keys() - {"float8"}:
        check_precision("mlx", dtype)
    check_precision("jax", "float8")
    with pytest.raises(ConfigError, match="--dtype float8 is not for the backend mlx"):
        check_precision("mlx", "float8")


def test_a_width_that_float8_cannot_take_is_refused():
    with pytest.raises(ConfigError, match="does not work with --dim 120"):
        TRAIN.check_model(dataclasses.replace(MODEL, dim=120, heads=2, ffn_dim=256))
