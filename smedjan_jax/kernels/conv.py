"""Causal depthwise convolution and SiLU of mixers/conv.py as one kernel each way, and the unit length of heads where a mixer wants it.

    u_t = bias + sum_j weight[:, j] x_{t - W + 1 + j};   s = silu(u);   y = s, or scale s / sqrt(|s|^2 + eps) over a head

The features come as they are projected and leave as the arrays that the core reads, one for each part, so nothing is cut or joined
outside. Neighbouring parts of one scale are made at once: alone, a small one would leave most of the GPU idle. A program takes a few
heads of some neighbouring positions and walks along these, row by row, with the last rows in registers: so x is read once and no row is
shifted. Backward it walks from the end and makes u again from x; with the gradients of the next W - 1 rows of u in registers those of x
are done as soon as those of u are, and the ones of taps and bias are added up on the way, then over programs.

Shapes: B batch, T positions, H heads of F features (any equal parts of the channels), W taps; N heads and R positions of a program.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.special import rsqrt, sigmoid
from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, load, padded, partial, power_of_two, store

EPS = 1e-6


class Part(NamedTuple):
    """Neighbouring heads that become one array. scale: the length that each gets; 0: its own."""

    heads: int
    scale: float = 0.0


class Plan(NamedTuple):
    """How a problem is run. Positions and features of a program; positions that are loaded at once; features that a thread holds."""

    rows: int = 64
    features: int = 128
    step: int = 4
    values: int = 4


PLAIN = Plan(step=8, values=2)  # where no head gets unit length: nothing is summed over features, so more threads load more rows at once


def conv_silu(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    documents: jax.Array | None,
    parts: tuple[Part, ...],
    plan: Plan | None = None,
) -> tuple[jax.Array, ...]:
    """For each part [B, T, heads, F] in the dtype of x [B, T, C]; C = F times all heads. weight [C, W], bias [C] float32.

    documents: int32 [B, T]; taps do not reach into an earlier one.
    """
    (B, T, C), H, W = x.shape, sum(part.heads for part in parts), weight.shape[1]
    plan = plan or (Plan() if any(part.scale for part in parts) else PLAIN)
    F = C // H
    wide, size = power_of_two(F), plan.rows * -(-T // plan.rows)
    x = padded(padded(x.reshape(B, T, H, F), -1, wide), 1, size)
    taps = padded(weight.astype(FLOAT32).T.reshape(W, H, F), -1, wide)
    start = None if bias is None else padded(bias.astype(FLOAT32).reshape(H, F), -1, wide)
    docs = None if documents is None else jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, size - T)), mode="edge")
    return tuple(y[:, :T, :, :F] for y in _conv(x, taps, start, docs, parts, plan))


class _Group(NamedTuple):
    """Neighbouring parts of one scale: programs (heads, positions, batch), so that neighbours read the same rows."""

    parts: tuple[Part, ...]
    programs: tuple[int, int, int]
    heads: int  # of a program
    first: int  # how many programs' heads stand before the group's
    launch: Launch

    def bounds(self) -> list[tuple[int, int]]:
        """The programs of each part along the heads, from and to."""
        ends = [sum(part.heads for part in self.parts[: i + 1]) // self.heads for i in range(len(self.parts))]
        return [(end - part.heads // self.heads, end) for part, end in zip(self.parts, ends, strict=True)]

    def specs(self, T: int, F: int) -> list[pl.BlockSpec]:
        """Of the parts' own arrays [B, T, heads, F]; to programs of other parts an array shows its border, which they leave alone."""

        def of(first: int, end: int) -> pl.BlockSpec:
            return pl.BlockSpec((None, T, self.heads, F), lambda h, i, b: (b, 0, jnp.clip(h - first, 0, end - first - 1), 0))

        return [of(*each) for each in self.bounds()] if len(self.parts) > 1 else [_heads(T, self.heads, F)]


