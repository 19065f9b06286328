"""Which backend runs a command: MLX on Apple Silicon, else JAX where it is installed, else MLX; or the one that --backend names."""

import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable

from smedjan_common.errors import ConfigError, near, reason, run_command, unknown

BACKENDS = ("jax", "mlx")
_INSTALL = {
    "jax": "pip install 'smedjan[cpu]', with [cuda12] or [cuda13] for an NVIDIA GPU",
    "mlx": "pip install 'smedjan[mlx]', with [mlx-cuda12] or [mlx-cuda13] for an NVIDIA GPU",
}
_PACKAGES = {"jax": ("jax", "flax", "optax"), "mlx": ("mlx",)}


def delegate(command: str, argv: list[str]) -> int:
    """Run `smedjan_{backend}.{command}`, importing nothing of the other backend."""

    def call() -> int:
        name = default_backend() if _asks_for_help(argv) else choose(argv)
        return importlib.import_module(f"smedjan_{name}.{command}").main(argv)

    return run_command(call)


def program(name: str, argv: list[str] | None, run: Callable[[], int]) -> int:
    """Run a program of the backend `name`, however it was started, if its packages are installed; returns the exit code."""

    def call() -> int:
        if not _asks_for_help(sys.argv[1:] if argv is None else argv):
            check_installed(name)
        try:
            return run()
        except ImportError as error:
            if (error.name or "").startswith(("smedjan", "convert")):
                raise
            raise ConfigError(
                f"The backend {name} is installed, but does not load.", reason(error), f"Install it again: {_INSTALL[name]}."
            ) from error

    return run_command(call)


def choose(argv: list[str]) -> str:
    """The backend that a command line asks for (the last one, as for every flag), or the machine's."""
    asked = "auto"
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--backend":
            value = value if equals else (argv[position + 1] if position + 1 < len(argv) else "")
            if value not in (*BACKENDS, "auto"):
                raise unknown("--backend", value, [*BACKENDS, "auto"])
            asked = value
    return default_backend() if asked == "auto" else asked


def default_backend() -> str:
    """The machine's own."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mlx"
    return "jax" if installed("jax") or not installed("mlx") else "mlx"


def installed(name: str) -> bool:
    """Whether the packages of a backend can be imported; imports none of them."""
    return all(importlib.util.find_spec(package) for package in _PACKAGES[name])


def check_installed(name: str) -> None:
    """Raises ConfigError when they cannot."""
    if not installed(name):
        missing = [package for package in _PACKAGES[name] if not importlib.util.find_spec(package)]
        raise ConfigError(f"The backend {name} is not installed.", f"Missing: {', '.join(missing)}.", f"Install it: {_INSTALL[name]}.")


def check_backend(name: str, asked: str) -> None:
    """Raises ConfigError when --backend names another backend than the program that runs."""
    if asked not in ("auto", name):
        fix = f"Run `smedjan train --backend {asked}`." if asked in BACKENDS else near(asked, ["auto", *BACKENDS])
        raise ConfigError(f"--backend {asked} does not fit: this is the program of {name}.", "", fix)


def _asks_for_help(argv: list[str]) -> bool:
    return "-h" in argv or "--help" in argv
