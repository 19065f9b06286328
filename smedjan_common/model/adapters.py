"""Adapters (LoRA; Hu et al., 2021): small matrices beside the frozen ones of a trained model, as rows of its parameter table.

    y = W x + s B (A x)        W [out, in] frozen,   A [r, in],   B [out, r],   s = alpha / r

    layers.3.mixer.q_proj.weight     layers.3.mixer.q_proj.lora_a     layers.3.mixer.q_proj.lora_b

A begins uniform in +-1/sqrt(in), by (seed, name), and B at zero: the adapted model begins as the model. Tokens that the tokenizer has
gained have rows of their own, which are trained whole (`embed.new_rows` [K, D]): in a frozen embedding they would never be learned.

Which linear maps have adapters is said by parts of their dotted paths: `q_proj`, `mixer`, `ffn.up_proj`, `layers.0`; `all` is every
one. Maps of single experts, routers, gates of shared experts, convolutions, norms and the embedding have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from smedjan_common.errors import ConfigError, near
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.params import head_name, initial_value, parameter_table, require_tree
from smedjan_common.model.shape import Shape

if TYPE_CHECKING:
    import numpy as np

ALL = "all"
LORA_A, LORA_B, NEW_ROWS = "lora_a", "lora_b", "new_rows"
_VOCABULARY = ("embed", "embed_tokens", "head", "lm_head", "wte")  # what users call the embedding and the head


class Adapters(NamedTuple):
    """What is trained of a model with adapters.

    rank: r. alpha: over it is the scale. targets: parts of paths. new_rows: first and last + 1 of the tokens whose rows are trained.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ALL,)
    new_rows: tuple[int, int] = (0, 0)

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank

    @property
    def tokens(self) -> int:
        """How many tokens have rows of their own."""
        return self.new_rows[1] - self.new_rows[0]


def linear_maps(config: Shape) -> dict[str, ParamSpec]:
    """The matrices that can have adapters, by the path of their map: `layers.0.mixer.q_proj` -> that of its weight."""
    table = parameter_table(config).values()
    maps = (spec for spec in table if spec.matrix and len(spec.shape) == 2 and spec.name.endswith(".weight"))
    return {spec.name.removesuffix(".weight"): spec for spec in maps if not spec.name.endswith((".router.weight", ".shared_gate.weight"))}


def adapted_maps(config: Shape, adapters: Adapters) -> dict[str, ParamSpec]:
    """Those that have adapters here, as `linear_maps`."""
    return {path: spec for path, spec in linear_maps(config).items() if any(_named(path, target) for target in adapters.targets)}


def adapter_table(config: Shape, adapters: Adapters) -> dict[str, ParamSpec]:
    """What is trained, by name: A and B of every adapted map, and rows of new tokens."""
    r, specs = adapters.rank, []
    for path, spec in adapted_maps(config, adapters).items():
        (out, into), (out_axis, in_axis) = spec.shape, spec.axes
        specs.append(ParamSpec(f"{path}.{LORA_A}", (r, into), (None, in_axis), "uniform", 1 / math.sqrt(into)))
        specs.append(ParamSpec(f"{path}.{LORA_B}", (out, r), (out_axis, None), "zeros", 0.0))
    if adapters.tokens:  # they begin as the rows of the embedding (with_adapters), and decay would pull them to zero
        shape = (adapters.tokens, config.dim)
        specs += [ParamSpec(rows, shape, (None, None), "zeros", 0.0, decay=False) for rows in row_names(config)]
    return {spec.name: spec for spec in specs}


def row_names(config: Shape) -> dict[str, str]:
    """Rows of new tokens -> the tensor that they belong to: the embedding, and a head of its own."""
    return {name.replace("weight", NEW_ROWS): name for name in dict.fromkeys(("embed.weight", head_name(config)))}


