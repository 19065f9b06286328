"""The row of `mla`: DeepSeek's multi-head latent attention; keys and values are expanded from one small latent per token."""

from dataclasses import dataclass

from smedjan_common.errors import ConfigError
from smedjan_common.model.activations import Activations, Course, Measured, scores
from smedjan_common.model.mixers.shared import Softmax, check_no_kv_heads
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec, head_norm, residual_std, weight
from smedjan_common.model.shape import Shape
from smedjan_common.model.spec import MixerSpec, StateSpec


@dataclass(frozen=True)
class Options(Shape):
    """Options of `mla`."""

    mla_kv_rank: int = option(0, "rank of the joint compression of keys and values.", least=0, filled="4 heads' width")
    mla_q_rank: int = option(0, "rank of the compression of queries.", least=0, filled="queries are not compressed")
    mla_rope_dim: int = option(0, "features of a head that are turned by position.", least=0, filled="half a head")
    mla_plain_factor: float = option(
        0.0,
        "the square of it multiplies the scores of features that are not turned (YaRN's mscale_all_dim).",
        least=0,
        most=1e6,
        filled="the factor of turned ones",
        shape_free=True,
    )


def kv_rank(config: Options) -> int:
    """Size of the latent, R."""
    return config.mla_kv_rank or 4 * config.head_dim


def rope_dim(config: Options) -> int:
    """Features that turn by position, P: added to each query head, and one key for all heads."""
    return config.mla_rope_dim or config.head_dim // 2


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    query, std = config.heads * (config.head_dim + rope_dim(config)), config.init_std
    if config.mla_q_rank:
        queries = [
            weight("q_a_proj", config.mla_q_rank, config.dim, (None, "embed"), std),
            head_norm("q_a_norm", config.mla_q_rank),
            weight("q_b_proj", query, config.mla_q_rank, ("heads", None), std),
        ]
    else:
        queries = [weight("q_proj", query, config.dim, ("heads", "embed"), std)]
    return [
        *queries,
        weight("kv_a_proj", kv_rank(config) + rope_dim(config), config.dim, (None, "embed"), std),
        head_norm("kv_a_norm", kv_rank(config)),
        weight("kv_b_proj", 2 * config.inner_dim, kv_rank(config), ("heads", None), std),
        weight("o_proj", config.dim, config.inner_dim, ("embed", "heads"), residual_std(config)),
    ]


def _flops(config: Options, seq_len: int) -> int:
    pair = 2 * (config.head_dim + rope_dim(config)) + 2 * config.head_dim  # q k^T and p v of one head, as they are trained
    return pair * config.heads * seq_len // 2  # the causal half


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    sizes = {"latent": kv_rank(config), "key": rope_dim(config)}
    return [StateSpec(name, (batch, max_len, size), axis=1) for name, size in sizes.items()]


def _validate(config: Options) -> None:
    if rope_dim(config) < 2 or rope_dim(config) % 2:
        raise ConfigError(
            f"mla turns {rope_dim(config)} features of a head by position.",
            "RoPE turns pairs of features.",
            f"Take --mla-rope-dim {max(2, rope_dim(config) // 2 * 2)}.",
        )
    why = "mla makes the keys and values of all heads from one latent."
    check_no_kv_heads(config, "mla", why, "Leave --kv-heads out; --mla-kv-rank sets the size of the cache.")


MEASURED: Measured = {
    "gpu": Activations(0.96, 0.54, 0, 0.37),
    "cpu": Activations(1.6, 0.5, 0, 0.22),
    "cpu-0.10": Activations(1.5, 1.5, 1.5, 0.63),
    "mlx": Activations(1.6, 0.2, 0.3, 3.1),
}


def _activations(config: Options, course: Course) -> Activations:
    query = config.head_dim + rope_dim(config)
    features = 3 * config.heads * query + 3 * config.inner_dim + config.dim + 2 * (kv_rank(config) + rope_dim(config))
    return MEASURED[course.platform].times(features).with_(scores(course, config.heads, query))


ROW = MixerSpec(
    "mla",
    Options,
    "multi-head latent attention with decoupled RoPE (DeepSeek-V3)",
    "mla",
    "LatentAttention",
    _parameters,
    _flops,
    _activations,
    _state,
    _validate,
    rope_dims=lambda config: (rope_dim(config),),
    training=Softmax,
    head_size=True,
)
