"""The mesh of devices that a run is spread over, `data=2,fsdp=4,tensor=1`, and what it splits.

    data     parts of the batch
    fsdp     parts of the batch, and of the width of every matrix, gathered for use   (ZeRO-3, Rajbhandari et al., 2020)
    tensor   parts of the heads, of the feed-forward and of the vocabulary            (Megatron-LM, Shoeybi et al., 2019)

A mesh changes where numbers are, not what they are: a checkpoint does not know of it.
"""

import dataclasses
import math
from dataclasses import dataclass

from smedjan_common.errors import ConfigError, near
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.params import parameter_table
from smedjan_common.model.shape import Shape

# logical axis of the parameter table -> axis of the mesh. No device is the only one that has an expert
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "embed": "fsdp",
    "experts": None,
}


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch(self) -> int:
        """Number of parts of the batch."""
        return self.data * self.fsdp

    def parts(self, spec: ParamSpec, but: str | None = None) -> int:
        """Number of parts of a parameter; `but`: an axis that is not counted."""
        return math.prod(getattr(self, axis) for axis in mesh_axes(spec) if axis and axis != but)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size > 1) or "data=1"


ONE_DEVICE = MeshShape()
WITHOUT_MESH = ("mlx",)
AXES = tuple(field.name for field in dataclasses.fields(MeshShape))


def parse_mesh(text: str) -> MeshShape | None:
    """`data=2,fsdp=4` -> its shape, axes that are not named being 1; None for auto. Raises ConfigError."""
    if text == "auto":
        return None
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ConfigError(f"--mesh has no axis {name!r}.", f"Its axes are {', '.join(AXES)}.", near(name, AXES))
        if name in sizes:
            raise ConfigError(f"--mesh names {name} twice.", "An axis has one size.", f"Leave one out: --mesh {name}={sizes[name]}.")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {part!r} has no number of devices.", "It must be at least 1.", f"Write {name}=2, say.")
        sizes[name] = int(size)
    if not sizes:
        raise ConfigError("--mesh is empty.", "It names axes and devices.", "Write --mesh data=2, say, or leave it out.")
    return MeshShape(**sizes)


def mesh_axes(spec: ParamSpec) -> tuple[str | None, ...]:
    """The axis of the mesh that splits each dimension of a parameter, at most one dimension each.

    Vectors stay whole: they hold next to nothing, and each would cost a message.
    """
    if len(spec.shape) < 2:
        return (None,) * len(spec.shape)
    axes: list[str | None] = []
    for name in spec.axes:
        axis = RULES[name] if name else None
        axes.append(None if axis in axes else axis)
    return tuple(axes)


def check_mesh_of(backend: str, mesh: MeshShape | None) -> None:
    """Raises ConfigError for a mesh of several devices in a backend that takes one."""
    if backend in WITHOUT_MESH and mesh and mesh.size > 1:
        fix = "Leave --mesh out, or train with --backend jax."
        raise ConfigError(f"--mesh {mesh} is not for the backend {backend}.", "There a run takes one device.", fix)


def check_mesh(mesh: MeshShape, model: Shape, batch_size: int, grad_accum: int) -> None:
    """Raises ConfigError when the mesh cannot share out this model or this batch evenly."""
    rows = batch_size // grad_accum
    if rows % mesh.batch:
        parts = f" in {grad_accum} parts (--grad-accum)" if grad_accum > 1 else ""
        raise ConfigError(
            f"--mesh {mesh} cannot share out --batch-size {batch_size}{parts}.",
            f"data and fsdp make {mesh.batch} shares, and every one gets the same number of sequences of the {rows}.",
            f"Take --batch-size {-(-rows // mesh.batch) * mesh.batch * grad_accum}, or data * fsdp = {math.gcd(rows, mesh.batch)}.",
        )
    for axis in ("tensor", "fsdp"):
        extents = _extents(model, axis)
        for what, extent in extents.items():
            if extent % (size := getattr(mesh, axis)):
                fits = [str(n) for n in range(1, size) if math.gcd(*extents.values()) % n == 0]
                raise ConfigError(
                    f"--mesh {axis}={size} does not divide {what}.",
                    "Every device gets a part of the same size.",
                    f"Take {axis}={' or '.join(fits[-2:])}.",
                )


def _extents(model: Shape, axis: str) -> dict[str, int]:
    """What an axis of the mesh has to divide, by what a user calls it: `--heads 4`."""
    table = parameter_table(model)
    named = {name for spec in table.values() if axis in mesh_axes(spec) for name in spec.axes if name}
    flags = {"heads": "--heads", "kv_heads": "--kv-heads", "embed": "--dim"}
    values = {name: getattr(model, "dim" if name == "embed" else name) for name in flags if name in named and RULES[name] == axis}
    counts = {f"{flags[name]} {value}": value for name, value in values.items()}
    sides = ((spec, at) for spec in table.values() for at, split in enumerate(mesh_axes(spec)) if split == axis)
    return counts | {f"dimension {at} of {spec.name}, which is {spec.shape[at]}": spec.shape[at] for spec, at in sides}
