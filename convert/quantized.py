"""Quantised models: a directory that smedjan infers from as it is, and mlx-lm too where it knows the architecture.

    config.json   model.safetensors (or shards)   tokenizer.json and what else `--to hf` writes beside it

Llama, Qwen2, Qwen3 and Mistral have their names in it and the keys that MLX quantises by. Every other model has smedjan's own names and
`"model_type": "smedjan"`: both backends run it, other programs do not. The three arrays of a weight: smedjan_common.model.quantization.

Before the directory takes its name it is read back and compared: every array bit for bit, model and tokenizer.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf_config, hf_export, hf_import, hf_tokenizer, layouts
from convert.families import FAMILIES, family_of
from convert.json_file import read_json, write_json
from convert.portable import Lazy, Packed, Portable, cast, check_equal
from convert.safetensors_file import PACKED
from smedjan_common.checkpoint.lazy import Show, watched
from smedjan_common.checkpoint.manifest import checked_config
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError, reason
from smedjan_common.files.atomic_directory import atomic_directory
from smedjan_common.model.params import parameter_table
from smedjan_common.model.quantization import BITS, GROUP, bits_of, names, planned
from smedjan_common.model.rounding import Quantized, quantize

OWN = "smedjan"  # model_type of what has no public architecture
KEY = "quantization"
_AGAIN = "Restore it from a good copy, or convert the model again."


def detect(path: Path) -> bool:
    """Whether a directory is of MLX's quantised form, ours or anybody's."""
    try:
        return path.is_dir() and isinstance(read_json(path / hf_import.CONFIG).get(KEY), dict)
    except CheckpointError:
        return False


def write(model: Portable, target: Path, bits: int, max_shard_bytes: int, show: Show) -> list[str]:
    """Write the directory `target` atomically; returns notes for the user.

    Raises ConfigError for a model in which nothing can be quantised, CheckpointError when it reads back differently, OSError.
    """
    config = model.config
    plan = planned(config, bits)
    if not plan:
        raise ConfigError("Nothing in this model can be quantised.", f"No row of a matrix is a multiple of {GROUP}.", "Keep it as it is.")
    theirs, values = _described(model)
    flat = _flat(model, plan)
    tensors = {_renamed(name, theirs): tensor for name, tensor in flat.items()}
    values |= dict.fromkeys((KEY, "quantization_config"), _settings(plan, bits, theirs))
    with atomic_directory(target) as temporary:
        write_json(temporary / hf_import.CONFIG, values)
        hf_export.write_texts(temporary, model)
        hf_export.write_weights(temporary, watched(tensors, "write", show), max_shard_bytes)
        again = read(temporary)
        check_equal(str(target), hf_import.open_weights(temporary, PACKED), watched(tensors, "verify", show))
        hf_export.check_described(target, model, again)
    odd = sum(spec.matrix and name not in plan for name, spec in parameter_table(config).items())
    notes = [f"{odd} matrices stay float32: routers, convolutions and rows that are no multiple of {GROUP}."] if odd else []
    return notes + (
        hf_export.notes_of(model, values) if theirs else ["mlx-lm has no form of this model: smedjan alone opens the directory."]
    )


def read(path: Path) -> Portable:
    """The model of a directory: `packed` has what is quantised as it is, `tensors` everything as float32. Raises CheckpointError for a
    wrong file, ConfigError for a quantisation that is not read here."""
    values, where = read_json(path / hf_import.CONFIG), str(path / hf_import.CONFIG)
    _check_settings(values, where)
    stored = hf_import.open_weights(path, PACKED)
    config, theirs = _model(values, stored, where)
    tensors: dict[str, Lazy] = {}
    packed: dict[str, Packed] = {}
    ours = {_renamed(part, theirs): part for name in parameter_table(config) for part in _parts(name)}
    if odd := sorted(stored.keys() - ours.keys()):
        raise CheckpointError(f"{path} has a tensor {odd[0]!r}.", "The model of its config.json has no such tensor.", _AGAIN)
    found = {ours[name]: tensor for name, tensor in stored.items()}
    for name, spec in parameter_table(config).items():
        if name not in found:
            raise CheckpointError(f"{path} lacks the tensor {name}.", "The model of its config.json has it.", _AGAIN)
        rows = spec.shape[0] if "vocab" in spec.axes else None
        if name in found and names(name).scales in found and name.endswith(".weight"):
            packed[name] = _packed(name, spec.shape, found, rows, path)
            tensors[name] = packed[name].whole(spec.shape)
        else:
            tensors[name] = _whole(name, spec.shape, cast(name, found[name], np.dtype(np.float32)), rows, path)
    tokenizer, notes = hf_tokenizer.read(path, config.padded_vocab_size)
    if tokenizer is not None and config.vocab_size != tokenizer.vocab_size:
        config = hf_import.with_vocabulary(config, tokenizer)
    width = ", ".join(str(bits) for bits in sorted({each.bits for each in packed.values()}))
    source = {"format": "quantized", "bits": width, "group": GROUP}
    return Portable(config, tensors, tokenizer, 0, source, tuple(notes), packed=packed)


def note(model: Portable) -> str:
    """What is to be said where such a model becomes float32 again."""
    return f"Its weights were quantised to {model.source['bits']} bits: what that rounded away is gone."


def params(model: Portable) -> dict[str, Lazy]:
    """The parameters to infer with: three arrays of each quantised weight, float32 of the others."""
    found: dict[str, Lazy] = {}
    for name, tensor in model.tensors.items():
        found |= dict(zip(names(name), model.packed[name], strict=True)) if name in model.packed else {name: tensor}
    return found


def _described(model: Portable) -> tuple[dict[str, str], dict[str, Any]]:
    """(our names -> the architecture's, none where the names are our own; config.json)."""
    config, eos = model.config, hf_export.end_id(model)
    try:
        family = FAMILIES[family_of(config, "Hugging Face")]
    except ConfigError:
        family = None
    if family and family.layout is layouts.llama:
        return _theirs(config), hf_config.to_hf(config, "float16", eos)
    return {}, {"model_type": OWN, "eos_token_id": eos, OWN: config.to_dict()}


def _theirs(config: ModelConfig) -> dict[str, str]:
    return {tie.ours[0]: tie.theirs[0] for tie in layouts.llama(config)}


def _renamed(part: str, theirs: Mapping[str, str]) -> str:
    """The name in the file of one of our arrays."""
    if part in theirs or not theirs:
        return theirs.get(part, part)
    stem, _, last = part.rpartition(".")
    weight = theirs.get(f"{stem}.weight", part)
    return f"{weight.removesuffix('.weight')}.{last}"


def _parts(name: str) -> tuple[str, ...]:
    return names(name) if name.endswith(".weight") else (name,)


def _settings(plan: Mapping[str, int], bits: int, theirs: Mapping[str, str]) -> dict[str, Any]:
    """What MLX reads: the usual bits, and by path what has others."""
    usual: dict[str, Any] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    others = {_renamed(name, theirs).removesuffix(".weight"): width for name, width in plan.items() if width != bits}
    return usual | {path: {"group_size": GROUP, "bits": width} for path, width in others.items()}


def _check_settings(values: Mapping[str, Any], where: str) -> None:
    settings = values[KEY]
    for row in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        group, mode, bits = row.get("group_size"), row.get("mode", "affine"), row.get("bits")
        if (group, mode) != (GROUP, "affine") or bits not in BITS:
            what = f"{where} is of weights quantised to {bits} bits in groups of {group} ({mode})."
            raise ConfigError(what, f"Affine groups of {GROUP} with 4 or 8 bits are read here.", "Use a copy that is not quantised.")


def _model(values: dict[str, Any], stored: Mapping[str, Lazy], where: str) -> tuple[ModelConfig, dict[str, str]]:
    """(the model, our names -> those of the file; none where they are our own)."""
    try:
        if values.get("model_type") == OWN:
            config: ModelConfig = checked_config(ModelConfig, values[OWN])
            theirs = {}
        else:
            plain = {key: value for key, value in values.items() if key not in (KEY, "quantization_config")}
            config = hf_config.from_hf(plain, where, hf_import.HEAD not in stored)
            if FAMILIES[str(values.get("model_type"))].layout is not layouts.llama:
                what = f"{where} is of a quantised model of the type {values['model_type']}."
                raise ConfigError(what, "Its arrays are laid out in another way there.", "Use a copy that is not quantised.")
            theirs = None
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where} cannot be used.", reason(error), _AGAIN) from None
    if config.layers > len(stored):  # before a table of that many layers is made
        raise CheckpointError(f"{where} promises {config.layers} layers.", f"There are only {len(stored)} tensors.", _AGAIN)
    return config, _theirs(config) if theirs is None else theirs


