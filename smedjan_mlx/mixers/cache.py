"""Decode states by position: what mixers keep of every token lies in a ring of L entries a row, position p at p modulo L.

So a row goes on past L positions: its newest L are kept, and seen. A chunk of several tokens is read beside the ring and written after,
since its last tokens overwrite what its first ones see.

Shapes: B rows, T new positions, L entries, S entries that are read.
"""

import mlx.core as mx

from smedjan_mlx.modules import Context, State


def extend(state: State, new: State, context: Context, axis: int, window: int = 0) -> tuple[State, mx.array, State]:
    """What T new tokens read, which of it they see, bool [B, T, S], and the state with them in it.

    new: arrays as the state's, T long along `axis`. window: a token sees only so many positions, itself included; 0: all that are kept.
    """
    L, T = next(iter(state.values())).shape[axis], next(iter(new.values())).shape[axis]
    position, length = context.position, min(context.length or L, L)
    assert position is not None
    assert T <= L, "a chunk is longer than the ring"
    after = {name: write(state[name], new[name], context, axis) for name in new}
    at_BT1 = position[:, None, None] + mx.arange(T)[:, None]
    reach = min(window or L, L)
    if T == 1:
        behind = (at_BT1 - mx.arange(length)) % L
        return {name: _first(after[name], length, axis) for name in after}, (behind <= at_BT1) & (behind < reach), after
    last_B11 = position[:, None, None] - 1
    kept_B1S = last_B11 - (last_B11 - mx.arange(length)) % L  # the positions in the ring; under 0: none yet
    behind = mx.arange(T)[:, None] - mx.arange(T)
    seen_new = mx.broadcast_to((behind >= 0) & (behind < reach), (len(position), T, T))
    seen = mx.concatenate([(kept_B1S >= 0) & (at_BT1 - kept_B1S < reach), seen_new], axis=-1)
    old = {name: _first(state[name], length, axis) for name in new}
    return {name: mx.concatenate([old[name], new[name].astype(old[name].dtype)], axis=axis) for name in new}, seen, after


def write(ring: mx.array, new: mx.array, context: Context, axis: int, span: int = 1) -> mx.array:
    """The ring with `new`, T long along `axis`, at the rows' positions; those of rows that are not active stay out.

    span: positions that share an entry; then T is 1.
    """
    (B, L), T = (ring.shape[0], ring.shape[axis]), new.shape[axis]
    assert context.position is not None
    new = new.astype(ring.dtype)
    slots_BT = (context.position[:, None] + mx.arange(T)) // span % L
    shape = [B, *[1] * (axis - 1), T, *[1] * (ring.ndim - axis - 1)]
    slots = mx.broadcast_to(slots_BT.reshape(shape), new.shape)
    if context.active is not None:
        new = mx.where(context.active.reshape(B, *[1] * (ring.ndim - 1)), new, mx.take_along_axis(ring, slots, axis=axis))
    return mx.put_along_axis(ring, slots, new, axis=axis)


def _first(array: mx.array, count: int, axis: int) -> mx.array:
    """The first entries along `axis`."""
    return array[(slice(None),) * axis + (slice(count),)]
