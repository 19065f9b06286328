"""Estimated device memory to train and to infer, in bytes. Estimates, for choosing a size: the run reports the real peak.

Training holds float32 parameters, their gradients and what the optimizer keeps (16 bytes a parameter with AdamW's two
moments), a bf16 copy of the weights in use, the activations that the backward pass needs, and the logits.
"""

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.params import parameter_table
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.mesh import ONE_DEVICE, MeshShape
from smedjan_common.training.optimizers import OPTIMIZERS

BYTES = {"float32": 4, "bfloat16": 2}

LOGITS_BYTES = 5 << 29  # float32 logits held at once; medium at 64 x 1024 x 8192 stays whole, larger losses go in chunks


def training_bytes(config: ModelConfig, train: TrainConfig, mesh: MeshShape = ONE_DEVICE) -> int:
    """Peak memory of a training step on each device: state + activations of one micro-batch + logits. What tensor saves of the
    activations is not counted."""
    width = BYTES[train.dtype]
    specs, slots = parameter_table(config).values(), OPTIMIZERS[train.optimizer].slots
    state = 4 * sum((2 + len(slots(spec))) * (spec.size // mesh.parts(spec)) for spec in specs)
    if train.dtype != "float32" or mesh.fsdp > 1:  # the weights in use are a copy, whole
        state += width * sum(spec.size // mesh.parts(spec, but="fsdp") for spec in specs)
    tokens = train.batch_size // train.grad_accum // mesh.batch * train.seq_len
    logits = tokens // loss_chunks(tokens, config.padded_vocab_size) * config.padded_vocab_size // mesh.tensor * (4 + width)
    return state + tokens * activation_values_per_token(config, train.gradient_checkpointing) * width + logits


def loss_chunks(tokens: int, vocab: int) -> int:
    """The fewest chunks of tokens whose float32 logits stay under LOGITS_BYTES each; the last chunk may be shorter."""
    return min(tokens, max(1, -(-tokens * vocab * 4 // LOGITS_BYTES)))


def activation_values_per_token(config: ModelConfig, gradient_checkpointing: str) -> int:
    """Values kept per token from the forward for the backward pass."""
    kv = config.kv_heads * config.head_dim
    residual = config.dim
    total, largest = 0, 0
    for layer in range(config.layers):
        row = FFNS[config.ffn_of(layer)]
        hidden = row.active(config) // (3 * config.dim)  # features of all the feed-forwards that a token meets
        dots = config.dim * 3 + kv * 2 + hidden * 2  # q, attention output, o / down output, k, v, gate, up
        elementwise = config.dim * 3 + kv + hidden  # two norms, rotated q and k, the product in the feed-forward
        elementwise += row.copies(config) * 2 * config.dim  # what goes into experts and what comes out
        total += {"none": residual * 2 + dots + elementwise, "dots": residual + dots, "full": residual}[gradient_checkpointing]
        largest = max(largest, dots + elementwise)
    return total + (0 if gradient_checkpointing == "none" else largest)