def _packed(name: str, shape: tuple[int, ...], found: Mapping[str, Lazy], rows: int | None, path: Path) -> Packed:
    if missing := [part for part in names(name) if part not in found]:
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}.", "Its weight is quantised.", _AGAIN)
    parts = Packed(*(found[part] for part in names(name)))
    bits = bits_of(parts.codes.shape, parts.scales.shape) if parts.scales.shape and parts.scales.shape[-1] else 0
    wanted = [(*shape[:-1], shape[-1] * bits // 32), *[(*shape[:-1], shape[-1] // GROUP)] * 2]
    fits = bits in BITS and shape[-1] % GROUP == 0 and all(_fits(part.shape, want, rows) for part, want in zip(parts, wanted, strict=True))
    if not fits or [part.dtype.name for part in parts] != ["uint32", "float16", "float16"]:
        shapes = ", ".join(f"{part.dtype.name} {part.shape}" for part in parts)
        raise CheckpointError(
            f"The quantised weight {name} in {path} has the arrays {shapes}.",
            f"Codes are uint32, scales and biases float16, for {shape} in groups of {GROUP}.",
            _AGAIN,
        )
    return Packed(*(_whole(name, want, part, rows, path) for part, want in zip(parts, wanted, strict=True)))


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], rows: int | None) -> bool:
    return shape == wanted or (rows is not None and shape[1:] == wanted[1:] and rows - 64 < shape[0] <= rows)


def _whole(name: str, shape: tuple[int, ...], tensor: Lazy, rows: int | None, path: Path) -> Lazy:
    """The tensor, checked, with rows of zeros where the vocabulary is padded."""
    if not _fits(tensor.shape, shape, rows):
        raise CheckpointError(f"The tensor {name} in {path} has shape {tensor.shape}.", f"config.json asks for {shape}.", _AGAIN)

    def check(array: np.ndarray) -> np.ndarray:
        if array.dtype != np.uint32 and not np.isfinite(array).all():
            raise CheckpointError(f"The tensor {name} in {path} has values that are not finite.", "The model is damaged.", _AGAIN)
        missing = shape[0] - array.shape[0]
        return np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))) if missing else array

    return tensor.then(check, shape=shape)


def _flat(model: Portable, plan: Mapping[str, int]) -> dict[str, Lazy]:
    """Every array that is written, by our names; a weight that is quantised already, to as many bits, stays bit for bit what it is."""

    @functools.lru_cache(maxsize=1)  # the three arrays of a weight are read one after another
    def rounded(name: str) -> Quantized:
        try:
            return quantize(model.tensors[name].read(), plan[name])
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error.what}", error.why, error.fix) from None

    flat: dict[str, Lazy] = {}
    for name, tensor in model.tensors.items():
        if name not in plan:
            flat[name] = cast(name, tensor, np.dtype(np.float32))
        elif name in model.packed and model.packed[name].bits == plan[name]:
            flat |= dict(zip(names(name), model.packed[name], strict=True))
        else:
            lead, width = tensor.shape[:-1], tensor.shape[-1]
            shapes = (*lead, width * plan[name] // 32), (*lead, width // GROUP), (*lead, width // GROUP)
            for at, (part, shape) in enumerate(zip(names(name), shapes, strict=True)):
                dtype = np.dtype(np.float16 if at else np.uint32)
                flat[part] = Lazy(dtype, shape, lambda name=name, at=at: rounded(name)[at])
    return flat
