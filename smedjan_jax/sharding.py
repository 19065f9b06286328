"""One model on several devices: where its arrays lie, and a step that runs on every device's part of the batch.

Along data and fsdp the program is written per device (shard_map): each computes its own rows exactly as a single device would, so
whatever a mixer does (sorts, scans, kernels) never crosses devices. Matrices are gathered over fsdp in the dtype that they are used
in, their gradients reduced and split in float32; what is left is summed over data. Along tensor XLA splits the matmuls by itself.

What splits what: smedjan_common.training.mesh.
"""

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from smedjan_common.config import TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.training.mesh import AXES, MeshShape, mesh_axes
from smedjan_jax import products

Params = dict[str, jax.Array]
Table = dict[str, ParamSpec]

BATCH = ("data", "fsdp")  # the axes that the rows of a batch are dealt over


def default_shape(train: TrainConfig) -> MeshShape:
    """Every GPU that the batch can be shared out to, each with the whole model; one device on a CPU. Of several hosts all devices."""
    devices = jax.devices()
    if jax.process_count() > 1:
        return MeshShape(data=len(devices))
    return MeshShape(data=math.gcd(train.batch_size // train.grad_accum, len(devices)) if devices[0].platform != "cpu" else 1)


def make_mesh(shape: MeshShape) -> Mesh:
    """The first `shape.size` devices as a mesh. Raises ConfigError when there are fewer."""
    devices = jax.devices()
    if shape.size > len(devices):
        names = f"{len(devices)} of {devices[0].device_kind}" if len(devices) > 1 else f"one, {devices[0].device_kind}"
        raise ConfigError(f"--mesh {shape} needs {shape.size} devices.", f"JAX sees {names}.", "Take a smaller mesh, or leave --mesh out.")
    if jax.process_count() > 1 and shape.size < len(devices):
        why = f"{jax.process_count()} hosts have {len(devices)} devices, and every host takes part with all of its own."
        raise ConfigError(f"--mesh {shape} has {shape.size} devices.", why, f"Take data={len(devices)}, say, or leave --mesh out.")
    sizes = tuple(getattr(shape, axis) for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: shape.size])


def param_shardings(table: Table, mesh: Mesh) -> dict[str, Sharding]:
    """Where each parameter lies; on a mesh of one device simply there."""
    if mesh.size == 1:
        return dict.fromkeys(table, SingleDeviceSharding(mesh.devices.item()))
    return {name: NamedSharding(mesh, PartitionSpec(*mesh_axes(spec))) for name, spec in table.items()}


def everywhere(mesh: Mesh) -> Sharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec()) if mesh.size > 1 else SingleDeviceSharding(mesh.devices.item())


def everywhere_with(arrays: dict[str, jax.Array]) -> Sharding:
    """A whole copy on each device that has a part of these arrays."""
    sharding = next(iter(arrays.values())).sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def rows(mesh: Mesh) -> Sharding:
    """The rows of a batch dealt out."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def place(host: Any, places: Any) -> Any:
    """Host arrays on their devices; each device is sent its part. None shares the host's memory, which a donated step would overwrite."""

    def one(value: np.ndarray, place: Sharding) -> jax.Array:
        return jax.make_array_from_callback(value.shape, place, lambda part: np.array(value[part]))

    return jax.tree.map(one, host, places)


class OwnRows:
    """The rows of a batch of `size` that the devices of this host take, of several hosts. `starts`: where they begin, of `each` rows."""

    def __init__(self, mesh: Mesh, size: int):
        self._place, self.size = rows(mesh), size
        parts = [part[0].indices(size) for part in self._place.addressable_devices_indices_map((size,)).values() if part]
        self.each = parts[0][1] - parts[0][0]
        self.starts = sorted({start for start, _, _ in parts})

    def of(self, batch: np.ndarray) -> np.ndarray:
        """Those of a whole batch."""
        return np.concatenate([batch[start : start + self.each] for start in self.starts])

    def spread(self, batch: Any) -> Any:
        """Arrays of all hosts, of which this one knows these rows."""

        def one(own: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                first = self.starts.index(index[0].indices(self.size)[0]) * self.each
                return own[first : first + self.each]

            return jax.make_array_from_callback((self.size, *own.shape[1:]), self._place, part)

        return jax.tree.map(one, batch)


class Gathered:
    """An array in parts on several hosts. `np.asarray` brings it together, on all at once: each device has a whole copy meanwhile."""

    def __init__(self, array: jax.Array, place: Sharding):
        self._array, self._place = array, place
        self.dtype, self.shape = array.dtype, array.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.gather(), dtype)

    def gather(self) -> jax.Array:
        """The whole array, on the devices."""
        return jax.block_until_ready(jax.jit(_same, out_shardings=self._place)(self._array))


def _same(x: jax.Array) -> jax.Array:
    return x


def each_device(mesh: Mesh, value: int) -> jax.Array:
    """One int32 for each device, `value` on those of this host."""
    place = NamedSharding(mesh, PartitionSpec(tuple(AXES)))
    return jax.make_array_from_callback((mesh.size,), place, lambda part: np.full(1, value, np.int32))


def sums_over_hosts(mesh: Mesh) -> Callable[[], object]:
    """A compiled function that adds something up over each group of devices that the axes of the mesh make, for the sake of the channels
    between hosts that it opens: gloo gives up after 30 seconds where a host comes later, and one may compile for longer than another."""
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    groups = [group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)]
    place = PartitionSpec(tuple(AXES))

    def local(ones: jax.Array) -> jax.Array:
        return sum((jax.lax.psum(ones, group) for group in groups), ones)

    sums = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=place, out_specs=place, check_vma=False))
    ones = each_device(mesh, 1)
    compiled = sums.lower(ones).compile()
    return lambda: jax.block_until_ready(compiled(ones))


