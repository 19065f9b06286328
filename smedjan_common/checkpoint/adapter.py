"""What checkpoint.json says of a checkpoint that holds adapters only: "adapter" in its "extra".

    {"rank", "alpha", "targets": [NAME, …], "new_rows": [FIRST, LAST + 1], "base": {"path", "beside", "sha256"}}

The base is the checkpoint whose weights the adapters belong to: its absolute path, its path from the folder of the run, so that both may
move together, and a hash of its weights. What the numbers mean: smedjan_common.model.adapters.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smedjan_common.errors import CheckpointError
from smedjan_common.model.adapters import Adapters
from smedjan_common.model.json_fields import MAX_EXTENT, is_of

ADAPTER = "adapter"
MOST_RANK = 1 << 16


class BaseWeights(NamedTuple):
    """Where the base was, and what it was."""

    path: str
    beside: str
    sha256: str

    @classmethod
    def at(cls, path: Path, run: Path, sha256: str) -> "BaseWeights":
        """That in `path`, for a run in the folder `run`."""
        return cls(os.path.abspath(path), os.path.relpath(path.resolve(), run.resolve()), sha256)


class AdapterRecord(NamedTuple):
    """Adapters, and their base."""

    adapters: Adapters
    base: BaseWeights

    def to_json(self) -> dict[str, Any]:
        """The value of "adapter"."""
        values = self.adapters._asdict()
        return values | {"targets": list(self.adapters.targets), "new_rows": list(self.adapters.new_rows), "base": self.base._asdict()}


def adapter_of(extra: Mapping[str, Any] | None) -> AdapterRecord | None:
    """The adapters that an "extra" describes; None: the checkpoint holds a whole model. Raises CheckpointError for what cannot be."""
    if not extra or ADAPTER not in extra:
        return None
    values = extra[ADAPTER]
    if not (isinstance(values, dict) and _fits(values)):
        raise CheckpointError(f'"adapter" in "extra" is {str(values)[:80]}.', "It describes no adapters.")
    adapters = Adapters(values["rank"], float(values["alpha"]), tuple(values["targets"]), tuple(values["new_rows"]))
    return AdapterRecord(adapters, BaseWeights(**values["base"]))


def _fits(values: dict[str, Any]) -> bool:
    hints = {"rank": int, "alpha": float, "targets": tuple[str, ...], "new_rows": tuple[int, ...], "base": dict}
    if values.keys() != hints.keys() or not all(is_of(hint, values[name], MAX_EXTENT) for name, hint in hints.items()):
        return False
    base, rows = values["base"], values["new_rows"]
    whole = base.keys() == set(BaseWeights._fields) and all(type(value) is str for value in base.values())
    return whole and 1 <= values["rank"] <= MOST_RANK and values["alpha"] > 0 and len(rows) == 2 and 0 <= rows[0] <= rows[1]
