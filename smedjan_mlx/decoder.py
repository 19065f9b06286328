"""Decoding in MLX: rows side by side, each at its own position (protocol: smedjan_common.backend.Decoder).

The state of all rows is one tree of arrays that every call uses up, so it is updated in place; the positions are the host's. Prompts
are fed in chunks whose lengths are powers of two, and steps read a power of two of the entries, so few shapes are compiled.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from smedjan_common.backend import LESS_TO_DECODE
from smedjan_common.config import ModelConfig
from smedjan_common.inference.chunks import by_position, can_rewind, chunk_lengths, read_length
from smedjan_common.inference.drawing import Draw, Drawn, Settings, Way, seen, settings, way
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.spec import StateSpec
from smedjan_mlx.guard import guarded
from smedjan_mlx.model import Model, State
from smedjan_mlx.modules import Params
from smedjan_mlx.noise import gumbel
from smedjan_mlx.precision import on_gpu
from smedjan_mlx.sampling import draw
from smedjan_mlx.weights import decoding_weights, views

Layers = list[State]


@dataclass(frozen=True)
class Saved:
    """What a row has seen: its state, on the device, up to `position`."""

    position: int
    layers: Layers

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.layers for array in arrays.values())


class MlxDecoder:
    """Decodes `rows` sequences. max_len: positions that a row's state holds; beyond them the newest are seen."""

    largest_chunk = 512

    def __init__(self, model: ModelConfig, params: dict[str, Any], dtype: str, max_len: int, rows: int = 1):
        self.model, self.dtype, self.rows, self.max_len = model, dtype, rows, max_len
        self.can_rewind, self.endless = can_rewind(model), not by_position(model, max_len)
        self._weights = guarded(decoding_weights, model, params, dtype, fix=LESS_TO_DECODE)
        self._compiled = _functions(model, dtype, max_len)
        self._positions = np.zeros(rows, np.int32)
        self._layers = Model(model, views(model, self._weights), dtype).init_state(rows, max_len)["layers"]
        guarded(mx.eval, self._layers, fix=LESS_TO_DECODE)
        self._seen, self._looked = [], 0  # of the last `look`: states that sum up, after it, and its tokens

    _seen: Layers

    def position(self, row: int = 0) -> int:
        return int(self._positions[row])

    def feed(self, ids: Sequence[int], row: int = 0) -> np.ndarray:
        assert len(ids), "there is nothing to feed"
        tokens, logits, start = np.asarray(ids, np.int32), None, 0
        for length in chunk_lengths(self.model, self.max_len, self.position(row), len(tokens), self.largest_chunk):
            chunk, position = tokens[None, start : start + length], self._positions[row : row + 1]
            read = read_length(self.max_len, self.position(row) + (length == 1))
            logits = self._run(self._compiled.feed, mx.array(chunk), mx.array(row), mx.array(position), read)
            self._positions[row] += length
            start += length
        return np.array(logits)

    def step(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        active = np.asarray(active, bool)
        read = self._read(int(self._positions[active].max(initial=0)) + 1)
        tokens = np.where(active, tokens, 0).astype(np.int32)
        logits = self._run(self._compiled.step, mx.array(tokens[:, None]), mx.array(self._positions), mx.array(active), read)
        self._positions += active
        return np.array(logits)

    def look(self, tokens: np.ndarray, active: np.ndarray) -> np.ndarray:
        active, count = np.asarray(active, bool), tokens.shape[1]
        newest = int(self._positions[active].max(initial=0))
        assert self.endless or newest + count <= self.max_len, "it would overwrite what it is to go back to"
        tokens = np.where(active[:, None], tokens, 0).astype(np.int32)
        args = mx.array(tokens), mx.array(self._positions), mx.array(active), self._read(newest)
        logits, self._seen = self._run(self._compiled.look, *args)
        self._looked = count
        return np.array(logits)

    def keep(self, counts: np.ndarray) -> None:
        counts = np.asarray(counts, np.int32)
        assert self.can_rewind or np.isin(counts, (0, self._looked)).all(), "its state sums up all that was looked at"
        if not self.can_rewind and counts.any():
            self._change(self._compiled.keep, self._seen, mx.array(np.greater(counts, 0)))
        self._positions += counts
        self._seen, self._looked = [], 0

    def block(self, rows: Sequence[Draw], steps: int) -> list[Drawn]:
        vocab, kind = self.model.vocab_size, way(rows, self.model.vocab_size)
        token, place, left = (np.zeros(self.rows, np.int32) for _ in range(3))
        for each in rows:
            token[each.row], place[each.row], left[each.row] = each.token, len(each.history), each.most
        read = self._read(max((self.position(each.row) for each in rows), default=0) + steps)
        texts = seen(rows, self.rows, vocab) if kind.penalized else np.zeros((self.rows, 1), bool)
        begin: list[Any] = [token, self._positions, place, left, left > 0, texts, np.zeros(self.rows, bool)]
        at = Going(*map(mx.array, begin))
        how, logits, taken = Settings(*map(mx.array, settings(rows, self.rows, vocab))), mx.zeros((self.rows, vocab)), []
        for _ in range(steps):  # each is under way while the next is prepared
            at, logits, chosen = self._start(self._compiled.block, at, logits, how, kind, read)
            taken.append(chosen)
        at = Going(*at)
        guarded(mx.eval, at, logits, taken, self._layers, fix=LESS_TO_DECODE)
        asked, drawn = np.array(at.asked), np.stack([np.array(chosen) for chosen in taken])
        self._positions = np.array(at.position)
        waiting = np.array(logits) if asked.any() else None
        return [Drawn(_tokens(drawn[:, each.row]), waiting[each.row] if waiting is not None and asked[each.row] else None) for each in rows]

    def reset(self, row: int | None = None) -> None:
        for each in range(self.rows) if row is None else (row,):
            self._change(self._compiled.reset, each)
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
        saved = Saved(self.position(row), self._compiled.save(self._layers, row, length))
        guarded(mx.eval, saved.layers, fix=LESS_TO_DECODE)
        return saved

    def load(self, row: int, saved: Saved) -> None:
        self._change(self._compiled.load, row, saved.layers)
        self._positions[row] = saved.position

    def _read(self, position: int) -> int:
        """How many entries a step of all rows reads. In float32 no row's sums have another order for where the others stand."""
        return self.max_len if self.rows > 1 and self.dtype == "float32" else read_length(self.max_len, position)

    def _run(self, function: Callable, *args: Any) -> Any:
        given = self._start(function, *args)
        guarded(mx.eval, given, self._layers, fix=LESS_TO_DECODE)
        return given

    def _start(self, function: Callable, *args: Any) -> Any:
        given, self._layers = guarded(function, self._weights, self._layers, *args, fix=LESS_TO_DECODE)
        guarded(mx.async_eval, given, self._layers, fix=LESS_TO_DECODE)
        return given

    def _change(self, function: Callable, *args: Any) -> None:
        self._layers = function(self._layers, *args)
        guarded(mx.eval, self._layers, fix=LESS_TO_DECODE)


class Going(NamedTuple):
    """Where the rows of a block are, arrays of R rows."""

    token: Any  # drawn, not consumed yet
    position: Any
    place: Any  # of the next token in the text
    left: Any  # tokens that may be drawn
    active: Any
    seen: Any  # bool [R, V], or [R, 1] where there is no penalty
    asked: Any  # whether the host is to choose the next token


class Functions(NamedTuple):
    """The functions of a decoder. Each takes the layers of the state and gives them back."""

    feed: Callable
    step: Callable
    look: Callable
    keep: Callable
    block: Callable
    reset: Callable
    save: Callable
    load: Callable


@functools.lru_cache(maxsize=8)
def _functions(model: ModelConfig, dtype: str, max_len: int) -> Functions:
    """Decoders of the same model share them, so a run's samples compile once."""
    summed = [{spec.name for spec in _specs(model, layer, max_len) if spec.axis is None} for layer in range(model.layers)]

    def logits(weights: Params, tokens: mx.array, layers: Layers, position: mx.array, active: mx.array | None, length: int):
        state = {"position": position, "layers": layers}
        scores, after = Model(model, views(model, weights), dtype).step(tokens, state, active, length)
        return scores[:, : model.vocab_size], after["layers"]

    def feed(weights: Params, layers: Layers, tokens: mx.array, row: mx.array, position: mx.array, length: int):
        scores, one = logits(weights, tokens, _row(layers, row), position, None, length)
        return scores[0], _with_row(layers, row, one)

    def step(weights: Params, layers: Layers, tokens: mx.array, position: mx.array, active: mx.array, length: int):
        return logits(weights, tokens, layers, position, active, length)

    def look(weights: Params, layers: Layers, tokens: mx.array, position: mx.array, active: mx.array, length: int):
        state = {"position": position, "layers": layers}
        scores, after = Model(model, views(model, weights), dtype).look(tokens, state, active, length)
        ahead = [{name: array for name, array in one.items() if name in names} for one, names in zip(after["layers"], summed, strict=True)]
        stays = [one | {name: before[name] for name in names} for one, before, names in zip(after["layers"], layers, summed, strict=True)]
        return (scores[..., : model.vocab_size], ahead), stays

    def keep(layers: Layers, ahead: Layers, rows: mx.array) -> Layers:
        def chosen(new: mx.array, old: mx.array) -> mx.array:
            return mx.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return [old | {name: chosen(new[name], old[name]) for name in new} for old, new in zip(layers, ahead, strict=True)]

    def block(weights: Params, layers: Layers, at: Going, waiting: mx.array, how: Settings, kind: Way, length: int):
        at, how = Going(*at), Settings(*how)  # compiled, they come as plain tuples
        scores, layers = logits(weights, at.token[:, None], layers, at.position, at.active, length)
        noise = gumbel(how.seed, at.place, model.vocab_size) if kind.random else scores
        chosen, sure = draw(scores, noise, how, at.seen, kind)
        asked, took = at.active & ~sure, at.active & sure
        texts, one = at.seen, chosen[:, None]
        if kind.penalized:
            texts = mx.put_along_axis(texts, one, mx.take_along_axis(texts, one, axis=1) | took[:, None], axis=1)
        left = at.left - took.astype(mx.int32)
        active = took & (left > 0) & ~(one == how.stops).any(axis=1)
        position, place = at.position + at.active.astype(mx.int32), at.place + took.astype(mx.int32)
        after = Going(mx.where(took, chosen, at.token), position, place, left, active, texts, at.asked | asked)
        return (after, mx.where(asked[:, None], scores, waiting), mx.where(took, chosen, -1)), layers

    def reset(layers: Layers, row: int) -> Layers:
        return _with_row(layers, mx.array(row), tree_map(lambda array: mx.zeros((1, *array.shape[1:]), array.dtype), layers))

    def save(layers: Layers, row: int, length: int | None) -> Layers:
        return [
            {spec.name: _upto(one[spec.name], spec, length) for spec in _specs(model, layer, max_len)}
            for layer, one in enumerate(_row(layers, mx.array(row)))
        ]

    def load(layers: Layers, row: int, saved: Layers) -> Layers:
        return _with_row(reset(layers, row), mx.array(row), saved)

    return Functions(_compiled(feed), _compiled(step), _compiled(look), keep, _compiled(block, 2), reset, save, load)


def _compiled(function: Callable, fixed: int = 1) -> Callable:
    """One compilation for each value of the last arguments, on a GPU; on a CPU MLX's compiler takes half a minute and gains nothing."""

    @functools.cache
    def at(*last: Any) -> Callable:
        return mx.compile(lambda *args: function(*args, *last))

    return (lambda *args: at(*args[-fixed:])(*args[:-fixed])) if on_gpu() else function


def _tokens(drawn: np.ndarray) -> list[int]:
    """What a row drew, without the steps in which it did not."""
    return drawn[drawn >= 0].tolist()


def _specs(model: ModelConfig, layer: int, max_len: int) -> list[StateSpec]:
    return MIXERS[model.mixer_of(layer)].state(model, 1, max_len)


def _row(layers: Layers, row: mx.array) -> Layers:
    """One row, [1, …] each."""
    return tree_map(lambda array: array if len(array) == 1 else array[row][None], layers)


def _with_row(layers: Layers, row: mx.array, one: Layers) -> Layers:
    """The layers with `one` at the beginning of that row."""
    return tree_map(lambda array, new: array if new is array else mx.slice_update(array, new, row.reshape(1), (0,)), layers, one)


def _upto(array: mx.array, spec: StateSpec, length: int | None) -> mx.array:
    """The entries of the first `length` positions, or all, of an array by position; a copy, since the state is overwritten in place."""
    if spec.axis is None or length is None:
        return array + 0
    return array[(slice(None),) * spec.axis + (slice(-(-length // spec.span)),)] + 0
