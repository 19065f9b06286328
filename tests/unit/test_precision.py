"""What the programs set before a framework computes: float32 products that are float32, XLA's flags, a device that is there."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest

import smedjan_jax.precision
import smedjan_mlx.precision
from smedjan_common import cli
from tests.conftest import DEVICE
from tests.fakes.runs import ROOT, arguments, train_here, write_text

SETTINGS = ("JAX_DEFAULT_MATMUL_PRECISION", "MLX_ENABLE_TF32")
PROBES = {
    "jax": "import jax; print(jax.config.jax_default_matmul_precision)",
    "mlx": "import os; print(os.environ['MLX_ENABLE_TF32'])",
}
EXACT = {"jax": "highest", "mlx": "0"}
BACKENDS = [pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(name), reason="not installed")) for name in PROBES]


def fresh(code):
    """A process as a user starts it: without what the tests set."""
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("program", ["train", "generate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_multiplies_float32_in_float32(backend, program):
    assert fresh(f"from smedjan_{backend}.{program} import load; load(); {PROBES[backend]}") == EXACT[backend]


def test_what_the_user_sets_stands(monkeypatch):
    given = dict(zip(SETTINGS, ("tensorfloat32", "1"), strict=True))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    smedjan_jax.precision.exact_float32()
    smedjan_mlx.precision.exact_float32()
    assert given.items() <= os.environ.items()


def bfloat16_products():
    """Of the same matrices, by the function that the delta-rule mixers multiply with: (as it returns them, rounded to bfloat16)."""
    import numpy as np

    a, b = np.random.default_rng(0).standard_normal((2, 32, 32)).astype(np.float32)
    if importlib.util.find_spec("jax"):
        import jax.numpy as jnp

        from smedjan_jax.mixers.chunks import matmul

        product = matmul(jnp.asarray(a), jnp.asarray(b), jnp.bfloat16)
        yield "jax", np.asarray(product), np.asarray(product.astype(jnp.bfloat16).astype(jnp.float32))
    if importlib.util.find_spec("mlx"):
        import mlx.core as mx

        from smedjan_mlx.mixers.chunks import matmul

        product = matmul(mx.array(a), mx.array(b), mx.bfloat16)
        yield "mlx", np.array(product), np.array(product.astype(mx.bfloat16).astype(mx.float32))


def test_products_of_bfloat16_are_float32_sums_in_jax_and_rounded_ones_in_mlx_as_its_docstrings_say():
    for name, product, rounded in bfloat16_products():
        assert product.dtype == "float32"
        assert (product == rounded).all() == (name == "mlx"), "MLX has products with float32 sums now: use them, and strike the docstrings"


def test_a_flag_of_xla_is_taken_for_ours_only_if_it_has_the_whole_name():
    startup = pytest.importorskip("smedjan_jax.startup")
    flags = lambda given, wanted=startup.XLA_FLAGS: startup.missing_flags(given, wanted)  # noqa: E731
    assert flags("") == ["--xla_gpu_enable_triton_gemm=false"]
    assert flags("--xla_gpu_enable_triton_gemm_int4=true --xla_x=1") == ["--xla_gpu_enable_triton_gemm=false"]
    assert flags("--xla_gpu_enable_triton_gemm=true") == []
    assert flags("--xla_gpu_enable_triton_gemm", (*startup.XLA_FLAGS, startup.DETERMINISTIC)) == ["--xla_gpu_deterministic_ops=true"]


def test_hosts_of_cpus_sum_in_one_order_unless_the_user_says_otherwise(monkeypatch):
    startup = pytest.importorskip("smedjan_jax.startup")
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    startup.add_flags(startup.CPU_HOSTS)
    assert os.environ["XLA_FLAGS"] == "--xla_x=1 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    startup.add_flags(["--xla_x=2"])
    assert os.environ["XLA_FLAGS"].startswith("--xla_x=1 --xla_cpu")


@pytest.mark.skipif(DEVICE == "gpu", reason="CUDA is there")
@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="not installed")
def test_a_device_that_is_not_there_is_refused_in_three_sentences(tmp_path):
    assert train_here(*arguments(write_text(tmp_path), tmp_path / "run", 1)) == 0
    words = [sys.executable, "-m", "smedjan_jax.generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "the"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2
    what, why, fix = done.stderr.splitlines()
    assert what == "error: JAX cannot start on 'cuda', which JAX_PLATFORMS asks for."
    assert why.strip()
    assert "smedjan[cuda12]" in fix
    assert "JAX_PLATFORMS=cpu" in fix


@pytest.mark.parametrize("program", ["train", "generate"])
@pytest.mark.parametrize(("backend", "missing"), [("mlx", "mlx"), ("jax", "flax")])
def test_a_program_whose_framework_is_missing_says_what_the_command_says(backend, missing, program, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest))
    words = {"train": ["--dataset", "x.txt"], "generate": ["--checkpoint", "x"]}[program]
    assert cli.main([program, *words, "--backend", backend]) == 2
    of_the_command = capsys.readouterr().err
    assert importlib.import_module(f"smedjan_{backend}.{program}").main(words) == 2
    assert capsys.readouterr().err == of_the_command
    assert of_the_command.startswith(
        f"error: The backend {backend} is not installed.\n       Missing: {missing}.\n       Install it: pip install 'smedjan["
    )
