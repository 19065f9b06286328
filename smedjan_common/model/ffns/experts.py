"""The row of `experts`: a router sends each token to k of E SwiGLU feed-forwards; shared ones meet every token.

Tensors of one projection of all experts stand together, [experts, out, in]. Both backends sort the (token, expert) pairs by
expert and multiply the rows of an expert in blocks; how long a block is, and how many rows there can be, is said here.
"""

from dataclasses import dataclass
from typing import Literal

from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.shape import Shape
from smedjan_common.model.spec import FfnSpec

LARGEST_BLOCK = 512


@dataclass(frozen=True)
class Options(Shape):
    """Options of `experts`."""

    experts: int = option(0, "Experts of a feed-forward. 0: one dense feed-forward.", least=0)
    experts_per_token: int = option(2, "Experts that each token is sent to.")
    shared_experts: int = option(0, "Experts that see every token, besides the routed ones.", least=0)
    shared_gate: bool = option(False, "a sigmoid gate on the shared experts, one number a token (Qwen3-Next).")
    expert_dim: int = option(0, "Width of one expert.", least=0, filled="the feed-forward width")
    router: Literal["softmax", "bias"] = option(
        "softmax",
        "softmax: balanced by a loss (--balance-loss). bias: sigmoid scores, balanced without a loss by a bias on the choice.",
    )
    norm_topk_prob: bool = option(
        True, "The weights of a token's experts add up to 1; otherwise they are the router's among all experts (DeepSeek-V2, OLMoE)."
    )
    routed_scaling_factor: float = option(1.0, "What the sum of a token's routed experts is multiplied by.", over=0, most=1e6)
    expert_groups: int = option(1, "Groups that experts stand in, one after another (DeepSeek-V3: 8).", least=1)
    expert_groups_per_token: int = option(1, "Groups that a token's experts may come from, the best ones.", least=1)


def width(config: Options) -> int:
    """Hidden features of one expert."""
    return config.expert_dim or config.ffn_dim


def limited(config: Options) -> bool:
    """Whether a token's experts come from some of the groups only."""
    return config.expert_groups_per_token < config.expert_groups


def load_names(config: Options) -> list[str]:
    """What the layers that route call their loads, from the first to the last."""
    return [f"layers.{layer}.ffn.load" for layer in range(config.layers) if config.ffn_of(layer) == ROW.name]


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a block for `pairs` (token, expert) pairs: a power of two; the last block of an expert is half empty on average,
    so a quarter of its mean share bounds the waste to an eighth."""
    return 1 << (min(max(pairs // (4 * experts), 1), LARGEST_BLOCK).bit_length() - 1)


def padded_rows(pairs: int, experts: int, block: int) -> int:
    """The most rows that `pairs` can take when the rows of every expert fill whole blocks."""
    busy = min(pairs, experts)  # the worst: all but one have a single row over a full block
    return ((pairs - busy) // block + busy) * block


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    experts, dim, hidden = config.experts, config.dim, width(config)
    specs = [weight("router", experts, dim, ("experts", "embed"), config.init_std)]
    if config.router == "bias":
        specs.append(ParamSpec("router.bias", (experts,), ("experts",), "constant", 0.0, decay=False, lr_scale=0.0))
    specs += [_stacked(spec, experts) for spec in _swiglu(config, hidden)]
    if config.shared_experts:
        specs += [spec._replace(name=f"shared.{spec.name}") for spec in _swiglu(config, config.shared_experts * hidden)]
    if config.shared_gate:
        specs.append(weight("shared_gate", 1, dim, (None, "embed"), config.init_std))
    return specs


def _swiglu(config: Shape, hidden: int) -> list[ParamSpec]:
    return [
        weight("gate_proj", hidden, config.dim, ("ffn", "embed"), config.init_std),
        weight("up_proj", hidden, config.dim, ("ffn", "embed"), config.init_std),
        weight("down_proj", config.dim, hidden, ("embed", "ffn"), residual_std(config)),
    ]


def _stacked(spec: ParamSpec, experts: int) -> ParamSpec:
    return spec._replace(shape=(experts, *spec.shape), axes=("experts", *spec.axes))


def _active(config: Options) -> int:
    """The router's weight, k experts, the shared ones and their gate; the bias is no operand of a product."""
    gate = config.dim if config.shared_gate else 0
    return config.experts * config.dim + 3 * config.dim * width(config) * (config.experts_per_token + config.shared_experts) + gate


