"""What commands promise about their outputs: nothing is overwritten without saying so."""

import os
from collections.abc import Iterable

from smedjan_common.errors import DataError


def refuse_existing(paths: Iterable[str | None], force: bool) -> None:
    """Raises DataError when one of the outputs has no name, exists, is a directory or stands twice; `force`: existing files are fine."""
    given = [path for path in paths if path is not None]
    if "" in given:
        raise DataError("The name of an output is empty.", "Nothing was written.", "Name a file.")
    if len({os.path.abspath(path) for path in given}) < len(given):
        raise DataError("Two outputs have the same name.", f"They are {', '.join(map(repr, given))}.", "Give each its own name.")
    for path in given:
        if os.path.isdir(path):
            raise DataError(f"The output {path!r} is a directory.", "A file is written here.", "Name a file.")
        if os.path.exists(path) and not force:
            raise DataError(
                f"The output {path!r} exists already.", "Nothing was changed.", "Choose another --output, or replace it with --force."
            )
