"""Estimated device memory to train and to infer, in bytes: for choosing a size, and for refusing what cannot fit (run/room.py).

Training holds float32 parameters, and of those that are trained what the optimizer keeps. A step adds the larger of two moments:

    after the forward pass   what the layers keep for the backward pass, and the logits or what one layer's backward pass works with
    after the backward pass  the gradients of all that is trained, or what the update of the optimizer works with

and, of another dtype, a copy of the weights. What a layer keeps is said by the rows of its mixer and its feed-forward, per token.
"""

from typing import NamedTuple

from smedjan_common.model.activations import BLOCK, RECOMPUTES_NOTHING, Course
from smedjan_common.model.adapters import adapter_table, is_frozen, trained_table
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.params import head_name, parameter_table
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.mesh import ONE_DEVICE, MeshShape
from smedjan_common.training.optimizers import slots_of
from smedjan_common.training.precision import BYTES, compute_dtype

LOGITS_BYTES = 5 << 29  # float32 logits held at once; medium at 64 x 1024 x 8192 stays whole, larger losses go in chunks

# bytes per parameter beside the state while the optimizer moves them, gradients included (measured where nothing else counts)
UPDATE = {
    "jax": {"adamw": 4, "muon": 10, "lion": 8},
    "mlx": {"adamw": 6.6, "muon": 46.4, "lion": 10.1},  # on a CPU, where nothing is compiled; Newton-Schulz takes all matrices at once
}

# what a process on a CPU takes besides: XLA compiles with some 200 MiB and computes with as much again, MLX keeps buffers for later
PROCESS_BYTES = {"jax": 400 << 20, "mlx": 100 << 20}


class Place(NamedTuple):
    """Where a run happens, as far as memory depends on it. version: the framework's; kernels: as `by_kernels` gives them."""

    backend: str = "jax"
    kind: str = "gpu"
    version: str = ""
    kernels: frozenset[str] = frozenset()  # mixers that are computed by this project's kernels

    @property
    def platform(self) -> str:
        """One of smedjan_common.model.activations; a backend that is none of the two is taken for JAX."""
        if self.backend == "mlx":
            return "mlx"
        return "gpu" if self.kind == "gpu" else "cpu-0.10" if self.version.startswith("0.10.") else "cpu"


def by_kernels(said: str) -> frozenset[str]:
    """The mixers that take kernels, of what a device says (backend.Device.kernels): "pallas", "plain for ssm, pallas for linear"."""
    parts = [part.partition(" for ") for part in said.split(", ")]
    chunked = [name for name, row in MIXERS.items() if row.training is Chunked]
    return frozenset(name for form, _, of in parts if form == "pallas" for name in ([of] if of else chunked))