def _validate(config: Options) -> None:
    if config.experts < 2:
        raise ConfigError(f"--experts is {config.experts}.", "A router needs experts to choose from.", "Take --experts 8, say.")
    if config.experts_per_token > config.experts:
        raise ConfigError(
            f"--experts-per-token {config.experts_per_token} of --experts {config.experts} is impossible.",
            "A token goes to each expert at most once.",
            "Take --experts-per-token 2, say.",
        )
    _validate_groups(config)
    if config.experts_per_token < 2 and (config.norm_topk_prob or config.experts_per_token < 1):
        raise ConfigError(
            f"--experts-per-token is {config.experts_per_token}.",
            "The weights of a token's experts add up to 1: of one alone the weight is always 1, and the router would learn nothing.",
            "Take --experts-per-token 2, say.",
        )
    if config.shared_gate and not config.shared_experts:
        raise ConfigError("--shared-gate would do nothing.", "There are no --shared-experts.", "Add --shared-experts 1, or leave it out.")


def _validate_groups(config: Options) -> None:
    groups, taken = config.expert_groups, config.expert_groups_per_token
    if config.experts % groups:
        what = f"--experts {config.experts} does not divide into --expert-groups {groups}."
        raise ConfigError(what, "Groups are equally large.", f"Take --expert-groups {nearest_divisor(config.experts, groups)}.")
    if taken > groups:
        what = f"--expert-groups-per-token {taken} of --expert-groups {groups} is impossible."
        raise ConfigError(what, "A group is taken once.", f"Take --expert-groups-per-token {groups}, or more groups.")
    size = config.experts // groups
    if config.experts_per_token > taken * size:
        what = f"--experts-per-token is {config.experts_per_token}; --expert-groups-per-token {taken} has only {taken * size} experts."
        raise ConfigError(what, "A token's experts come from its groups.", "Take more groups for a token, or fewer experts.")
    if limited(config) and config.router == "bias" and size < 2:
        why = "The bias router ranks groups by their two best experts."
        raise ConfigError(f"--expert-groups {groups} has one expert in each.", why, "Take fewer groups.")


@dataclass(frozen=True)
class SoftmaxRouter:
    """Options of the training with router softmax."""

    balance_loss: float = option(0.01, "experts, router softmax: weight of the loss that spreads tokens over experts.", least=0)
    router_z_loss: float = option(1e-3, "experts, router softmax: weight of the router's own z-loss.", least=0)


@dataclass(frozen=True)
class BiasRouter:
    """Options of the training with router bias."""

    router_bias_rate: float = option(1e-3, "experts, router bias: how far a step moves the bias of an expert.", least=0)


ROUTERS: dict[str, type] = {"softmax": SoftmaxRouter, "bias": BiasRouter}  # what each reads of the training


MEASURED: Measured = {
    "gpu": Activations(1, 0, 0, 0.12),
    "cpu": Activations(0.92, 0, 0, 0.073),
    "cpu-0.10": Activations(1.7, 1.7, 1.7, 0.11),
    "mlx": Activations(0.98, 0.054, 0.55, 0.85),
}


def _activations(config: Options, course: Course) -> Activations:
    """Copies of a token go to its experts and come back, in blocks that are an eighth too large on average; shared ones take none."""
    routed = 1.125 * config.experts_per_token * 3 * (config.dim + width(config)) + 1.5 * config.dim
    shared = 3 * config.shared_experts * width(config) + config.dim * (config.shared_experts > 0)
    return MEASURED[course.platform].times(routed + shared)


ROW = FfnSpec(
    "experts",
    Options,
    "SwiGLU experts, k of them for each token, none dropped (softmax router or loss-free bias router)",
    "experts",
    "Experts",
    _parameters,
    _active,
    _activations,
    _validate,
)
