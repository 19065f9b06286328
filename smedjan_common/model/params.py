"""The parameter table: the one place that knows names, shapes, initial values, decay and sharding axes.

    embed.weight [V, D]                   (also the output head, unless the model has head.weight [V, D])      norm.weight [D]
    layers.{i}.mixer_norm.weight [D]      layers.{i}.ffn_norm.weight [D]      (mixer_post_norm and ffn_post_norm by --norms)
    layers.{i}.mixer.*                    layers.{i}.ffn.*                (rows of smedjan_common.model.mixers)

Weights are [out, in]. A tensor's initial value is drawn by NumPy's Philox keyed by (seed, name), so it depends on
neither backend, order nor device. It does depend on NumPy, whose Generator promises no stream between versions, and where it is
orthogonal on LAPACK: `draw` gives a digest by which two machines can tell whether they began alike. A run that goes on from a
checkpoint draws nothing.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smedjan_common.errors import CheckpointError
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.parameter import ParamSpec, norm_spec
from smedjan_common.model.shape import Shape

if TYPE_CHECKING:
    import numpy as np  # imported where values are drawn: counting parameters (`smedjan sizes`) must not wait for it


def parameter_table(config: Shape) -> dict[str, ParamSpec]:
    """Every parameter of the model, by name, in the order of the forward pass."""
    embed = ParamSpec("embed.weight", (config.padded_vocab_size, config.dim), ("vocab", "embed"), "normal", config.init_std)
    specs = [embed]
    for layer in range(config.layers):
        at = f"layers.{layer}."
        norms = [norm_spec(f"{at}{name}.weight", config.dim) for name in config.block_norms]
        specs += [spec for spec in norms if ".mixer_norm." in spec.name]
        specs += [spec._replace(name=f"{at}mixer.{spec.name}") for spec in MIXERS[config.mixer_of(layer)].parameters(config, layer)]
        specs += [spec for spec in norms if ".mixer_post_norm." in spec.name or ".ffn_norm." in spec.name]
        specs += [spec._replace(name=f"{at}ffn.{spec.name}") for spec in FFNS[config.ffn_of(layer)].parameters(config, layer)]
        specs += [spec for spec in norms if ".ffn_post_norm." in spec.name]
    specs.append(norm_spec("norm.weight", config.dim))
    if not config.tied_head:
        specs.append(embed._replace(name=head_name(config)))
    return {spec.name: spec for spec in specs}


def head_name(config: Shape) -> str:
    """The tensor [V, D] that the logits are made with."""
    return "embed.weight" if config.tied_head else "head.weight"


def count_params(config: Shape) -> int:
    """Exact number of values in the tree."""
    return sum(spec.size for spec in parameter_table(config).values())


def initial_params(config: Shape, seed: int) -> dict[str, np.ndarray]:
    """Initial values, float32, by name. Tensors are drawn in parallel threads; the result does not depend on that."""
    return draw(config, seed)[0]


def draw(config: Shape, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """Initial values as `initial_params` gives them, and their digest: SHA-256, hexadecimal, over name and CRC-32 of every tensor.

    Each CRC is taken by the thread that drew the tensor, for a twentieth of the time of drawing; a cryptographic hash takes a fifth.
    """
    from concurrent.futures import ThreadPoolExecutor

    def one(spec: ParamSpec) -> tuple[np.ndarray, int]:
        value = initial_value(spec, seed)
        return value, zlib.crc32(value.astype("<f4", order="C", copy=False).data)  # an orthogonal one may be transposed

    table = parameter_table(config)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = dict(zip(table, pool.map(one, table.values()), strict=True))
    lines = "".join(f"{name} {crc:08x}\n" for name, (_, crc) in sorted(drawn.items()))
    return {name: value for name, (value, _) in drawn.items()}, hashlib.sha256(lines.encode()).hexdigest()


def initial_value(spec: ParamSpec, seed: int) -> np.ndarray:
    """The tensor's initial value, float32 [*shape]: with one NumPy (and LAPACK) a pure function of (seed, name, shape, init, scale)."""
    import numpy as np

    from smedjan_common.model.initializers import INITIALIZERS

    key = hashlib.blake2b(f"{seed}:{spec.name}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return INITIALIZERS[spec.init](rng, spec.shape, spec.scale)


def require_tree(config: Shape, tensors: dict[str, Any]) -> None:
    """Raises CheckpointError, with the names, for parameters that are not this model's."""
    if problems := check_tree(config, tensors):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError("The parameters are not those of the model.", "; ".join(problems[:3]) + more + ".", "Take the model's own.")


def check_tree(config: Shape, tensors: dict[str, Any]) -> list[str]:
    """Names the differences between `tensors` (name -> anything with .shape) and the table; empty when they agree."""
    return differences(parameter_table(config), tensors)


def differences(table: Mapping[str, ParamSpec], tensors: Mapping[str, Any]) -> list[str]:
    """The same with any table."""
    missing = [f"{name} is missing" for name in table if name not in tensors]
    extra = [f"{name} is not a parameter of this model" for name in tensors if name not in table]
    wrong = [
        f"{name} has shape {tuple(tensors[name].shape)}, the model needs {spec.shape}"
        for name, spec in table.items()
        if name in tensors and tuple(tensors[name].shape) != spec.shape
    ]
    return missing + extra + wrong
