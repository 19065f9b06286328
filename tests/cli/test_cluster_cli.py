"""`smedjan train … --dry-run --devices 64`: a plan for machines that are not here, as docs/scale.md shows it."""

import re
import subprocess
import sys

import pytest

from tests.fakes.runs import ROOT, write_text

DOCS = (ROOT / "docs" / "scale.md").read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def plan(text, tmp_path, *words):
    command = [sys.executable, "-m", "smedjan_jax.train", str(text), "--checkpoint-dir", str(tmp_path / "run"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"}, cwd=ROOT)


def test_the_plans_in_the_docs_are_what_the_commands_say(text, tmp_path):
    shown = re.findall(r"```\n\$ smedjan train my\.txt (.*?)\n(devices .*?)\n```", DOCS, re.DOTALL)
    assert len(shown) == 2
    for words, out in shown:
        got = plan(text, tmp_path, *re.sub(r"\\\n", "", words).split())
        assert got.returncode == 0, got.stderr
        assert got.stdout.strip() == out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--devices 8", 2, "Add --dry-run"),
        ("--dry-run --device h200", 2, "--device says nothing by itself"),
        ("--dry-run --devices 12", 2, "Take 8 or 16"),
        ("--dry-run --devices 3", 2, "Take a multiple of 3 for --batch-size"),
        ("--dry-run --devices 8 --mesh data=2", 2, "--mesh data=2 takes 2 devices"),
        ("--dry-run --devices 8 --device a1000", 2, "Did you mean a100"),
        ("--dry-run --devices 2 --size max --batch-size 64 --seq-len 4096", 3, "More --devices".lower()),
    ],
)
def test_what_cannot_be_planned_says_why(text, tmp_path, words, code, said):
    got = plan(text, tmp_path, *words.split())
    assert got.returncode == code
    assert said in got.stderr
    assert not (tmp_path / "run").exists()
