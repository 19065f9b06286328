"""The row of `attention`: softmax(q k^T / sqrt(K)) v with RoPE; multi-head or grouped-query."""

from dataclasses import dataclass

from smedjan_common.errors import ConfigError
from smedjan_common.model.activations import Activations, Course, Measured, scores
from smedjan_common.model.mixers.shared import HeadNorm, Softmax, check_kv_heads
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec, bias, head_norm, residual_std, weight
from smedjan_common.model.shape import SWITCH
from smedjan_common.model.spec import MixerSpec, StateSpec


@dataclass(frozen=True)
class Options(HeadNorm):
    """Options of `attention`."""

    window: int = option(0, "see only this many newest positions. 0: all.", least=0, shape_free=True)
    window_layers: tuple[str, ...] = option(
        ("on",), "whether a layer has the window, a pattern over the depth; the others see all.", choices=SWITCH, shape_free=True
    )


def parameters(config: HeadNorm, layer: int) -> list[ParamSpec]:
    kv = config.kv_heads * config.head_dim
    spans = (config.inner_dim, kv) if config.qk_norm_over == "all" else (config.head_dim,) * 2
    norms = [head_norm(f"{name}_norm", span) for name, span in zip("qk", spans, strict=True)] if config.qk_norm else []
    qkv = [bias(f"{n}_proj", *of) for n, of in (("q", (config.inner_dim, "heads")), ("k", (kv, "kv_heads")), ("v", (kv, "kv_heads")))]
    gate = [weight("gate_proj", config.inner_dim, config.dim, ("heads", "embed"), config.init_std)] if config.attention_gate else []
    if gate and config.qkv_bias:
        gate.append(bias("gate_proj", config.inner_dim, "heads"))
    return [
        weight("q_proj", config.inner_dim, config.dim, ("heads", "embed"), config.init_std),
        weight("k_proj", kv, config.dim, ("kv_heads", "embed"), config.init_std),
        weight("v_proj", kv, config.dim, ("kv_heads", "embed"), config.init_std),
        weight("o_proj", config.dim, config.inner_dim, ("embed", "heads"), residual_std(config)),
        *(qkv if config.qkv_bias else []),
        *([bias("o_proj", config.dim, "embed")] if config.o_bias else []),
        *gate,
        *norms,
    ]


def _flops(config: Options, seq_len: int) -> int:
    window = min(config.window or seq_len, seq_len)
    return round(
        4 * config.inner_dim * window * (1 - window / (2 * seq_len))
    )  # q k^T and p v, 2 H K each a pair; without a window T / 2 pairs


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    shape = (batch, config.kv_heads, max_len, config.head_dim)
    return [StateSpec("key", shape, axis=2), StateSpec("value", shape, axis=2)]


def validate(config: HeadNorm) -> None:
    """Raises ConfigError for heads that cannot turn, or share keys and values, evenly."""
    check_kv_heads(config, "Every key/value head serves the same number of query heads.")
    if config.qk_norm_over != "head" and not config.qk_norm:
        raise ConfigError("--qk-norm-over all would do nothing.", "There is no --qk-norm.", "Add --qk-norm, or leave it out.")
    if config.rope_dim % 2 or config.rope_dim > config.head_dim:
        raise ConfigError(
            f"--rope-dim is {config.rope_dim}, of heads of {config.head_dim}.",
            "RoPE turns pairs of features of a head.",
            f"Take --rope-dim {min(config.rope_dim, config.head_dim) // 2 * 2 or 2}, or leave it out: whole heads turn.",
        )
    if config.head_dim % 2 and not config.rope_dim:
        raise ConfigError(
            f"A head has {config.head_dim} features, an odd number.",
            "RoPE turns pairs of features.",
            "Choose --head-size even." if config.head_size else "Choose --dim / --heads even.",
        )


def _validate(config: Options) -> None:
    validate(config)
    if "off" in config.window_layers and not (config.window and "on" in config.window_layers):
        raise ConfigError(
            f"--window-layers {','.join(config.window_layers)} would do nothing.",
            "--window is 0." if "on" in config.window_layers else "No layer would have the window.",
            "Add --window 1024, say, or leave --window-layers out." if not config.window else "Leave --window out.",
        )


def rope_dims(config: HeadNorm) -> tuple[int, ...]:
    """Whole heads turn, or their first features, of the layers that do."""
    return (config.rope_dim or config.head_dim,) if "on" in config.rope_layers else ()


MEASURED: Measured = {
    "gpu": Activations(1.3, 1, 0, 1.8),
    "cpu": Activations(3.1, 0.94, 0.062, 0.29),
    "cpu-0.10": Activations(2.8, 2.8, 2.8, 0.5),
    "mlx": Activations(1.8, 1.4, 0.8, 10),
}


def projected(config: HeadNorm) -> int:
    """Values of a token that its projections give: queries, keys, values, the output, and the gate where there is one."""
    gate = config.inner_dim if config.attention_gate else 0
    return config.inner_dim + config.dim + 2 * config.kv_heads * config.head_dim + gate


def activations(config: HeadNorm, course: Course) -> Activations:
    """Its projections, and the scores where they are held."""
    norms = round(1.5 * (config.inner_dim + config.kv_heads * config.head_dim)) if config.qk_norm else 0
    return MEASURED[course.platform].times(projected(config) + norms).with_(scores(course, config.heads, config.head_dim))


ROW = MixerSpec(
    "attention",
    Options,
    "softmax attention with RoPE, multi-head or grouped-query",
    "attention",
    "Attention",
    parameters,
    _flops,
    activations,
    _state,
    _validate,
    rope_dims=rope_dims,
    training=Softmax,
    head_size=True,
)
