"""What a larger model is made of, with the function kept: which layer, head and hidden unit of the new one stems from which old one.

    layers     old layers stay in their order; a new one follows the layer that it is a copy of and adds nothing yet
    heads      copies share a key/value head, or have a copy of it; heads keep their size
    kv heads   copies, each with a part of the query heads
    units      hidden units of a feed-forward, or of every expert, are copies
    experts    each is the dense feed-forward

The values: smedjan_common.checkpoint.growing. What cannot grow so is refused here (ConfigError).
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from smedjan_common.errors import ConfigError, flag
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns.experts import width

PATTERNS = ("mixer", "ffn", "rope_layers", "window_layers", "rope_global_layers")  # what says something of every layer by itself
COPIED = ("attention", "block-sparse")  # mixers whose heads can be copied
DENSE, ROUTED = "swiglu", "experts"
OF_EXPERTS = ("experts_per_token", "shared_experts", "router")


class Wanted(NamedTuple):
    """Sizes of the new model; None: as it is. ffn: a pattern over the new depth."""

    layers: int | None = None
    ffn_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    shared_experts: int | None = None
    router: str | None = None
    expert_dim: int | None = None
    ffn: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Growth:
    """From `old` to `new`. layers, heads, kv_heads: for each of the new model the old one that it stems from."""

    old: ModelConfig
    new: ModelConfig
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    def added(self, layer: int) -> bool:
        """Whether a layer of the new model is a copy, which adds nothing yet."""
        return layer > 0 and self.layers[layer] == self.layers[layer - 1]

    def becomes_experts(self, layer: int) -> bool:
        """Whether the feed-forward of a layer was dense and is routed."""
        return self.new.ffn_of(layer) != self.old.ffn_of(self.layers[layer])


def spread(old: int, new: int) -> tuple[int, ...]:
    """For each of `new` things the one of `old` that it stems from: copies stand beside each other, as evenly as can be."""
    return tuple(place * old // new for place in range(new))


def plan(old: ModelConfig, wanted: Wanted) -> Growth:
    """How `old` grows. Raises ConfigError for what cannot be, would shrink, or could not keep the function."""
    if all(value is None for value in wanted):
        what, fix = "Nothing is to grow.", "Give --layers, --ffn-mult, --heads, --kv-heads, --expert-dim or --experts."
        raise ConfigError(what, "The copy would be the same model.", fix)
    sizes = _sizes(old, wanted)
    layers = spread(old.layers, sizes["layers"])
    patterns = {name: shortest(pattern[layer % len(pattern)] for layer in layers) for name in PATTERNS if (pattern := getattr(old, name))}
    patterns["ffn"] = _feed_forwards(old, wanted, layers)
    new = dataclasses.replace(old, **patterns, **sizes, **_experts(old, wanted, patterns["ffn"]))
    if new == old:
        raise ConfigError("Nothing would grow.", "The model has these sizes already.", "Give larger ones, or leave the command out.")
    new.validate()
    return Growth(old, new, layers, *_heads(old, new))


def shortest(pattern: Iterable[str]) -> tuple[str, ...]:
    """The shortest pattern that gives the same, repeated over the depth."""
    whole = tuple(pattern)
    periods = range(1, len(whole) + 1)
    return next(whole[:period] for period in periods if all(whole[i] == whole[i % period] for i in range(len(whole))))


def _sizes(old: ModelConfig, wanted: Wanted) -> dict[str, Any]:
    """The sizes that every model has. Raises ConfigError for smaller ones."""
    heads = wanted.heads or old.heads
    shared = heads if old.kv_heads == old.heads else old.kv_heads  # where each head has keys and values of its own, so it stays
    sizes = {
        "layers": wanted.layers or old.layers,
        "ffn_dim": wanted.ffn_dim or old.ffn_dim,
        "heads": heads,
        "kv_heads": wanted.kv_heads or shared,
    }
    for name, value in sizes.items():
        if value < (now := getattr(old, name)):
            what = f"{flag(name)} would be {value}, and the model has {now}." if name != "ffn_dim" else _narrower(value, now)
            raise ConfigError(what, "A smaller model cannot compute the same.", "Give a larger number, or leave it out.")
    if heads == old.heads:
        return sizes
    if fixed := [name for name in dict.fromkeys(old.mixer) if _cuts_the_width(old, name)]:
        why = f"{fixed[0]} cuts the width into its heads, so each would become another, smaller one."
        fix = "Grow --layers, --ffn-mult or --experts; attention and block-sparse take more heads."
        raise ConfigError(f"The heads of {', '.join(fixed)} cannot grow in number.", why, fix)
    return sizes | {"head_size": old.head_dim}


def _cuts_the_width(old: ModelConfig, mixer: str) -> bool:
    """Whether heads of a mixer are as many as --heads says and cannot become more with it."""
    if mixer == "gated-deltanet":
        return not (old.delta_key_heads and old.delta_value_heads)
    return mixer not in COPIED


def _narrower(value: int, now: int) -> str:
    return f"The feed-forward would be {value} wide, and that of the model is {now}."


def _heads(old: ModelConfig, new: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of which each head and each key/value head is a copy. Raises ConfigError where the function could not be kept."""
    kv, group, wide = spread(old.kv_heads, new.kv_heads), old.heads // old.kv_heads, new.heads // new.kv_heads
    heads = tuple(
        kept * group + ((place - kv.index(kept)) * wide + i) % group for place, kept in enumerate(kv) for i in range(wide)
    )  # the copies of a key/value head share out its query heads, again from the first where there are more places
    if new.heads == old.heads and new.kv_heads == old.kv_heads:
        return heads, kv
    why = "Each head must keep a head that it reads, and all must be there."
    if set(heads) != set(range(old.heads)):
        what = f"{new.heads} heads over {new.kv_heads} key/value heads cannot be made of {old.heads} over {old.kv_heads}."
        raise ConfigError(what, why, f"Multiply both by one number: --heads {2 * old.heads} --kv-heads {2 * old.kv_heads}, say.")
    if "block-sparse" in old.mixer and wide % group:
        what = f"Block-sparse heads cannot become {new.heads} over {new.kv_heads} key/value heads."
        why = "The heads of a key/value head choose blocks together: with some of them counted more than others the choice would change."
        raise ConfigError(what, why, f"Take heads that are a multiple: {group} for each key/value head, or {2 * group}.")
    if "gated-deltanet" in old.mixer and new.kv_heads != old.kv_heads and old.delta_value_heads and not old.delta_key_heads:
        why = "Its value heads are as many as --delta-value-heads says, and would read other key heads."
        raise ConfigError("--kv-heads cannot grow with --delta-value-heads alone.", why, "Leave --kv-heads out.")
    if "linear" in old.mixer and old.linear_decay == "fixed" and new.kv_heads != old.kv_heads:
        why = "Its decay follows from the place of a key/value head, and would be another one."
        raise ConfigError("--kv-heads cannot grow with --linear-decay fixed.", why, "Leave --kv-heads out.")
    if old.qk_norm and old.qk_norm_over == "all" and any(len({of.count(one) for one in of}) > 1 for of in (heads, kv)):
        why = "The norm is over all heads together: with some of them counted more than others its mean would change."
        fix = f"Take multiples: --heads {2 * old.heads} --kv-heads {2 * old.kv_heads}, say."
        raise ConfigError(f"--qk-norm-over all does not go with {new.heads} heads of {old.heads}.", why, fix)
    return heads, kv


