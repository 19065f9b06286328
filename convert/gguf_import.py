"""A GGUF file of llama.cpp -> Portable: the architectures of gguf_forms.py, weights dequantised to float32.

An architecture, a kind of RoPE or a split of the tokenizer that is not known here is refused by name. Types: what the package `gguf`
(extra `gguf`) dequantises.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import gguf_vocabulary, ties
from convert.gates import ungated
from convert.gguf_blocks import BLOCKS, from_blocks
from convert.gguf_fields import LONGROPE, Fields
from convert.gguf_file import package
from convert.gguf_forms import FORMS
from convert.portable import Lazy, Packed, Portable
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError, reason
from smedjan_common.model import rope
from smedjan_common.model.params import parameter_table
from smedjan_common.model.quantization import GROUP
from smedjan_common.model.rounding import Quantized

WHOLE = ("F32", "F16", "BF16")


def read(path: Path) -> Portable:
    """The model of a file; tensors are read when they are asked for. Raises CheckpointError for a wrong file, ConfigError for a model that
    cannot be expressed or when the package is not installed."""
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader raises whatever a damaged file leads to
        raise CheckpointError(f"{path} cannot be read as GGUF.", reason(error), "Download it again.") from None
    fields = Fields(values, str(path), FORMS)
    config = _config(fields, stored)
    layout = FORMS[fields.architecture].layout(config)
    wanted = {name: shape for tie in layout for name, shape in zip(tie.theirs, tie.shapes, strict=True)}
    if config.tied_head and "output.weight" in wanted:
        stored.setdefault("output.weight", stored["token_embd.weight"])
    if odd := sorted(stored.keys() - wanted.keys() - {"rope_freqs.weight", *LONGROPE}):
        raise ConfigError(f"{path} has a tensor {odd[0]!r}.", "The model of its fields has no such tensor.", "Choose another model.")
    if missing := [name for name in wanted if name not in stored]:
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}.", "The model of its fields has it.", "Download it again.")
    theirs = {name: _tensor(name, stored[name], shape, str(path), gguf) for name, shape in wanted.items()}
    config = ungated(config, FORMS[fields.architecture].layout, theirs)
    layout = FORMS[fields.architecture].layout(config)
    if name := ties.lost(layout, theirs):
        what = f"{path} has a tensor {name} with values that are zero in every model from here."
        raise ConfigError(what, "The model cannot be expressed here.", "Choose another model.")
    kinds = sorted({tensor.tensor_type.name for tensor in stored.values()} - set(WHOLE))
    notes = [f"Its weights were quantised ({', '.join(kinds)}): what that rounded away is gone."] if kinds else []
    tokenizer, more = gguf_vocabulary.read(fields.values, str(path))
    source = {"format": "gguf", "architecture": fields.architecture, "types": sorted({t.tensor_type.name for t in stored.values()})}
    packed: dict[str, Packed] = {}
    for tie in layout:
        if tie.by_rows and stored[tie.theirs[0]].tensor_type.name in BLOCKS:
            packed = _packed(tie, stored[tie.theirs[0]], config) | packed
    return Portable(config, ties.read(layout, theirs, config), tokenizer, 0, source, (*notes, *more), packed=packed)


def _config(fields: Fields, stored: Mapping[str, Any]) -> ModelConfig:
    dim, heads, layers = (fields.number(key) for key in ("embedding_length", "attention.head_count", "block_count"))
    heads = heads or (1 if fields.architecture == "arwkv7" else 0)
    if not 0 < layers <= len(stored) or not heads or not dim or "token_embd.weight" not in stored:
        raise CheckpointError(f"{fields.where} promises {layers} layers.", f"It has {len(stored)} tensors.", "Download it again.")
    head_dim = fields.number("attention.key_length", dim // heads)
    rotary = fields.number("rope.dimension_count", head_dim)
    own_heads = fields.architecture in ("deepseek2", "arwkv7")  # their forms tell the sizes of heads
    parted = fields.architecture in ("phi3", "glm4moe", "qwen35", "qwen3next")
    if not own_heads and (fields.number("attention.value_length", head_dim) != head_dim or (rotary != head_dim and not parted)):
        what = f"{fields.where} turns {rotary} of {head_dim} features, or has values of another size."
        raise ConfigError(what, "Heads here turn whole.", "Choose another model.")
    if fields.architecture not in ("olmo2", "phi3") and (window := fields.number("attention.sliding_window", 0)):
        what = f"{fields.where} has a sliding window of {window} positions."
        raise ConfigError(what, "Such a file does not say in which layers.", "Take its safetensors.")
    context = fields.number("context_length")
    found: dict[str, Any] = {
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "ffn_dim": fields.number("feed_forward_length"),
        "context_length": context,
        "norm_eps": fields.real("attention.layer_norm_rms_epsilon", 1e-5),
        "head_size": 0 if head_dim * heads == dim else head_dim,
        "qk_norm": _some(stored, "attn_q_norm.weight"),
        "qkv_bias": _some(stored, "attn_q.bias"),
        "o_bias": _some(stored, "attn_output.bias"),
        "tied_head": _tied(stored),
        "rope_dim": rotary if rotary != head_dim else 0,
        **_rope(fields, stored, context),
        **FORMS[fields.architecture].read(fields, stored),
    }
    if "kv_heads" not in found:
        found["kv_heads"] = fields.number("attention.head_count_kv", heads)
    config = ModelConfig(**found)
    config.validate()
    if "rope_freqs.weight" in stored:
        _check_frequencies(config, stored["rope_freqs.weight"].data, fields.where)
    return config


def _some(stored: Mapping[str, Any], part: str) -> bool:
    return any(name.startswith("blk.") and name.split(".", 2)[2] == part for name in stored)


def _tied(stored: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: it is not there, or is the same."""
    if "output.weight" not in stored:
        return True
    head, embed = stored["output.weight"], stored["token_embd.weight"]
    return head.tensor_type == embed.tensor_type and np.array_equal(head.data, embed.data)


