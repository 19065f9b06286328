"""A Hugging Face directory of a family of families.py -> Portable.

    config.json   model.safetensors, or model.safetensors.index.json and its shards   tokenizer.json

Nothing in it is believed: names, shapes and dtypes are checked against the model of config.json before a tensor is read, pickles are
never opened, and what smedjan's model cannot express is refused by name. Weights become float32, which holds F32, BF16 and F16 exactly.
A head that equals the embedding is the embedding (tied), whatever config.json says; one that it asks for and no file has is refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf_config, hf_tokenizer, layouts, ties
from convert.families import FAMILIES
from convert.gates import ungated
from convert.hf_language import language
from convert.json_file import read_json
from convert.names import HEAD_ROW, MODEL_ROWS
from convert.portable import Lazy, Portable, cast
from convert.safetensors_file import DTYPES, open_tensors
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError, reason
from smedjan_common.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD, EMBED = HEAD_ROW.hf, MODEL_ROWS[0].hf
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # old files keep a table that follows from config.json


def detect(path: Path) -> bool:
    """Whether a directory looks like one of Hugging Face's."""
    try:
        return path.is_dir() and bool({"model_type", "architectures"} & read_json(path / CONFIG).keys())
    except CheckpointError:
        return False


def is_damaged(path: Path) -> bool:
    """Whether a directory is one of Hugging Face's by its files, though not by what config.json says: reading it tells what is wrong.

    Not a part of `detect`, which also says what --force may replace.
    """
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def read(path: Path) -> Portable:
    """The model of a directory; no tensor but an untied head is read yet.

    Raises CheckpointError for a wrong file, ConfigError for a model that cannot be expressed, DataError for its tokenizer.
    """
    values, where = hf_config.of_language(read_json(path / CONFIG)), str(path / CONFIG)
    try:
        hf_config.from_hf(values, where)  # what it says by itself is refused before a tensor is looked at
        stored, others = language(open_weights(path), values)
        tied, notes = _tied(values, stored, path)
        notes += others
        if tied and (table := _table(stored)):  # some architectures have a tied head written out
            stored.setdefault(HEAD, table)
        config = hf_config.from_hf(values, where, tied)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{where} cannot be used.", reason(error), "Restore it from a good copy.") from None
    dtypes = sorted({tensor.dtype.name for tensor in stored.values()})
    if config.layers > len(stored):  # before a table of that many layers is made
        raise CheckpointError(f"{where} promises {config.layers} layers.", f"There are only {len(stored)} tensors.", "Download it again.")
    layout = layout_of(values, config)
    stored, left_out = _without_extras(stored, layout, path)
    _check_shapes(stored, config, layout, path)
    tokenizer, more = hf_tokenizer.read(path, config.vocab_size)
    config = with_vocabulary(config, tokenizer)
    stored = {name: _finite(name, cast(name, tensor, np.dtype(np.float32)), path) for name, tensor in stored.items()}
    stored |= {name: _padded(stored[name], config) for name in stored if _is_table(name)}
    config = ungated(config, lambda config: layout_of(values, config), stored)
    layout = layout_of(values, config)
    if name := ties.lost(layout, stored):
        what = f"{path} has a tensor {name} with values that are zero in every model from here. The model cannot be expressed here."
        raise ConfigError(what, "It says that it has no shared experts.", "Choose another model.")
    tensors = ties.read(layout, stored, config)
    if values.get("auto_map"):
        notes.append(f"It names code of its own (auto_map), which was not read: it is taken for a plain {values['model_type']}.")
    source = {"format": "hf", "model_type": values["model_type"], "dtypes": dtypes}
    return Portable(config, tensors, tokenizer, 0, source, (*notes, *left_out, *more))


def layout_of(values: Mapping[str, Any], config: ModelConfig) -> list[ties.Tie]:
    """Of its family, or of one with rows in another order, which a key of config.json says."""
    if values["model_type"] == "deepseek_v3" and values.get("rope_interleave") is False:
        return layouts.deepseek_v3(config, halves=True)
    return FAMILIES[values["model_type"]].layout(config)


def open_weights(path: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> dict[str, Lazy]:
    """Every tensor of the directory by its name there, none read yet. Raises CheckpointError."""
    if (path / WEIGHTS).exists():
        return open_tensors(path / WEIGHTS, dtypes)
    if (path / INDEX).exists():
        return _open_shards(path, dtypes)
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in path.glob(suffix))
    if pickles:
        raise CheckpointError(
            f"{path} has its weights in {pickles[0]}, a pickle.",
            "Loading a pickle can run any code, so pickles are never loaded.",
            "Use a copy of the model in safetensors.",
        )
    raise CheckpointError(f"{path} has no weights.", f"There is neither {WEIGHTS} nor {INDEX}.", "Download the model again.")


