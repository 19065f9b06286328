"""What the kernels of the delta rule with a decay for each channel share (channel_decay.py): factors, and tiles of two chunks of rows.

Shapes: as there. A tile [2C, features] has one thing of a chunk in its upper half and another in its lower one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.compat import plgpu
from smedjan_jax.kernels.special import LOG2_E, exp2
from smedjan_jax.kernels.tiles import DeltaPlan, dot

Arrays = tuple[jax.Array, ...]


class Prepare(NamedTuple):
    """Functions of rows [C, K] and of parameters, as each row of [C, K] too, float32, of which the first row and the first `few` parameters
    are the decay's alone."""

    decay: Callable[[jax.Array, list[jax.Array]], jax.Array]  # log w [C, K]
    rest: Callable[[list[jax.Array], list[jax.Array]], Arrays]  # r, k, a, b [C, K] and more numbers [C]
    few: int = 0


class How(NamedTuple):
    """What is computed besides the arrays: rows into r, log w, k, a, b; how many numbers a row gives besides; how it is run."""

    prepare: Prepare
    more: int
    plan: DeltaPlan


class Factors(NamedTuple):
    """e^G and what it is made of, float32."""

    up: jax.Array  # [C, K] e^G
    before: jax.Array  # [C, K] e^Gx
    down: jax.Array  # [C, K] e^-G


def factors(log_decay: jax.Array) -> Factors:
    """From the beginning of the chunk, whatever the documents: only quotients of two positions count."""
    powers = log_decay * LOG2_E
    total = lax.cumsum(powers, axis=0)
    return Factors(exp2(total), exp2(total - powers), exp2(-total))


class Pair(NamedTuple):
    """What the rows of L, [2C], see of the rows of N, and of the states around the chunk (tiles.Borders)."""

    seen: jax.Array  # [2C, 2C]
    reads: jax.Array | None  # [2C]
    writes: jax.Array | None  # [2C]
    keeps: jax.Array | None


def positions(C: int, shape: tuple[int, ...], axis: int) -> tuple[jax.Array, jax.Array]:
    """The position in the chunk of each row (column) of a tile of 2C, and whether it is of the upper half."""
    index = lax.broadcasted_iota(jnp.int32, shape, axis)
    return lax.rem(index, jnp.int32(C)), index < C


def pair_of(C: int, i: Any, documents: Any, edges: Any, masked: bool, chunk: Any = None) -> Pair:
    """Of chunk i of the documents that the reference has. chunk: which of the sequence that is; None: i."""
    (row, upper), (column, _) = (positions(C, (2 * C, 2 * C), axis) for axis in (0, 1))
    seen = jnp.where(upper, row, row - 1) >= column
    if not masked:
        return Pair(seen, None, None, None)
    at = documents[i * C + positions(C, (2 * C,), 0)[0]]
    chunk = i if chunk is None else chunk
    before, after = edges[chunk], edges[chunk + 1]
    return Pair(seen & (at[:, None] == at[None, :]), at == before, at == after, before == after)


def kept(keeps: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if keeps is None else jnp.where(keeps, x, 0.0)


def rows_of(C: int, features: int, start: Any, lower: bool) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Where the upper (lower) half of a tile [2C, features] lies in rows from `start` on, and the mask of that half."""
    row, upper = positions(C, (2 * C, features), 0)
    return (start + row, lax.broadcasted_iota(jnp.int32, row.shape, 1)), ~upper if lower else upper


def half_of(ref: Any, start: Any, C: int, lower: bool = False) -> jax.Array:
    """[2C, features]: the C rows of a reference from `start` on as the upper (lower) half, zeros as the other."""
    at, mask = rows_of(C, ref.shape[-1], start, lower)
    return plgpu.load(ref.at[at], mask=mask, other=0.0)


def put_half(ref: Any, start: Any, C: int, x: jax.Array, lower: bool = False) -> None:
    """The upper (lower) half of x [2C, features] into C rows of a reference."""
    at, mask = rows_of(C, x.shape[-1], start, lower)
    if jax.default_backend() == "cpu":  # the interpreter writes what was there where the mask does not hold: beyond the end here
        at = jnp.where(mask, at[0], ref.shape[0]), at[1]
    plgpu.store(ref.at[at], x.astype(ref.dtype), mask=mask)


def put_last(ref: Any, x: jax.Array) -> None:
    """The last row of x [R, K] into a reference [K]."""
    row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    mask = row == x.shape[0] - 1
    if jax.default_backend() == "cpu":  # as in put_half
        column = jnp.where(mask, column, ref.shape[0])
    plgpu.store(ref.at[column], x, mask=mask)


def corner_of(x: Any, i: Any, C: int) -> jax.Array:
    """[2C, 2C]: X of chunk i as the lower right quarter, zeros as the others."""
    (row, upper), (column, left) = (positions(C, (2 * C, 2 * C), axis) for axis in (0, 1))
    return plgpu.load(x.at[i, row, column], mask=~upper & ~left, other=0.0)


def of_parameter(K: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, K), lambda b, h, i: (h, 0))


def split_refs(refs: Any, counts: tuple[int, int]) -> tuple[Any, Any, Any]:
    """References of rows, of parameters, and those behind them."""
    end = counts[0] + counts[1]
    return refs[: counts[0]], refs[counts[0] : end], refs[end:]


def scores_of(left: jax.Array, right: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen, dot(left, right, turn_b=True), 0.0).astype(left.dtype)
