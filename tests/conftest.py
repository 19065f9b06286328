"""Settings that must stand before a framework is imported: float32 as the programs have it, on the CPU unless asked otherwise.

SMEDJAN_TEST_DEVICE is cpu, metal (MLX on the GPU of Apple Silicon, where this is the default; JAX on the CPU), or gpu, which runs
the same tests on the machine's accelerator. One thread per process: the models are tiny, two pytest workers share two cores, and
the order in which sums are taken, hence their bits, does not depend on the machine's cores.

Property tests draw the same cases on every machine; `make soak` lets them search: pytest -m hypothesis --hypothesis-profile=search.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import pathlib
import platform
import sys

import hypothesis
import pytest
from hypothesis.internal.conjecture import providers

import smedjan_jax.precision

hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")
providers._get_local_constants = lambda: providers._local_constants  # else cases depend on which modules other tests have imported

DEVICES = ("cpu", "metal", "gpu")
DEVICE = os.environ.get("SMEDJAN_TEST_DEVICE") or ("metal" if (sys.platform, platform.machine()) == ("darwin", "arm64") else "cpu")

smedjan_jax.precision.exact_float32()  # as the programs do
if importlib.util.find_spec("mlx"):
    importlib.import_module("smedjan_mlx.precision").exact_float32()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if DEVICE != "gpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    # no word without dashes may stand here: XLA reads no flag behind it
    single = "--xla_cpu_multi_thread_eigen=false"
    if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        single += " --xla_backend_optimization_level=0"  # tests mostly compile: those that train take two fifths less CPU
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {single}".strip()
elif os.environ.get("SMEDJAN_TEST_DETERMINISTIC", "1") == "1":
    # a repeated run has the same bits only without atomic sums; cuDNN attention does not run with this flag (jaxlib 0.11.2)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
if DEVICE == "cpu":
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")  # on a CPU mx.compile calls g++; one test compiles all the same
    with contextlib.suppress(ImportError):  # on a Mac the default is the GPU
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE not in DEVICES:
        raise pytest.UsageError(f"SMEDJAN_TEST_DEVICE is {DEVICE!r}: it takes {', '.join(DEVICES)}")
    if DEVICE == "metal" and not _has_metal():
        raise pytest.UsageError("MLX finds no Metal device here, and the tests are to run on it: SMEDJAN_TEST_DEVICE=cpu make test")
    config.addinivalue_line("markers", "xdist_group(name): tests that share compiled functions (pytest -n 2 --dist loadgroup)")
    config.addinivalue_line("markers", "oracle: needs the `oracle` extra (torch, transformers)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: SMEDJAN_TEST_DEVICE=gpu"))


MAPS, MOST_MAPS = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")  # of Linux
LOOK_EVERY = 20  # tests
_tests_run = 0


def pytest_runtest_teardown() -> None:
    """Drop JAX's compiled functions before they use up the process's memory maps: each takes dozens, Linux gives 65,530, and where none
    is left XLA ends the process while it compiles."""
    global _tests_run
    _tests_run += 1
    jax = sys.modules.get("jax")
    if jax and _tests_run % LOOK_EVERY == 0 and MOST_MAPS.exists() and _lines(MAPS) > int(MOST_MAPS.read_text()) // 2:
        jax.clear_caches()
        gc.collect()


def _has_metal() -> bool:
    import mlx.core as mx

    return mx.metal.is_available() and mx.default_device() == mx.gpu


def _lines(file: pathlib.Path) -> int:
    return file.read_bytes().count(b"\n")
