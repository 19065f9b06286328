"""The commands of docs/generate.md as they stand, in both backends; both write the same text."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.test_readme import commands
from tests.unit import convert_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of random weights in runs/mine, and the files that the page names."""
    folder = tmp_path_factory.mktemp("generate")
    convert_models.neutral(folder / "runs" / "mine")
    config = convert_models.model_config(convert_models.tokenizer().vocab_size, layers=1)
    convert_models.neutral(folder / "runs" / "small", config)
    (folder / "start.txt").write_text("Sparks fly")
    (folder / "starts.txt").write_text("Once\nThe smith \n")
    return folder


def shell(command: str, folder: Path, backend: str) -> str:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SMEDJAN_NO_OPENBLAS": "1", "PYTHONPATH": str(ROOT)}
    command = command.replace("smedjan generate", f"smedjan generate --backend {backend}")
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_every_command_of_the_page_runs(folder):
    found = commands("docs/generate.md")
    assert len(found) == 7
    for number, command in enumerate(found):
        shell(command, folder, "jax" if number == 1 else "mlx")
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Once", "The smith "]
    assert (folder / "more.txt").read_text()


def test_both_backends_write_the_same_texts_past_the_context_too(folder):
    command = "smedjan generate runs/mine --prompts starts.txt --max-tokens 150 --top-k 50 --seed 5 --json"
    assert shell(command, folder, "jax") == shell(command, folder, "mlx")


def test_ctrl_c_ends_it_and_what_was_printed_stays(folder):
    words = [sys.executable, "-m", "smedjan_jax.generate", "runs/mine", "--prompt", "Once", "--max-tokens", "1000000"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(6).startswith("Once")
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        process.wait(10)
        assert time.monotonic() - began < 5
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT
