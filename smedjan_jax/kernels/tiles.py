"""What the kernels share: products of tiles, decays inside a chunk, borders of documents, block shapes.

Kernels are written in Pallas for its Triton backend (NVIDIA GPUs from Ampere on); on a CPU, where nobody asks for them but the tests,
the same bodies are interpreted. A tile of positions has C of them, a power of two, at least 16, as are K and V: `padded` sees to that.

Operands of products have the compute dtype, sums are float32. No sum is by atomic operations: the bits are the same every time.

Shapes: B batch, T positions, H heads, n chunks of C positions, K key and V value features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.compat import plgpu
from smedjan_jax.kernels.special import exp

FLOAT32 = jnp.float32
SHARED_BYTES = 200 << 10  # of a multiprocessor, with something left for operands: an H100 has 227 KiB
SMALLEST = 16  # rows and columns of a tile
NEVER = -1e4  # a log decay of which nothing is left
FILLED = 128  # programs that fill a large GPU: an H100 has 132 multiprocessors


class Launch(NamedTuple):
    """How a kernel is run: warps of a program, loads in flight."""

    warps: int = 4
    stages: int = 2


class DeltaPlan(NamedTuple):
    """How a delta rule is run. parts of V and segments of the sequence, 0: as many as fill the GPU."""

    chunk: int
    parts: int = 0
    segments: int = 0
    tiles: Launch = Launch(4, 1)
    inverse: Launch = Launch(1, 1)
    forward: Launch = Launch(4, 3)
    backward: Launch = Launch(4, 3)
    pieces: Launch = Launch(4, 1)


def call(
    kernel: Callable,
    launch: Launch,
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    specs: Sequence[Any],
    outputs: Sequence[Any],
    aliases: dict[int, int] | None = None,
    together: bool = False,
) -> Any:
    """pallas_call of `kernel` over `grid`; inputs beside their BlockSpecs, outputs as (shape, dtype, BlockSpec).

    aliases: number of an input -> number of the output that is written over it. together: of a grid (b, h[, i]), programs of all h at one
    place run side by side, and what they read at one time lies together in memory; the kernel finds i with `place`. The first axis is the
    one whose programs do so otherwise.
    """
    if together:
        grid, specs = (*grid[1:], grid[0]), [_turned(spec) for spec in specs]
        outputs = [(shape, dtype, _turned(spec)) for shape, dtype, spec in outputs]
    how: dict[str, Any] = {"interpret": True, "name": getattr(kernel, "func", kernel).__name__.strip("_")}
    if jax.default_backend() != "cpu":
        how = {"name": how["name"], "compiler_params": plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)}
    how["input_output_aliases"] = aliases or {}
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    return pl.pallas_call(kernel, grid=grid, in_specs=list(specs), out_specs=[spec for _, _, spec in outputs], out_shape=shapes, **how)(
        *inputs
    )


def _turned(spec: pl.BlockSpec) -> pl.BlockSpec:
    at: Any = spec.index_map
    return pl.BlockSpec(spec.block_shape, lambda *there: at(there[-1], *there[:-1]))


def place() -> Any:
    """i of a program (b, h, i) of a `call` with `together`."""
    return pl.program_id(1)


def load(ref: Any, row: Any, there: jax.Array) -> jax.Array:
    """ref[row], or zeros where it is not `there` (a scalar); such a row is not read."""
    return plgpu.load(ref.at[row], mask=jnp.broadcast_to(there, ref.shape[1:]), other=0.0)


def store(ref: Any, row: Any, values: jax.Array, there: jax.Array | None) -> None:
    """ref[row] = values where it is `there` (a scalar; None: always)."""
    if there is None:
        ref[row] = values
    else:
        plgpu.store(ref.at[row], values, mask=jnp.broadcast_to(there, values.shape))


def near(x: Any, documents: Any, at: jax.Array, offset: int, masked: bool, part: int | None = None) -> jax.Array:
    """The rows `at` + offset of a sequence [T, F], or of a part of [T, parts, F], float32; 0 where there is none, or one of another
    document."""
    row = at + offset
    inside = (row >= 0) if offset < 0 else (row < x.shape[0])
    near = jnp.clip(row, 0, x.shape[0] - 1)
    if masked:
        inside = inside & (documents[near] == documents[at])
    rows = x[near, :] if part is None else x[near, part, :]
    return jnp.where(inside[:, None], rows.astype(FLOAT32), 0.0)


def fitting(launch: Launch, step_bytes: int) -> Launch:
    """`launch` with as many loads in flight as shared memory holds; step_bytes: what one step of a walk loads."""
    return launch._replace(stages=max(1, min(launch.stages, SHARED_BYTES // step_bytes)))


def dot(a: jax.Array, b: jax.Array, turn_a: bool = False, turn_b: bool = False) -> jax.Array:
    """a b of two tiles, either transposed first, summed and returned in float32; float32 operands keep all their bits."""
    return _dot(a, b, turn_a, turn_b, a.dtype == FLOAT32)


def _dot(a: jax.Array, b: jax.Array, turn_a: bool, turn_b: bool, precision: Any) -> jax.Array:
    """precision: as for lax.dot_general; True: all bits, False: TF32. Never None, which jax_default_matmul_precision has a say in: exact
    products of float32 run on no tensor core, and precision.py asks for them."""
    if isinstance(precision, bool):
        precision = lax.Precision.HIGHEST if precision else lax.Precision.DEFAULT
    contracted = (((0 if turn_a else 1,), (1 if turn_b else 0,)), ((), ()))
    return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=FLOAT32)


def carried(matrix: jax.Array, x: jax.Array, turn: bool = False) -> jax.Array:
    """matrix x (with `turn` matrix^T x) of float32 tiles, to about float32: what a state is after a segment."""
    precision: Any = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    if jax.default_backend() == "cpu":
        precision = lax.Precision.HIGHEST
    return _dot(matrix, x, turn, False, precision)


def product(a: jax.Array, b: jax.Array, exact: bool) -> jax.Array:
    """a b of float32 tiles; not exact: to TF32."""
    return _dot(a, b, False, False, exact)


class Borders(NamedTuple):
    """What a chunk's positions may see. None: nothing is hidden."""

    seen: jax.Array  # [C, C] itself and earlier ones of its document
    below: jax.Array  # [C, C] earlier ones alone
    reads: jax.Array | None  # [C] those of the document of the state that comes in
    writes: jax.Array | None  # [C] of the state that goes out
    keeps: jax.Array | None  # whether both are one document
    same: jax.Array | None = None  # [C, C] positions of one document


