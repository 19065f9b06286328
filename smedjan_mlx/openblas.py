"""MLX on a Linux CPU: start the program again with Debian's OpenBLAS, which multiplies matrices 15 to 80 times faster than the
reference BLAS in MLX's wheel (6 GFLOP/s against 90-200, measured on x86).

A library can be put in front only when a process starts, hence the second start: the same command, LD_PRELOAD set, before mlx is
imported. The number of threads is fixed with it, so that sums keep their order and results their bits. SMEDJAN_NO_OPENBLAS=1 turns
all this off; on macOS, with MLX's CUDA build, and inside another program (tests, notebooks) nothing is done.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

from smedjan_common.streams import put

OFF, STARTED = "SMEDJAN_NO_OPENBLAS", "SMEDJAN_OPENBLAS_STARTED"
PLACES = ("/usr/lib/*/openblas-pthread/libopenblas.so.0", "/usr/lib64/libopenblasp.so.0", "/usr/lib/*/openblas-openmp/libopenblas.so.0")
CUDA_BUILDS = ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")


def preload(argv: list[str]) -> None:
    """Replace this process by the same command with OpenBLAS in front, where that helps; says so in one line. Else returns."""
    asks_for_help = "-h" in argv or "--help" in argv
    if sys.platform != "linux" or os.environ.get(OFF) == "1" or asks_for_help or "mlx" in sys.modules or not is_program():
        return
    if "openblas" in os.environ.get("LD_PRELOAD", "") or STARTED in os.environ or has_cuda_build():
        return
    library = find_library()
    if library is None:
        os.environ[STARTED] = "none"  # said once, also to processes started from here
        advice = "Debian's package libopenblas0-pthread makes it several times faster."
        put(f"note: MLX will be slow on this CPU, as its own BLAS is. {advice}", sys.stderr)
        return
    put(f"note: MLX multiplies matrices with OpenBLAS here ({OFF}=1: without).", sys.stderr)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(library))


def environment(library: Path) -> dict[str, str]:
    """This process's environment with the library in front and a fixed number of threads."""
    before = os.environ.get("LD_PRELOAD")
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    preloads = f"{library}:{before}" if before else str(library)
    return os.environ | {"LD_PRELOAD": preloads, "OPENBLAS_NUM_THREADS": threads, STARTED: str(library)}


def find_library() -> Path | None:
    """OpenBLAS where distributions put it."""
    return next((path for place in PLACES for path in sorted(Path("/").glob(place.lstrip("/")))), None)


def has_cuda_build() -> bool:
    """Whether MLX runs on an NVIDIA GPU here; its package is installed then."""
    for name in CUDA_BUILDS:
        try:
            importlib.metadata.version(name)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def is_program() -> bool:
    """Whether this process was started as one of smedjan's own commands or measurements, so that it may be started again."""
    script = Path(sys.argv[0])
    return script.name in ("smedjan", "smedjan.exe") or script.parent.name in ("smedjan_mlx", "smedjan_common", "bench")
