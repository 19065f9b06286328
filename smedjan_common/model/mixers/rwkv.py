"""The row of `rwkv`: RWKV-7's time mix. Sizes and initial values are the official training code's (RWKV-LM, RWKV-v7/train_temp):

    low ranks: c sqrt(D) rounded to a multiple of 32, c = 2.5 (w, a), 1.7 (v), 5 (g); first factors 0, second ones orthogonal * 0.1
    mu_c = 1 - (i/D)^(p (1 - l/L)); w0 from -5.5 to 0.5 over the channels, bent more in deeper layers, a wave in every head;
    the output projection starts at 0; the learning rate of w0 is twice the others'; weight decay on the four projections only

i channel, l layer of L. The feed-forward is this project's, as with every mixer, not RWKV's channel mix.
"""

from dataclasses import dataclass

from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.shape import Shape
from smedjan_common.model.spec import MixerSpec, StateSpec

LOW_RANKS = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
PROJECTIONS = {"r": 0.5, "k": 0.05, "v": 0.5}  # bounds of the uniform start, times 1 / sqrt(D)

OFFICIAL_STD = 0.02  # at this init_std, the default, the start is the official one; another one widens or narrows the random matrices


@dataclass(frozen=True)
class Options(Shape):
    """Options of `rwkv`."""

    rwkv_head_dim: int = option(64, "head size.", least=2)


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    D, size, depth = config.dim, config.rwkv_head_dim, layer / max(1, config.layers - 1)
    after_first = layer > config.mixer.index("rwkv")
    specs = [_vector(f"x_{name}", D, "rwkv_shift", power * (1 - layer / config.layers)) for name, power in SHIFTS.items()]
    width = config.init_std / OFFICIAL_STD
    specs += [_matrix(f"{name}_proj", D, D, ("heads", "embed"), "uniform", width * bound * D**-0.5) for name, bound in PROJECTIONS.items()]
    specs.append(_vector("w0", D, "rwkv_channels", (-5.5, 6.0, 1 + depth**0.3, 2.5, size))._replace(lr_scale=2.0))
    specs.append(_vector("a0", D, "rwkv_channels", (-0.39, 0.4, 1.0, 0.3, size)))
    specs += [_vector("v0", D, "rwkv_channels", (0.93, -0.4, 1.0, 0.0, size))] if after_first else []
    for name in LOW_RANKS:
        specs += _low_rank(name, D, width) if after_first or name != "v" else []
    return [
        *specs,
        _vector("k_k", D, "rwkv_channels", (0.76, -0.1, 1.0, 0.0, size)),
        _vector("k_a", D, "constant", 1.02),
        _vector("r_k", D, "constant", -0.04)._replace(shape=(D // size, size), axes=(None, None)),
        _vector("ln_x.weight", D, "constant", ((1 + layer) / config.layers) ** 0.7),
        _vector("ln_x.bias", D, "constant", 0.0),
        _matrix("o_proj", D, D, ("embed", "heads"), "constant", 0.0),
    ]


def _vector(name: str, size: int, init: str, scale: float | tuple[float, ...]) -> ParamSpec:
    axis = "embed" if name.startswith("x_") else "heads"
    return ParamSpec(name, (size,), (axis,), init, scale, decay=False)


def _matrix(name: str, out: int, into: int, axes: tuple[str | None, str | None], init: str, scale: float) -> ParamSpec:
    return ParamSpec(f"{name}.weight", (out, into), axes, init, scale)


def _low_rank(name: str, dim: int, width: float) -> list[ParamSpec]:
    rank = max(32, round(LOW_RANKS[name] * dim**0.5 / 32) * 32)
    pair = (
        _matrix(f"{name}1", rank, dim, (None, "embed"), "constant", 0.0),
        _matrix(f"{name}2", dim, rank, ("heads", None), "orthogonal", width * 0.1),
    )
    return [spec._replace(decay=False) for spec in pair]


def _flops(config: Options, seq_len: int) -> int:
    return 8 * config.dim * config.rwkv_head_dim  # S a, its product with b, v k^T and S r: 2 per entry of S [V, K] each


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    size = config.rwkv_head_dim
    return [StateSpec("shift", (batch, config.dim)), StateSpec("S", (batch, config.dim // size, size, size), "float32")]


def _validate(config: Options) -> None:
    size = config.rwkv_head_dim
    if config.dim % size:
        raise ConfigError(
            f"--rwkv-head-dim {size} does not divide --dim {config.dim}.",
            "rwkv cuts the width into heads of that size, whatever --heads says.",
            f"Take --rwkv-head-dim {nearest_divisor(config.dim, size, least=2)}." if config.dim > 1 else "Take --dim 128 or more.",
        )
    if config.kv_heads != config.heads:
        raise ConfigError(
            f"--kv-heads {config.kv_heads} would do nothing for rwkv.",
            "Its heads share no keys or values.",
            f"Leave it out, or take --kv-heads {config.heads}.",
        )


MEASURED: Measured = {
    "gpu": Activations(0.93, 0.48, 0.27, 0.87),
    "kernels": Activations(0.715, 0.48, 0.27, 0.87),
    "cpu": Activations(1.1, 0.4, 0.16, 0.12),
    "cpu-0.10": Activations(1.5, 1.5, 1.5, 0.1),
    "mlx": Activations(0.77, 0, 0.09, 1.3),
}


def _activations(config: Options, course: Course) -> Activations:
    size, chunk = config.rwkv_head_dim, course.chunk_size
    return MEASURED[course.form].times(config.dim * (23.2 + 9.5 * size / chunk + 3.15 * chunk / size))


ROW = MixerSpec(
    "rwkv",
    Options,
    "RWKV-7 time mix: delta rule with a decay per channel, cost per token and state independent of the length",
    "rwkv",
    "Rwkv",
    _parameters,
    _flops,
    _activations,
    _state,
    _validate,
    training=Chunked,
    linear=True,
)
