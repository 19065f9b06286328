"""The weights of a decoder: cast to the compute dtype once, and those that meet the same x joined, so that a token reads each once.

A joined weight stands under the names of its parts, with + between them.
"""

from typing import Any

import mlx.core as mx

from smedjan_common.config import ModelConfig
from smedjan_common.model.params import head_name, parameter_table
from smedjan_common.model.quantization import quantized_names
from smedjan_mlx.model import Model
from smedjan_mlx.modules import Linear, Params, Part
from smedjan_mlx.precision import on_gpu


def decoding_weights(config: ModelConfig, params: dict[str, Any], dtype: str, join: bool | None = None) -> Params:
    """Arrays on the device, for `views`; those that are there in their dtype are taken as they are. join None: on one GPU, where a
    product more takes its time, if they are copied anyway."""
    kept = quantized_names(params)  # as they are, and one by one
    cast = compute_weights(config) - kept
    groups = [group for group in together(config) if not kept & set(group)]
    if join is None:
        there = isinstance(next(iter(params.values())), mx.array)
        copied = not there or any(params[name].dtype != getattr(mx, dtype) for name in cast)
        join = copied and on_gpu()
    names = {name: group for group in (groups if join else []) for name in group}
    weights: Params = {}
    for name in params:
        group = names.get(name, (name,))
        if group[0] == name:
            parts = [_on_device(params[each], dtype if each in cast else None) for each in group]
            weights["+".join(group)] = joined = mx.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
            mx.eval(joined)  # one after the other: what they are made of is not held for all at once
    return weights


def views(config: ModelConfig, weights: Params) -> dict[str, Any]:
    """The same by their own names, for Model: those that meet the same x are Parts, of a joined one or of themselves."""
    table, shared = parameter_table(config), {name for group in together(config) for name in group} - quantized_names(weights)
    params = {}
    for key, whole in weights.items():
        start, names = 0, key.split("+")
        for name in names:
            stop = start + table[name].shape[-2] if name in shared else 0
            params[name] = Part(whole, start, stop) if name in shared else whole
            start = stop
    return params


def together(config: ModelConfig) -> list[tuple[str, ...]]:
    """Names of the weights that meet the same x, group by group."""
    found = _unfilled(config).named_modules()
    groups = (tuple(f"{at}.{name}.weight" for name in getattr(module, "together", ())) for at, module in found)
    return [group for group in groups if group]


def compute_weights(config: ModelConfig) -> set[str]:
    """Weights that are used in the compute dtype only: of linear maps, but for convolutions, and of the embedding and the head."""
    found = _unfilled(config).named_modules()
    linears = {f"{at}.weight" for at, module in found if isinstance(module, Linear) and not at.endswith(".conv")}
    return linears | {"embed.weight", head_name(config)}


def _unfilled(config: ModelConfig) -> Model:
    """A model whose arrays are never made."""
    return Model(config, {name: mx.zeros(spec.shape) for name, spec in parameter_table(config).items()})


def _on_device(value: Any, dtype: str | None) -> mx.array:
    array = value if isinstance(value, mx.array) else mx.array(value)
    return array.astype(getattr(mx, dtype)) if dtype else array
