"""Several token files as one dataset: `--dataset a.bin:0.7 b.bin:0.3` trains, is recorded, and resumes to the same bits."""

import json
import os
import subprocess
import sys

import pytest

from smedjan_common.checkpoint import read_checkpoint
from smedjan_mlx.openblas import OFF

MODEL = "--size custom --dim 32 --layers 1 --heads 2 --batch-size 8 --seq-len 16 --log-every 1 --warmup 0 --sample-every 0".split()


def smedjan(folder, *words, module="smedjan_common.cli"):
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=folder, text=True, capture_output=True, env=os.environ | {OFF: "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    """Two token files of one tokenizer."""
    (tmp_path / "a.txt").write_text("the smith strikes iron\n" * 400)
    (tmp_path / "b.txt").write_text("sparks over the anvil fly\n" * 300)
    assert smedjan(tmp_path, "tokenizer", "--input", "a.txt", "b.txt", "--vocab-size", "280", "--output", "tokenizer.json")[0] == 0
    for name in "ab":
        code, said = smedjan(tmp_path, "prepare", "--input", f"{name}.txt", "--tokenizer", "tokenizer.json", "--output", f"{name}.bin")
        assert code == 0, said
    return tmp_path


def test_a_mixture_trains_and_resumes_to_the_same_bits(folder):
    train = ["--dataset", "a.bin:0.7", "b.bin:0.3", *MODEL, "--steps", "8"]
    code, said = smedjan(folder, *train, "--checkpoint-dir", "whole", module="smedjan_jax.train")
    assert code == 0, said
    code, said = smedjan(folder, *train, "--checkpoint-dir", "parts", "--checkpoint-every", "4", module="smedjan_jax.train")
    assert code == 0, said
    for name in ("final", "step-00000008"):
        (folder / "parts" / name).rename(folder / f"gone-{name}")
    code, said = smedjan(folder, "--checkpoint-dir", "parts", module="smedjan_jax.train")  # the files come from config.json
    assert code == 0, said
    whole, parts = (read_checkpoint(folder / run / "step-00000008").snapshot.params for run in ("whole", "parts"))
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)
    recorded = json.loads((folder / "parts" / "config.json").read_text())["dataset"]
    assert [file["weight"] for file in recorded["files"]] == [0.7, 0.3]


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (["a.bin:0", "b.bin:1"], "a weight over 0"),
        (["a.bin:0.5", "b.txt"], "only .bin files, or only texts"),
        (["a.bin:0.5", "missing.bin:0.5"], "missing.bin"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(folder, dataset, why):
    code, said = smedjan(folder, "--dataset", *dataset, *MODEL, "--steps", "2", "--checkpoint-dir", "run", module="smedjan_jax.train")
    assert (code, why in said) == (2, True), said
    assert not (folder / "run" / "metrics.jsonl").exists()
