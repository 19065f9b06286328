"""Numbers of 8 bits by kernels: the largest of a matrix, then the matrix rounded, as it lies and turned over, of one reading each.

The matrix need not be in memory: SwiGLU's output and the gradients of its inputs are computed in both readings, of tiles of what they are
made from, so that nothing of them is written but the numbers of 8 bits:

    h = silu(g) u        du = dh silu(g)        dg = dh u s (1 + g (1 - s)),  s = sigmoid(g)

in float32, rounded once. A tile is rounded to the compute dtype first, as it would be in memory, and turned over in 16 bits. The largest is
found among the bits as integers, where what is not finite is above all.

Shapes: N rows, P parts of F columns side by side in a matrix of P F columns, all multiples of 16; tiles of R rows and C columns.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.float8 import Numbers, scales
from smedjan_jax.kernels.loss import powers_of_two
from smedjan_jax.kernels.special import sigmoid
from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, partial


class Made(NamedTuple):
    """How tiles of P parts are made of tiles of the inputs: of each input, how many F its columns begin at."""

    begins: tuple[int, ...]
    parts: int
    make: Callable


class Plan(NamedTuple):
    """Rows and columns of a tile, at most, and how its kernel is run."""

    rows: int
    columns: int
    launch: Launch


class Plans(NamedTuple):
    """Of the reading that finds the largest, and of the one that rounds."""

    largest: Plan
    rounded: Plan


def _same(x):
    return (x,)


def _swiglu(gate, up):
    g, u = gate.astype(FLOAT32), up.astype(FLOAT32)
    return (g * sigmoid(g) * u,)


def _swiglu_back(gate, up, dh):
    g, u, d = gate.astype(FLOAT32), up.astype(FLOAT32), dh.astype(FLOAT32)
    s = sigmoid(g)
    return d * u * (s * (1 + g * (1 - s))), d * (g * s)


MATRIX, SWIGLU, SWIGLU_BACK = Made((0,), 1, _same), Made((0, 1), 1, _swiglu), Made((0, 1, 0), 2, _swiglu_back)
PLANS = {
    MATRIX: Plans(Plan(64, 256, Launch(8, 1)), Plan(64, 128, Launch(4, 1))),
    SWIGLU: Plans(Plan(32, 256, Launch(8, 1)), Plan(64, 64, Launch(8, 1))),
    SWIGLU_BACK: Plans(Plan(32, 256, Launch(8, 1)), Plan(64, 64, Launch(4, 1))),
}


@functools.partial(jax.jit, static_argnames=("made", "to", "dtype", "turned", "plans"))  # lowered once for all layers
def numbers(made: Made, inputs: tuple[jax.Array, ...], to: Any, dtype: Any, turned: bool = True, plans: Plans | None = None) -> Numbers:
    """What is made of the inputs, the last of which is [N, F], or [N, begin + F] of those that are read at several columns.

    to: the float8 format. dtype: in which the numbers would be in memory. turned: whether both ways, or as it lies only.
    """
    plans = plans or PLANS[made]
    N, F = inputs[-1].shape[0], inputs[-1].shape[1] // (made.begins[-1] + 1)
    scale, inverse = _scales(_largest(made, inputs, N, F, dtype, plans.largest), to)
    (R, C), (n, m), specs = _tiles(made, N, F, plans.rounded)
    rows = ((N, made.parts, F), to, pl.BlockSpec((R, made.parts, C), lambda i, j: (i, 0, j)))
    columns = ((made.parts, F, N), to, pl.BlockSpec((made.parts, C, R), lambda i, j: (0, j, i)))
    kernel, one = partial(_rounded_kernel, make=made.make, dtype=dtype), pl.BlockSpec((1,), lambda i, j: (0,))
    # neighbours along a row of tiles run side by side: 4 to 12 % faster on an H200 than along a column
    specs, outputs = [_swapped(spec) for spec in (*specs, one)], [(*about, _swapped(spec)) for *about, spec in (rows, columns)]
    found = call(kernel, plans.rounded.launch, (m, n), [*inputs, inverse], specs, outputs[: 1 + turned])
    return Numbers(found[0].reshape(N, -1), found[1].reshape(-1, N) if turned else None, scale.reshape(()))


def _largest(made: Made, inputs: tuple[jax.Array, ...], N: int, F: int, dtype: Any, plan: Plan) -> jax.Array:
    """The bits of the largest magnitude of every tile, int32 [tiles]."""
    _, (n, m), specs = _tiles(made, N, F, plan, backwards=True)
    output = ((n * m,), jnp.int32, pl.BlockSpec((1,), lambda i, j: (i * m + j,)))
    return call(partial(_largest_kernel, make=made.make, dtype=dtype), plan.launch, (n, m), inputs, specs, [output])[0]


def _scales(bits: jax.Array, to: Any) -> tuple[jax.Array, jax.Array]:
    """The scale and its inverse, float32 [1], from the bits of all tiles."""
    whole, one = pl.BlockSpec(bits.shape, lambda i: (0,)), pl.BlockSpec((1,), lambda i: (0,))
    return call(partial(_scales_kernel, to=to), Launch(8, 1), (1,), [bits], [whole], [((1,), FLOAT32, one)] * 2)


def _tiles(made: Made, N: int, F: int, plan: Plan, backwards: bool = False) -> tuple[tuple[int, int], tuple[int, int], list[pl.BlockSpec]]:
    """(R, C), how many of them, and the blocks of the inputs. backwards: from the last rows on, which whoever wrote them left in the cache,
    as this reading leaves the first ones for the next."""
    R, C = math.gcd(N, plan.rows), math.gcd(F, plan.columns)
    n, m = N // R, F // C
    row = (lambda i: n - 1 - i) if backwards else (lambda i: i)
    return (R, C), (n, m), [pl.BlockSpec((R, C), lambda i, j, begin=begin: (row(i), begin * m + j)) for begin in made.begins]


def _swapped(spec: pl.BlockSpec) -> pl.BlockSpec:
    """Of a grid whose axes are swapped."""
    at: Any = spec.index_map
    return pl.BlockSpec(spec.block_shape, lambda j, i: at(i, j))


def _largest_kernel(*refs, make, dtype):
    *inputs, out = refs
    parts = [lax.bitcast_convert_type(part.astype(dtype).astype(FLOAT32), jnp.int32) for part in make(*(ref[...] for ref in inputs))]
    out[0] = jnp.max(functools.reduce(jnp.maximum, [part & 0x7FFFFFFF for part in parts]))


def _scales_kernel(bits, scale, inverse, *, to):
    found = functools.reduce(jnp.maximum, [jnp.max(bits[cut]) for cut in powers_of_two(bits.shape[0])])
    scale[0], inverse[0] = scales(found, to)


def _rounded_kernel(*refs, make, dtype):
    count = make.__code__.co_argcount
    inputs, inverse, rows, turned = refs[:count], refs[count][0], refs[count + 1], refs[count + 2 :]
    for at, part in enumerate(make(*(ref[...] for ref in inputs))):
        tile = part.astype(dtype).astype(FLOAT32) * inverse
        rows[:, at, :] = tile.astype(rows.dtype)
        for other in turned:
            other[at] = tile.astype(rows.dtype).T
