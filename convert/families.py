"""The architectures of others that hold a model of smedjan: what config.json calls them, what they have more than a plain Llama.

| row | model_type | more than Llama |
|---|---|---|
| llama | Llama 1 to 3.3, TinyLlama, SmolLM2, and most that came after | `attention_bias` puts a bias on q, k, v and o |
| qwen2 | Qwen 2 and 2.5 | biases of q, k and v |
| qwen3 | Qwen 3 | RMSNorm over each head of q and k, heads of a size of their own |
| mistral | Mistral 7B, Nemo | a sliding window in all layers, heads of a size of their own |

A model goes out as the first row that expresses it. `window`: what of it another program is known to misread is told in a note.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError


class Family(NamedTuple):
    """A row.

    architecture: transformers' class. gguf: llama.cpp's name, "" where a GGUF file cannot hold it. interleaved: llama.cpp turns neighbours
    of a head there, not halves. defaults: what transformers takes where config.json is silent. options: which fields of a ModelConfig it
    has beside those of every row; a value of None: either, another: only that.
    """

    architecture: str
    gguf: str
    interleaved: bool
    defaults: Mapping[str, Any]
    options: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        True,
        {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
        {"head_size": None, "qkv_bias": None, "o_bias": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        False,
        {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768, "sliding_window": 4096},
        {"qkv_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        False,
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
        {"qk_norm": True, "head_size": None},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "",  # llama.cpp reads it as a llama, without the window
        True,
        {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
        {"window": None, "head_size": None},
    ),
}

# What of a ModelConfig every row can say; a field that is added later is refused until it is thought about here.
EXPRESSED = {
    *("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length", "mixer", "ffn", "norm_eps", "tied_head"),
    *("rope_base", "rope_scaling", "rope_factor", "rope_original_len", "rope_low_freq_factor", "rope_high_freq_factor", "init_std"),
}


def family_of(config: ModelConfig, target: str) -> str:
    """The first row that expresses a model. `target` names the format in errors.

    Raises ConfigError, by name, for what none does: other mixers, other feed-forwards, options or sets of options.
    """
    for what, names, known in (("mixer", config.mixer, "attention"), ("feed-forward", config.ffn, "swiglu")):
        if odd := sorted(set(names) - {known}):
            raise ConfigError(
                f"A model with the {what} {odd[0]} has no {target} form.",
                f"The layouts that other programs run have {known} only.",
                "Keep it neutral: both backends run it.",
            )
    values, plain = config.to_dict(), ModelConfig(64, 2, 1, 1, 1, 1).to_dict()
    special = {name: values[name] for name in values.keys() - EXPRESSED if values[name] != plain[name]}
    for name, family in FAMILIES.items():
        only = {option for option, value in family.options.items() if value is not None}
        if special.keys() <= family.options.keys() and only <= special.keys() and (name != "llama" or config.qkv_bias == config.o_bias):
            return name
    wanted = ", ".join(f"{name} = {value}" for name, value in sorted(special.items()))
    raise ConfigError(
        f"A model with {wanted} has no {target} form.",
        "No layout that other programs run expresses it.",
        "Keep it neutral: both backends run it.",
    )
