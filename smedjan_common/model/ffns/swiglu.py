"""The row of `swiglu`: down(silu(gate(x)) * up(x))."""

from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.shape import Shape
from smedjan_common.model.spec import FfnSpec


def _parameters(config: Shape, layer: int) -> list[ParamSpec]:
    return [
        weight("gate_proj", config.ffn_dim, config.dim, ("ffn", "embed"), config.init_std),
        weight("up_proj", config.ffn_dim, config.dim, ("ffn", "embed"), config.init_std),
        weight("down_proj", config.dim, config.ffn_dim, ("embed", "ffn"), residual_std(config)),
    ]


MEASURED: Measured = {
    "gpu": Activations(1, 0.67, 0, 0.49),
    "cpu": Activations(1.3, 0.46, 0, 0.081),
    "cpu-0.10": Activations(1.3, 1.3, 1.3, 0.26),
    "mlx": Activations(1.4, 0.63, 0.34, 1.7),
}


def _activations(config: Shape, course: Course) -> Activations:
    return MEASURED[course.platform].times(3 * config.ffn_dim)  # gate, up and their product


ROW = FfnSpec(
    "swiglu",
    Shape,
    "gated linear unit with SiLU (Shazeer, 2020)",
    "ffn",
    "SwiGLU",
    _parameters,
    lambda config: 3 * config.dim * config.ffn_dim,
    _activations,
    lambda config: None,
)
