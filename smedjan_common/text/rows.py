"""Rows of Parquet files and Hugging Face datasets: lots of texts as the bytes that stand in the file, None for null.

Bytes and not text, because a column of text may hold bytes that are no UTF-8: then --errors decides, as for files of text.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smedjan_common.errors import DataError, SmedjanError
from smedjan_common.remote.address import Address, is_remote
from smedjan_common.text.compressed import open_bytes
from smedjan_common.text.kinds import NAME_FIELD
from smedjan_common.text.sources import DATASET_PREFIX

_AT_ONCE = 1024


def parquet(name: str, field: str) -> Iterator[list[bytes | None]]:
    """The rows of a file's column `field`. Raises DataError, OSError."""
    shown = _shown(name)
    with _errors(shown, "The file is damaged or not Parquet; get it again."), _parquet(name) as file:
        _check_field(shown, file.schema_arrow.names, field)
        for batch in file.iter_batches(_AT_ONCE, columns=[field]):
            yield _texts(shown, batch.column(0), field)


def parquet_rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with all their columns, as Python has them. Raises DataError, OSError."""
    with _errors(_shown(name), "The file is damaged or not Parquet; get it again."), _parquet(name) as file:
        for batch in file.iter_batches(_AT_ONCE):
            yield from batch.to_pylist()


def _parquet(name: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"Cannot read {_shown(name)!r}.", "Parquet needs the package pyarrow.", "Run: pip install pyarrow.") from None
    return parquet.ParquetFile(open_bytes(Address(name)) if is_remote(name) else name)


def _shown(name: str) -> str:
    return str(Address(name)) if is_remote(name) else name


def dataset(name: str, field: str) -> Iterator[list[bytes | None]]:
    """The rows of `hf:NAME[:CONFIG[:SPLIT]]`; NAME may be a folder of this machine. Raises DataError."""
    path, config, split = ([*name.removeprefix(DATASET_PREFIX).split(":"), "", ""])[:3]
    try:
        import datasets
    except ImportError:
        raise DataError(f"Cannot read {name!r}.", "It needs the package datasets.", "Run: pip install datasets.") from None
    fix = f"Check the name, {DATASET_PREFIX}NAME[:CONFIG[:SPLIT]], and that it is on this machine or that the hub is reached."
    with _errors(name, fix):
        if (Path(path) / "state.json").is_file():
            rows: Any = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        for table in rows.with_format("arrow").iter(_AT_ONCE):
            _check_field(name, table.column_names, field)
            yield _texts(name, table.column(field), field)


def _check_field(name: str, names: list[str], field: str) -> None:
    if field not in names:
        why = f"It has {', '.join(map(repr, names[:8]))}."
        raise DataError(f"{name!r} has no column {field!r}.", why, NAME_FIELD, case="field")


def _texts(name: str, column: Any, field: str) -> list[bytes | None]:
    """A column of text as bytes, whether they are UTF-8 or not."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if pyarrow.types.is_null(kind):
        return [None] * len(column)
    if not any(test(kind) for test in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)):
        raise DataError(f"The column {field!r} of {name!r} is not text.", f"Its type is {kind}.", NAME_FIELD, case="field")
    return column.cast(kind).cast(pyarrow.large_binary()).to_pylist()


@contextlib.contextmanager
def _errors(name: str, fix: str) -> Iterator[None]:
    """What the libraries raise, with the name of the file or dataset."""
    try:
        yield
    except (SmedjanError, MemoryError, ImportError):
        raise
    except Exception as error:  # datasets, pyarrow and fsspec raise errors of many kinds and bases
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"Cannot read {name!r}.", f"{first}.", fix) from error