def _groups(x: jax.Array, parts: tuple[Part, ...], plan: Plan) -> list[_Group]:
    (B, T, _, F), found, before = x.shape, [], 0
    for _, alike in itertools.groupby(parts, lambda part: part.scale):
        own, N = tuple(alike), 1
        while plan.features >= 2 * N * F and all(heads % (2 * N) == 0 for heads in (before, *(part.heads for part in own))):
            N *= 2
        total = sum(part.heads for part in own)
        launch = Launch(max(1, N * F // (32 * plan.values)), 1)
        found.append(_Group(own, (total // N, T // plan.rows, B), N, before // N, launch))
        before += total
    return found


def _outputs(x, taps, bias, docs, parts, plan):
    (B, T, _, F), outputs = x.shape, []
    for group in _groups(x, parts, plan):
        kernel = partial(_forward_kernel, group=group, plan=plan, biased=bias is not None, masked=docs is not None)
        shapes = [((B, T, part.heads, F), x.dtype, spec) for part, spec in zip(group.parts, group.specs(T, F), strict=True)]
        outputs += call(kernel, group.launch, group.programs, *_inputs(x, taps, bias, docs, group), shapes)
    return tuple(outputs)


def _forward(x, taps, bias, docs, parts, plan):
    return _outputs(x, taps, bias, docs, parts, plan), (x, taps, bias, docs)


def _backward(parts, plan, saved, cotangents):
    x, taps, bias, docs = saved
    (B, T, _, F), biased = x.shape, bias is not None
    rows, dx, sums, cotangents = len(taps) + biased, None, [], list(cotangents)
    for group in _groups(x, parts, plan):
        own, cotangents = cotangents[: len(group.parts)], cotangents[len(group.parts) :]
        inputs, specs = _inputs(x, taps, bias, docs, group)
        inputs, specs = [*inputs, *own], [*specs, *group.specs(T, F)]
        of_rows = pl.BlockSpec((None, None, rows, group.heads, F), lambda h, i, b: (b, i, 0, h, 0))
        heads, tiles, _ = group.programs
        outputs = [(x.shape, x.dtype, specs[0]), ((B, tiles, rows, heads * group.heads, F), FLOAT32, of_rows)]
        aliases = {}
        if dx is not None:  # each group's programs fill their heads of one array
            inputs, specs, aliases = [*inputs, dx], [*specs, specs[0]], {len(inputs): 0}
        kernel = partial(_backward_kernel, group=group, plan=plan, biased=biased, masked=docs is not None)
        dx, total = call(kernel, group.launch, group.programs, inputs, specs, outputs, aliases)
        sums.append(jnp.sum(total, axis=(0, 1)))
    total = jnp.concatenate(sums, axis=1)
    return dx, total[: len(taps)], total[-1] if biased else None, None


_conv: Any = jax.custom_vjp(_outputs, nondiff_argnums=(4, 5))
_conv.defvjp(_forward, _backward)


def _heads(T: int, N: int, F: int, first: int = 0) -> pl.BlockSpec:
    """[B, T, heads, F]: N heads' whole sequences."""
    return pl.BlockSpec((None, T, N, F), lambda h, i, b: (b, 0, first + h, 0))


def _inputs(x, taps, bias, docs, group):
    """x, taps, bias and documents, the last two perhaps dummies, and their specs."""
    (_, T, _, F), N, first = x.shape, group.heads, group.first
    one = pl.BlockSpec((1, 1), lambda h, i, b: (0, 0))
    specs = [
        _heads(T, N, F, first),
        pl.BlockSpec((len(taps), N, F), lambda h, i, b: (0, first + h, 0)),
        one if bias is None else pl.BlockSpec((N, F), lambda h, i, b: (first + h, 0)),
        one if docs is None else pl.BlockSpec((None, T), lambda h, i, b: (b, 0)),
    ]
    bias = jnp.zeros((1, 1), FLOAT32) if bias is None else bias
    return [x, taps, bias, jnp.zeros((1, 1), jnp.int32) if docs is None else docs], specs


class _Rows(NamedTuple):
    """What a program reads of its heads: rows of x float32 [N, F], of a document; taps [N, F] each, the last the position's own."""

    x: Any
    taps: list[jax.Array]
    start: jax.Array | None  # the bias
    documents: Any
    masked: bool

    def at(self, row: Any) -> jax.Array:
        """A row of the program's own."""
        return self.x[row].astype(FLOAT32)

    def near(self, row: Any) -> jax.Array:
        """Zeros where there is no such row."""
        return load(self.x, row, (row >= 0) & (row < self.x.shape[0])).astype(FLOAT32)

    def document(self, row: Any) -> jax.Array:
        return self.documents[jnp.clip(row, 0, self.x.shape[0] - 1)] if self.masked else row

    def same(self, x: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
        """x where two documents are one, else zeros."""
        return jnp.where(one == other, x, 0.0) if self.masked else x

    def inputs(self, near: list[jax.Array], owners: list[jax.Array]) -> list[jax.Array]:
        """Of the taps of a row, of the last W rows with their documents, its own at the end."""
        return [self.same(each, owner, owners[-1]) for each, owner in zip(near, owners, strict=True)]

    def convolved(self, inputs: list[jax.Array]) -> jax.Array:
        total = inputs[-1] * self.taps[-1] if self.start is None else self.start + inputs[-1] * self.taps[-1]
        for each, tap in zip(inputs[:-1], self.taps[:-1], strict=True):
            total = total + each * tap
        return total


def _rows(x, taps, bias, documents, biased, masked) -> _Rows:
    return _Rows(x, [taps[tap] for tap in range(len(taps))], bias[...] if biased else None, documents, masked)


def _length(active: jax.Array) -> jax.Array:
    """One over the length of each head of [N, F]."""
    return rsqrt(jnp.sum(active * active, axis=1, keepdims=True) + EPS)


def _own(group: _Group) -> list[Any]:
    """Whether a program is of each part; None where there is one."""
    h = pl.program_id(0)
    return [(h >= first) & (h < end) for first, end in group.bounds()] if len(group.parts) > 1 else [None]


def _forward_kernel(x, taps, bias, documents, *outputs, group, plan, biased, masked):
    scale, own = group.parts[0].scale, _own(group)
    it, first, W = _rows(x, taps, bias, documents, biased, masked), pl.program_id(1) * plan.rows, len(taps)

    def body(i, carried):
        at = first + i * plan.step
        rows = [at + j for j in range(plan.step)]
        near, owners = [*carried[0], *[it.at(row) for row in rows]], [*carried[1], *[it.document(row) for row in rows]]
        for j in range(plan.step):
            u = it.convolved(it.inputs(near[j : j + W], owners[j : j + W]))
            active = u * sigmoid(u)
            y = (active * (scale * _length(active)) if scale else active).astype(x.dtype)
            for out, mine in zip(outputs, own, strict=True):
                store(out, at + j, y, mine)
        return near[1 - W :], owners[1 - W :]

    before = [first + j for j in range(1 - W, 0)]
    lax.fori_loop(0, plan.rows // plan.step, body, ([it.near(row) for row in before], [it.document(row) for row in before]))


def _slope(u: jax.Array, dy: jax.Array, scale: float) -> jax.Array:
    """d u of d y."""
    gate = sigmoid(u)
    active = u * gate
    if scale:
        length = _length(active)
        dy = scale * length * (dy - active * (length * length * jnp.sum(active * dy, axis=1, keepdims=True)))
    return dy * (gate + active * (1 - gate))


def _backward_kernel(x, taps, bias, documents, *refs, group, plan, biased, masked):
    dx, totals = refs[-2:]
    scale, own = group.parts[0].scale, list(zip(refs, _own(group), strict=False))
    it, end = _rows(x, taps, bias, documents, biased, masked), (pl.program_id(1) + 1) * plan.rows
    W, U = len(taps), plan.step

    def slope(inputs, out):
        return _slope(it.convolved(inputs), out.astype(FLOAT32), scale)

    def walk(dy):
        def body(i, carried):
            later, of_later, after, sums = carried  # x of rows that this step has too, their documents and more, d u of those behind it
            rows = [end - (i + 1) * U + j for j in range(1 - W, U)]
            near, owners = [*[it.near(row) for row in rows[:U]], *later], [*[it.document(row) for row in rows[:U]], *of_later]
            inputs = [it.inputs(near[j : j + W], owners[j : j + W]) for j in range(U)]
            outs = [dy[row] for row in rows[W - 1 :]]
            # sums over heads are made beside each other; without them a row at a time takes a third fewer registers
            found = [slope(*each) for each in zip(inputs, outs, strict=True)] if scale else None
            for j in reversed(range(U)):
                du = found[j] if found else slope(inputs[j], outs[j])
                sums = [total + (du if of is None else du * of) for total, of in zip(sums, [*inputs[j], None], strict=False)]
                after = [du, *after]
                ahead = [it.same(each, owners[j + W - 1 + a], owners[j + W - 1]) * it.taps[W - 1 - a] for a, each in enumerate(after)]
                dx[rows[j + W - 1]] = sum(ahead[1:], ahead[0]).astype(dx.dtype)
                after = after[: W - 1]
            return near[: W - 1], owners[: 2 * (W - 1)], after, sums

        rows = [end + j for j in range(1 - W, W - 1)]
        near, owners = [it.near(row) for row in rows], [it.document(row) for row in rows]
        inputs = [it.inputs(near[j : j + W], owners[j : j + W]) for j in range(W - 1)]
        outs = [load(dy, row, row < x.shape[0]) for row in rows[W - 1 :]]
        after = [slope(*each) for each in zip(inputs, outs, strict=True)]
        zeros = [jnp.zeros(it.taps[0].shape, FLOAT32)] * len(totals)
        *_, sums = lax.fori_loop(0, plan.rows // U, body, (near[: W - 1], owners, after, zeros))
        for i, total in enumerate(sums):
            totals[i] = total

    if len(own) == 1:
        walk(refs[0])
        return
    for dy, mine in own:  # a program takes one branch: with a masked load of every part's gradients registers would run out
        pl.when(mine)(partial(walk, dy))
