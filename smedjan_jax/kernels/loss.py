"""Losses and the logits' gradient in one pass over the logits: float32 logits are read once, the gradient is written in the compute dtype.

The equations stand in smedjan_jax/loss.py. XLA reads the logits three times: for the maximum, for the sum, for the gradient.

Shapes: N tokens, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, partial, power_of_two


def losses_and_gradients(logits: jax.Array, targets: jax.Array, z_loss: float, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of every token and logsumexp [N] float32, and dlogits [N, V] in `dtype`, of float32 logits [N, V] and int targets [N].

    Where a target is negative, loss and dlogits are 0.
    """
    N, V = logits.shape
    row, number = pl.BlockSpec((None, V), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (i,))
    outputs = [((N,), FLOAT32, number), ((N,), FLOAT32, number), ((N, V), dtype, row)]
    launch = Launch(max(4, min(32, power_of_two(V) >> 10)), 1)
    losses, lse, dlogits = call(partial(_kernel, z_loss=z_loss, V=V), launch, (N,), [logits, targets], [row, number], outputs)
    return losses, lse, dlogits


def _kernel(logits, targets, losses, lse, dlogits, *, z_loss, V):
    target, cuts = targets[0], _powers_of_two(V)
    counted = target >= 0
    parts = [logits[cut] for cut in cuts]
    hits = [lax.iota(jnp.int32, cut.size) + cut.start == target for cut in cuts]
    largest = functools.reduce(jnp.maximum, [jnp.max(x) for x in parts])
    powers = [jnp.exp(x - largest) for x in parts]
    total = sum(jnp.sum(each) for each in powers)
    log_sum = largest + jnp.log(total)
    own = sum(jnp.sum(jnp.where(hit, x, 0.0)) for hit, x in zip(hits, parts, strict=True))
    losses[0], lse[0] = jnp.where(counted, log_sum - own, 0.0), log_sum
    scale = (1 + 2 * z_loss * log_sum if z_loss else 1.0) / total
    for cut, each, hit in zip(cuts, powers, hits, strict=True):
        dlogits[cut] = jnp.where(counted, each * scale - jnp.where(hit, 1.0, 0.0), 0.0).astype(dlogits.dtype)


def _powers_of_two(V: int) -> list[Any]:
    """[0, V) cut into slices whose sizes are powers of two, which tiles must have."""
    cuts, start = [], 0
    while start < V:
        size = 1 << ((V - start).bit_length() - 1)
        cuts.append(pl.ds(start, size))
        start += size
    return cuts
