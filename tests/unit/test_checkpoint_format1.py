"""Files of format 1 stay readable: a checkpoint that smedjan 0.1.0 wrote is committed and never written again.

`sample_snapshot` gives the values it must hold. If a change of this repository makes this test fail, the change is at fault:
give the new format a new number and leave the reader of format 1.
"""

import os
import shutil
from pathlib import Path

import pytest

from smedjan_common.checkpoint import find_checkpoints, read_checkpoint, read_info, verify_checkpoint
from tests.unit.test_checkpoint import MODEL, TOKENIZER_JSON, assert_same_arrays, sample_snapshot

RUN = Path(__file__).parents[1] / "fixtures" / "checkpoint-format-1"


@pytest.mark.parametrize("name", ["step-00000003", "final"])
def test_a_checkpoint_of_format_1_is_read(name):
    verify_checkpoint(RUN / name)
    checkpoint = read_checkpoint(RUN / name)
    assert checkpoint.info.format_version == 1
    assert checkpoint.step == 3
    assert_same_arrays(checkpoint.snapshot.params, sample_snapshot().params)
    assert_same_arrays(checkpoint.snapshot.optimizer, {} if name == "final" else sample_snapshot().optimizer)
    assert {field: getattr(checkpoint.model, field) for field in ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim")} == {
        field: getattr(MODEL, field) for field in ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim")
    }
    assert checkpoint.train is not None
    assert (checkpoint.train.steps, checkpoint.train.lr, checkpoint.train.optimizer) == (10, 1e-3, "adamw")
    assert checkpoint.tokenizer_json == TOKENIZER_JSON
    assert checkpoint.tokenizer_hash == "tokenizer-hash"


def test_a_run_directory_of_format_1_is_listed():
    assert [found.step for found in find_checkpoints(RUN)] == [3]
    assert read_info(RUN).optimizer == "adamw"


def test_reading_changes_nothing_and_needs_no_right_to_write(tmp_path):
    run = shutil.copytree(RUN, tmp_path / "run")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    for path in (*run.rglob("*"), run):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    read_checkpoint(run)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    for path in (run, *run.rglob("*")):
        os.chmod(path, 0o755)
