"""Adapters in MLX (smedjan_common.model.adapters): parameters as the modules take them in training, and as a model without adapters."""

from typing import Any

import mlx.core as mx

from smedjan_common.config import ModelConfig
from smedjan_common.model.adapters import LORA_A, LORA_B, Adapters, adapted_maps, row_names
from smedjan_common.model.params import parameter_table
from smedjan_mlx.modules import Params


def adapted(config: ModelConfig, adapters: Adapters | None, params: dict[str, Any]) -> dict[str, Any]:
    """The same with every B times the scale, and the rows of new tokens in their place."""
    if adapters is None:
        return params
    scaled = {f"{path}.{LORA_B}": params[f"{path}.{LORA_B}"] * adapters.scale for path in adapted_maps(config, adapters)}
    return {**params, **scaled, **_with_rows(config, adapters, params)}


def merged(config: ModelConfig, adapters: Adapters, params: Params) -> Params:
    """The model alone: W + s B A in its matrices, float32, and the rows of new tokens in their place."""
    whole = {name: params[name] for name in parameter_table(config)}
    for path, spec in adapted_maps(config, adapters).items():
        whole[spec.name] = whole[spec.name] + adapters.scale * (params[f"{path}.{LORA_B}"] @ params[f"{path}.{LORA_A}"])
    return {**whole, **_with_rows(config, adapters, params)}


def _with_rows(config: ModelConfig, adapters: Adapters, params: Params) -> Params:
    start, stop = adapters.new_rows
    rows = row_names(config) if stop > start else {}
    return {name: mx.concatenate([params[name][:start], params[new], params[name][stop:]]) for new, name in rows.items()}
