"""Who imports whom: smedjan_common imports no array framework, the backends do not import each other, and start-up stays short."""

import ast
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "mlx", "torch", "transformers", "tensorflow"}
FORBIDDEN = {
    "smedjan_common": FRAMEWORKS | {"smedjan_jax", "smedjan_mlx", "convert"},
    "smedjan_jax": {"mlx", "smedjan_mlx", "torch", "transformers"},
    "smedjan_mlx": {"jax", "jaxlib", "flax", "optax", "orbax", "smedjan_jax", "torch", "transformers"},
}
LIGHT = (
    "smedjan_common.config",
    "smedjan_common.model.params",
    "smedjan_common.errors",
    "smedjan_common.training.schedule",
    "smedjan_common.model.flops",
)


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