def _rope(fields: Fields, stored: Mapping[str, Any], context: int) -> dict[str, Any]:
    base = float(f"{fields.number('rope.freq_base', 10000.0, whole=False):.7g}")
    if not base:
        raise CheckpointError(f"{fields.where} has rope.freq_base 0.", "Positions would not be told apart.", "Download it again.")
    kind = fields.text("rope.scaling.type") or "none"
    if all(name in stored for name in LONGROPE):
        return {"rope_base": base, **_longrope(fields, stored, context)}
    if "rope_freqs.weight" in stored:
        return {"rope_base": base} | _llama3(np.asarray(stored["rope_freqs.weight"].data, np.float64), base)
    if kind == "none":
        return {"rope_base": base}
    if kind not in ("linear", "yarn"):
        what = f"{fields.where} has RoPE scaled as {kind!r}."
        raise ConfigError(what, "RoPE here is none, linear, yarn or llama3.", "Choose another model.")
    factor = float(fields.number("rope.scaling.factor", whole=False))
    found: dict[str, Any] = {"rope_base": base, "rope_scaling": kind, "rope_factor": factor}
    if kind == "yarn":
        found["rope_original_len"] = fields.number("rope.scaling.original_context_length", context)
        for name, usual in (("yarn_beta_fast", rope.BETA_FAST), ("yarn_beta_slow", rope.BETA_SLOW)):
            if not math.isclose(fields.number(f"rope.scaling.{name}", usual, whole=False), usual, rel_tol=1e-6):
                raise ConfigError(f"{fields.where} has YaRN with another {name}.", f"YaRN here has {usual:g}.", "Choose another model.")
    return found


