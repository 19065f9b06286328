"""The weights of a decoder: cast to the compute dtype once, and those that meet the same x joined, so that a token reads each once.

A joined weight stands under the names of its parts, with + between them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model.params import head_name, parameter_table
from smedjan_common.model.quantization import quantized_names
from smedjan_jax.model import Model
from smedjan_jax.modules import Linear, Params, Part


def decoding_weights(config: ModelConfig, params: dict[str, Any], dtype: str, join: bool | None = None) -> Params:
    """Arrays on the device, for `views`; those that are there in their dtype are taken as they are. join None: on one GPU, where a
    product more takes its time, if they are copied anyway."""
    kept = quantized_names(params)  # as they are, and one by one
    cast = compute_weights(config) - kept
    groups = [group for group in together(config) if not kept & set(group)]
    first = next(iter(params.values()))
    if join is None:
        there = isinstance(first, jax.Array)
        copied = not there or (len(first.sharding.device_set) == 1 and any(params[name].dtype != dtype for name in cast))
        join = copied and jax.default_backend() == "gpu"
    names = {name: group for group in (groups if join else []) for name in group}
    weights: Params = {}
    for name in params:
        group = names.get(name, (name,))
        if group[0] == name:
            parts = [jnp.asarray(params[each], dtype if each in cast else None) for each in group]
            weights["+".join(group)] = jnp.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
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
    found = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(_shapes(config)))
    groups = (tuple(f"{at}.{name}.weight" for name in getattr(module, "together", ())) for at, module in found)
    return [group for group in groups if group]


def compute_weights(config: ModelConfig) -> set[str]:
    """Weights that are used in the compute dtype only: of linear maps, but for convolutions, and of the embedding and the head."""
    found = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(_shapes(config)))
    linears = {f"{at}.weight" for at, module in found if isinstance(module, Linear) and not at.endswith(".conv")}
    return linears | {"embed.weight", head_name(config)}


def _shapes(config: ModelConfig) -> Model:
    shapes: Any = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in parameter_table(config).items()}
    return Model(config, shapes)
