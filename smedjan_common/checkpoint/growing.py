"""The weights of a larger model that computes the same (smedjan_common.model.growth), in float64 and rounded once to float32.

    what writes into the stream    W -> W / c + d_i for each of c copies of a unit, sum_i d_i = 0      o_proj, down_proj
    everything else of a unit      copied as it is; so all copies compute the same, and the sum of what they write is W's
    an added layer                 what it writes is 0 (its norm, where that comes after), its other matrices W + a tenth of noise
    an expert                      the dense one with each hidden unit's up row times s and down column over s, s = exp(N(0, 1) / 4)
    a shared expert                writes 0

The d_i, as large as the shares, and s keep copies from being twins: of equal shares the gradients would be equal too, and after any
number of steps c units would still be one (Chen et al., 2016, add noise for it, which changes the function). New layers: LLaMA Pro (Wu et
al., 2024). Experts of a dense model: Komatsuzaki et al., 2023.
"""

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.model.growth import Growth, spread
from smedjan_common.model.mixers.gated_deltanet import heads
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.params import initial_value, parameter_table

APART = 0.5  # d_i over the root mean square of W
NOISE = 0.1  # of the matrices of an added layer
STRETCH = 0.25  # of log s

Read = Callable[[], np.ndarray]  # -> a tensor, float64


def grown(weights: Mapping[str, Lazy], growth: Growth, seed: int) -> dict[str, Lazy]:
    """The tensors of `growth.new`, float32, none computed yet: a pure function of weights, growth and seed."""
    making = _Making(weights, growth, seed)
    return {name: Lazy(np.dtype(np.float32), spec.shape, making.of(spec)) for name, spec in parameter_table(growth.new).items()}


class _Making:
    def __init__(self, weights: Mapping[str, Lazy], growth: Growth, seed: int):
        self.weights, self.growth, self.seed = weights, growth, seed
        self.table = parameter_table(growth.old)

    def of(self, spec: ParamSpec) -> Read:
        """How a tensor of the new model is made."""
        if not spec.name.startswith("layers."):
            return lambda: self.read(spec.name).astype(np.float32)
        _, number, part, rest = spec.name.split(".", 3)
        layer = int(number)
        stems = f"layers.{self.growth.layers[layer]}.{part}.{rest}"
        if part == "ffn" and self.growth.becomes_experts(layer):
            return lambda: self.expert(layer, rest, spec)
        if stems not in self.table:  # a layer of rwkv that is no longer the first
            return lambda: initial_value(spec, self.seed)
        return lambda: self.unit_by_unit(layer, stems, spec).astype(np.float32)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.weights[name], np.float64)

    def unit_by_unit(self, layer: int, stems: str, spec: ParamSpec) -> np.ndarray:
        """The tensor of an old layer with copies of its units, and for an added layer what makes it add nothing."""
        if self.growth.added(layer) and _silenced(spec, self.growth.new.block_norms):
            return np.zeros(spec.shape)
        old, value = self.table[stems], self.read(stems)
        for axis, (before, after) in enumerate(zip(old.shape, spec.shape, strict=True)):
            if before != after:
                index = self.stems(old, axis, before, after)
                divided = _writes(spec) and axis == value.ndim - 1
                value = self.shared_out(value, index, spec) if divided else np.take(value, index, axis)
        if self.growth.added(layer) and spec.matrix:
            value = value + NOISE * _size(value) * self.rng(spec.name).standard_normal(value.shape)
        return value

    def stems(self, old: ParamSpec, axis: int, before: int, after: int) -> np.ndarray:
        """Of which row (or column) each one of the new tensor is a copy."""
        label, growth = old.axes[axis], self.growth
        if label == "ffn":
            return np.array(spread(before, after))
        if label in ("heads", "kv_heads"):
            of = growth.heads if label == "heads" else growth.kv_heads
            return _blocks(of, before // getattr(growth.old, label))
        if old.name.endswith("mixer.conv.weight"):  # gated-deltanet: the features of queries, keys and values
            own = heads(growth.old)
            keys, copies = own.key_features, _blocks(growth.kv_heads, own.key_dim)
            return np.concatenate([copies, keys + copies, np.arange(2 * keys, before)])
        of = growth.heads if old.name.endswith("q_norm.weight") else growth.kv_heads  # --qk-norm-over all
        return _blocks(of, growth.old.head_dim)

    def shared_out(self, value: np.ndarray, index: np.ndarray, spec: ParamSpec) -> np.ndarray:
        """Columns of the old tensor shared out among their copies, which add up to them, the last one's rounding included."""
        counts, order = np.bincount(index), np.argsort(index, kind="stable")
        starts = np.cumsum(counts) - counts
        size = _size(value) or (float(np.max(spec.scale)) if spec.init == "normal" else 0.0)
        apart = APART * size * self.rng(spec.name).standard_normal((*value.shape[:-1], len(index)))
        apart -= (np.add.reduceat(apart[..., order], starts, axis=-1) / counts)[..., index]
        shares = (value / counts)[..., index] + np.where(counts[index] > 1, apart, 0)
        shares = shares.astype(np.float32).astype(np.float64)
        last = order[starts + counts - 1]
        shares[..., last] += value - np.add.reduceat(shares[..., order], starts, axis=-1)
        return shares

    def expert(self, layer: int, rest: str, spec: ParamSpec) -> np.ndarray:
        """A tensor of the experts that a dense feed-forward becomes."""
        at = f"layers.{self.growth.layers[layer]}.ffn."
        if rest.startswith("router."):
            return initial_value(spec, self.seed)
        name = rest.removeprefix("shared.")
        if name != rest:
            return self.shared_expert(at + name, spec)
        dense = self.table[at + name]._replace(name=f"layers.{layer}.ffn.{name}", shape=spec.shape[1:])
        value, made = self.unit_by_unit(layer, at + name, dense), np.empty(spec.shape, np.float32)
        for expert in range(len(made)):
            stretch = np.exp(STRETCH * self.rng(f"layers.{layer}.ffn.{expert}").standard_normal(self.growth.new.ffn_dim))
            made[expert] = value * {"up_proj.weight": stretch[:, None], "down_proj.weight": 1 / stretch}.get(name, 1.0)
        return made

    def shared_expert(self, name: str, spec: ParamSpec) -> np.ndarray:
        """It writes nothing yet; its hidden units are those of the dense one and noise."""
        if _writes(spec):
            return np.zeros(spec.shape, np.float32)
        value = self.read(name)
        value = value[np.arange(spec.shape[0]) % len(value)]
        return (value + NOISE * _size(value) * self.rng(spec.name).standard_normal(value.shape)).astype(np.float32)

    def rng(self, name: str) -> np.random.Generator:
        key = hashlib.blake2b(f"grow:{self.seed}:{name}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _writes(spec: ParamSpec) -> bool:
    """Whether it is the matrix, or the bias, whose outputs are added to the residual stream."""
    return (spec.matrix and spec.axes[-2] == "embed") or (spec.axes == ("embed",) and spec.name.endswith(".bias"))


def _silenced(spec: ParamSpec, norms: tuple[str, ...]) -> bool:
    """Whether a tensor is 0 in a layer that is to add nothing: what it writes with, or the norms after that, where there are any."""
    if any(name.endswith("_post_norm") for name in norms):
        return spec.name.endswith("_post_norm.weight")
    return _writes(spec)


def _blocks(of: tuple[int, ...], size: int) -> np.ndarray:
    """Places of features where each of `of` has `size` of them."""
    return (np.array(of)[:, None] * size + np.arange(size)).ravel()


def _size(value: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(value * value)))
