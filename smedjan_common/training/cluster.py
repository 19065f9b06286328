"""What a run costs on machines that are not here: memory, bytes between devices and time of a step, from figures measured on one GPU.

    time of a step = FLOPs / (peak * share)  +  over the axes of the mesh: bytes / bandwidth + messages * latency

Shares, and what the links inside of a host really carry, are measured (bench/results, compared by tests/unit/test_cluster.py: steps on two
and four GPUs within 15 %). Nothing is hidden behind the computation, as measured: what XLA overlaps is in the bandwidth. Between hosts
nothing was measured: there the network's data sheet counts, with NETWORK_SHARE of it.

A ring of n devices sends (n - 1) / n of the bytes for a gather or a scatter of sums, twice that to sum and share.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from smedjan_common.errors import ConfigError, unknown
from smedjan_common.model.adapters import trained_table
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import peak_flops, train_flops_per_token
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.memory import Place, training_bytes
from smedjan_common.training.mesh import AXES, MeshShape, check_mesh, mesh_axes
from smedjan_common.training.precision import BYTES, compute_dtype


class Hardware(NamedTuple):
    """A GPU. memory: bytes. link: bytes/s to the other GPUs of its host, one way, by the data sheet. share: of its peak that a step with
    attention in bfloat16 reaches, by the width of the model; measured: whether that is its own figure."""

    name: str
    memory: float
    link: float
    share: dict[int, float]
    measured: bool


GIB = 2**30
# widths of medium, large, xxl and max; the last is what four H200 leave when the bytes are taken off
_H100 = {512: 0.350, 1024: 0.441, 2048: 0.559, 4096: 0.60}
_H200 = {512: 0.377, 1024: 0.468, 2048: 0.565, 4096: 0.60}
HARDWARE = {
    row.name: row
    for row in (
        Hardware("h100", 79.6 * GIB, 450e9, _H100, True),
        Hardware("h200", 139.8 * GIB, 450e9, _H200, True),
        Hardware("a100", 79.2 * GIB, 300e9, _H100, False),
        Hardware("b200", 178.4 * GIB, 900e9, _H100, False),
    )
}

USABLE = 0.92  # of the memory: the rest is the driver's and NCCL's
LINK_SHARE = 0.45  # of a link's data sheet that the sums of a training step get, measured on two and four H200
NETWORK_SHARE = 0.8  # the same between hosts: assumed
LATENCY = 20e-6  # seconds of a message
# tokens/s at medium, 1024 tokens, over those of attention on an H200 with its kernels. Beside attention and mla none grows with the length
SPEED = {
    "attention": 1.0,
    "mla": 0.83,
    "linear": 1.04,
    "ssm": 0.79,
    "rwkv": 0.69,
    "gated-deltanet": 0.90,
    "block-sparse": 0.86,
}
MEASURED_LENGTH = 1024
KERNEL_SIZES = {
    "linear": ("head_dim",),
    "ssm": ("ssm_state", "ssm_head_dim"),
    "rwkv": ("rwkv_head_dim",),
    "gated-deltanet": ("delta_key_dim", "delta_value_dim"),
}
KERNEL_FEATURES = {32, 64, 128}  # of those sizes
EXPERTS_SPEED = 0.65  # of a dense model with as many active parameters: 8 experts at medium on an H100
FLOAT8 = {512: 1.0, 1024: 1.04, 2048: 1.30, 4096: 1.50}  # tokens/s over those of bfloat16, by width, rounded by XLA as on meshes
FORWARD_SHARE = {"data": 0.0, "fsdp": 0.25, "tensor": 0.5}  # of what a step sends: its forward pass, in bfloat16
RECOMPUTING = {"none": 1.0, "dots": 1.05, "full": 4 / 3}


@dataclass(frozen=True)
class Cluster:
    """Hosts with `per_host` GPUs each. network: bytes/s of each GPU to other hosts."""

    hardware: Hardware
    devices: int
    per_host: int = 8
    network: float = 50e9

    def bandwidth(self, mesh: MeshShape, axis: str) -> float:
        """Bytes/s that each device of a ring along the axis sends; data is the outermost axis, tensor the innermost."""
        inside = self.hardware.link * LINK_SHARE
        inner = math.prod(getattr(mesh, name) for name in AXES[AXES.index(axis) + 1 :])
        here = max(1, min(getattr(mesh, axis), self.per_host // inner))
        if getattr(mesh, axis) * inner <= self.per_host or here == getattr(mesh, axis):
            return inside
        return min(inside, here * self.network * NETWORK_SHARE)  # so many rings cross between hosts at a time


class Traffic(NamedTuple):
    """What each device sends along an axis in a step: bytes, and messages."""

    bytes: float
    messages: int

    def plus(self, other: "Traffic", share: float) -> "Traffic":
        """This and a share of another."""
        return Traffic(self.bytes + share * other.bytes, self.messages + round(share * other.messages))


class Cost(NamedTuple):
    """Of one mesh. needed: bytes of memory on each device. compute: seconds of a step without traffic."""

    mesh: MeshShape
    needed: int
    compute: float
    traffic: dict[str, Traffic]
    sending: dict[str, float]  # seconds, by axis
    tokens: int

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + sum(self.sending.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds


def hardware(name: str) -> Hardware:
    """The row of `name`. Raises ConfigError."""
    if name.lower() not in HARDWARE:
        raise unknown("--device", name, HARDWARE)
    return HARDWARE[name.lower()]


def cost(model: ModelConfig, train: TrainConfig, mesh: MeshShape, cluster: Cluster, teacher: ModelConfig | None = None) -> Cost:
    """What a step costs on this mesh, with the forward pass of a teacher where there is one. Raises ConfigError where the mesh cannot share
    out the models or the batch."""
    for each in (model, teacher) if teacher else (model,):
        check_mesh(mesh, each, train.batch_size, train.grad_accum)
    found = traffic(model, train, mesh)
    if teacher:
        found = {axis: sent.plus(traffic(teacher, train, mesh)[axis], FORWARD_SHARE[axis]) for axis, sent in found.items()}
    sending = {axis: sent.bytes / cluster.bandwidth(mesh, axis) + sent.messages * LATENCY for axis, sent in found.items() if sent.bytes}
    tokens = train.batch_size * train.seq_len
    flops = _flops(model, train) + (_flops(teacher, train) / RECOMPUTING[train.gradient_checkpointing] / 3 if teacher else 0)
    compute = flops * tokens / (_peak(model, train, cluster.hardware) * mesh.size)
    place = Place(kind="gpu", kernels=_by_kernels(model, train, cluster.hardware))
    return Cost(mesh, training_bytes(model, train, mesh, place, teacher), compute, found, sending, tokens)


def _by_kernels(model: ModelConfig, train: TrainConfig, hardware: Hardware) -> frozenset[str]:
    """The mixers whose kernels a run takes there by itself, as smedjan_jax.kernels chooses."""
    if not hardware.measured or train.dtype != "bfloat16":
        return frozenset()
    fits = {name for name, sizes in KERNEL_SIZES.items() if {getattr(model, size) for size in sizes} <= KERNEL_FEATURES}
    fits -= set() if train.kernels != "plain" else set(KERNEL_SIZES)
    blocks = {model.block_size, model.head_dim} <= {16, 32, 64, 128} and train.attention != "plain"
    return frozenset(fits | ({"block-sparse"} if blocks else set()))


def costs(model: ModelConfig, train: TrainConfig, cluster: Cluster, teacher: ModelConfig | None = None) -> list[Cost]:
    """Of every mesh of all devices that can share the run out: those that fit first, the fastest first."""
    found = []
    for mesh in _meshes(cluster):
        try:
            found.append(cost(model, train, mesh, cluster, teacher))
        except ConfigError:
            continue
    return sorted(found, key=lambda one: (not fits(one, cluster), one.seconds))


def fits(found: Cost, cluster: Cluster) -> bool:
    """Whether the memory of each device is enough."""
    return found.needed <= USABLE * cluster.hardware.memory


def traffic(model: ModelConfig, train: TrainConfig, mesh: MeshShape) -> dict[str, Traffic]:
    """What each device sends along each axis in a step."""
    width, parts = BYTES[compute_dtype(train.dtype)], train.grad_accum
    gathered = summed = shared = 0.0
    for spec in trained_table(model, train.adapters).values():
        whole = 4 * spec.size / mesh.parts(spec, but="fsdp")  # of this device's part of the tensor axis
        if "fsdp" in mesh_axes(spec):
            gathered += width / 4 * whole * 2  # for the forward pass and again for the backward pass
            summed += whole * (spec.lr_scale > 0)
        elif spec.lr_scale:
            summed += 2 * whole * (mesh.fsdp > 1)
        shared += (spec.lr_scale > 0) * 2 * whole / (mesh.fsdp if "fsdp" in mesh_axes(spec) else 1)
    tokens = train.batch_size * train.seq_len / mesh.batch
    crossing = tokens * model.dim * width * (4 * model.layers + 2) * 2  # two sums a layer forward, two backward; embedding and head
    return {
        "data": Traffic(_ring(mesh.data) * shared * parts, (mesh.data > 1) * 7 * model.layers * parts),
        "fsdp": Traffic(_ring(mesh.fsdp) * (gathered + summed) * parts, (mesh.fsdp > 1) * 11 * model.layers * parts),
        "tensor": Traffic(_ring(mesh.tensor) * crossing, (mesh.tensor > 1) * (4 * model.layers + 2) * parts),
    }


def _ring(devices: int) -> float:
    return (devices - 1) / devices


def _meshes(cluster: Cluster) -> Iterator[MeshShape]:
    for tensor in (size for size in range(1, cluster.per_host + 1) if cluster.devices % size == 0):
        rest = cluster.devices // tensor
        for fsdp in (size for size in range(1, rest + 1) if rest % size == 0):
            yield MeshShape(rest // fsdp, fsdp, tensor)


def _flops(model: ModelConfig, train: TrainConfig) -> float:
    """FLOPs per token that attention would need in the same time."""
    found = 0.0
    for layer in range(model.layers):
        mixer, ffn = model.mixer_of(layer), model.ffn_of(layer)
        length = train.seq_len if mixer in {"attention", "mla"} else min(train.seq_len, MEASURED_LENGTH)
        speed = SPEED.get(mixer, min(SPEED.values())) * (1.0 if ffn == "swiglu" else EXPERTS_SPEED)
        found += train_flops_per_token(replace(model, mixer=("attention",)), length, adapters=train.adapters) / speed
    return found / model.layers * RECOMPUTING[train.gradient_checkpointing]


def _peak(model: ModelConfig, train: TrainConfig, row: Hardware) -> float:
    """FLOP/s of one device at this width and dtype."""
    peak = peak_flops(row.name)
    assert peak
    faster = _between(FLOAT8, model.dim) if train.dtype == "float8" else 1.0
    return peak * _between(row.share, model.dim) * faster


def _between(known: dict[int, float], width: int) -> float:
    """By the logarithm of the width between two that are known; narrower ones in proportion, wider ones like the widest."""
    widths = sorted(known)
    if width <= widths[0]:
        return known[widths[0]] * width / widths[0]
    for low, high in itertools.pairwise(widths):
        if width <= high:
            part = math.log(width / low) / math.log(high / low)
            return known[low] + part * (known[high] - known[low])
    return known[widths[-1]]
