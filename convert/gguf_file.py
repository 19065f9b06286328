"""Portable -> a GGUF file that llama.cpp runs: hyper-parameters, tokenizer and weights in one file.

Architectures: gguf_forms.py; how their tensors come of ours: gguf_layouts.py. Vectors, routers, convolutions and what recurrent layers have
besides matrices stay float32.

The `gguf` package (extra `gguf`) writes, quantises and reads the file.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from convert import gguf_tokenizer, ties
from convert.gguf_blocks import BLOCKS, KINDS, to_blocks
from convert.gguf_fields import LONGROPE
from convert.gguf_forms import FORMS, form_of
from convert.hf_rope import rope_to_hf, turned_dim
from convert.portable import Lazy, Packed, Portable, cast
from smedjan_common.checkpoint.lazy import Show, watched
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.files.atomic_file import atomic_path
from smedjan_common.model import rope
from smedjan_common.model.rounding import Quantized

_MAGIC = b"GGUF"
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}  # ours -> GGMLQuantizationType
_FILE_TYPES = {
    "F32": "ALL_F32",
    "BF16": "MOSTLY_BF16",
    "F16": "MOSTLY_F16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_1": "MOSTLY_Q4_1",
}  # -> LlamaFileType
_BLOCK = 32  # weights that share a scale in Q8_0


def detect(path: Path) -> bool:
    """Whether it is a GGUF file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == _MAGIC


def write(model: Portable, target: Path, dtype: str, show: Show) -> list[str]:
    """Write the file `target` atomically; returns notes for the user. dtype: float32, bfloat16, float16 or q8_0; what is quantised
    in the source stays bit for bit what it is.

    Raises ConfigError for a model or tokenizer that llama.cpp has no form for, and when the `gguf` package is not installed;
    CheckpointError when what was written reads back differently; OSError.
    """
    gguf = package()
    architecture = form_of(model.config)
    if model.tokenizer is None:
        raise ConfigError("The model has no tokenizer.", "A GGUF file contains one.", "Put tokenizer.json beside its weights.")
    fields = _hyper_parameters(model.config, architecture, target.stem) | gguf_tokenizer.fields(model.tokenizer, model.config.vocab_size)
    kind, layout = _TYPES[dtype], FORMS[architecture].layout(model.config)
    ours = {name: cast(name, tensor, np.dtype(np.float32)) for name, tensor in model.tensors.items()}
    tensors = ties.written(layout, ours)
    if model.config.rope_scaling == "llama3":
        tensors["rope_freqs.weight"] = _periods_over_plain(model.config)
    if model.config.rope_scaling == "longrope":
        lists = model.config.rope_short_factors, model.config.rope_long_factors
        tensors |= {name: _vector(factors) for name, factors in zip(LONGROPE, lists, strict=True)}
    kinds = {name: _kind(name, kind, tensor) for name, tensor in tensors.items()}
    encoded = {name: _encoded(name, tensor, kinds[name], gguf) for name, tensor in tensors.items()}
    for tie in layout:  # what is quantised stays as it is: nothing is rounded again
        packed = [model.packed[name] for name in tie.ours if name in model.packed]
        if tie.by_rows and packed and len(packed) == len(tie.ours) and len({each.bits for each in packed}) == 1:
            (name,), (shape,) = tie.theirs, tie.shapes
            kinds[name], encoded[name] = KINDS[packed[0].bits], _blocks(packed, tie, shape)
    if model.packed:
        kind = KINDS[min(packed.bits for packed in model.packed.values())]
    fields["general.file_type"] = int(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    with atomic_path(target) as temporary:
        _write(temporary, architecture, fields, watched(encoded, "write", show), kinds, tensors, gguf)
        _verify(temporary, target, fields, watched(encoded, "verify", show), kinds, gguf)
    odd = sum(1 for name, tensor in tensors.items() if kinds[name] == "F16" != kind and len(tensor.shape) > 1)
    return [f"{odd} matrices have rows that are not a multiple of {_BLOCK}: they are float16."] if odd else []


def package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "The package gguf is not installed.", "It is needed to write the file.", "Install it: pip install 'smedjan[gguf]'."
        ) from None
    return gguf


