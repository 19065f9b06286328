"""Decode states by position: what mixers keep of every token lies in a ring of L entries a row, position p at p modulo L.

So a row goes on past L positions: its newest L are kept, and seen. A chunk of several tokens is read beside the ring and written after,
since its last tokens overwrite what its first ones see.

Shapes: B rows, T new positions, L entries, S entries that are read.
"""

import jax
import jax.numpy as jnp

from smedjan_jax.modules import Context, State


def extend(state: State, new: State, context: Context, axis: int, window: int = 0) -> tuple[State, jax.Array, State]:
    """What T new tokens read, which of it they see, bool [B, T, S], and the state with them in it.

    new: arrays as the state's, T long along `axis`. window: a token sees only so many positions, itself included; 0: all that are kept.
    """
    L, T = next(iter(state.values())).shape[axis], next(iter(new.values())).shape[axis]
    position, length = context.position, min(context.length or L, L)
    assert position is not None
    assert T <= L, "a chunk is longer than the ring"
    after = {name: write(state[name], new[name], context, axis) for name in new}
    at_BT1 = position[:, None, None] + jnp.arange(T)[:, None]
    reach = min(window or L, L)
    if T == 1:
        read = {name: jax.lax.slice_in_dim(array, 0, length, axis=axis) for name, array in after.items()}
        behind = (at_BT1 - jnp.arange(length)) % L
        return read, (behind <= at_BT1) & (behind < reach), after
    last_B11 = position[:, None, None] - 1
    kept_B1S = last_B11 - (last_B11 - jnp.arange(length)) % L  # the positions in the ring; under 0: none yet
    behind = jnp.arange(T)[:, None] - jnp.arange(T)
    seen_new = jnp.broadcast_to((behind >= 0) & (behind < reach), (len(position), T, T))
    seen = jnp.concatenate([(kept_B1S >= 0) & (at_BT1 - kept_B1S < reach), seen_new], axis=-1)
    old = {name: jax.lax.slice_in_dim(state[name], 0, length, axis=axis) for name in new}
    return {name: jnp.concatenate([old[name], new[name].astype(old[name].dtype)], axis=axis) for name in new}, seen, after


def write(ring: jax.Array, new: jax.Array, context: Context, axis: int, span: int = 1) -> jax.Array:
    """The ring with `new`, T long along `axis`, at the rows' positions; those of rows that are not active stay out.

    span: positions that share an entry; then T is 1.
    """
    (B, L), T = (ring.shape[0], ring.shape[axis]), new.shape[axis]
    assert context.position is not None
    new = new.astype(ring.dtype)
    if B == T == 1:  # in place, without a scatter
        start = (context.position[0] // span) % L
        if context.active is not None:
            new = jnp.where(context.active[0], new, jax.lax.dynamic_slice_in_dim(ring, start, 1, axis))
        return jax.lax.dynamic_update_slice_in_dim(ring, new, start, axis)
    slots_BT = (context.position[:, None] + jnp.arange(T)) // span % L
    if context.active is not None:
        slots_BT = jnp.where(context.active[:, None], slots_BT, L)
    where = jnp.arange(B)[:, None], *[slice(None)] * (axis - 1), slots_BT
    # an entry past the end is dropped; what is written stands with B and T first
    return ring.at[where].set(jnp.moveaxis(new, axis, 1), mode="drop", unique_indices=True)
