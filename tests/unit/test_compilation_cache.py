"""XLA's compilation cache: where it is, on a CPU too, and that a second process takes what the first one compiled."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("jax", reason="jax is not installed here")

PROGRAM = """
import jax, jax.numpy as jnp
from smedjan_jax.startup import configure
configure()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None)
jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
print(jax.config.values["jax_compilation_cache_dir"], len(hits))
"""


def run(**env: str) -> tuple[str, int]:
    """Where the cache of a process is, and how often it was taken."""
    env = {**{name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}, "JAX_PLATFORMS": "cpu", **env}
    out = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    folder, hits = out.rsplit(maxsplit=1)
    return folder, int(hits)


def test_a_second_process_on_a_cpu_takes_what_the_first_compiled(tmp_path: pathlib.Path):
    first, second = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first[0] == second[0]
    folder = pathlib.Path(first[0])
    assert folder.parent == tmp_path / "smedjan" / "jax"
    assert folder.name.startswith("cpu-")
    assert first[1] == 0
    assert second[1] > 0


def test_a_cache_that_the_environment_names_is_left_alone(tmp_path: pathlib.Path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"), XDG_CACHE_HOME=str(tmp_path / "x"))[0] == str(tmp_path / "own")
    assert not (tmp_path / "x").exists()
