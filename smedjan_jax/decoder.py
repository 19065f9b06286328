"""Decoding in JAX: rows side by side, each at its own position (protocol: smedjan_common.backend.Decoder).

The state of all rows is one tree of arrays that every call donates, so it is updated in place; the positions are the host's. Prompts
are fed in chunks whose lengths are powers of two, and steps read a power of two of the entries, so few shapes are compiled.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smedjan_common.backend import LESS_TO_DECODE
from smedjan_common.config import ModelConfig
from smedjan_common.inference.chunks import by_position, can_rewind, chunk_lengths, read_length
from smedjan_common.inference.drawing import Draw, Drawn, Settings, Way, seen, settings, way
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.spec import StateSpec
from smedjan_jax import held, kernels, sharding
from smedjan_jax.guard import guarded
from smedjan_jax.model import Model, State
from smedjan_jax.modules import Params
from smedjan_jax.noise import gumbel
from smedjan_jax.sampling import draw
from smedjan_jax.weights import decoding_weights, views

Layers = list[State]

_NOISE_AT_ONCE = 1 << 25  # float32 values: 128 MiB


@dataclass(frozen=True)
class Saved:
    """What a row has seen: its state, on the device, up to `position`."""

    position: int
    layers: Layers

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.layers for array in arrays.values())


class JaxDecoder:
    """Decodes `rows` sequences. max_len: positions that a row's state holds; beyond them the newest are seen."""

    largest_chunk = 512
    _kernels = "auto"  # as of --kernels

    def __init__(self, model: ModelConfig, params: dict[str, Any], dtype: str, max_len: int, rows: int = 1):
        self.model, self.dtype, self.rows, self.max_len = model, dtype, rows, max_len
        self.can_rewind, self.endless = can_rewind(model), not by_position(model, max_len)
        self._weights = guarded(decoding_weights, model, params, dtype, fix=LESS_TO_DECODE)
        everywhere = sharding.everywhere_with(self._weights)
        by_kernel = kernels.for_decoding(self._kernels, model, dtype, max_len, len(everywhere.device_set))
        by_kernel = by_kernel and held.decoding(model, dtype, max_len)
        self._reads_all = by_kernel and set(model.mixer) == {"attention"}
        self._compiled = _functions(model, dtype, max_len, everywhere, by_kernel)
        self._positions = np.zeros(rows, np.int32)
        fresh = functools.partial(Model(model, views(model, self._weights), dtype).init_state, rows, max_len)
        self._layers = guarded(lambda: jax.device_put(fresh()["layers"], everywhere), fix=LESS_TO_DECODE)
        self._seen, self._looked = [], 0  # of the last `look`: states that sum up, after it, and its tokens

    _seen: Layers

    def position(self, row: int = 0) -> int:
        return int(self._positions[row])

    def feed(self, ids: Sequence[int], row: int = 0) -> np.ndarray:
        assert len(ids), "there is nothing to feed"
        tokens, logits, start = np.asarray(ids, np.int32), None, 0
        for length in chunk_lengths(self.model, self.max_len, self.position(row), len(tokens), self.largest_chunk):
            chunk, position = tokens[None, start : start + length], self._positions[row : row + 1].copy()
            read = read_length(self.max_len, self.position(row) + (length == 1))
            read = self.max_len if length == 1 and self._reads_all else read
            logits = self._feed(row, chunk, position, read)
            self._positions[row] += length
            start += length
        return np.asarray(logits)

    def _feed(self, row: int, chunk: np.ndarray, position: np.ndarray, read: int) -> Any:
        """Logits [V] after a chunk of a row. The row is taken out and put back by calls of their own: XLA writes into a state that one
        program reads as well only after it has copied all of it."""
        if self.rows == 1:
            return self._run(self._compiled.feed, chunk, position, read)
        one = self._compiled.take(self._layers, np.int32(row))
        logits, one = guarded(self._compiled.feed, self._weights, one, chunk, position, read, fix=LESS_TO_DECODE)
        self._layers = self._compiled.put(self._layers, np.int32(row), one)
        return logits

    def step(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        active = np.asarray(active, bool)
        read = self._read(int(self._positions[active].max(initial=0)) + 1)
        tokens = np.where(active, tokens, 0).astype(np.int32)
        logits = self._run(self._compiled.step, tokens[:, None], self._positions.copy(), active, read)
        self._positions += active
        return np.asarray(logits)

    def look(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        active, count = np.asarray(active, bool), tokens.shape[1]
        newest = int(self._positions[active].max(initial=0))
        assert self.endless or newest + count <= self.max_len, "it would overwrite what it is to go back to"
        tokens = np.where(active[:, None], tokens, 0).astype(np.int32)
        args = tokens, self._positions.copy(), active, self._read(newest, count)
        logits, self._seen = self._run(self._compiled.look, *args)
        self._looked = count
        return np.asarray(logits)

    def keep(self, counts: np.ndarray) -> None:
        counts = np.asarray(counts, np.int32)
        assert self.can_rewind or np.isin(counts, (0, self._looked)).all(), "its state sums up all that was looked at"
        if not self.can_rewind and counts.any():
            self._layers = self._compiled.keep(self._layers, self._seen, counts > 0)
        self._positions += counts
        self._seen, self._looked = [], 0

    def block(self, rows: Sequence[Draw], steps: int) -> list[Drawn]:
        vocab, kind = self.model.vocab_size, way(rows, self.model.vocab_size)
        token, place, left = (np.zeros(self.rows, np.int32) for _ in range(3))
        for each in rows:
            token[each.row], place[each.row], left[each.row] = each.token, len(each.history), each.most
        read = self._read(max((self.position(each.row) for each in rows), default=0) + steps)
        texts = seen(rows, self.rows, vocab) if kind.penalized else np.zeros((self.rows, 1), bool)
        begin = Going(token, self._positions, place, left, left > 0, np.zeros(self.rows, bool))
        sent = _packed((*begin, *settings(rows, self.rows, vocab)))
        report, logits = self._run(self._compiled.block, sent, texts, kind, steps, read)
        *drawn, self._positions, asked = np.array(report)
        drawn, waiting = np.stack(drawn), np.asarray(logits) if asked.any() else None
        return [Drawn(_tokens(drawn[:, each.row]), waiting[each.row] if waiting is not None and asked[each.row] else None) for each in rows]

    def reset(self, row: int | None = None) -> None:
        for each in range(self.rows) if row is None else (row,):
            self._layers = self._compiled.reset(self._layers, np.int32(each))
            self._positions[each] = 0

    def rewind(self, row: int, position: int) -> bool:
        assert self.can_rewind, "its state sums up all positions"
        assert 0 <= position <= self.position(row), "it has not been there"
        if self.position(row) > self.max_len and position < self.position(row):
            return False
        self._positions[row] = position
        return True

    def save(self, row: int) -> Saved:
        length = read_length(self.max_len, self.position(row)) if self.position(row) <= self.max_len else None
        return Saved(self.position(row), self._compiled.save(self._layers, np.int32(row), length))

    def load(self, row: int, saved: Saved) -> None:
        self._layers = self._compiled.load(self._layers, np.int32(row), saved.layers)
        self._positions[row] = saved.position

    def _read(self, position: int, tokens: int = 1) -> int:
        """How many entries a step of all rows reads. In float32 no row's sums have another order for where the others stand. The kernel of
        one token reads what is there, whatever it is told, so that nothing else is compiled where a row grows."""
        if self._reads_all and tokens == 1:
            return self.max_len
        return self.max_len if self.rows > 1 and self.dtype == "float32" else read_length(self.max_len, position)

    def _run(self, function: Callable, *args: Any) -> Any:
        given, self._layers = guarded(function, self._weights, self._layers, *args, fix=LESS_TO_DECODE)
        return given


class _PlainDecoder(JaxDecoder):
    """The same without the kernel of one new token's attention."""

    _kernels = "plain"


def decoder_class(kernels: str) -> type[JaxDecoder]:
    """The decoder of a value of --kernels."""
    return _PlainDecoder if kernels == "plain" else JaxDecoder


class Going(NamedTuple):
    """Where the rows of a block are, arrays of R rows."""

    token: Any  # drawn, not consumed yet
    position: Any
    place: Any  # of the next token in the text
    left: Any  # tokens that may be drawn
    active: Any
    asked: Any  # whether the host is to choose the next token


class Functions(NamedTuple):
    """The compiled functions of a decoder. Each takes the layers of the state and gives them back; `feed` those of one row, which `take`
    takes out and `put` puts back."""

    take: Callable
    feed: Callable
    put: Callable
    step: Callable
    look: Callable
    keep: Callable
    block: Callable
    reset: Callable
    save: Callable
    load: Callable


@functools.lru_cache(maxsize=8)
def _functions(model: ModelConfig, dtype: str, max_len: int, everywhere: jax.sharding.Sharding, by_kernel: bool) -> Functions:
    """Decoders of the same model share them, so a run's samples compile once. Of weights that are split, XLA makes what it needs; what
    comes out is `everywhere`."""
    summed = [{spec.name for spec in _specs(model, layer, max_len) if spec.axis is None} for layer in range(model.layers)]

    def logits(weights: Params, tokens: jax.Array, layers: Layers, position: jax.Array, active: jax.Array | None, length: int):
        state = {"position": position, "layers": layers}
        scores, after = Model(model, views(model, weights), dtype, "kernel" if by_kernel else "auto").step(tokens, state, active, length)
        return scores[:, : model.vocab_size], after["layers"]

    def feed(weights: Params, one: Layers, tokens: jax.Array, position: jax.Array, length: int):
        scores, one = logits(weights, tokens, one, position, None, length)
        return scores[0], one

    def step(weights: Params, layers: Layers, tokens: jax.Array, position: jax.Array, active: jax.Array, length: int):
        return logits(weights, tokens, layers, position, active, length)

    def look(weights: Params, layers: Layers, tokens: jax.Array, position: jax.Array, active: jax.Array, length: int):
        state = {"position": position, "layers": layers}
        scores, after = Model(model, views(model, weights), dtype).look(tokens, state, active, length)
        ahead = [{name: array for name, array in one.items() if name in names} for one, names in zip(after["layers"], summed, strict=True)]
        stays = [one | {name: before[name] for name in names} for one, before, names in zip(after["layers"], layers, summed, strict=True)]
        return (scores[..., : model.vocab_size], ahead), stays

    def keep(layers: Layers, ahead: Layers, rows: jax.Array) -> Layers:
        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return [old | {name: chosen(new[name], old[name]) for name in new} for old, new in zip(layers, ahead, strict=True)]

    def block(weights: Params, layers: Layers, sent: jax.Array, texts: jax.Array, kind: Way, steps: int, length: int):
        rows, vocab = len(sent), model.vocab_size
        begin, how = _unpacked(sent)
        ahead = kind.random and steps * rows * vocab <= _NOISE_AT_ONCE
        places_SR = begin.place + jnp.arange(steps)[:, None]
        of_place = functools.partial(gumbel, count=vocab)
        noise = jax.vmap(of_place, (None, 0))(how.seed, places_SR) if ahead else jnp.zeros((steps, 0))

        def go_on(carry: tuple[Going, Layers, jax.Array, jax.Array], noise_RV: jax.Array):
            at, layers, texts, waiting = carry
            scores, layers = logits(weights, at.token[:, None], layers, at.position, at.active, length)
            drawn = noise_RV if ahead or not kind.random else of_place(how.seed, at.place)
            chosen, sure = draw(scores, drawn, how, texts, kind)
            asked, took = at.active & ~sure, at.active & sure
            texts = texts.at[jnp.arange(rows), chosen].max(took) if kind.penalized else texts
            left = at.left - took
            active = took & (left > 0) & ~(chosen[:, None] == how.stops).any(axis=1)
            token = jnp.where(took, chosen, at.token)
            after = Going(token, at.position + at.active, at.place + took, left, active, at.asked | asked)
            return (after, layers, texts, jnp.where(asked[:, None], scores, waiting)), jnp.where(took, chosen, -1)

        start = begin, layers, texts, jnp.zeros((rows, vocab))
        (end, layers, _, waiting), tokens_SR = jax.lax.scan(go_on, start, noise)
        return (jnp.concatenate([tokens_SR, end.position[None], end.asked[None].astype(jnp.int32)]), waiting), layers

    def reset(layers: Layers, row: jax.Array) -> Layers:
        return _with_row(layers, row, jax.tree.map(lambda array: jnp.zeros((1, *array.shape[1:]), array.dtype), layers))

    def save(layers: Layers, row: jax.Array, length: int | None) -> Layers:
        return [
            {spec.name: _upto(one[spec.name], spec, length) for spec in _specs(model, layer, max_len)}
            for layer, one in enumerate(_row(layers, row))
        ]

    def load(layers: Layers, row: jax.Array, saved: Layers) -> Layers:
        return _with_row(reset(layers, row), row, saved)

    jit = functools.partial(jax.jit, out_shardings=everywhere)
    return Functions(
        jit(_row),
        jit(feed, donate_argnums=1, static_argnums=4),
        jit(_with_row, donate_argnums=0),
        jit(step, donate_argnums=1, static_argnums=5),
        jit(look, donate_argnums=1, static_argnums=5),
        jit(keep, donate_argnums=0),
        jit(block, donate_argnums=1, static_argnums=(4, 5, 6)),
        jit(reset, donate_argnums=0),
        jit(save, static_argnums=2),
        jit(load, donate_argnums=0),
    )


def _packed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of R rows as the columns of one, int32: what goes to the device goes at once."""
    wide = [array.astype(np.int32) if array.dtype == bool else np.ascontiguousarray(array).view(np.int32) for array in arrays]
    return np.concatenate([array.reshape(len(array), -1) for array in wide], axis=1)


def _unpacked(sent: jax.Array) -> tuple[Going, Settings]:
    """What was packed."""
    like, values, column = settings((), 1, 1), [], len(Going._fields)
    flags = ("active", "asked")
    going = Going(*(sent[:, i] > 0 if name in flags else sent[:, i] for i, name in enumerate(Going._fields)))
    for array in like:
        width = array.reshape(1, -1).shape[1]
        value = sent[:, column : column + width]
        value = value > 0 if array.dtype == bool else jax.lax.bitcast_convert_type(value, array.dtype)
        values.append(value if array.ndim > 1 else value[:, 0])
        column += width
    return going, Settings(*values)


def _tokens(drawn: np.ndarray) -> list[int]:
    """What a row drew, without the steps in which it did not."""
    return drawn[drawn >= 0].tolist()


def _specs(model: ModelConfig, layer: int, max_len: int) -> list[StateSpec]:
    return MIXERS[model.mixer_of(layer)].state(model, 1, max_len)


def _row(layers: Layers, row: jax.Array) -> Layers:
    """One row, [1, …] each."""
    return jax.tree.map(lambda array: array if len(array) == 1 else jax.lax.dynamic_slice_in_dim(array, row, 1), layers)


def _with_row(layers: Layers, row: jax.Array, one: Layers) -> Layers:
    """The layers with `one` at the beginning of that row."""
    return jax.tree.map(lambda array, new: jax.lax.dynamic_update_slice(array, new, (row, *[0] * (array.ndim - 1))), layers, one)


def _upto(array: jax.Array, spec: StateSpec, length: int | None) -> jax.Array:
    """The entries of the first `length` positions, or all, of an array by position."""
    if spec.axis is None or length is None:
        return array
    return jax.lax.slice_in_dim(array, 0, min(-(-length // spec.span), array.shape[spec.axis]), axis=spec.axis)
