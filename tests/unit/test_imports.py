"""Who imports whom: imports point down only, without circles; smedjan_common imports no array framework, the backends do not import each
other, and start-up stays short."""

import ast
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from tests.import_graph import Import, circles, needless, read, unexplained, upward

ROOT = pathlib.Path(__file__).parents[2]
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "mlx", "torch", "transformers", "tensorflow"}
FORBIDDEN = {
    "smedjan_common": FRAMEWORKS | {"smedjan_jax", "smedjan_mlx", "convert"},
    "smedjan_jax": {"mlx", "smedjan_mlx", "torch", "transformers"},
    "smedjan_mlx": {"jax", "jaxlib", "flax", "optax", "orbax", "smedjan_jax", "torch", "transformers"},
}
LIGHT = (
    "smedjan_common.config",
    "smedjan_common.model.adapters",
    "smedjan_common.model.params",
    "smedjan_common.errors",
    "smedjan_common.training.schedule",
    "smedjan_common.model.flops",
)

IMPORTS = read()

# from the ground up; rooms of one floor do not import one another
FLOORS = (
    ("smedjan_common", "hints", "machine", "nearby", "optional", "streams"),  # the package by itself: its version
    ("errors",),
    ("command_line", "files", "workers"),
    ("ray_workers",),
    ("executors", "remote", "settings"),
    ("model", "text"),
    ("training", "tokenizer"),
    ("backend",),
    ("reference", "data", "config"),  # config: a face of two configurations
    ("checkpoint", "reporting"),
    ("inference",),
    ("chat", "evaluation", "serving"),
    ("run",),
    ("commands",),
    ("smedjan_jax", "smedjan_mlx"),
    ("convert",),
    ("cli",),
)