def borders(C: int, documents: jax.Array | None, before: jax.Array | None, after: jax.Array | None) -> Borders:
    """documents [C]: numbers of the positions; before, after: of the states that come in and go out. All None: one document."""
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    if documents is None:
        return Borders(row >= column, row > column, None, None, None)
    same = documents[:, None] == documents[None, :]
    return Borders((row >= column) & same, (row > column) & same, documents == before, documents == after, before == after, same)


def seen_turned(b: Borders, C: int) -> jax.Array:
    """`seen` of Borders turned over."""
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return column >= row if b.same is None else (column >= row) & b.same


def only(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where the mask holds, else 0; a mask [C] chooses rows of a matrix."""
    if mask is None:
        return x
    return jnp.where(mask[:, None] if x.ndim == 2 else mask, x, 0.0)


class Decays(NamedTuple):
    """Decays e^{sum of g} inside a chunk with one g for each position; none above 1."""

    between: jax.Array  # [C, C] from position j to i >= j of its document
    start: jax.Array  # [C] from the state before the chunk to the position
    end: jax.Array  # [C] from the position to the chunk's end
    whole: jax.Array  # over the whole chunk


def decays(total: jax.Array, last: jax.Array, b: Borders) -> Decays:
    """Of running sums [C] float32, the last of which is `last`."""
    between = exp(jnp.where(b.seen, total[:, None] - total[None, :], NEVER))
    whole = exp(last) if b.keeps is None else jnp.where(b.keeps, exp(last), 0.0)
    end = exp(last - total if b.writes is None else jnp.where(b.writes, last - total, NEVER))
    return Decays(between, only(b.reads, exp(total)), end, whole)


def running_sums(log_decay: jax.Array, documents: jax.Array | None, C: int) -> jax.Array:
    """Sums of log decays [B, T, H] from the beginning of the chunk, or of the position's document in it. Outside of kernels."""
    where, seen = _seen(documents, log_decay.shape, C)
    chunks = log_decay.reshape(log_decay.shape[0], -1, C, log_decay.shape[2])
    return jnp.einsum(f"{where}ij,bnjh->bnih", seen, chunks, precision="highest").reshape(log_decay.shape)


def decay_gradient(change: jax.Array, flow: jax.Array, documents: jax.Array | None, C: int) -> jax.Array:
    """d g [B, T, H]: what later positions of the chunk read more than they add, and what flows out of it through the state.

    A state that is scaled between two positions changes the outputs after it by as much as they owe to it; so the gradient of a log decay
    is the sum over later positions of <output, its gradient> - <value, its gradient>, `change` [B, T, H], with the state that leaves
    the chunk as one more output, `flow` [B, H, n, 1]. Outside of kernels.
    """
    where, seen = _seen(documents, change.shape, C)
    chunks = change.reshape(change.shape[0], -1, C, change.shape[2])
    out = flow.transpose(0, 2, 3, 1)
    if documents is not None:
        numbers = documents.reshape(*chunks.shape[:3], 1)
        out = jnp.where(numbers == numbers[:, :, -1:], out, 0.0)
    return (jnp.einsum(f"{where}ij,bnih->bnjh", seen, chunks, precision="highest") + out).reshape(change.shape)


def _seen(documents: jax.Array | None, shape: tuple[int, ...], C: int) -> tuple[str, jax.Array]:
    """The axes before the positions, and 1 where one sees another."""
    lower = jnp.tril(jnp.ones((C, C), FLOAT32))
    if documents is None:
        return "", lower
    numbers = documents.reshape(shape[0], -1, C)
    return "bn", jnp.where(numbers[..., :, None] == numbers[..., None, :], lower, 0.0)


def unit_lower_inverse(m: jax.Array, exact: bool) -> jax.Array:
    """(I + m)^-1 of a strictly lower tile [C, C] by block doubling (mixers/triangular.py)."""
    C = m.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    x, half = jnp.where(row == column, 1.0, 0.0), 1
    while half < C:
        odd = ((row // half) % 2 == 1) & ((column // half) % 2 == 0) & (row // (2 * half) == column // (2 * half))
        corner = jnp.where(odd, m, 0.0)
        # the first products are with the identity
        change = corner if half == 1 else product(product(x, corner, exact), x, exact)
        x, half = x - change, 2 * half
    return x


def row_sums(a: jax.Array, b: jax.Array) -> jax.Array:
    """<a_i, b_i> of every row, float32 [C]."""
    return jnp.sum(a.astype(FLOAT32) * b, axis=1)


def in_rows(parameter: jax.Array, like: jax.Array) -> jax.Array:
    """A parameter [F] as each row of a tile; its transpose is one sum over rows."""
    return lax.broadcast_in_dim(parameter, like.shape, (1,))


def in_columns(number: jax.Array, like: jax.Array) -> jax.Array:
    """A number of each row [R] as each column of a tile. (A tile [R, 1] would have a layout that few threads share.)"""
    return lax.broadcast_in_dim(number, like.shape, (0,))


# block shapes: whole sequences for a program that walks through them, a chunk for one that takes a chunk


def power_of_two(size: int) -> int:
    """The smallest tile size that holds `size` features or positions."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with zeros at the end of `axis` up to `size`."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if a == axis % x.ndim else 0) for a in range(x.ndim)])


def numbers(documents: jax.Array | None, before: jax.Array | None, T: int, C: int) -> tuple[jax.Array, jax.Array]:
    """Documents [B, T] filled up to T positions, and those of the states around the chunks [B, n + 1]; two dummies for None.

    before [B]: the document of the state before the first chunk; None: the first position's.
    """
    if documents is None:
        dummy = jnp.zeros((1, 1), jnp.int32)
        return dummy, dummy
    documents = jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, T - documents.shape[1])), mode="edge")
    first = documents[:, :1] if before is None else before[:, None]
    return documents, jnp.concatenate([first, documents[:, C - 1 :: C]], axis=1)


def documents_or_none(docs: Any) -> tuple[Any, bool]:
    """Documents as a kernel takes them, and whether there are any. docs: what `numbers` gave, or None."""
    return (numbers(None, None, 0, 1), False) if docs is None else (docs, True)


def whole_specs(masked: bool, T: int, n: int) -> list[pl.BlockSpec]:
    """Of what `numbers` gives, for programs (b, …) that walk."""
    if not masked:
        return [pl.BlockSpec((1, 1), lambda *_: (0, 0))] * 2
    return [pl.BlockSpec((None, T), lambda b, *_: (b, 0)), pl.BlockSpec((None, n + 1), lambda b, *_: (b, 0))]


def chunk_specs(masked: bool, C: int, n: int) -> list[pl.BlockSpec]:
    """The same for programs (b, h, i) of one chunk."""
    if not masked:
        return [pl.BlockSpec((1, 1), lambda *_: (0, 0))] * 2
    return [pl.BlockSpec((None, C), lambda b, h, i: (b, i)), pl.BlockSpec((None, n + 1), lambda b, h, i: (b, 0))]


def borders_at(C: int, i: Any, documents: Any, edges: Any, masked: bool, whole: bool = True) -> Borders:
    """Borders of chunk i from the references that the specs above give."""
    if not masked:
        return borders(C, None, None, None)
    at = documents[pl.ds(i * C, C)] if whole else documents[...]
    return borders(C, at, edges[i], edges[i + 1])


def walk(T: int, features: int, parts: int = 1) -> pl.BlockSpec:
    """[B, T, H, features]: a head's whole sequence; with `parts` programs (b, h, p) take a part of the features each."""
    if parts == 1:
        return pl.BlockSpec((None, T, None, features), lambda b, h, *_: (b, 0, h, 0))
    return pl.BlockSpec((None, T, None, features // parts), lambda b, h, p: (b, 0, h, p))


def walk_vector(T: int) -> pl.BlockSpec:
    """[B, T, H]."""
    return pl.BlockSpec((None, T, None), lambda b, h, *_: (b, 0, h))


def piece(C: int, features: int) -> pl.BlockSpec:
    """[B, T, H, features]: a head's chunk."""
    return pl.BlockSpec((None, C, None, features), lambda b, h, i: (b, i, h, 0))


def piece_vector(C: int) -> pl.BlockSpec:
    """[B, T, H]."""
    return pl.BlockSpec((None, C, None), lambda b, h, i: (b, i, h))


def of_head(rows: int, columns: int, parts: int = 1) -> pl.BlockSpec:
    """[B, H, rows, columns]: a head's matrix, or a part of its columns."""
    if parts == 1:
        return pl.BlockSpec((None, None, rows, columns), lambda b, h, *_: (b, h, 0, 0))
    return pl.BlockSpec((None, None, rows, columns // parts), lambda b, h, p: (b, h, 0, p))


def of_chunks(n: int, rows: int, columns: int, parts: int = 1) -> pl.BlockSpec:
    """[B, H, n, rows, columns]: the matrices of all chunks of a head."""
    if parts == 1:
        return pl.BlockSpec((None, None, n, rows, columns), lambda b, h, *_: (b, h, 0, 0, 0))
    return pl.BlockSpec((None, None, n, rows, columns // parts), lambda b, h, p: (b, h, 0, 0, p))


def walk_numbers(n: int) -> pl.BlockSpec:
    """[B, H, n, 1]: a number for each chunk of a head."""
    return pl.BlockSpec((None, None, n, 1), lambda b, h, *_: (b, h, 0, 0))


def of_chunk(rows: int, columns: int) -> pl.BlockSpec:
    """[B, H, n, rows, columns]: the matrix of one chunk."""
    return pl.BlockSpec((None, None, None, rows, columns), lambda b, h, i: (b, h, i, 0, 0))


def fill_parts(programs: int, features: int) -> int:
    """Into how many parts of at least 16 features a walk is cut so that the GPU is full."""
    parts = 1
    while programs * parts < FILLED and features // (2 * parts) >= SMALLEST:
        parts *= 2
    return parts


partial = functools.partial
