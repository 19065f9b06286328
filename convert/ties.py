"""How tensors of ours are written in layouts of others, and read back: Tie, one or several tensors on either side, exact both ways.

What is joined, reordered, doubled or shifted by one is the same numbers: float32 holds 2 w and w / 2 of any weight exactly, and w - 1 of a
norm's weight is rounded as its own program rounds it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from convert.portable import Lazy
from smedjan_common.config import ModelConfig
from smedjan_common.model.params import parameter_table

Arrays = Sequence[np.ndarray]
Shape = tuple[int, ...]


class Tie(NamedTuple):
    """ours, theirs: names. shapes: of theirs. out: arrays of ours -> of theirs; back: the way back. checked: theirs could say more than
    ours, so what is read is written again and compared. by_rows: rows move whole, so the parts of a quantised weight move alike."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    out: Callable[[Arrays], Arrays]
    back: Callable[[Arrays], Arrays]
    checked: bool = False
    by_rows: bool = False


def same(ours: str, theirs: str, shape: Shape) -> Tie:
    """The tensor itself, perhaps with axes of length one more or less."""
    return Tie((ours,), (theirs,), (shape,), lambda arrays: [arrays[0].reshape(shape)], lambda arrays: list(arrays))


def kept(ours: str, theirs: str, shape: Shape) -> Tie:
    """The tensor itself."""
    return Tie((ours,), (theirs,), (shape,), list, list, by_rows=True)


def joined(ours: Sequence[str], theirs: str, sizes: Sequence[int], *width: int, axis: int = 0) -> Tie:
    """Several tensors of `sizes` rows, one after another. width: the extents beside; axis: where the rows are."""
    bounds = np.cumsum(sizes)[:-1]
    shape = (*width[:axis], sum(sizes), *width[axis:])
    return Tie(
        tuple(ours),
        (theirs,),
        (shape,),
        lambda arrays: [np.concatenate(arrays, axis)],
        lambda arrays: np.split(arrays[0], bounds, axis),
        by_rows=axis == 0,
    )


def by_expert(ours: str, theirs: str, experts: int, *shape: int) -> Tie:
    """[E, out, in] as one tensor per expert; `{e}` in the name is its number."""
    names = tuple(theirs.format(e=e) for e in range(experts))
    return Tie((ours,), names, (shape,) * experts, lambda arrays: list(arrays[0]), lambda arrays: [np.stack(arrays)])


def reordered(ours: str, theirs: str, rows: np.ndarray, *width: int, by: np.ndarray | None = None, axis: int = 0) -> Tie:
    """Rows in another order, theirs[i] is ours[rows[i]], and times `by` there. axis: where the rows are, without `by`."""
    back, shape = np.argsort(rows), (*width[:axis], len(rows), *width[axis:])
    if by is None:
        out, home = (lambda arrays: [np.take(arrays[0], rows, axis)]), (lambda arrays: [np.take(arrays[0], back, axis)])
        return Tie((ours,), (theirs,), (shape,), out, home, by_rows=axis == 0)
    return Tie((ours,), (theirs,), (shape,), lambda arrays: [arrays[0][rows] * by], lambda arrays: [(arrays[0] / by)[back]])


def shifted(ours: str, theirs: str, by: float, *shape: int) -> Tie:
    """A norm's weight that is added to one there: by = -1."""
    change = np.float32(by)
    return Tie((ours,), (theirs,), (shape,), lambda arrays: [arrays[0] + change], lambda arrays: [arrays[0] - change])


def scaled(ours: str, theirs: str, by: float, *shape: int) -> Tie:
    """Times a number, which is exact if that is a power of two."""
    change = np.float32(by)
    return Tie((ours,), (theirs,), (shape,), lambda arrays: [arrays[0] * change], lambda arrays: [arrays[0] / change])


def zeros(theirs: str, *shape: int) -> Tie:
    """A tensor that they need and we do not have."""
    return Tie((), (theirs,), (shape,), lambda _: [np.zeros(shape, np.float32)], lambda _: [], checked=True)


def by_key_head(ours: tuple[str, ...], theirs: str, groups: int, sizes: tuple[int, ...], *width: int) -> Tie:
    """Rows of several tensors, of each key head together. sizes: rows of each tensor for one key head. width: the extents beside."""
    bounds = np.cumsum(sizes)[:-1]

    def out(arrays):
        parts = [array.reshape(groups, size, *width) for array, size in zip(arrays, sizes, strict=True)]
        return [np.concatenate(parts, axis=1).reshape(-1, *width)]

    def back(arrays):
        return [part.reshape(-1, *width) for part in np.split(arrays[0].reshape(groups, sum(sizes), *width), bounds, axis=1)]

    return Tie(ours, (theirs,), ((groups * sum(sizes), *width),), out, back)


def gated(ours: str, theirs: str, heads: int, size: int, *width: int) -> Tie:
    """The map to queries, which has there as many rows for a gate of each head after its own: 0, which is a half."""

    def out(arrays):
        queries = arrays[0].reshape(heads, size, *width)
        return [np.concatenate([queries, np.zeros_like(queries)], axis=1).reshape(-1, *width)]

    def back(arrays):
        return [arrays[0].reshape(heads, 2 * size, *width)[:, :size].reshape(-1, *width)]

    return Tie((ours,), (theirs,), ((2 * heads * size, *width),), out, back, checked=True)


def written(ties: Sequence[Tie], tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of others, by name, of ours."""
    made: dict[str, Lazy] = {}
    for tie in ties:
        for number, (name, shape) in enumerate(zip(tie.theirs, tie.shapes, strict=True)):
            made[name] = Lazy(np.dtype(np.float32), shape, _read(tie.out, [tensors[each] for each in tie.ours], number))
    return made


def read(ties: Sequence[Tie], tensors: Mapping[str, Lazy], config: ModelConfig) -> dict[str, Lazy]:
    """Ours, by name, of the tensors of others. A name of ours that two ties give is read from the first."""
    table, made = parameter_table(config), {}
    for tie in ties:
        for number, name in enumerate(tie.ours):
            shape = table[name].shape
            made.setdefault(name, Lazy(np.dtype(np.float32), shape, _read(tie.back, [tensors[each] for each in tie.theirs], number, shape)))
    return {name: made[name] for name in table}


def lost(ties: Sequence[Tie], tensors: Mapping[str, Lazy]) -> str | None:
    """The first tensor of others that says something ours cannot."""
    for tie in ties:
        if tie.checked:
            theirs = [tensors[name].read().astype(np.float32) for name in tie.theirs]
            for name, array, again in zip(tie.theirs, theirs, tie.out(tie.back(theirs)), strict=True):
                if not np.array_equal(array, again):
                    return name
    return None


def _read(change: Callable[[Arrays], Arrays], sources: Sequence[Lazy], number: int, shape: Shape | None = None) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        array = np.ascontiguousarray(change([source.read().astype(np.float32, copy=False) for source in sources])[number])
        return array if shape is None else array.reshape(shape)

    return make