def _open_shards(path: Path, dtypes: Mapping[str, np.dtype]) -> dict[str, Lazy]:
    index, where = read_json(path / INDEX).get("weight_map"), path / INDEX
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{where} has no weight_map of names.", "It says which file has which tensor.", "Download it again.")
    tensors: dict[str, Lazy] = {}
    for file in sorted(set(index.values())):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", file):
            raise CheckpointError(f"{where} names the file {file!r}.", "Only safetensors files beside it are opened.", "Download it again.")
        found = open_tensors(path / file, dtypes)
        for name in found:
            if index.get(name) != file:
                raise CheckpointError(f"{path / file} has a tensor {name!r}.", f"{INDEX} does not list it there.", "Download it again.")
        tensors |= found
    if missing := index.keys() - tensors.keys():
        name = min(missing)
        raise CheckpointError(f"{path / index[name]} lacks the tensor {name!r}.", f"{INDEX} lists it there.", "Download it again.")
    return tensors


def _without_extras(stored: Mapping[str, Lazy], layout: list[ties.Tie], path: Path) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors of the model alone: what more there is must change nothing, or is refused by name."""
    wanted = [name for tie in layout for name in tie.theirs]
    known, notes = set(wanted), []
    if missing := [name for name in wanted if name not in stored]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{path} lacks the tensor {missing[0]}{more}.", f"The model of {CONFIG} has it.", "Download it again.")
    for name in stored.keys() - known:
        if name == HEAD:
            continue  # it equals the embedding
        if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in known:
            if np.any(stored[name].read()):
                raise ConfigError(
                    f"{path} has the bias {name}.", f"The model of {CONFIG} has none there.", "Choose another model: one without it."
                )
            notes = ["Its biases are all zero and were left out."]
        elif not _IGNORED.fullmatch(name):
            raise ConfigError(f"{path} has a tensor {name!r}.", f"The model of {CONFIG} has no such tensor.", "Choose another model.")
    return {name: tensor for name, tensor in stored.items() if name in known}, notes


def _tied(values: Mapping[str, Any], stored: Mapping[str, Lazy], path: Path) -> tuple[bool, list[str]]:
    """Whether the head is the embedding, and what to tell of it. Raises CheckpointError for a head that should be there and is not."""
    said = values.get("tie_word_embeddings")
    if HEAD in stored and (embed := _table(stored)):
        head = stored[HEAD]
        return head.shape == embed.shape and np.array_equal(head.read().astype(np.float32), embed.read().astype(np.float32)), []
    if said is False:
        raise CheckpointError(
            f"{path} lacks the tensor {HEAD}.",
            f"{CONFIG} says that the head is not the embedding (tie_word_embeddings).",
            "Download it again.",
        )
    return True, [] if said else [f"It has no {HEAD}, and {CONFIG} does not say why: the embedding is taken for the head."]


def _table(stored: Mapping[str, Lazy]) -> Lazy | None:
    """The embedding."""
    return next((tensor for name, tensor in stored.items() if name != HEAD and _is_table(name)), None)


def _finite(name: str, tensor: Lazy, path: Path) -> Lazy:
    """The tensor; reading raises CheckpointError where a value is not finite."""

    def check(array: np.ndarray) -> np.ndarray:
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"The tensor {name} in {path} has values that are not finite.", "The model is damaged.", "Download it again."
            )
        return array

    return tensor.then(check)


def _check_shapes(stored: Mapping[str, Lazy], config: ModelConfig, layout: list[ties.Tie], path: Path) -> None:
    for tie in layout:
        for name, shape in zip(tie.theirs, tie.shapes, strict=True):
            shape = (config.vocab_size, config.dim) if _is_table(name) else shape
            if stored[name].shape != shape:
                raise CheckpointError(
                    f"The tensor {name} in {path} has shape {stored[name].shape}.", f"{CONFIG} asks for {shape}.", "Download it again."
                )


def _is_table(name: str) -> bool:
    """Whether its rows are the vocabulary's, which need not be padded."""
    return name == HEAD or name.endswith(EMBED.removeprefix(layouts.PREFIX))


def with_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model with the tokenizer's vocabulary, where that pads to the same number of rows."""
    if tokenizer is None:
        return config
    smaller = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    return smaller if smaller.padded_vocab_size == config.padded_vocab_size else config


def _padded(table: Lazy, config: ModelConfig) -> Lazy:
    """Rows of the vocabulary with zero rows up to a multiple of 64."""
    missing = config.padded_vocab_size - table.shape[0]
    shape = (config.padded_vocab_size, config.dim)
    return table.then(lambda array: np.pad(array, ((0, missing), (0, 0))), shape=shape) if missing else table
