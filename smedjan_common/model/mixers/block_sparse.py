"""The row of `block-sparse`: mixture of block attention (MoBA); a query sees its own block and the best of the earlier ones."""

from dataclasses import dataclass

from smedjan_common.errors import ConfigError
from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.mixers import attention
from smedjan_common.model.mixers.shared import HeadNorm, Softmax
from smedjan_common.model.options import option
from smedjan_common.model.spec import MixerSpec, StateSpec


@dataclass(frozen=True)
class Options(HeadNorm):
    """Options of `block-sparse`."""

    block_size: int = option(64, "positions of a block.", least=1, shape_free=True)
    block_topk: int = option(4, "blocks that a query sees, its own included.", least=1, shape_free=True)


def _flops(config: Options, seq_len: int) -> int:
    """Scores and values of the pairs that are seen, half of the own block among them; and one score per query and earlier block."""
    block, blocks = config.block_size, -(-seq_len // config.block_size)
    most = min(config.block_topk - 1, blocks)  # block j sees min(block_topk - 1, j) of the earlier ones; summed over j
    others = (most * (most - 1) // 2 + (blocks - most) * most) / blocks
    pairs = min(block, seq_len) / 2 + others * block
    return round(4 * config.inner_dim * pairs + 2 * config.kv_heads * config.head_dim * (blocks - 1) / 2)


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    """Keys and values of whole blocks, and the mean key of each block so far."""
    blocks = -(-max_len // config.block_size)
    kept = (batch, config.kv_heads, blocks * config.block_size, config.head_dim)
    return [
        StateSpec("key", kept, axis=2),
        StateSpec("value", kept, axis=2),
        StateSpec("mean", (batch, config.kv_heads, blocks, config.head_dim), "float32", axis=2, span=config.block_size),
    ]


def _validate(config: Options) -> None:
    attention.validate(config)
    if config.block_size > config.context_length:
        raise ConfigError(
            f"--block-size {config.block_size} is longer than the context of {config.context_length}.",
            "There would be one block, and nothing to choose.",
            f"Take --block-size {max(1, config.context_length // 16)}, or --mixer attention.",
        )


MEASURED: Measured = {  # of what is gathered for each of the blocks that a query sees
    "gpu": Activations(0.88, 0.78, 0.73, 0.34),
    "cpu": Activations(0.73, 0.8, 0.36, 0.15),
    "cpu-0.10": Activations(1.9, 1.9, 1.9, 0.19),
    "mlx": Activations(0.38, 0.21, 0, 1.5),
}


def _activations(config: Options, course: Course) -> Activations:
    if course.plain:
        return attention.activations(config, course)
    kv = config.kv_heads * config.head_dim
    seen = min(config.block_topk, -(-course.seq_len // config.block_size))
    if course.kernels:  # nothing is gathered: for each block its mean
        return attention.MEASURED[course.platform].times(attention.projected(config)).with_(Activations(1.4 * config.inner_dim, 0, 0, 0))
    gathered = seen * (3.4 * config.inner_dim + 0.55 * kv + 0.75 * config.heads * config.block_size)
    return attention.MEASURED[course.platform].times(attention.projected(config)).with_(MEASURED[course.platform].times(gathered))


ROW = MixerSpec(
    "block-sparse",
    Options,
    "each query sees its own block and the best of the earlier ones (MoBA)",
    "block_sparse",
    "BlockSparseAttention",
    attention.parameters,
    _flops,
    _activations,
    _state,
    _validate,
    rope_dims=attention.rope_dims,
    training=Softmax,
    head_size=True,
    documents=False,  # a block may hold the end of one document and the start of the next: its mean key would mix them
)
