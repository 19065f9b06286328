"""The import graph of the product, read from the syntax trees: every file, what it imports, where, and why it may."""

import ast
import fnmatch
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("smedjan_common", "smedjan_jax", "smedjan_mlx", "convert")


@dataclass(frozen=True)
class Import:
    """`file` (a module of ours) imports `target`, a module of ours or of others. inside: within a function; typing: for a type checker."""

    file: str
    target: str
    line: int
    inside: bool = False
    typing: bool = False

    @property
    def late(self) -> bool:
        """Whether importing the file does not import the target."""
        return self.inside or self.typing

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def read(root: pathlib.Path = ROOT, packages: Sequence[str] = PACKAGES) -> list[Import]:
    """Every import of every file of `packages` below `root`."""
    files = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return [found for file, path in files.items() for found in _imports(file, path, set(files))]


def _imports(file: str, path: pathlib.Path, ours: set[str]) -> Iterator[Import]:
    package = file.split(".") if path.name == "__init__.py" else file.split(".")[:-1]

    def visit(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [full if (full := f"{base}.{alias.name}") in ours else base for alias in node.names]
        yield from (Import(file, target, node.lineno, inside, typing) for target in dict.fromkeys(targets) if target != file)
        inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, typing)

    return visit(ast.parse(path.read_text()), inside=False, typing=False)


def circles(imports: Sequence[Import]) -> list[list[str]]:
    """The sets of files that import one another, late imports counted too (Tarjan, 1972)."""
    files = {found.file for found in imports}
    edges = {file: sorted({found.target for found in imports if found.file == file} & files) for file in sorted(files)}
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    result = []

    def visit(file: str) -> None:
        number[file] = lowest[file] = len(number)
        path.append(file)
        for target in edges[file]:
            if target not in number:
                visit(target)
            if target in path:
                lowest[file] = min(lowest[file], lowest[target])
        if lowest[file] == number[file]:
            circle = path[path.index(file) :]
            del path[path.index(file) :]
            if len(circle) > 1:
                result.append(sorted(circle))

    for file in edges:
        if file not in number:
            visit(file)
    return result


def room(file: str) -> str:
    """smedjan_common.model.mixers.ssm -> model; smedjan_jax.model -> smedjan_jax."""
    package, *inner = file.split(".")
    return inner[0] if package == "smedjan_common" and inner else package


def upward(imports: Sequence[Import], floors: Sequence[Sequence[str]]) -> list[str]:
    """Imports from a room to another one that is not below it, and rooms that no floor has."""
    level = {name: height for height, names in enumerate(floors) for name in names}
    packages = {found.file.split(".")[0] for found in imports}
    arrows = [found for found in imports if found.target.split(".")[0] in packages]
    rooms = {room(file) for found in imports for file in (found.file, *([found.target] if found in arrows else []))}
    wrong = [f"{name} is on no floor" for name in sorted(rooms - level.keys())]
    for found in arrows:
        here, there = room(found.file), room(found.target)
        if here != there and level.get(there, 0) >= level.get(here, 0):
            wrong.append(f"{found}: {there} is not below {here}")
    return wrong


def needless(imports: Sequence[Import]) -> list[str]:
    """Late imports of what importing the file has imported already."""
    at_once: dict[str, set[str]] = {}
    for found in imports:
        at_once.setdefault(found.file, set())
        if not found.late:
            at_once[found.file].add(found.target)

    def loaded(file: str, known: set[str]) -> set[str]:
        for target in at_once.get(file, set()) - known:
            known.add(target)
            loaded(target, known)
        return known

    closure = {file: loaded(file, set()) for file in at_once}
    return [f"{found} late for nothing" for found in imports if found.late and found.target in closure[found.file]]


def unexplained(imports: Sequence[Import], reasons: Mapping[tuple[str, str], str]) -> list[str]:
    """Late imports for which no reason (file pattern, target pattern) stands, and reasons that nothing needs."""
    late = [found for found in imports if found.late]
    pairs = {pair: [found for found in late if _is(pair, found)] for pair in reasons}
    explained = {found for matching in pairs.values() for found in matching}
    return [str(found) for found in late if found not in explained] + [
        f"{pair} is a reason for nothing" for pair in pairs if not pairs[pair]
    ]


def _is(pair: tuple[str, str], found: Import) -> bool:
    return fnmatch.fnmatchcase(found.file, pair[0]) and fnmatch.fnmatchcase(found.target, pair[1])
