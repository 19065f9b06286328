"""Losses and the logits' gradient in one pass over the logits: float32 logits are read once, the gradient is written in the compute dtype.

The equations stand in smedjan_jax/loss.py. XLA reads the logits three times: for the maximum, for the sum, for the gradient.

Shapes: N tokens, K targets of a token, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.special import exp
from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, partial, power_of_two


def losses_and_gradients(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None, z_loss: float, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of every token and logsumexp [N] float32, and dlogits [N, V] in `dtype`, of float32 logits [N, V] and int targets [N], or
    targets and float32 weights [N, K].

    Where a target is negative, loss and dlogits are 0.
    """
    N, V = logits.shape
    row, number = pl.BlockSpec((None, V), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (i,))
    outputs = [((N,), FLOAT32, number), ((N,), FLOAT32, number), ((N, V), dtype, row)]
    launch = Launch(max(4, min(32, power_of_two(V) >> 10)), 1)
    aims = [targets] if weights is None else [*targets.T, *weights.T]
    K = 0 if weights is None else targets.shape[1]
    inputs, specs = [logits, *aims], [row, *(number for _ in aims)]
    losses, lse, dlogits = call(partial(_kernel, z_loss=z_loss, V=V, K=K), launch, (N,), inputs, specs, outputs)
    return losses, lse, dlogits


def _kernel(logits, *refs, z_loss, V, K):
    """K: targets with weights of a token; 0: one target without a weight."""
    *aims, losses, lse, dlogits = refs
    targets, cuts = [ref[0] for ref in aims[: K or 1]], powers_of_two(V)
    weights = [jnp.where(target >= 0, ref[0], 0.0) for target, ref in zip(targets, aims[K:], strict=True)] if K else [1.0]
    counted = functools.reduce(jnp.logical_or, [target >= 0 for target in targets])
    parts = [logits[cut] for cut in cuts]
    hits = [[lax.iota(jnp.int32, cut.size) + cut.start == target for target in targets] for cut in cuts]
    largest = functools.reduce(jnp.maximum, [jnp.max(x) for x in parts])
    powers = [exp(x - largest) for x in parts]
    total = sum(jnp.sum(each) for each in powers)
    log_sum = largest + jnp.log(total)
    # read again: to find it among the others, all would be kept beside their powers, twice the registers (at 32,768 tokens they spilled)
    owns = [logits[jnp.maximum(target, 0)] for target in targets]
    losses[0] = jnp.where(counted, sum(weight * (log_sum - own) for weight, own in zip(weights, owns, strict=True)), 0.0)
    lse[0], whole = log_sum, sum(weights)
    scale = (whole + 2 * z_loss * log_sum if z_loss else whole) / total
    for cut, each, hit in zip(cuts, powers, hits, strict=True):
        aim = sum(jnp.where(one, weight, 0.0) for one, weight in zip(hit, weights, strict=True))
        dlogits[cut] = jnp.where(counted, each * scale - aim, 0.0).astype(dlogits.dtype)


def powers_of_two(V: int) -> list[Any]:
    """[0, V) cut into slices whose sizes are powers of two, which tiles must have."""
    cuts, start = [], 0
    while start < V:
        size = 1 << ((V - start).bit_length() - 1)
        cuts.append(pl.ds(start, size))
        start += size
    return cuts