def _longrope(fields: Fields, stored: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The factor is what the context is over the original one, as llama.cpp's converter takes it."""
    original, said = fields.number("rope.scaling.original_context_length", context), fields.real("rope.scaling.attn_factor", 1.0)
    if original < 2:
        raise fields.inexpressible(f"an original context of {original} positions")
    factor = context / original if context > original else 2.0  # which then tells nothing but the usual attention factor
    usual = math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (tuple(float(f"{value:.7g}") for value in stored[name].data) for name in LONGROPE)
    return {
        **{"rope_scaling": "longrope", "rope_factor": factor, "rope_original_len": original},
        **{"rope_attention_factor": 0.0 if math.isclose(said, usual, rel_tol=1e-6) else said},
        **{"rope_short_factors": short, "rope_long_factors": long},
    }


def _llama3(factors: np.ndarray, base: float) -> dict[str, Any]:
    """Llama 3's scaling, of which the file has only what it comes to: 1 for short periods, the factor for long ones. A period between them
    tells the original context, given the bounds that all Llama 3 have (1 and 4)."""
    factor = float(factors.max())
    found = {"rope_scaling": "llama3", "rope_factor": float(f"{factor:.6g}"), "rope_original_len": 8192}
    between = np.flatnonzero((factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4)))
    if len(between) and factor > 1:
        theta = base ** (-between[0] / len(factors))
        share = (1 / factors[between[0]] - 1) / (1 / factor - 1)  # of the stretched frequency
        found["rope_original_len"] = round((4 - 3 * share) * 2 * math.pi / theta)
    return found


def _check_frequencies(config: ModelConfig, factors: np.ndarray, where: str) -> None:
    plain = rope.frequencies(ModelConfig(**{**vars(config), "rope_scaling": "none", "rope_factor": 1.0, "rope_original_len": 0}))
    if factors.shape != plain.shape or not np.allclose(plain / rope.frequencies(config), factors, rtol=1e-3, atol=0):
        what = f"{where} has frequencies that are not Llama 3's."
        raise ConfigError(what, "RoPE here is none, linear, yarn or llama3.", "Take its safetensors.")


def _tensor(name: str, tensor: Any, shape: tuple[int, ...], where: str, gguf: Any) -> Lazy:
    found = tuple(int(extent) for extent in reversed(tensor.shape))
    if found != shape:
        raise CheckpointError(f"The tensor {name} in {where} has shape {found}.", f"Its fields ask for {shape}.", "Download it again.")

    def make() -> np.ndarray:
        try:
            array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(found)
        except NotImplementedError:
            what = f"The tensor {name} in {where} is of the type {tensor.tensor_type.name}."
            raise ConfigError(what, "The package gguf does not dequantise it.", "Choose another quantisation of the model.") from None
        if not np.isfinite(array).all():
            raise CheckpointError(f"The tensor {name} in {where} has values that are not finite.", "It is damaged.", "Download it again.")
        return array

    return Lazy(np.dtype(np.float32), shape, make)


def _packed(tie: ties.Tie, tensor: Any, config: ModelConfig) -> dict[str, Packed]:
    """The same blocks as quantised weights of ours, bit for bit."""
    kind = tensor.tensor_type.name

    @functools.lru_cache(maxsize=1)
    def read() -> list[Quantized]:
        parts = from_blocks(np.asarray(tensor.data).view(np.uint8), kind)
        return [Quantized(*each) for each in zip(*(tie.back([part]) for part in parts), strict=True)]

    def part(number: int, at: int, dtype: type, size: tuple[int, ...]) -> Lazy:
        return Lazy(np.dtype(dtype), size, lambda: read()[number][at])

    packed = {}
    for number, name in enumerate(tie.ours):
        *lead, width = parameter_table(config)[name].shape
        codes, scales = (*lead, width * BLOCKS[kind].bits // 32), (*lead, width // GROUP)
        packed[name] = Packed(part(number, 0, np.uint32, codes), part(number, 1, np.float16, scales), part(number, 2, np.float16, scales))
    return packed