# (file, what it imports inside a function or for a type checker alone) -> why not at the top of the file
HELP = "`COMMAND --help` answers within 0.3 s"
NUMPY = "model/ and training/ import without NumPy, which takes 70 ms"
PACKAGE = "an optional package"
REASONS = {
    ("smedjan_common.cli", "smedjan_common*"): HELP,
    ("smedjan_common.commands.*", "smedjan_common.*"): HELP,
    ("convert.cli", "convert.*"): HELP,
    ("convert.cli", "smedjan_common.*"): HELP,
    ("smedjan_common.model.params", "numpy"): NUMPY,
    ("smedjan_common.model.adapters", "numpy"): NUMPY,
    ("smedjan_common.model.params", "smedjan_common.model.initializers"): NUMPY,
    ("smedjan_common.model.params", "concurrent.futures"): "used with NumPy only, and takes 5 ms",
    ("smedjan_common.files.atomic_directory", "ctypes"): "takes 10 ms, and only an exchange of two directories calls it",
    ("smedjan_common.tokenizer.tokenizer", "smedjan_common.*"): "who only encodes needs neither the trainer nor a writer of files",
    ("smedjan_common.tokenizer.tokenizer", "smedjan_common.tokenizer.library"): "most tokenizers need no other library",
    ("smedjan_common.tokenizer.library", "tokenizers"): PACKAGE,
    ("smedjan_common.tokenizer.library", "smedjan_common.files.atomic_file"): "who only encodes needs no writer of files",
    ("smedjan_common.tokenizer.chat", "smedjan_common.tokenizer.chat_jinja"): "built-in templates need no Jinja",
    ("smedjan_common.tokenizer.chat_jinja", "smedjan_common.tokenizer.chat_sandbox"): f"{PACKAGE}, jinja2",
    ("smedjan_common.tokenizer.*", "regex"): "only text outside the array rules, and patterns of others, are split with it",
    ("smedjan_jax.mixers.*", "smedjan_jax.kernels.*"): "Pallas takes 0.3 s to import, and only a run on a GPU has kernels",
    ("smedjan_jax.loss", "smedjan_jax.kernels.*"): "the same",
    ("smedjan_jax.modules", "smedjan_jax.kernels.norm"): "the same",
    ("smedjan_jax.products", "smedjan_jax.kernels.float8"): "the same",
    ("smedjan_jax.ffn", "smedjan_jax.swiglu"): "the same, which it imports",
    ("smedjan_jax.held", "smedjan_jax.swiglu"): "the same",
    ("smedjan_common.reporting.plot", "matplotlib.*"): "takes a second, at the end of a run",
    ("smedjan_common.reporting.progress", "rich.*"): "takes 60 ms, and only a terminal shows it",
    ("smedjan_common.reporting.live", "rich.*"): "takes 150 ms, and only a terminal shows it",
    ("smedjan_common.reporting.displays", "smedjan_common.reporting.live"): "likewise",
    ("smedjan_common.reporting.trackers.*", "tensorboardX"): PACKAGE,
    ("smedjan_common.reporting.trackers.*", "wandb"): PACKAGE,
    ("smedjan_common.reporting.trackers.*", "trackio"): PACKAGE,
    ("smedjan_common.reporting.trackers.*", "mlflow.*"): PACKAGE,
    ("smedjan_common.run.given", "smedjan_common.run.config_file"): "only --config needs it, and TOML",
    ("smedjan_common.run.given", "smedjan_common.settings"): "the same",
    ("smedjan_common.text.compressed", "compression"): "Python 3.14 has it",
    ("smedjan_common.text.compressed", "zstandard"): PACKAGE,
    ("smedjan_common.remote.store", "fsspec"): PACKAGE,
    ("smedjan_common.executors", "smedjan_common.ray_workers"): "only --executor ray needs it",
    ("smedjan_common.ray_workers", "ray"): PACKAGE,
    ("smedjan_common.remote.store", "aiohttp"): PACKAGE,
    ("smedjan_common.text.*", "smedjan_common.remote.*"): "only addresses are read from a store",
    ("smedjan_common.data.token_file", "smedjan_common.data.fetched"): "the same",
    ("smedjan_common.text.rows", "pyarrow"): PACKAGE,
    ("smedjan_common.evaluation.tasks", "yaml"): PACKAGE,
    ("smedjan_common.text.chat_corpus", "yaml"): PACKAGE,
    ("smedjan_common.evaluation.harness", "yaml"): PACKAGE,
    ("smedjan_common.evaluation.harness", "lm_eval*"): PACKAGE,
    ("smedjan_common.text.rows", "datasets"): PACKAGE,
    ("smedjan_common.checkpoint.tensors", "ml_dtypes"): "only bfloat16 needs it",
    ("convert.push", "convert.*"): HELP,
    ("convert.push", "smedjan_common.*"): HELP,
    ("convert.gguf_file", "gguf"): PACKAGE,
    ("convert.hub", "huggingface_hub*"): PACKAGE,
    ("convert.safetensors_file", "safetensors"): "only files of others are read with it",
    ("convert.orbax", "smedjan_jax.checkpoint"): "a framework",
    ("smedjan_jax.checkpoint", "orbax.checkpoint"): "takes 2 s, and only checkpoints of its format need it",
    ("smedjan_jax.mixers.cudnn", "jax.*"): "a kernel that only a GPU has",
    ("smedjan_common.chat.reader", "readline"): "only a terminal has it, and not every Python",
    ("smedjan_jax.chat", "smedjan_jax.backend"): "a framework, likewise",
    ("smedjan_mlx.chat", "smedjan_mlx.backend"): "a framework, likewise",
    ("smedjan_jax", "*"): "importing the package imports neither a framework nor NumPy; its functions do",
    ("smedjan_mlx", "*"): "likewise",
    ("smedjan_jax.generate", "smedjan_jax.backend"): "a framework: everything that can be refused is refused before it is imported",
    ("smedjan_jax.serve", "smedjan_jax.backend"): "a framework, likewise",
    ("smedjan_jax.eval", "smedjan_jax.backend"): "a framework, likewise",
    ("smedjan_jax.train", "smedjan_jax.backend"): "a framework, likewise",
    ("smedjan_jax.train", "smedjan_jax.startup"): "a framework, likewise",
    ("smedjan_jax.train", "smedjan_jax.hosts"): HELP,
    ("smedjan_jax.hosts", "jax*"): "a framework, likewise",
    ("smedjan_jax.hosts", "smedjan_jax.startup"): "likewise",
    ("smedjan_mlx.train", "smedjan_mlx.hosts"): HELP,
    ("smedjan_mlx.hosts", "mlx*"): "a framework, likewise",
    ("smedjan_mlx.hosts", "smedjan_mlx.spread"): "likewise",
    ("smedjan_mlx.generate", "smedjan_mlx.backend"): "a framework, likewise",
    ("smedjan_mlx.serve", "smedjan_mlx.backend"): "a framework, likewise",
    ("smedjan_mlx.eval", "smedjan_mlx.backend"): "a framework, likewise",
    ("smedjan_mlx.train", "smedjan_mlx.backend"): "a framework, likewise",
}