def training_bytes(
    config: ModelConfig, train: TrainConfig, mesh: MeshShape = ONE_DEVICE, place: Place | None = None, teacher: ModelConfig | None = None
) -> int:
    """Peak memory of a training step on each device.

    place: None is a GPU with JAX, or a CPU where the run computes in float32. teacher: a model that the run learns from besides.
    """
    place = place or Place(kind="cpu" if train.dtype == "float32" else "gpu")
    width, framework = BYTES[compute_dtype(train.dtype)], "mlx" if place.backend == "mlx" else "jax"
    specs = parameter_table(config) if train.adapters is None else adapter_table(config, train.adapters)
    own = sum(spec.size // mesh.parts(spec) for spec in specs.values())  # what has gradients
    fixed = 4 * own * (train.grad_accum > 1) + state_bytes(config, train, mesh)  # with several parts their gradients add up
    fixed += _copies(config, train, mesh, place)
    tokens = train.batch_size // train.grad_accum // mesh.batch * train.seq_len
    kept, working, layer = _activations(config, train, mesh, place)
    models = 2 if teacher else 1  # whose logits there are
    logits = tokens // loss_chunks(tokens, models * config.padded_vocab_size) * config.padded_vocab_size // mesh.tensor
    each = 16 if place.backend == "mlx" else 4 + width  # and their gradient; MLX on a CPU, which fuses nothing, has four float32 arrays
    logits *= each if teacher is None else 2 * each
    moves = not is_frozen(config, train.adapters, head_name(config))
    embed = moves * 4 * config.padded_vocab_size * config.dim // mesh.tensor  # its gradient is the first that there is
    if teacher:
        taught = _activations(teacher, train, mesh, place)[2]  # of one layer after the other: there is no backward pass
        fixed += teacher_bytes(teacher, train, mesh, place) + round(tokens * teacher.dim * width)
        working = max(working, taught)
    after_forward = round(tokens * kept * width) + max(logits, round(tokens * working * width)) + embed
    gradients = 4 * own + round(tokens * layer * width)
    merged = 4 * sum(spec.size // mesh.parts(spec) for spec in parameter_table(config).values()) * bool(train.adapters)  # for samples
    return fixed + max(after_forward, gradients, round(UPDATE[framework][train.optimizer] * own), merged)


def teacher_bytes(teacher: ModelConfig, train: TrainConfig, mesh: MeshShape = ONE_DEVICE, place: Place | None = None) -> int:
    """The weights of a teacher on each device: matrices in the dtype that they are used in, and with fsdp what is gathered of them."""
    width = BYTES[compute_dtype(train.dtype)]
    held = ((width if len(spec.shape) > 1 else 4, spec.size // mesh.parts(spec)) for spec in parameter_table(teacher).values())
    gathered = _copies(teacher, train, mesh, place or Place()) if mesh.fsdp > 1 else 0
    return sum(each * size for each, size in held) + gathered


def _copies(config: ModelConfig, train: TrainConfig, mesh: MeshShape, place: Place) -> int:
    """The weights that a step uses, where they are a copy: whole, in the compute dtype. With fsdp linear maps are gathered block by block,
    but for XLA on a CPU, which gathers once."""
    if mesh.fsdp == 1 and (train.dtype == "float32" or train.gradient_checkpointing == "full"):
        return 0
    specs, width = parameter_table(config), BYTES[compute_dtype(train.dtype)]
    whole = {name: spec.size // mesh.parts(spec, but="fsdp") for name, spec in specs.items()}
    if mesh.fsdp == 1 or place.kind != "gpu":
        return width * sum(whole.values())
    passing = {name for name, spec in specs.items() if name.startswith("layers.") and len(spec.shape) == 2}
    block = max(sum(whole[name] for name in passing if name.startswith(f"layers.{layer}.")) for layer in range(config.layers))
    return width * (2 * block + sum(size for name, size in whole.items() if name not in passing))


def _activations(config: ModelConfig, train: TrainConfig, mesh: MeshShape, place: Place) -> tuple[float, float, float]:
    """Values per token: kept by all layers, held beside them while the last one is differentiated, and in all while the first one is."""
    course = Course(place.platform, train.seq_len, train.chunk_size, BYTES[compute_dtype(train.dtype)], train.attention == "plain")
    measured = train.gradient_checkpointing == "none" and mesh.tensor == 1  # else what kernels keep is taken for what plain forms do
    courses = [course._replace(kernels=measured and config.mixer_of(layer) in place.kernels) for layer in range(config.layers)]
    layers = [
        BLOCK._replace(kept=BLOCK.kept + len(config.block_norms) - 2)
        .times(config.dim)
        .with_(MIXERS[config.mixer_of(layer)].activations(config, courses[layer]).times(1 / mesh.tensor))
        .with_(FFNS[config.ffn_of(layer)].activations(config, course).times(1 / mesh.tensor))
        for layer in range(config.layers)
    ]
    undone = train.gradient_checkpointing == "none" or course.platform == RECOMPUTES_NOTHING
    held = [layer.kept if undone else getattr(layer, train.gradient_checkpointing) for layer in layers]
    recomputed = [layer.working + layer.kept - kept for layer, kept in zip(layers, held, strict=True)]
    return sum(held), max(recomputed), layers[0].kept + layers[0].working


def state_bytes(config: ModelConfig, train: TrainConfig, mesh: MeshShape = ONE_DEVICE) -> int:
    """Float32 parameters and what the optimizer keeps of them, on each device."""
    table = trained_table(config, train.adapters).values()
    return 4 * sum((1 + len(slots_of(spec, train.optimizer, train.ema))) * (spec.size // mesh.parts(spec)) for spec in table)


def checkpoint_bytes(config: ModelConfig, train: TrainConfig) -> int:
    """A checkpoint's size: the train state, but for frozen weights beside adapters."""
    frozen = parameter_table(config).values() if train.adapters else ()
    return state_bytes(config, train) - 4 * sum(spec.size for spec in frozen)


def final_bytes(config: ModelConfig, train: TrainConfig) -> int:
    """The size of final/: weights, or adapters."""
    table = adapter_table(config, train.adapters) if train.adapters else parameter_table(config)
    return 4 * sum(spec.size for spec in table.values())


def loss_chunks(tokens: int, vocab: int) -> int:
    """The fewest chunks of tokens whose float32 logits stay under LOGITS_BYTES each; the last chunk may be shorter."""
    return min(tokens, max(1, -(-tokens * vocab * 4 // LOGITS_BYTES)))