def _feed_forwards(old: ModelConfig, wanted: Wanted, layers: tuple[int, ...]) -> tuple[str, ...]:
    """The pattern of the new model. Raises ConfigError for layers that would go back to a dense one."""
    now = tuple(old.ffn_of(layer) for layer in layers)
    if wanted.ffn is not None and wanted.experts is None:
        raise ConfigError("--ffn would do nothing.", "It says which layers become experts.", "Add --experts 8, say, or leave it out.")
    if wanted.experts is None:
        return shortest(now)
    if ROUTED in old.ffn:
        why = "A token would be sent to other experts among more of them."
        fix = "Leave --experts out: --expert-dim makes those that are there wider."
        raise ConfigError(f"The model has {old.experts} experts already.", why, fix)
    pattern = wanted.ffn or (ROUTED,)
    if ROUTED not in pattern[: len(now)]:
        what = f"No layer would have experts: --ffn is {','.join(pattern)}."
        raise ConfigError(what, "--experts makes them of the layers that it names.", "Take --ffn swiglu,experts, or leave --ffn out.")
    return pattern


def _experts(old: ModelConfig, wanted: Wanted, ffn: tuple[str, ...]) -> dict[str, Any]:
    """The sizes of experts. Raises ConfigError for flags that would do nothing."""
    if wanted.experts is not None:
        if wanted.expert_dim is not None:
            why, fix = "Each expert begins as the dense feed-forward.", "Leave it out; --ffn-mult makes the feed-forward wider before."
            raise ConfigError("--expert-dim does not go with --experts.", why, fix)
        given = {name: value for name in OF_EXPERTS if (value := getattr(wanted, name)) is not None}
        return {"experts": wanted.experts, "expert_dim": 0, **given}
    if idle := [name for name in OF_EXPERTS if getattr(wanted, name) is not None]:
        raise ConfigError(
            f"{flag(idle[0])} would do nothing.", "No feed-forward becomes experts.", "Add --experts 8, say, or leave it out."
        )
    if wanted.expert_dim is None:
        if wanted.ffn_dim is not None and old.expert_dim and DENSE not in ffn:
            why, fix = "All feed-forwards are experts, of a width of their own.", "Take --expert-dim."
            raise ConfigError("--ffn-mult would do nothing.", why, fix)
        return {}
    if ROUTED not in old.ffn:
        raise ConfigError("--expert-dim would do nothing.", "The model has no experts.", "Take --ffn-mult, or --experts.")
    if wanted.expert_dim < (now := width(old)):
        what = f"--expert-dim would be {wanted.expert_dim}, and an expert is {now} wide."
        raise ConfigError(what, "A smaller model cannot compute the same.", "Give a larger number.")
    return {"expert_dim": wanted.expert_dim}
