"""bench/checkpoint.py at toy size: every way of saving is measured, the memory of a process too, and no folder is told."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from bench import checkpoint

pytest.importorskip("jax", reason="it measures JAX")


def test_a_synchronous_save_stalls_as_long_as_it_writes_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "REPEATS", 1)
    args = argparse.Namespace(size="tiny", vocab_size=256, batch_size=1, seq_len=16, steps=1)
    found = checkpoint.stall(args, tmp_path)
    assert set(found["saves"]) == {"neutral, synchronous", "neutral", "orbax, synchronous", "orbax"}
    for name, row in found["saves"].items():
        assert 0 < row["stall_seconds"] <= row["written_seconds"], name
        assert (row["stall_seconds"] > 0.9 * row["written_seconds"]) == ("synchronous" in name), name
    assert list(tmp_path.iterdir()) == []
    assert found["state_bytes"] == 12 * found["parameters"]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_the_peak_memory_of_a_process_is_seen():
    code = "import time; block = b'x' * 200_000_000; time.sleep(0.3)"
    row = checkpoint._measured([sys.executable, "-c", code])
    assert 200e6 < row["peak_anonymous_bytes"] <= row["peak_bytes"] < 300e6


def test_the_command_of_a_result_names_no_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["bench/checkpoint.py", "convert", "--size", "xxl", "--folder", "/some/place", "--output", "/other/x"])
    assert checkpoint._command(checkpoint._arguments()) == "python bench/checkpoint.py convert --size xxl --vocab-size 8192"


def test_committed_results_are_of_this_program():
    committed = {path.stem: path for path in (checkpoint.ROOT / "bench" / "results").glob("checkpoint-*.json")}
    assert {"checkpoint-convert-cpu", "checkpoint-stall-cpu", "checkpoint-stall-h100"} <= committed.keys(), "the pages quote them"
    for path in committed.values():
        values = json.loads(path.read_text())
        assert values["command"].startswith("python bench/checkpoint.py ")
        assert {"device", "versions", "parameters"} <= values.keys()