def modules(package: str) -> list[str]:
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def imported(path: pathlib.Path) -> set[str]:
    """Top-level packages that the file imports anywhere, inside functions too; type checking blocks do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_file_imports_what_its_package_must_not(package: str):
    wrong = {
        str(path.relative_to(ROOT)): names for path in (ROOT / package).rglob("*.py") if (names := imported(path) & FORBIDDEN[package])
    }
    wrong = {file: names for file, names in wrong.items() if not allowed(file, names)}
    assert not wrong, wrong


def allowed(file: str, names: set[str]) -> bool:
    """The commands hand over to a backend inside the function that runs it; nothing else may name one."""
    return file.startswith("smedjan_common/commands/") and names <= {"smedjan_jax", "smedjan_mlx"}


def test_importing_all_of_smedjan_common_loads_no_framework():
    names = [name for name in modules("smedjan_common") if not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    code += f"print(sorted({FRAMEWORKS | {'smedjan_jax', 'smedjan_mlx', 'matplotlib'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_forbidden_import_is_found(tmp_path: pathlib.Path):
    file = tmp_path / "wrong.py"
    file.write_text("def lazy():\n    from mlx.core import array\n    import jax.numpy as jnp\n")
    assert imported(file) == {"mlx", "jax"}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_within_150_ms(module: str):
    """Processor time, best of five, less an empty interpreter's: what else the machine does shall not count."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = min(seconds(f"import {module}") for _ in range(5)) - min(seconds("pass") for _ in range(3))
    assert best < 0.150, f"{module} takes {best * 1000:.0f} ms"


def lines(found: list) -> str:
    return "\n".join(["", *map(str, found)])


def test_no_circle_of_imports():
    assert not (found := circles(IMPORTS)), lines(found)


def test_imports_point_down():
    assert not (found := upward(IMPORTS, FLOORS)), lines(found)


def test_an_import_inside_a_function_has_a_reason_and_a_reason_an_import():
    assert not (found := unexplained(IMPORTS, REASONS)), lines(found)


def test_nothing_is_imported_late_that_the_file_has_imported_already():
    assert not (found := needless(IMPORTS)), lines(found)


@pytest.fixture
def planted(tmp_path: pathlib.Path):
    """A function that makes a package of files and reads its imports."""

    def plant(**files: str) -> list[Import]:
        for name, text in files.items():
            path = tmp_path / "smedjan_common" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read(tmp_path, ["smedjan_common"])

    return plant


@pytest.mark.parametrize(
    "back",
    [
        "import smedjan_common.a",
        "from smedjan_common import a",
        "from smedjan_common.a import x",
        "from .a import x",
        "from . import a",
        "def f():\n    from smedjan_common.a import x",
        "class C:\n    def f(self):\n        return lambda: __import__('os')\n    import smedjan_common.a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from smedjan_common.a import x",
    ],
)
def test_a_planted_circle_is_found(planted, back):
    imports = planted(
        __init__="", a="import smedjan_common.b\nx = 1", b="from smedjan_common import c", c=back, d="import smedjan_common.a"
    )
    assert circles(imports) == [["smedjan_common.a", "smedjan_common.b", "smedjan_common.c"]]


@pytest.mark.parametrize(
    ("low", "wrong"),
    [
        ("import smedjan_common.high.x", "high is not below low"),
        ("def f():\n    from ..high import x", "high is not below low"),
        ("import smedjan_common.beside.x", "beside is not below low"),
    ],
)
def test_a_planted_arrow_up_or_to_the_same_floor_is_found(planted, low, wrong):
    imports = planted(high__x="import smedjan_common.low.x", low__y="", low__x=low, beside__x="")
    [found] = upward(imports, (("low", "beside"), ("high",)))
    assert found.endswith(wrong)


def test_a_room_that_no_floor_has_is_found(planted):
    assert upward(planted(attic__x="import os"), (("low",),)) == ["attic is on no floor"]


def test_a_planted_late_import_and_a_stale_reason_are_found(planted):
    imports = planted(__init__="", a="import json", b="import smedjan_common.a\ndef f():\n    import json\n    import csv")
    assert needless(imports) == ["smedjan_common.b:3 imports json late for nothing"]
    reasons = {("smedjan_common.b", "csv"): "slow", ("smedjan_common.*", "json"): "slow", ("smedjan_common.a", "csv"): "stale"}
    assert unexplained(imports, reasons) == ["('smedjan_common.a', 'csv') is a reason for nothing"]
    del reasons["smedjan_common.*", "json"]
    assert unexplained(imports, reasons)[0] == "smedjan_common.b:3 imports json"
