"""`make mutate`: changes one place of the product at a time and asks the tests that concern it; prints the changes that none of them saw.

    MODULE=smedjan_common/data/order.py N=10 SEED=1 make mutate         one module; without MODULE all of them, without N twenty changes

A survivor is a hole in the tests, or a change that changes nothing. Every change is made in a copy of the tree and the same SEED makes the
same ones. Which tests concern a module follows from the import graph: those nearest to it, of its name first.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import import_graph

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".*", "runs", "build", "__pycache__", "*.egg-info")
MOST_FILES = 6  # test files that are asked about a change
FLIPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{
        ast.And: ast.Or,
        ast.Or: ast.And,
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.FloorDiv,
        ast.FloorDiv: ast.Mult,
        ast.Div: ast.Mult,
    },
}


@dataclass(frozen=True)
class Mutation:
    """`file`, relative to the root, with the text from `start` to `end` (characters) replaced by `new`."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        shown = [" ".join(text.split()) for text in (self.old, self.new)]
        return f"{self.file}:{self.line}  {' -> '.join(text if len(text) <= 60 else text[:57] + '...' for text in shown)}"


def mutations(text: str, file: str = "") -> list[Mutation]:
    """Every change of a source that is tried, in its order."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)

    def place(line: int, column: int) -> int:  # columns are of UTF-8
        return starts[line - 1] + len(text[starts[line - 1] : starts[line]].encode()[:column].decode())

    found = []
    for node, new in _changes(ast.parse(text)):
        start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        found.append(Mutation(file, node.lineno, start, end, text[start:end], new))
    return sorted(found, key=lambda each: (each.start, each.end, each.new))


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """A node and the text in its place. Annotations, f-strings, docstrings and what only a type checker reads are left alone."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        return
    if (isinstance(node, ast.Compare) and len(node.ops) == 1) or isinstance(node, ast.BoolOp | ast.BinOp):
        changed = copy.deepcopy(node)
        old = changed.ops[0] if isinstance(changed, ast.Compare) else changed.op
        if type(old) in FLIPS and not _is_text(node):
            new = FLIPS[type(old)]()
            if isinstance(changed, ast.Compare):
                changed.ops = [new]
            else:
                changed.op = new
            yield node, f"({ast.unparse(changed)})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield node, str(node.value + 1)
        yield node, f"({node.value - 1})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield node, repr(node.value * 2 if node.value else 1.0)
    if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield node, "pass"
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child)


def _is_text(node: ast.AST) -> bool:
    """Whether a sum joins strings or types (`int | None`), where another sign is only an error at import."""
    return isinstance(node, ast.BinOp) and any(
        isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in (node.left, node.right)
    )


def concerned(file: str, imports: Sequence[import_graph.Import], most: int = MOST_FILES) -> list[str]:
    """The test files that reach a file through imports: of its name first, then the nearest, units before commands and conformance."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    away, layer = {module: 0}, {module}
    while layer:
        layer = {each.file for each in imports if each.target in layer} - away.keys()
        away |= {found: max(away.values()) + 1 for found in layer}
    words = set(module.replace("_", ".").split(".")[1:])

    def rank(name: str) -> tuple:
        room, stem = name.split(".")[1], set(name.split(".")[-1].split("_"))
        return not words & stem, away[name], ("unit", "cli", "conformance", "e2e").index(room) if "." in name else 0, name

    rooms = ("tests.unit.test_", "tests.cli.test_", "tests.conformance.test_")
    return [f"{name.replace('.', '/')}.py" for name in sorted((name for name in away if name.startswith(rooms)), key=rank)[:most]]


@dataclass(frozen=True)
class Tree:
    """A copy of the tree, in which tests run."""

    root: Path

    def passes(self, tests: Sequence[str], seconds: float) -> bool | None:
        """Whether the tests pass; None when they take longer."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *tests]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            return not subprocess.run(command, cwd=self.root, env=environment, capture_output=True, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return None

    def survives(self, mutation: Mutation, tests: Sequence[str], seconds: float) -> bool:
        """Whether no test sees the change. A change with which they never end is seen."""
        file = self.root / mutation.file
        text = file.read_text()
        try:
            file.write_text(text[: mutation.start] + mutation.new + text[mutation.end :])
            return self.passes(tests, seconds) is True
        finally:
            file.write_text(text)


def sample(root: Path, packages: Sequence[str], module: str, number: int, seed: int) -> list[Mutation]:
    """`number` changes of one module, or of all, by chance and always the same for a seed."""
    files = [root / module] if module else sorted(path for package in packages for path in (root / package).rglob("*.py"))
    every = [found for path in files for found in mutations(path.read_text(), str(path.relative_to(root)))]
    return sorted(random.Random(seed).sample(every, min(number, len(every))), key=lambda each: (each.file, each.start, each.new))


def run(root: Path, packages: Sequence[str], module: str = "", number: int = 20, seed: int = 0, limit: float = 600) -> list[Mutation]:
    """Try the sampled changes, print what becomes of them; returns the survivors."""
    imports, chosen = import_graph.read(root, [*packages, "tests"]), sample(root, packages, module, number, seed)
    survivors, untested, times = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(shutil.copytree(root, Path(folder) / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))))
        for mutation in chosen:
            tests = concerned(mutation.file, imports)
            if mutation.file not in times:
                started = time.monotonic()
                times[mutation.file] = time.monotonic() - started if tests and tree.passes(tests, limit) else None
                print(f"{mutation.file}: {' '.join(tests) or 'no tests'}", flush=True)
            if (seconds := times[mutation.file]) is None:
                untested.append(mutation)
            elif tree.survives(mutation, tests, 3 * seconds + 20):
                survivors.append(mutation)
                print(f"  survived  {mutation}", flush=True)
            else:
                print(f"  killed    {mutation}", flush=True)
    killed = len(chosen) - len(survivors) - len(untested)
    print(f"{len(chosen)} changes: {killed} killed, {len(survivors)} survived, {len(untested)} without tests that pass in {limit:g} s")
    return survivors


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", default="", help="a file such as smedjan_common/data/order.py; default: all")
    parser.add_argument("--number", type=int, default=20, help="changes to try")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other changes")
    parser.add_argument("--limit", type=float, default=600, help="seconds that the tests of a module may take without a change")
    args = parser.parse_args()
    run(ROOT, import_graph.PACKAGES, args.module, args.number, args.seed, args.limit)


if __name__ == "__main__":
    main()
