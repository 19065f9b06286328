"""Kernels for the mixers of linear cost, each beside its plain twin in smedjan_jax/mixers, and what --kernels comes to.

"pallas" asked for by name never falls back: where it cannot run that is an error. "auto" takes a kernel only on a GPU and in a dtype in
which it was measured faster than the twin (bench/layers.py, bench/kernels.py; figures: bench/results/layers-h100.json), and a run only
after the device itself gave the same with both (smedjan_jax/held.py).

The kernels are written in Pallas for its Triton backend. It needs no package, takes cards from Ampere on, and interprets on a CPU, where
the conformance suite holds every kernel against its twin.
"""

import importlib.util
from typing import Any

import jax

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.training.precision import PRECISIONS, compute_dtype
from smedjan_jax import sharding

SIZES = {  # mixer -> the fields of ModelConfig that are features of its tiles
    "linear": ("head_dim",),
    "ssm": ("ssm_state", "ssm_head_dim"),
    "rwkv": ("rwkv_head_dim",),
    "gated-deltanet": ("delta_key_dim", "delta_value_dim"),
}
FASTER = (32, 64, 128)  # the sizes of those in which they were measured faster (layers-heads32-h200.json, layers-heads128-h100.json)
MEASURED = "bfloat16", "9.0"  # dtype and compute capability of that
REFUSED: set[str] = set()  # mixers, and "float8", whose kernels are not their plain form on this device; "auto" does not take them
LARGEST = 128  # features of a tile
LARGEST_FLOAT32 = {"rwkv": 64}  # where shared memory does not hold the tiles in float32
LARGEST_VOCABULARY = 1 << 16  # logits of a token that a program holds
# positions up to which block-sparse goes through cuDNN with its choice as a mask, whose cost beside attention is proportional to them; the
# kernel's is not. At 1024 that was twice the kernel's (bench/results/masked_blocks-h200.json: 17.6 ms a step against 8.3), so even at half
LONGEST_MASKED = 256
NORMED = {"bfloat16": (512, 1024), "float8": (512, 1024, 2048)}  # widths in which the kernels of norms were measured faster
SHORTEST = 64  # new tokens of a decoding step that a kernel is worth
DECODED = (64, 128)  # sizes of heads in which the attention of one new token was measured faster
MOST_SHARING = 16  # query heads that read one key head there: the rows of a tensor core's tile
SHORTEST_RING = 64  # entries of a block there


def chosen(mixer: str, implementation: str, model: ModelConfig, dtype: str) -> str:
    """What `implementation` of --kernels comes to for a mixer: "pallas" or "plain".

    Raises ConfigError for "pallas" where it cannot run.
    """
    why = _obstacle(mixer, model, dtype)
    if implementation == "pallas" and why:
        raise ConfigError("--kernels pallas cannot run here.", why, "Take --kernels auto or plain.")
    if implementation == "auto":
        return "pallas" if not why and _measured(mixer, model, dtype) else "plain"
    return implementation


BLOCKS = {"masked": "cuDNN with a mask", "pallas": "pallas"}  # what the console says of the forms of block-sparse


def _measured(mixer: str, model: ModelConfig, dtype: str) -> bool:
    sizes = {getattr(model, name) for name in SIZES[mixer]}
    if not sizes <= set(FASTER) or (dtype, getattr(jax.devices()[0], "compute_capability", "")) != MEASURED:
        return False
    return mixer not in REFUSED


def for_loss(implementation: str, vocabulary: int, dtype: str, parts: int = 1) -> bool:
    """Whether the loss takes its kernel: where --kernels does not say plain, it can run and was measured faster (kernels/loss.py).

    parts: devices along the mesh's tensor axis, over which the vocabulary is split.
    """
    if implementation == "plain" or parts > 1 or vocabulary > LARGEST_VOCABULARY or _no_device():
        return False
    return (dtype, getattr(jax.devices()[0], "compute_capability", "")) == MEASURED


def for_decoding(implementation: str, model: ModelConfig, dtype: str, entries: int, devices: int = 1) -> bool:
    """Whether a decoder whose rings have so many entries takes the kernel of one new token's attention (kernels/decode_attention.py):
    where --kernels does not say plain, it can run and was measured faster, on one device. The device is asked too (held.decoding)."""
    if implementation == "plain" or "attention" not in model.mixer or devices > 1 or entries < SHORTEST_RING or _no_device():
        return False
    measured = (dtype, getattr(jax.devices()[0], "compute_capability", "")) == MEASURED
    return measured and model.head_dim in DECODED and model.heads // model.kv_heads <= MOST_SHARING


