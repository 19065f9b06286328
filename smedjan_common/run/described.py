"""The new model that flags describe, those of `train` and those of `sizes`."""

from typing import Any

from smedjan_common.errors import ConfigError
from smedjan_common.model.config import ModelConfig, parse_pattern
from smedjan_common.model.options import options
from smedjan_common.run.flags import LayerFlags, MixerFlags

SHAPE = ("dim", "layers", "heads")  # what --size custom needs


def described_model(size: str, model: LayerFlags, mixers: MixerFlags, vocab_size: int, seq_len: int, **more: Any) -> ModelConfig:
    """The model of a size, single values of it replaced by flags; `more`: values of its configuration. Raises ConfigError."""
    names = (*SHAPE, "kv_heads", "ffn_mult")
    values = more | {name: value for name in names if (value := getattr(model, name)) is not None}
    values |= {**option_values(mixers), "mixer": parse_pattern(model.mixer), "ffn": feed_forward(model, mixers)}
    values["context_length"] = seq_len
    if size != "custom":
        return ModelConfig.preset(size, vocab_size, **values)
    if missing := [f"--{name}" for name in SHAPE if name not in values]:
        raise ConfigError(f"--size custom lacks {', '.join(missing)}.", "It has no values of its own.", "Give --dim, --layers and --heads.")
    return ModelConfig.build(vocab_size=vocab_size, **values)


def option_values(flags: MixerFlags | LayerFlags) -> dict[str, Any]:
    """The values of the flags that are options of a model, patterns as names."""
    known = options(ModelConfig)
    return {name: parse_pattern(value) if known[name].pattern else value for name, value in vars(flags).items() if name in known}


def feed_forward(model: LayerFlags, mixers: MixerFlags) -> tuple[str, ...]:
    """The pattern of feed-forwards: --ffn, or what --experts says."""
    return parse_pattern(model.ffn) if model.ffn else ("experts",) if mixers.experts else ("swiglu",)
