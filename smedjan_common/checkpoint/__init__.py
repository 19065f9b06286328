"""The neutral checkpoint: a directory that either backend writes, reads and resumes, atomic, hashed, versioned.

    CHECKPOINT_DIR/step-00001000/   checkpoint.json   model.safetensors   optimizer.safetensors   tokenizer.json
    CHECKPOINT_DIR/final/           checkpoint.json   model.safetensors   tokenizer.json

docs/checkpoints.md describes the format. No framework but NumPy is imported here.
"""

from smedjan_common.checkpoint.directory import Found, find_checkpoints, latest_checkpoint, prune_checkpoints
from smedjan_common.checkpoint.load import Checkpoint, step_name, verify_checkpoint
from smedjan_common.checkpoint.manifest import FORMAT, FORMAT_VERSION, CheckpointInfo
from smedjan_common.checkpoint.read import read_checkpoint, read_info
from smedjan_common.checkpoint.resume import check_resume, difference
from smedjan_common.checkpoint.tensors import FileRecord, TensorRecord
from smedjan_common.checkpoint.write import write_checkpoint, write_final

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Checkpoint",
    "CheckpointInfo",
    "FileRecord",
    "Found",
    "TensorRecord",
    "check_resume",
    "difference",
    "find_checkpoints",
    "latest_checkpoint",
    "prune_checkpoints",
    "read_checkpoint",
    "read_info",
    "step_name",
    "verify_checkpoint",
    "write_checkpoint",
    "write_final",
]