def deal(batch: Any, mesh: MeshShape, parts: int) -> Any:
    """The rows of a batch so ordered that the rows which all devices take for one of `parts` are those that one device would take."""
    return jax.tree.map(lambda x: x.reshape(parts, mesh.batch, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), batch)


class Spread:
    """Turns functions of (params, batch, …) for one device into functions that every device of a mesh runs on its own rows.

    params: how each parameter lies. linear: names of weights that are used in the dtype of the activations only, so that they may be cast
    before they travel, and by `products` only, which gathers them when it comes to them. again: for the backward pass once more.
    trained: names of the parameters that have gradients; None: all.
    """

    def __init__(self, table: Table, mesh: Mesh, linear: set[str], dtype: str, again: bool = True, trained: Collection[str] | None = None):
        self.mesh, self._linear, self._again = mesh, linear, again
        self._trained = table if trained is None else trained
        self._batch = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
        splits = {name: mesh_axes(spec) for name, spec in table.items()}
        self.params = {name: PartitionSpec(*(axis if axis in self._batch else None for axis in split)) for name, split in splits.items()}
        self._split = {name: split.index("fsdp") for name, split in splits.items() if "fsdp" in split and "fsdp" in self._batch}
        self._dtypes = {name: jnp.dtype(dtype if name in linear else "float32") for name in self._split}

    def gather(self, params: Params) -> dict[str, Any]:
        """The parameters as the model takes them: this device's parts of linear maps as such, other matrices whole; for the functions
        that are run."""

        def one(name: str, value: jax.Array) -> Any:
            if name not in self._split:
                return value
            part = products.Shard(value, self._split[name], self._dtypes[name], self._again)
            return part if name in self._linear else products.whole(part)

        return {name: one(name, value) for name, value in params.items()}

    def gradients(self, function: Callable, *beside: Any) -> Callable:
        """`function(params, batch, tokens, …)` gives gradients and a tree of sums; now over the whole batch, on every device's rows.

        beside: how what it takes besides lies (`params` of another Spread).
        """

        def local(params: Params, batch: Any, tokens: Any, *more: Any) -> tuple[Params, Any]:
            grads, sums = function(params, batch, tokens, *more)
            return {name: self._sum(grad, gathered=name in self._split) for name, grad in grads.items()}, self._sum(sums)

        returns = {name: self.params[name] for name in self._trained}, PartitionSpec()
        return self._over_rows(local, PartitionSpec(), *beside, returns=returns)

    def sums(self, function: Callable) -> Callable:
        """`function(params, batch)` gives a tree of sums; now over the whole batch."""
        return self._over_rows(lambda params, batch: self._sum(function(params, batch)), returns=PartitionSpec())

    def rows(self, function: Callable) -> Callable:
        """`function(params, batch)` gives an array with the rows of the batch; now of the whole batch."""
        return self._over_rows(function, returns=PartitionSpec(self._batch or None))

    def _sum(self, tree: Any, gathered: bool = False) -> Any:
        """Over the devices' rows; the gradient of what was gathered is a sum over fsdp already."""
        return jax.lax.psum(tree, tuple(axis for axis in self._batch if not (gathered and axis == "fsdp")))

    def _over_rows(self, function: Callable, *more: Any, returns: Any) -> Callable:
        if not self._batch:

            def whole(*args: Any) -> Any:
                with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                    return function(*args)

            return whole
        # without a tensor axis nothing is left to XLA; XLA takes no manual axes of one device beside others
        axes = set(self._batch) if self.mesh.shape["tensor"] > 1 else set(AXES)
        specs = (self.params, PartitionSpec(self._batch), *more)
        # unchecked: loops inside the mixers start from plain zeros. So a device's gradient is that of the sum of all devices' results
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=returns, axis_names=axes, check_vma=False)


def batch_mean(x: jax.Array) -> jax.Array:
    """The mean over the devices that hold other rows of the batch, where this is traced; x itself on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH if axis in mesh.manual_axes and mesh.shape[axis] > 1)
    return jax.lax.pmean(x, axes) if axes else x


def tensor_parts() -> int:
    """Devices along the tensor axis where this is traced; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def over_heads(function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], *whole: Any) -> jax.Array:
    """`function(*arrays, *whole)` [B, T, heads, K] of arrays of that form, which looks at each head alone, on every device's own heads."""
    return over_tensor(function, (*arrays, *whole), (*(2 for _ in arrays), *(None for _ in whole)), 2)


def over_tensor(function: Callable[..., Any], arrays: tuple[Any, ...], heads: tuple[int | None, ...], results: Any) -> Any:
    """`function(*arrays)`, which looks at each head alone, on every device's own heads; where they cannot be dealt out, on all of them.

    heads: the dimension of each array, or of each of a tuple, that they are along; None: every device takes the whole. results: of what
    comes out.
    XLA could not split a kernel that it knows nothing of.
    """
    if (parts := tensor_parts()) == 1:
        return function(*arrays)
    split = [leaf.shape[at] for array, at in zip(arrays, heads, strict=True) if at is not None for leaf in jax.tree.leaves(array)]
    even = all(extent % parts == 0 for extent in split)

    def spec(at: int | None) -> PartitionSpec:
        return PartitionSpec() if at is None or not even else PartitionSpec(*(None,) * at, "tensor")

    # every axis, those of one device too: JAX lowers cuDNN attention on several devices only where nothing is left to XLA
    axes = set(AXES) - set(jax.sharding.get_abstract_mesh().manual_axes)
    specs = tuple(map(spec, heads)), jax.tree.map(spec, results)
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], axis_names=axes, check_vma=False)(*arrays)
