"""Portable -> a directory that transformers' AutoModelForCausalLM and AutoTokenizer, and mlx-lm, load with no code of ours.

    config.json   generation_config.json   model.safetensors (or shards and an index)
    tokenizer.json   tokenizer_config.json   special_tokens_map.json   chat_template.jinja (of a model that has one)

Before it takes its name it is read back through hf_import and compared: tensors bit for bit, rotary frequencies, tokenizer hash.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf_config, hf_delta, hf_import, hf_tokenizer, ties
from convert.families import FAMILIES
from convert.hf_rope import turned_dim
from convert.json_file import write_json, write_text
from convert.portable import Lazy, Portable, cast, check_equal
from convert.safetensors_file import write_tensors
from smedjan_common.checkpoint.lazy import Show, watched
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.files.atomic_directory import atomic_directory
from smedjan_common.model import rope
from smedjan_common.model.json_fields import MAX_POSITION

PARTS = (
    *(hf_import.CONFIG, "generation_config.json", hf_import.WEIGHTS, "model-*-of-*.safetensors", hf_import.INDEX),
    *(hf_tokenizer.FILE, hf_tokenizer.CONFIG, hf_tokenizer.SPECIAL, hf_tokenizer.CHAT),
)


def write(model: Portable, target: Path, dtype: np.dtype, max_shard_bytes: int, show: Show) -> list[str]:
    """Write the directory `target` atomically, in place of one of that name; returns notes for the user.

    Raises ConfigError for a model that is no Llama, CheckpointError when what was written reads back differently, OSError.
    """
    config = model.config
    values = hf_config.to_hf(config, dtype.name, end_id(model))  # refuses before anything is written
    layout = FAMILIES[values["model_type"]].layout(config)
    tensors = {name: cast(name, tensor, dtype) for name, tensor in ties.written(layout, model.tensors).items()}
    with atomic_directory(target) as temporary:
        write_json(temporary / hf_import.CONFIG, values)
        write_texts(temporary, model)
        write_weights(temporary, watched(tensors, "write", show), max_shard_bytes)
        _verify(temporary, model, watched(tensors, "verify", show))
    return notes_of(model, values)


def notes_of(model: Portable, values: Mapping[str, Any]) -> list[str]:
    """What users of a directory with this config.json should know."""
    config, values = model.config, hf_config.of_language(dict(values))
    notes = [] if model.tokenizer else ["It has no tokenizer: transformers loads the model, but no text."]
    if config.rope_scaling == "ntk":
        notes.append(f"NTK-aware scaling is written as the base it comes to, {values['rope_theta']:.6g}.")
    if values["model_type"] == "deepseek_v2" and config.rope_scaling == "none":
        notes.append("mlx-lm reads this architecture with YaRN alone. transformers reads it as it is.")
    if config.rope_scaling == "longrope":
        length = config.rope_original_len
        notes.append(
            f"Of texts of up to {length} tokens mlx-lm's logits are those of another model: it has the factors of longer ones only."
        )
    if "attention_factor" in (values["rope_scaling"] or {}):
        notes.append("mlx-lm does not read its factor of cosines and sines (attention_factor). transformers reads it.")
    if config.window and values["model_type"] not in ("smollm3", "olmo3"):
        notes.append("mlx-lm does not read this window: beyond it its logits are those of another model. transformers reads it.")
    if values["model_type"] == "qwen3_next" and not hf_delta.regular(config):
        note = "mlx-lm takes others of its layers for those that attend: its logits are those of another model. transformers reads which."
        notes.append(note)
    return notes


def end_id(model: Portable) -> int | None:
    """The id of the token between documents."""
    tokenizer = model.tokenizer
    return tokenizer.special_tokens[name] if tokenizer and (name := hf_tokenizer.end_of_text(tokenizer)) else None


def write_texts(directory: Path, model: Portable) -> None:
    """Everything beside config.json and the weights: how to generate, tokenizer, chat template."""
    config, tokenizer = model.config, model.tokenizer
    chat, turn_ends = hf_tokenizer.chat_of(tokenizer) if tokenizer else (None, [])
    write_json(directory / "generation_config.json", _generation(model, end_id(model), turn_ends))
    if chat is not None:
        write_text(directory / hf_tokenizer.CHAT, chat)
    for name, value in hf_tokenizer.files(tokenizer, config.padded_vocab_size, config.context_length).items() if tokenizer else ():
        write_text(directory / name, value) if isinstance(value, str) else write_json(directory / name, value, indent=2)


def _generation(model: Portable, eos: int | None, turn_ends: Sequence[int]) -> dict[str, Any]:
    """generation_config.json: greedy, to the end of a turn or of the text; the embedding rows beyond the vocabulary are never chosen, as
    in smedjan."""
    spare = list(range(model.config.vocab_size, model.config.padded_vocab_size))
    tokenizer = model.tokenizer
    ends = list(dict.fromkeys([*([] if eos is None else [eos]), *(tokenizer.ends.eos_ids if tokenizer else ()), *turn_ends]))
    bos = eos if tokenizer is None or tokenizer.bos_id is None else tokenizer.bos_id
    special = ({} if bos is None else {"bos_token_id": bos}) | ({"eos_token_id": ends if ends[1:] else ends[0]} if ends else {})
    return {"do_sample": False, **special, **({"suppress_tokens": spare} if spare else {})}


def write_weights(directory: Path, tensors: Mapping[str, Lazy], max_shard_bytes: int) -> None:
    shards: list[dict[str, Lazy]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return write_tensors(directory / hf_import.WEIGHTS, shards[0])
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard)
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return write_json(directory / hf_import.INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _verify(directory: Path, model: Portable, expected: Mapping[str, Lazy]) -> None:
    """Raises CheckpointError unless the directory reads back as the model that was to be written."""
    again = hf_import.read(directory)
    check_equal(str(directory), hf_import.open_weights(directory), expected)
    check_described(directory, model, again)


def check_described(directory: Path, model: Portable, again: Portable) -> None:
    """Raises CheckpointError unless model and tokenizer are those that were to be written."""
    ours, theirs = model.config, again.config
    same = ours.padded_vocab_size == theirs.padded_vocab_size and math.isclose(ours.norm_eps, theirs.norm_eps, rel_tol=1e-12)
    same = same and _patterns(ours) == _patterns(theirs)
    if not same or not all(map(_turn_alike, rope.turnings(ours).values(), rope.turnings(theirs).values())):
        raise CheckpointError(f"{directory} is not what was written.", "Its config.json describes another model.", "Report this.")
    if model.tokenizer and (again.tokenizer is None or again.tokenizer.hash != model.tokenizer.hash):
        raise CheckpointError(f"{directory} is not what was written.", "Its tokenizer.json reads back differently.", "Report this.")
    if model.tokenizer and again.tokenizer and hf_tokenizer.chat_of(again.tokenizer) != hf_tokenizer.chat_of(model.tokenizer):
        raise CheckpointError(f"{directory} is not what was written.", "Its chat template reads back differently.", "Report this.")


def _turn_alike(ours: ModelConfig, theirs: ModelConfig) -> bool:
    factors = [(rope.attention_factor(each), rope.plain_factor(each)) for each in (ours, theirs)]
    same = turned_dim(ours) == turned_dim(theirs) and np.allclose(*factors, rtol=1e-9, atol=0)
    tables = [[rope.frequencies(rope.settled(each, longest), turned_dim(each)) for longest in (1, MAX_POSITION)] for each in (ours, theirs)]
    return bool(same) and np.allclose(*tables, rtol=1e-12, atol=0)


def _patterns(config: ModelConfig) -> list[tuple[int, tuple[str, ...], bool]]:
    """Of each layer: what its window leaves of the context, whether it turns, and whether as the model's scaling says."""
    layers = [config.at(layer) for layer in range(config.layers)]
    context, scaling = config.context_length, config.rope_scaling
    return [(min(one.window or context, context), one.rope_layers, one.rope_scaling == scaling) for one in layers]
