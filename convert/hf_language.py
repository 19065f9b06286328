"""The tensors of the language model among those of a directory: under the names and in the form that its layout has (layouts.py).

What else there is belongs to a larger model and changes no logits of a text: layers that guess further tokens, and eyes.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import layouts
from convert.portable import Lazy

_MOST_AHEAD = 16  # GLM and DeepSeek have 1
_NESTED = ("qwen3_5", "qwen3_5_moe")
_EYES = "model.visual."
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


def language(stored: dict[str, Lazy], values: Mapping[str, Any]) -> tuple[dict[str, Lazy], list[str]]:
    """Those tensors, and notes of what was left out. values: config.json, as `of_language` gives it."""
    notes, kind = [], values.get("model_type")
    if kind in _NESTED:
        kept = {name: tensor for name, tensor in _nested(stored).items() if not name.startswith(_EYES)}
        if len(kept) < len(stored):
            notes.append("Its part that sees pictures was left out: it reads and writes text here.")
        stored = _stacked(kept) if kind == "qwen3_5_moe" else kept
    kept = _without_predictors(stored, values)
    if len(kept) < len(stored):
        notes.append("Its layers that guess further tokens at once were left out.")
    return kept, notes


def _nested(stored: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of a language model that was saved by itself, with the names they have inside the whole one."""
    if any(name.startswith(layouts.NESTED) for name in stored):
        return dict(stored)
    return {name.replace(layouts.PREFIX, layouts.NESTED, 1): tensor for name, tensor in stored.items()}


def _stacked(stored: dict[str, Lazy]) -> dict[str, Lazy]:
    """Experts that were saved one by one, those of a layer in two tensors: gate and up, and down. What does not fit stays as it is."""
    found: dict[str, dict[str, dict[int, Lazy]]] = {}
    for name in stored:
        if match := _EXPERT.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = stored[name]
    kept = dict(stored)
    for at, parts in found.items():
        gate, up, down = ([tensors[e] for e in sorted(tensors)] for tensors in (parts.get(name, {}) for name in ("gate", "up", "down")))
        if len(gate) == len(up) == len(down) and len({each.shape for each in gate + up}) == len({each.shape for each in down}) == 1:
            kept = {name: tensor for name, tensor in kept.items() if not (name.startswith(at) and _EXPERT.fullmatch(name))}
            kept |= {f"{at}gate_up_proj": _joined(gate, up), f"{at}down_proj": _joined(down)}
    return kept


def _joined(*parts: list[Lazy]) -> Lazy:
    """[E, rows of all parts, width] of the matrices of E experts."""
    rows, width = parts[0][0].shape

    def make() -> np.ndarray:
        return np.stack([np.concatenate([tensor.read() for tensor in each]) for each in zip(*parts, strict=True)])

    return Lazy(parts[0][0].dtype, (len(parts[0]), len(parts) * rows, width), make)


def _without_predictors(stored: dict[str, Lazy], values: Mapping[str, Any]) -> dict[str, Lazy]:
    """The tensors without those of layers that guess the token after the next one, after the model's own."""
    layers, more = values.get("num_hidden_layers"), values.get("num_nextn_predict_layers") or 0
    first = (
        [f"model.layers.{layers + number}." for number in range(min(more, _MOST_AHEAD))]
        if type(layers) is int and type(more) is int
        else []
    )
    ahead = tuple(first if more else ["mtp."])
    return {name: tensor for name, tensor in stored.items() if not name.startswith(ahead)}
