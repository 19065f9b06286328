"""A path at which there is nothing: what its writer may have meant, from the names beside it."""

import difflib
import os
from pathlib import Path

MOST = 1000  # names that are looked at in a folder
SHOWN = 3
ALIKE = 0.65


def beside(path: str | os.PathLike, there: bool = False) -> str:
    """A sentence that names paths near to `path`, which does not exist; empty when there are none. there: it exists by now, just made.

    It looks where the path goes wrong first: `runz/mine` is near to `runs/mine`, and `mine` to `runs/mine` and `mine.txt`.
    """
    path = Path(path)
    parts = path.parts
    for depth in range(len(parts)):
        here = Path(*parts[: depth + 1])
        if os.path.lexists(here) and not (there and depth == len(parts) - 1):
            continue
        folder = here.parent
        names = [name for name in _names(folder) if name != here.name]
        near = [Path(folder, name, *parts[depth + 1 :]) for name in _close(here.name, names)]
        near = [found if found.exists() else Path(folder, found.parts[depth]) for found in near]
        if (moved := Path(folder, "runs", *parts[depth:])).exists():
            near.insert(0, moved)
        if near:
            return f"Did you mean {' or '.join(str(found) for found in near[:SHOWN])}?"
        alike = [name for name in names if Path(name).suffix == here.suffix and depth == len(parts) - 1]
        return f"Beside that path there {'are' if alike[1:] else 'is'} {_listed(folder, alike)}." if alike else ""
    return ""


def with_suffix(folder: Path, suffix: str) -> list[Path]:
    """What is in a folder with that suffix, sorted; of a large folder only some of it."""
    return [folder / name for name in _names(folder) if Path(name).suffix == suffix]


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(MOST), strict=False) if not entry.name.startswith("."))
    except OSError:
        return []


def _close(name: str, names: list[str]) -> list[str]:
    """The names that are spelled nearly so; the same name with another suffix, or in capitals, comes first."""
    lowered, stem = name.lower(), Path(name).stem.lower()
    same = [other for other in names if lowered in (other.lower(), Path(other).stem.lower()) or stem == other.lower()]
    alike = sorted(((_likeness(lowered, other.lower()), other) for other in names), reverse=True)
    return list(dict.fromkeys([*same, *(other for likeness, other in alike if likeness >= ALIKE)]))


def _likeness(name: str, other: str) -> float:
    """0 to 1. Of names with the same suffix what stands before it counts."""
    if Path(name).suffix == Path(other).suffix:
        name, other = Path(name).stem, Path(other).stem
    return difflib.SequenceMatcher(None, name, other).ratio()


def _listed(folder: Path, names: list[str]) -> str:
    shown = [str(folder / name) for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
