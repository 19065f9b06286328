"""Hugging Face directories for the tests of `--to neutral`: changed by hand, and what `convert` says of them."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf_import
from convert.cli import main
from convert.portable import Lazy
from convert.safetensors_file import write_tensors


def refusal(path: Path) -> str:
    """What `convert` says when it refuses the directory; nothing is left of the attempt."""
    target = path.parent / "neutral"
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([str(path), str(target), "--to", "neutral"]) == 2
    assert not target.exists()
    assert "Traceback" not in said.getvalue()
    assert len(said.getvalue().strip().splitlines()) >= 2, said.getvalue()
    return said.getvalue()


def change(path: Path, name: str, **values: Any) -> None:
    """Other values in a JSON file; None removes."""
    document = json.loads((path / name).read_text()) | values
    (path / name).write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def one_file(path: Path, edit: Callable[[dict[str, np.ndarray]], Any] = lambda arrays: None, **more: np.ndarray) -> None:
    """Put all tensors into one model.safetensors, edited, with more."""
    arrays = {name: tensor.read() for name, tensor in hf_import.open_weights(path).items()}
    edit(arrays)
    arrays |= more
    for file in (*shards(path), path / hf_import.INDEX):
        file.unlink(missing_ok=True)
    write_tensors(path / hf_import.WEIGHTS, {name: lazy(array) for name, array in arrays.items()})


def lazy(array: np.ndarray) -> Lazy:
    return Lazy(array.dtype, array.shape, lambda: array)