def trained_table(config: Shape, adapters: Adapters | None) -> dict[str, ParamSpec]:
    """The parameter table of a run: that of the model, and with adapters the same, frozen, and their rows."""
    table = parameter_table(config)
    if adapters is None:
        return table
    return {name: spec._replace(lr_scale=0.0) for name, spec in table.items()} | adapter_table(config, adapters)


def is_frozen(config: Shape, adapters: Adapters | None, name: str) -> bool:
    """Whether the tensor `name` of the model gets no gradient: not even some of its rows move."""
    if adapters is None:
        return not parameter_table(config)[name].lr_scale
    return not (adapters.tokens and name in row_names(config).values())


def with_adapters(config: Shape, adapters: Adapters | None, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The parameters of a model, and with adapters what these begin with, where they are not among them. Float32 arrays by name.

    Raises CheckpointError, with the names, for parameters that are not this model's.
    """
    table = adapter_table(config, adapters) if adapters else {}
    require_tree(config, {name: value for name, value in params.items() if name not in table})
    rows, begun = row_names(config), dict(params)
    for name, spec in table.items():
        if name not in begun:
            assert adapters
            begun[name] = params[rows[name]][slice(*adapters.new_rows)] if name in rows else initial_value(spec, seed)
    return begun


def merged(config: Shape, adapters: Adapters, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The model alone, W + s B A in its matrices and new rows in their place.

    params: those of the model and of its adapters, arrays on the host. A matrix is made when its turn comes.
    """
    import numpy as np

    whole = {name: params[name] for name in parameter_table(config)}
    for path, spec in adapted_maps(config, adapters).items():
        whole[spec.name] = merged_matrix(adapters, whole[spec.name], params[f"{path}.{LORA_A}"], params[f"{path}.{LORA_B}"])
    for rows, name in row_names(config).items() if adapters.tokens else ():
        table = np.array(whole[name], np.float32)
        table[slice(*adapters.new_rows)] = params[rows]
        whole[name] = table
    return whole


def merged_matrix(adapters: Adapters, weight: Any, low: Any, high: Any) -> np.ndarray:
    """W + s B A, summed in float64 and rounded once, to float32: in bfloat16 3 % of what an adapter has learned would be lost."""
    import numpy as np

    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return (np.asarray(weight, np.float64) + adapters.scale * (high @ low)).astype(np.float32)


def check_targets(config: Shape, adapters: Adapters) -> None:
    """Raises ConfigError for a target that no linear map has, for the embedding, and for a block that would get no adapter."""
    maps = linear_maps(config)
    for target in adapters.targets:
        if target.split(".")[0] in _VOCABULARY:
            what = f"--lora-targets has {target!r}, which has no adapter."
            tied = " and here also the output head" if config.tied_head else ""
            why = f"The embedding is a table{tied}; what is added to it would change every token's meaning at once."
            raise ConfigError(what, why, "Leave it out: rows of new tokens are trained without it.")
        if not any(_named(path, target) for path in maps):
            known = [ALL, *dict.fromkeys(part for path in maps for part in path.split(".")[2:])]
            what = f"--lora-targets has {target!r}, which no linear map of the model is called."
            raise ConfigError(what, "Targets are parts of their names.", near(target, known))
    if any("layers" in target.split(".") for target in adapters.targets):  # blocks are chosen on purpose
        return
    touched = {path.split(".")[1] for path in adapted_maps(config, adapters)}
    for layer in range(config.layers):
        if str(layer) not in touched:
            has = dict.fromkeys(path.split(".", 2)[2] for path in maps if path.startswith(f"layers.{layer}."))
            what = f"No target of --lora-targets is in block {layer}, of {config.mixer_of(layer)} and {config.ffn_of(layer)}."
            raise ConfigError(what, f"Its linear maps are {', '.join(has)}.", f"Add one of them, or take {ALL}.")


def _named(path: str, target: str) -> bool:
    return target == ALL or f".{target}." in f".{path}."
