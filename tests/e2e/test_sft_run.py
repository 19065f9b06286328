"""A model learns to answer, in both backends alike, and talks at once: what it was taught, up to the end of its turn."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from smedjan_common.reporting.metrics import read_rows
from tests.fakes.runs import ROOT

METALS = {"iron": "grey", "gold": "yellow", "copper": "red"}
SIZE = "--size custom --dim 64 --layers 2 --heads 2 --ffn-mult 2 --vocab-size 300 --seq-len 64 --batch-size 8 --steps 20 --sample-every 0"
SFT = "--epochs 20 --batch-size 2 --lr 5e-3 --sample-every 0 --checkpoint-every 0 --log-every 1 --val-fraction 0 --dtype float32"


def run(module: str, words: str, said: str = "") -> str:
    """What `python -m module words` prints."""
    command = [sys.executable, "-m", module, *words.split()]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "SMEDJAN_NO_OPENBLAS": "1"}, input=said, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a text, and conversations."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "text.txt").write_text("The smith has iron, gold and copper of every color, and asks what color they are.\n" * 300)
    rows = [
        {"messages": [{"role": "user", "content": f"What color is {metal}?"}, {"role": "assistant", "content": f"It is {color}."}]}
        for metal, color in METALS.items()
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    run("smedjan_jax.train", f"{folder / 'text.txt'} --checkpoint-dir {folder / 'base'} {SIZE}")
    return folder


def test_both_backends_learn_the_same_and_the_model_answers(folder):
    losses = {}
    for name in ("jax", "mlx"):
        pytest.importorskip("jax" if name == "jax" else "mlx.core")
        where = f"--pretrained {folder / 'base'} --checkpoint-dir {folder / name}"
        run(f"smedjan_{name}.sft", f"{folder / 'chats.jsonl'} {where} {SFT}")
        losses[name] = [row["batch_loss"] for row in read_rows(folder / name) if "batch_loss" in row]
    assert len(losses["jax"]) > 40
    assert np.allclose(losses["jax"][:20], losses["mlx"][:20], rtol=1e-3)
    for metal, color in list(METALS.items())[:2]:
        assert run("smedjan_jax.chat", f"{folder / 'mlx'} --temperature 0", f"What color is {metal}?\n") == f"It is {color}.\n"