def _hyper_parameters(config: ModelConfig, architecture: str, name: str) -> dict[str, Any]:
    """GGUF keys of the architecture. int: uint32, float: float32."""
    base, scaling = rope_to_hf(config)
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": turned_dim(config),
        "rope.freq_base": float(base),
        "rope.scaling.type": config.rope_scaling if config.rope_scaling in ("linear", "yarn", "longrope") else "none",
    }
    if config.rope_scaling == "longrope":
        fields["rope.scaling.original_context_length"] = config.rope_original_len
        fields["rope.scaling.attn_factor"] = rope.attention_factor(config)
    if scaling and config.rope_scaling not in ("llama3", "longrope"):  # whose frequencies are tensors
        fields["rope.scaling.factor"] = float(scaling["factor"])
    if scaling and config.rope_scaling == "yarn":  # llama.cpp works out the attention factor by our formula
        fields["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        fields["rope.scaling.yarn_beta_fast"] = float(scaling["beta_fast"])
        fields["rope.scaling.yarn_beta_slow"] = float(scaling["beta_slow"])
    fields |= FORMS[architecture].written(config)
    named = {key if key.startswith("smedjan.") else f"{architecture}.{key}": value for key, value in fields.items()}
    return {"general.name": name, "general.type": "model", **named}


def _periods_over_plain(config: ModelConfig) -> Lazy:
    """How many times longer each period is than unscaled, float32 [K/2]: what llama.cpp divides the frequencies by."""
    plain = dataclasses.replace(config, rope_scaling="none", rope_factor=1.0, rope_original_len=0)
    return _vector(rope.frequencies(plain) / rope.frequencies(config))


def _vector(values: ArrayLike) -> Lazy:
    array = np.asarray(values, np.float32)
    return Lazy(array.dtype, array.shape, lambda: array)


def _blocks(packed: list[Packed], tie: ties.Tie, shape: tuple[int, ...]) -> Lazy:
    """The bytes of quantised weights in the file, their rows where they are there."""
    kind = KINDS[packed[0].bits]
    size = (*shape[:-1], shape[-1] // _BLOCK * BLOCKS[kind].bytes)

    def make() -> np.ndarray:
        parts = zip(*(each.read() for each in packed), strict=True)  # codes, scales and biases, each of all weights
        return to_blocks(Quantized(*(tie.out(part)[0] for part in parts)), kind)

    return Lazy(np.dtype(np.uint8), size, make)


_WHOLE = ("ffn_gate_inp", "ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm")  # parts of names of tensors that stay float32


def _kind(name: str, wanted: str, tensor: Lazy) -> str:
    if len(tensor.shape) == 1 or any(f".{part}" in name for part in _WHOLE):
        return "F32"
    return "F16" if wanted == "Q8_0" and tensor.shape[-1] % _BLOCK else wanted


def _encoded(name: str, tensor: Lazy, kind: str, gguf: Any) -> Lazy:
    """The bytes of a tensor in the file, uint8 [rows, bytes of a row]."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)

    def encode(array: np.ndarray) -> np.ndarray:
        if kind == "F16":
            array = cast(name, Lazy(array.dtype, array.shape, lambda: array), np.dtype(np.float16)).read()
        return np.ascontiguousarray(gguf.quantize(np.ascontiguousarray(array), number)).view(np.uint8).reshape(shape)

    return tensor.then(encode, np.uint8, shape)


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    encoded: Mapping[str, Lazy],
    kinds: Mapping[str, str],
    tensors: Mapping[str, Lazy],
    gguf: Any,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in fields.items():
        adders[type(value)](key, value)
    for name, tensor in encoded.items():
        writer.add_tensor_info(name, tensors[name].shape, np.dtype(np.float32), tensor.nbytes, gguf.GGMLQuantizationType[kinds[name]])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in encoded.values():
            writer.write_tensor_data(tensor.read())
    finally:
        writer.close()


def _verify(path: Path, target: Path, fields: Mapping[str, Any], encoded: Mapping[str, Lazy], kinds: Mapping[str, str], gguf: Any) -> None:
    """Raises CheckpointError unless the gguf reader finds exactly these fields and tensors, bit for bit."""
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # whatever it says, the file is wrong
        raise _not_what_was_written(target, f"its reader says: {error}") from None
    for key, value in fields.items():
        field = reader.get_field(key)
        if field is None or not _equal(field.contents(), value):
            raise _not_what_was_written(target, f"the field {key} differs")
    found = {tensor.name: tensor for tensor in reader.tensors}
    if set(found) != set(encoded):
        raise _not_what_was_written(target, "tensors are missing or too many")
    for name, tensor in encoded.items():
        data = np.ascontiguousarray(found[name].data).view(np.uint8).reshape(-1)
        if found[name].tensor_type.name != kinds[name] or not np.array_equal(data, tensor.read().reshape(-1)):
            raise _not_what_was_written(target, f"{name} differs")


def _equal(found: Any, value: Any) -> bool:
    return math.isclose(found, value, rel_tol=1e-6) if isinstance(value, float) else found == value


def _not_what_was_written(target: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{target} is not what was written.", f"When read back, {why}.", "Check the disk and try again.")
