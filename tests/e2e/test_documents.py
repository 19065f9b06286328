"""`--mask-documents` and `--packing documents` through the real commands: trained by both backends alike, recorded, resumed, refused."""

import json
import os
import subprocess
import sys

import pytest

from smedjan_common.checkpoint import read_checkpoint
from smedjan_mlx.openblas import OFF
from tests.conformance.gates import FLOAT32

MODEL = "--size custom --dim 32 --layers 1 --heads 2 --batch-size 4 --seq-len 96 --log-every 1 --warmup 0 --vocab-size 270".split()
MODEL += ["--sample-every", "0"]
KEPT = ["--mask-documents", "--packing", "documents"]


def train(folder, *words, backend="jax"):
    command = [sys.executable, "-m", f"smedjan_{backend}.train", *words]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, env=os.environ | {OFF: "1"})
    return done.returncode, done.stdout + done.stderr


def losses(run):
    return [row["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Many short documents of one corpus."""
    place = tmp_path_factory.mktemp("documents")
    texts = [f"the smith number {i} strikes the iron {i % 7} times" for i in range(300)]
    (place / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, said = train(place, "--dataset", "a.jsonl", *MODEL, *KEPT, "--steps", "6", "--checkpoint-dir", "whole")
    assert code == 0, said
    return place


def test_both_backends_train_the_same_and_otherwise_than_without(folder):
    first = losses(folder / "whole")
    data = str(next((folder / "whole" / "data").glob("*/train.bin")))
    code, said = train(folder, "--dataset", data, *MODEL, *KEPT, "--steps", "6", "--checkpoint-dir", "mlx", backend="mlx")
    assert code == 0, said
    assert max(abs(a / b - 1) for a, b in zip(losses(folder / "mlx"), first, strict=True)) < FLOAT32.steps_loss
    for flag in ([], KEPT[:1], KEPT[1:]):
        code, said = train(folder, "--dataset", data, *MODEL, *flag, "--steps", "6", "--checkpoint-dir", f"with-{len(flag)}-{flag[:1]}")
        assert code == 0, said
        assert losses(folder / f"with-{len(flag)}-{flag[:1]}") != first


def test_a_stopped_run_goes_on_with_the_same_documents(folder):
    code, said = train(
        folder, "--dataset", "a.jsonl", *MODEL, *KEPT, "--steps", "6", "--checkpoint-every", "3", "--checkpoint-dir", "parts"
    )
    assert code == 0, said
    for name in ("final", "step-00000006"):
        (folder / "parts" / name).rename(folder / f"gone-{name}")
    code, said = train(folder, "--checkpoint-dir", "parts")
    assert code == 0, said
    assert losses(folder / "parts") == losses(folder / "whole")
    whole, parts = (read_checkpoint(folder / run / "step-00000006").snapshot.params for run in ("whole", "parts"))
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)
    code, said = train(folder, "--checkpoint-dir", "parts", "--packing", "windows", "--steps", "9")
    assert (code, "--packing is documents there, windows now" in said) == (2, True), said


def test_a_token_file_without_offsets_is_refused_before_anything_is_written(folder, tmp_path):
    data = next((folder / "whole" / "data").glob("*/train.bin"))
    for file in data.parent.iterdir():
        if "offsets" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for flags in (KEPT[:1], KEPT[1:]):
        code, said = train(tmp_path, "--dataset", "train.bin", *MODEL[:-2], *flags, "--steps", "2", "--checkpoint-dir", "run")
        assert (code, "no document offsets" in said, "smedjan prepare" in said) == (2, True, True), said
        assert not (tmp_path / "run").exists()
