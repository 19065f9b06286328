"""JAX's own checkpoint: Orbax (its v1 API), asynchronous, sharded, restored onto any mesh. Nothing else here knows Orbax.

    {"params": {NAME: …}, "slots": {"mu": {NAME: …}, …}, "step": int32}      the train state as it is, one array per leaf

smedjan_common.checkpoint.own puts checkpoint.json around it, hashes it and gives it its name.
"""

import errno
import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smedjan_common.backend import State
from smedjan_common.errors import CheckpointError

BATCH_BYTES = 256 << 20  # of arrays that `write_arrays` holds at a time
_PATIENCE_SECONDS = 30  # for the other threads of a save that failed
_A_DAY = 24 * 3600  # Orbax gives up after 20 minutes by default, which a slow disk may take


class Orbax:
    """The backend's own format (protocol: smedjan_common.backend.OwnFormat). shapes: the state's arrays as ShapeDtypeStructs, each
    with the sharding that says where it belongs."""

    name = "orbax"

    def __init__(self, shapes: State):
        self._shapes = shapes

    def tensors(self, state: State) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters, and optimizer arrays by `{slot}.{parameter}`, where they are."""
        return state["params"], {f"{slot}.{name}": value for slot, values in state["slots"].items() for name, value in values.items()}

    def begin(self, state: State, folder: Path) -> Callable[[], None]:
        """Copy the state to the host and start to write it into the new `folder`; what is returned waits for the end. OSError."""
        from orbax.checkpoint import v1 as ocp

        def wait() -> None:
            _with_os_errors(response.result)

        with _context():
            response = _with_os_errors(lambda: ocp.save_async(str(folder.absolute()), state))
        return wait

    def read(self, folder: Path) -> State:
        """The state, each array where it belongs, whatever mesh it was saved on. Raises CheckpointError."""
        return _load(folder, self._shapes)

    def read_params(self, folder: Path, on_host: bool = False) -> dict[str, Any]:
        """The parameters alone, whatever model they are of. Raises CheckpointError.

        Those of the run's own shapes lie where they belong; others (a teacher's, the base of adapters, a smaller vocabulary) and all of
        them with on_host are NumPy.
        """
        from orbax.checkpoint import v1 as ocp

        stored, own = _structure(folder), self._shapes["params"]
        there = stored["params"]
        same = there.keys() == own.keys() and all(tuple(there[name].shape) == own[name].shape for name in own)
        params = own if same and not on_host else {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in there.items()}
        return _load(folder, jax.tree.map(lambda leaf: ocp.PLACEHOLDER, stored) | {"params": params})["params"]


class Arrays:
    """The arrays of a folder as NumPy, read one at a time, on no device."""

    def __init__(self, folder: Path):
        self._folder, self._tree = folder, _structure(folder)

    def read(self, *path: str) -> np.ndarray:
        """One array: read("slots", "mu", "norm.weight"). Raises CheckpointError."""
        from orbax.checkpoint import v1 as ocp

        def wanted(place: Any, leaf: Any) -> Any:
            return np.empty(leaf.shape, leaf.dtype) if tuple(key.key for key in place) == path else ocp.PLACEHOLDER

        found = _load(self._folder, jax.tree_util.tree_map_with_path(wanted, self._tree))
        for key in path:
            found = found[key]
        return found


def write_arrays(folder: Path, arrays: Iterable[tuple[tuple[str, ...], np.ndarray]]) -> None:
    """Write NumPy arrays, each with its path in the tree, into the new `folder`, as `begin` would; BATCH_BYTES are in memory at a
    time. Raises OSError."""
    from orbax.checkpoint import v1 as ocp

    where, batch, size = str(folder.absolute()), {}, 0
    with _context():
        for path, array in arrays:
            if batch and size + array.nbytes > BATCH_BYTES:
                _with_os_errors(functools.partial(ocp.partial.save, where, _nested(batch)))
                batch, size = {}, 0
            batch[path] = array
            size += array.nbytes
        _with_os_errors(functools.partial(ocp.partial.save, where, _nested(batch)))
        _with_os_errors(functools.partial(ocp.partial.finalize, where))


def _context() -> Any:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array_options.saving.use_compression = False  # float32 weights shrink by a tenth and take ten times as long
    context.async_options.timeout_secs = _A_DAY
    context.memory_options.deepcopy_host_arrays = False  # NumPy arrays come from write_arrays alone, which waits
    return context


def _structure(folder: Path) -> Any:
    """The tree of a folder, its leaves with dtype and shape."""
    from orbax.checkpoint import v1 as ocp

    return _with_checkpoint_errors(folder, lambda: ocp.metadata(str(folder.absolute())).metadata)


def _load(folder: Path, wanted: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    return _with_checkpoint_errors(folder, lambda: ocp.load(str(folder.absolute()), wanted))


def _nested(arrays: dict[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), array in arrays.items():
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[name] = array
    return tree


def _with_checkpoint_errors(folder: Path, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        why = f"Orbax says {type(error).__name__}: {_first_line(error)}."
        raise CheckpointError(f"{folder} cannot be read.", why, "Go on from an older checkpoint: --resume PATH.") from error


def _with_os_errors(function: Callable[[], Any]) -> Any:
    """Call and turn what Orbax makes of a failing disk, one of many errors with the system's own words in it, back into an OSError."""
    try:
        return function()
    except Exception as error:
        _await_threads()
        if isinstance(error, OSError):
            raise
        number = next((number for number, words in _WORDS.items() if words in str(error)), errno.EIO)
        raise OSError(number, _WORDS.get(number) or f"Orbax says {type(error).__name__}: {_first_line(error)}") from error


def _await_threads() -> None:
    """Wait for Orbax's threads. The first one to fail ends the save while others still write, and create folders again that the
    caller is about to remove."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        if type(thread).__module__.startswith("orbax.") or thread.name.startswith("asyncio_"):
            thread.join(max(0.0, deadline - time.monotonic()))


_WORDS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
    errno.EACCES: "Permission denied",
    errno.EROFS: "Read-only file system",
}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason").splitlines()[0][:300].rstrip(".")
