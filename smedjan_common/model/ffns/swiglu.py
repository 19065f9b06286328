"""The row of `swiglu`: down(silu(gate(x)) * up(x))."""

from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.shape import Shape
from smedjan_common.model.spec import FfnSpec


def _parameters(config: Shape, layer: int) -> list[ParamSpec]:
    return [
        weight("gate_proj", config.ffn_dim, config.dim, ("ffn", "embed"), config.init_std),
        weight("up_proj", config.ffn_dim, config.dim, ("ffn", "embed"), config.init_std),
        weight("down_proj", config.dim, config.ffn_dim, ("embed", "ffn"), residual_std(config)),
    ]


ROW = FfnSpec(
    "swiglu",
    Shape,
    "gated linear unit with SiLU (Shazeer, 2020)",
    "ffn",
    "SwiGLU",
    _parameters,
    lambda config: 3 * config.dim * config.ffn_dim,
    lambda config: None,
)