def for_norms(model: ModelConfig, train: TrainConfig, devices: int = 1) -> bool:
    """Whether blocks take the kernels of their norms in training (kernels/norm.py): where --kernels does not say plain, they can run and
    were measured faster. Gradient checkpointing would keep the matrices with the norms in them, adapters read what
    the norm gives, and meshes gather the matrices later.
    """
    if train.kernels == "plain" or train.adapters or train.gradient_checkpointing != "none" or devices > 1 or _no_device():
        return False
    if model.block_norms != ("mixer_norm", "ffn_norm") or model.dim not in NORMED.get(train.dtype, ()):
        return False
    return (compute_dtype(train.dtype), getattr(jax.devices()[0], "compute_capability", "")) == MEASURED


def for_float8(train: TrainConfig, devices: int = 1) -> bool:
    """Whether matrices are rounded to 8 bits by kernels in training (kernels/float8.py): where --kernels does not say plain, they can run
    and were measured faster, on one device: XLA would not part them. The device is asked too (held.float8)."""
    if not PRECISIONS[train.dtype].float8 or train.kernels == "plain" or devices > 1 or "float8" in REFUSED or _no_device():
        return False
    return (compute_dtype(train.dtype), getattr(jax.devices()[0], "compute_capability", "")) == MEASURED


def for_blocks(implementation: str, model: ModelConfig, dtype: str, length: int) -> str:
    """How `block-sparse` attends to the blocks that it chose in sequences of `length` (mixers/block_sparse.py): "plain", "masked" by cuDNN,
    "pallas" or "gathered". implementation: of --attention, or "reproducible"."""
    if implementation == "plain":
        return "plain"
    tiles = model.block_size, model.head_dim
    fits = all(size in (16, 32, 64, 128) for size in tiles) and not _no_device()
    if not fits or (dtype, getattr(jax.devices()[0], "compute_capability", "")) != MEASURED:
        return "gathered"
    if implementation == "reproducible":
        return "pallas"
    if length <= LONGEST_MASKED:
        return "masked"
    return "gathered" if "block-sparse" in REFUSED else "pallas"


def blocks_summary(implementation: str, model: ModelConfig, dtype: str, length: int) -> str:
    """What the console says of `block-sparse`; empty where it takes neither cuDNN nor its kernel, and for other models."""
    if "block-sparse" not in model.mixer:
        return ""
    form = for_blocks(implementation, model, dtype, length)
    return f"{BLOCKS[form]} for block-sparse" if form in BLOCKS else ""


def around(implementation: str, position: Any) -> bool:
    """Whether what surrounds a mixer's core is in kernels too: in training (without a position), where XLA has nothing to split."""
    return implementation == "pallas" and position is None and sharding.tensor_parts() == 1


def summary(implementation: str, model: ModelConfig, dtype: str) -> str:
    """What the console says: "pallas", "plain", or which mixers take which; empty for a model without such mixers. Raises ConfigError."""
    names = [name for name in dict.fromkeys(model.mixer) if MIXERS[name].training is Chunked]
    taken = {name: chosen(name, implementation, model, dtype) for name in names}
    if len(set(taken.values())) < 2:
        return next(iter(taken.values()), "")
    return ", ".join(f"{choice} for {name}" for name, choice in taken.items())


def _obstacle(mixer: str, model: ModelConfig, dtype: str) -> str:
    """Why the kernel of a mixer cannot run; empty when it can."""
    if why := _no_device():
        return why
    limit = LARGEST_FLOAT32.get(mixer, LARGEST) if dtype == "float32" else LARGEST
    largest = max(getattr(model, name) for name in SIZES[mixer])
    if largest > limit:
        return f"The kernel of {mixer} takes heads and states of at most {limit} features in {dtype}; here it would be {largest}."
    return ""


def _no_device() -> str:
    """Why no kernel can run here; empty when they can."""
    if jax.default_backend() != "gpu":
        return "The kernels need an NVIDIA GPU."
    capability = getattr(jax.devices()[0], "compute_capability", "")
    if int("0" + capability.partition(".")[0].strip("abcdefgx")) not in range(8, 100):
        return f"The kernels need an NVIDIA GPU from Ampere on (compute capability 8.0); this one has {capability or 'none'}."
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"JAX {jax.__version__} has no Triton backend of Pallas."
    return ""
