"""The neutral checkpoint: a directory that either backend writes, reads and resumes, atomic, hashed, versioned.

    CHECKPOINT_DIR/step-00001000/   checkpoint.json   model.safetensors   optimizer.safetensors   tokenizer.json
    CHECKPOINT_DIR/final/           checkpoint.json   model.safetensors   tokenizer.json

and what it shares with a backend's own (own.py): names, checkpoint.json, hashes, atomicity.

docs/checkpoints.md describes the format. No framework but NumPy is imported here.
"""

from smedjan_common.checkpoint.about import About, SavedTokenizer
from smedjan_common.checkpoint.adapter import ADAPTER, AdapterRecord, BaseWeights
from smedjan_common.checkpoint.background import Background
from smedjan_common.checkpoint.base import (
    AVERAGED,
    find_base,
    keeps_averages,
    lazy_weights,
    no_averages,
    read_averages,
    verify_weights,
    weights_hash,
    with_bases,
)
from smedjan_common.checkpoint.directory import Found, find_checkpoints, latest_checkpoint, prune_checkpoints
from smedjan_common.checkpoint.load import KINDS, Checkpoint, step_name, verify_checkpoint
from smedjan_common.checkpoint.manifest import FORMAT, FORMAT_VERSION, ORBAX, CheckpointInfo
from smedjan_common.checkpoint.own import check_readable, read_state, read_weights, start_own
from smedjan_common.checkpoint.read import newest, read_checkpoint, read_info
from smedjan_common.checkpoint.tensors import FileRecord, TensorRecord
from smedjan_common.checkpoint.write import write_checkpoint, write_final

__all__ = [
    "ADAPTER",
    "AVERAGED",
    "FORMAT",
    "FORMAT_VERSION",
    "KINDS",
    "ORBAX",
    "About",
    "AdapterRecord",
    "Background",
    "BaseWeights",
    "Checkpoint",
    "CheckpointInfo",
    "FileRecord",
    "Found",
    "SavedTokenizer",
    "TensorRecord",
    "check_readable",
    "find_base",
    "find_checkpoints",
    "keeps_averages",
    "latest_checkpoint",
    "lazy_weights",
    "newest",
    "no_averages",
    "prune_checkpoints",
    "read_averages",
    "read_checkpoint",
    "read_info",
    "read_state",
    "read_weights",
    "start_own",
    "step_name",
    "verify_checkpoint",
    "verify_weights",
    "weights_hash",
    "with_bases",
    "write_checkpoint",
    "write_final",
]
