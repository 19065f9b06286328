"""What must be set before JAX starts its device: XLA's flags, the share of the memory, the compilation cache, exact float32 products."""

import os
import pathlib
from collections.abc import Sequence

import jax

from smedjan_common.errors import ConfigError
from smedjan_common.machine import processor
from smedjan_jax.precision import exact_float32

# measured on an H100, sizes small to xxl: with cuBLAS a training step is 8-11 % faster than with XLA's Triton matmuls
XLA_FLAGS = ("--xla_gpu_enable_triton_gemm=false",)
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# with it collectives that do not depend on each other came in another order on one host than on the other: of two hosts that learned from a
# teacher over tensor=2, 3 of 4 runs ended by a mismatch in gloo, and none of 7 without
CPU_HOSTS = ("--xla_cpu_enable_concurrency_optimized_scheduler=false",)


def configure(deterministic: bool = False) -> None:
    """Settings that must stand before JAX starts its device: XLA flags, memory share, compilation cache, float32 products. Idempotent.

    What the user's environment says already is left alone. `deterministic` fixes the algorithms of a GPU and the order of their sums.
    Raises ConfigError where the device that JAX_PLATFORMS asks for is not there.
    """
    exact_float32()
    add_flags((*XLA_FLAGS, DETERMINISTIC) if deterministic else XLA_FLAGS)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "smedjan" / "jax"
        # what is compiled for a CPU holds its instructions: a home that machines share has a folder for each kind of them
        folder = cache if _platform() == "gpu" else cache / f"cpu-{processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def add_flags(wanted: Sequence[str]) -> None:
    """Set XLA flags for the devices that this process starts from here on, but for those that the environment sets, whatever to."""
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *missing_flags(given, wanted)]).strip()


def missing_flags(given: str, wanted: Sequence[str]) -> list[str]:
    """Those of the `wanted` XLA flags that `given`, the value of XLA_FLAGS, does not set already."""
    names = {word.partition("=")[0] for word in given.split()}
    return [flag for flag in wanted if flag.partition("=")[0] not in names]


def _platform() -> str:
    """Where JAX computes: "cpu", "gpu"."""
    try:
        return jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # an assertion where CUDA is asked for and the plugin is not installed
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ConfigError(
            f"JAX cannot start on {asked!r}, which JAX_PLATFORMS asks for." if asked else "JAX cannot start on any device here.",
            str(error).splitlines()[0].rstrip(".") + "." if str(error) else "It finds no such device, or no support for it is installed.",
            "Install smedjan[cuda12] or smedjan[cuda13] for an NVIDIA GPU, or set JAX_PLATFORMS=cpu.",
        ) from error
