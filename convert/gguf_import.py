"""A GGUF file of llama.cpp -> Portable: architectures llama, qwen2 and qwen3, weights dequantised to float32.

An architecture, a kind of RoPE or a split of the tokenizer that is not known here is refused by name. Types: what the package `gguf`
(extra `gguf`) dequantises. In a `llama` the rows of q and k go back from llama.cpp's order.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import gguf_vocabulary
from convert.families import FAMILIES
from convert.gguf_blocks import BLOCKS, from_blocks
from convert.gguf_file import TABLES, package
from convert.names import Row, rows
from convert.portable import Lazy, Packed, Portable
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError, reason
from smedjan_common.model import rope
from smedjan_common.model.params import parameter_table
from smedjan_common.model.quantization import GROUP
from smedjan_common.model.rounding import Quantized

ARCHITECTURES = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
WHOLE = ("F32", "F16", "BF16")


def read(path: Path) -> Portable:
    """The model of a file; tensors are read when they are asked for. Raises CheckpointError for a wrong file, ConfigError for a model that
    cannot be expressed or when the package is not installed."""
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
        fields = _Fields({name: field.contents() for name, field in reader.fields.items()}, str(path))
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader raises whatever a damaged file leads to
        raise CheckpointError(f"{path} cannot be read as GGUF.", reason(error), "Download it again.") from None
    config = _config(fields, stored)
    names = rows(config)
    if odd := sorted(stored.keys() - {row.gguf for row in names} - {"rope_freqs.weight"}):
        raise ConfigError(f"{path} has a tensor {odd[0]!r}.", "The model of its fields has no such tensor.", "Choose another model.")
    if missing := [row.gguf for row in names if row.gguf not in stored]:
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}.", "The model of its fields has it.", "Download it again.")
    turned = FAMILIES[ARCHITECTURES[fields.architecture]].interleaved
    tensors = {row.ours: _tensor(row, stored[row.gguf], config, turned, str(path), gguf) for row in names}
    kinds = sorted({tensor.tensor_type.name for tensor in stored.values()} - set(WHOLE))
    notes = [f"Its weights were quantised ({', '.join(kinds)}): what that rounded away is gone."] if kinds else []
    tokenizer, more = gguf_vocabulary.read(fields.values, str(path))
    source = {"format": "gguf", "architecture": fields.architecture, "types": sorted({t.tensor_type.name for t in stored.values()})}
    blocks = {row for row in names if stored[row.gguf].tensor_type.name in BLOCKS}
    packed = {row.ours: _packed(row, stored[row.gguf], config, turned) for row in blocks}
    return Portable(config, tensors, tokenizer, 0, source, (*notes, *more), packed=packed)


class _Fields:
    """The key-value pairs of a file. `number("block_count")` is `llama.block_count` in a llama."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.architecture = str(values.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            what = f"{where} is of the architecture {self.architecture!r}."
            raise ConfigError(what, f"These are read: {known}.", "Choose a model of one of them, or its safetensors.")

    def number(self, key: str, default: float | None = None, whole: bool = True) -> Any:
        value = self.values.get(f"{self.architecture}.{key}", default)
        if type(value) not in ((int,) if whole else (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"{self.where} has {key} {value!r:.60}.", "It must be a number.", "Download it again.")
        return value

    def text(self, key: str) -> str:
        return str(self.values.get(f"{self.architecture}.{key}", ""))


def _config(fields: _Fields, stored: Mapping[str, Any]) -> ModelConfig:
    dim, heads, layers = (fields.number(key) for key in ("embedding_length", "attention.head_count", "block_count"))
    if not 0 < layers <= len(stored) or not heads or not dim or "token_embd.weight" not in stored:
        raise CheckpointError(f"{fields.where} promises {layers} layers.", f"It has {len(stored)} tensors.", "Download it again.")
    head_dim = fields.number("attention.key_length", dim // heads)
    rotary = fields.number("rope.dimension_count", head_dim)
    if fields.number("attention.value_length", head_dim) != head_dim or rotary != head_dim:
        what = f"{fields.where} turns {rotary} of {head_dim} features, or has values of another size."
        raise ConfigError(what, "Heads here turn whole.", "Choose another model.")
    if window := fields.number("attention.sliding_window", 0):
        what = f"{fields.where} has a sliding window of {window} positions."
        raise ConfigError(what, "Such a file does not say in which layers.", "Take its safetensors.")
    context = fields.number("context_length")
    bias = [f"blk.0.attn_{name}.bias" in stored for name in ("q", "output")]
    config = ModelConfig(
        vocab_size=int(stored["token_embd.weight"].shape[1]),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=fields.number("attention.head_count_kv", heads),
        ffn_dim=fields.number("feed_forward_length"),
        context_length=context,
        norm_eps=float(f"{fields.number('attention.layer_norm_rms_epsilon', 1e-5, whole=False):.7g}"),  # it is a float32 there
        head_size=0 if head_dim * heads == dim else head_dim,
        qk_norm="blk.0.attn_q_norm.weight" in stored,
        qkv_bias=bias[0],
        o_bias=bias[1],
        tied_head="output.weight" not in stored,
        **_rope(fields, stored, context),
    )
    config.validate()
    if "rope_freqs.weight" in stored:
        _check_frequencies(config, stored["rope_freqs.weight"].data, fields.where)
    return config


def _rope(fields: _Fields, stored: Mapping[str, Any], context: int) -> dict[str, Any]:
    base = float(f"{fields.number('rope.freq_base', 10000.0, whole=False):.7g}")
    if not base:
        raise CheckpointError(f"{fields.where} has rope.freq_base 0.", "Positions would not be told apart.", "Download it again.")
    kind = fields.text("rope.scaling.type") or "none"
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


def _tensor(row: Row, tensor: Any, config: ModelConfig, turned: bool, where: str, gguf: Any) -> Lazy:
    shape = parameter_shape(config, row.ours)
    found = tuple(int(extent) for extent in reversed(tensor.shape))
    if found != ((config.vocab_size, config.dim) if row.ours in TABLES else shape):
        raise CheckpointError(f"The tensor {row.gguf} in {where} has shape {found}.", f"Its fields ask for {shape}.", "Download it again.")
    back = _back(row, config, turned)

    def make() -> np.ndarray:
        try:
            array = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(found)
        except NotImplementedError:
            what = f"The tensor {row.gguf} in {where} is of the type {tensor.tensor_type.name}."
            raise ConfigError(what, "The package gguf does not dequantise it.", "Choose another quantisation of the model.") from None
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"The tensor {row.gguf} in {where} has values that are not finite.", "It is damaged.", "Download it again."
            )
        return back(array)

    return Lazy(np.dtype(np.float32), shape, make)


def _packed(row: Row, tensor: Any, config: ModelConfig, turned: bool) -> Packed:
    """The same blocks as a quantised weight of ours, bit for bit."""
    shape, kind, back = parameter_shape(config, row.ours), tensor.tensor_type.name, _back(row, config, turned)

    @functools.lru_cache(maxsize=1)
    def read() -> Quantized:
        return Quantized(*map(back, from_blocks(np.asarray(tensor.data).view(np.uint8), kind)))

    lead, width = shape[:-1], shape[-1]
    sizes = (*lead, width * BLOCKS[kind].bits // 32), (*lead, width // GROUP), (*lead, width // GROUP)
    dtypes = (np.uint32, np.float16, np.float16)
    parts = [Lazy(np.dtype(dtype), size, lambda at=at: read()[at]) for at, (dtype, size) in enumerate(zip(dtypes, sizes, strict=True))]
    return Packed(*parts)


def _back(row: Row, config: ModelConfig, turned: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What becomes of the rows of a tensor of theirs."""
    if row.ours in TABLES:
        return lambda array: np.pad(array, ((0, config.padded_vocab_size - array.shape[0]), (0, 0)))
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(row.ours.split(".")[-2], 0) if turned else 0
    if not heads:
        return lambda array: array
    return lambda array: array.reshape(heads, array.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)


def parameter_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape of one of our tensors."""
    return parameter_table(config)[name].shape
