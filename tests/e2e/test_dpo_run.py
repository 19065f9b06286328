"""Preferences through the real commands: a model that says two things learns to say one of them, in both backends, killed on the way.

SMEDJAN_TEST_FULL=1 has the toy whose figures are known beforehand: five digits, which a model sorts up or down as often as not before
and up after; and the same bits whenever a run is killed.
"""

import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.checkpoint import read_info
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.tokenizer.chat import template_of
from smedjan_mlx.openblas import OFF
from tests.fakes.runs import ROOT, arrays, figures

FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
METALS = {"iron": "grey", "gold": "yellow", "copper": "red"}
QUIET = "--sample-every 0 --eval-every 0 --val-fraction 0 --dtype float32 --log-every 1"
SIZE = "--size custom --dim 64 --layers 2 --heads 2 --ffn-mult 2 --vocab-size 300 --seq-len 96 --batch-size 8 --steps 20"
SFT = "--steps 80 --batch-size 3 --lr 5e-3 --checkpoint-every 0"
DPO = "--batch-size 2 --checkpoint-every 2 --keep 0"

pytestmark = [pytest.mark.timeout(1800), pytest.mark.xdist_group("dpo run")]


def start(module: str, words: str) -> subprocess.Popen:
    """`python -m module words`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": os.environ | {OFF: "1"}}
    return subprocess.Popen([sys.executable, "-u", "-m", module, *words.split()], **pipes)


def run(module: str, words: str) -> str:
    """What it prints; it must end well."""
    process = start(module, words)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said
    return said


def killed(module: str, words: str, folder: Path, step: int) -> None:
    """Begin, and kill it as soon as `folder` has a checkpoint of `step` or later."""
    process = start(module, words)
    while process.poll() is None and not any((folder / f"step-{at:08}").is_dir() for at in range(step, step + 4)):
        time.sleep(0.02)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -9, said


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that says two things of every metal, and pairs of which one is better."""
    folder = tmp_path_factory.mktemp("dpo")
    (folder / "text.txt").write_text("The smith has iron, gold and copper of every color, and asks what color they are.\n" * 300)
    both = [
        {"prompt": f"What color is {name}?", "completion": said} for name, color in METALS.items() for said in (f"It is {color}.", "Ask.")
    ]
    better = [{"prompt": f"What color is {name}?", "chosen": f"It is {color}.", "rejected": "Ask."} for name, color in METALS.items()]
    write(folder / "chats.jsonl", both * 8)
    write(folder / "pairs.jsonl", better * 8)
    pytest.importorskip("mlx.core")
    run("smedjan_mlx.train", f"{folder / 'text.txt'} --checkpoint-dir {folder / 'base'} {SIZE} {QUIET} --checkpoint-every 0")
    run("smedjan_mlx.sft", f"{folder / 'chats.jsonl'} --pretrained {folder / 'base'} --checkpoint-dir {folder / 'chat'} {SFT} {QUIET}")
    return folder


def words(folder: Path, name: str, more: str = "--steps 24 --lr 2e-4") -> str:
    return f"{folder / 'pairs.jsonl'} --pretrained {folder / 'chat'} --checkpoint-dir {folder / name} {DPO} {QUIET} {more}"


def answers(backend: str, folder: Path, questions: list[str], **how) -> list[str]:
    """What a model says, and that it ends by itself; of sampled answers each has a seed of its own."""
    with importlib.import_module(f"smedjan_{backend}").load(folder) as lm:
        template = template_of(folder / "final", lm.tokenizer)
        asked = [template.encode(lm.tokenizer, [{"role": "user", "content": question}]) for question in questions]
        given = (
            lm.generate(asked, max_tokens=20, **how) if how else [lm.generate(one, max_tokens=20, seed=n) for n, one in enumerate(asked)]
        )
    assert all(one.finish_reason == "stop" for one in given), "a model that was taught answers ends them"
    return [one.text for one in given]


def test_both_backends_learn_what_is_preferred_though_they_are_killed(folder):
    pytest.importorskip("jax")
    run("smedjan_jax.dpo", words(folder, "jax"))
    killed("smedjan_mlx.dpo", words(folder, "mlx"), folder / "mlx", random.Random(0).randrange(2, 20, 2))
    said = run("smedjan_mlx.dpo", words(folder, "mlx"))
    assert "Going on from" in said
    assert "gives log-probabilities" not in said, "the reference is asked once"
    rows = {name: [row for row in read_rows(folder / name) if "batch_loss" in row] for name in ("jax", "mlx")}
    assert [row["step"] for row in rows["mlx"]] == list(range(1, 25))
    for side in rows.values():
        assert side[0]["batch_loss"] == pytest.approx(np.log(2), rel=1e-6)
        assert side[-1]["rewards/accuracies"] == 1
        assert side[-1]["rewards/margins"] > 0.05
    for key in ("batch_loss", "logps/chosen", "logps/rejected"):
        assert np.allclose(*([row[key] for row in side] for side in rows.values()), rtol=1e-3)
    asked = [f"What color is {name}?" for name in METALS]
    for backend, learned in (("mlx", "jax"), ("jax", "mlx")):
        said = answers(backend, folder / learned, asked, temperature=0)
        assert all(one.startswith("It is ") for one in said), said


def test_adapters_learn_preferences_too_and_begin_as_the_reference(folder):
    said = run("smedjan_mlx.dpo", words(folder, "adapted", "--steps 8 --lr 2e-3 --lora-rank 4"))
    assert "gives log-probabilities to 48 answers" in said
    first, *_, last = [row for row in read_rows(folder / "adapted") if "batch_loss" in row]
    assert first["batch_loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert last["batch_loss"] < first["batch_loss"]
    assert read_info(folder / "adapted" / "final").adapter
    run("smedjan_mlx.dpo", words(folder, "against", f"--steps 1 --lr 2e-4 --reference {folder / 'adapted'}"))
    told = next(row for row in read_rows(folder / "against") if "batch_loss" in row)
    assert told["batch_loss"] > np.log(2), "what it is compared with has learned something"


@pytest.mark.skipif(not FULL, reason="SMEDJAN_TEST_FULL=1 runs it")
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_run_that_is_killed_at_any_step_has_the_same_bits(folder, backend):
    run(f"smedjan_{backend}.dpo", words(folder, f"whole-{backend}"))
    rng = random.Random(backend)
    for _ in range(3):
        name = f"killed-{backend}-{rng.random()}"
        for step in sorted(rng.sample(range(2, 20, 2), 2)):
            killed(f"smedjan_{backend}.dpo", words(folder, name), folder / name, step)
        run(f"smedjan_{backend}.dpo", words(folder, name))
        assert arrays(folder / name) == arrays(folder / f"whole-{backend}")
        assert figures(folder / name) == figures(folder / f"whole-{backend}")


TOY = "--size custom --dim 64 --layers 3 --heads 4 --ffn-mult 2 --vocab-size 260 --seq-len 256 --batch-size 8 --steps 2"
SORTED = "--steps 1400 --batch-size 8 --lr 3e-3 --checkpoint-every 0"
PREFERS = "--steps 60 --batch-size 8 --lr-schedule constant --warmup 0 --checkpoint-every 0"
ASKED = 400


def digits(rng: random.Random) -> tuple[str, str, str]:
    """Five digits of which not all are one, and their two answers: up and down."""
    while True:
        drawn = [rng.choice("0123456789") for _ in range(5)]
        up = "".join(sorted(drawn))
        if up != up[::-1]:
            return "".join(drawn), up, up[::-1]


def shares(backend: str, folder: Path) -> tuple[float, float, float]:
    """Of sampled answers: how many sort up, how many down; and how many of the most probable ones sort up."""
    asked = [digits(random.Random(f"asked {number}")) for number in range(ASKED)]
    sampled = answers(backend, folder, [one for one, _, _ in asked])
    greedy = answers(backend, folder, [one for one, _, _ in asked], temperature=0)
    up, down = (sum(said == one[at] for said, one in zip(sampled, asked, strict=True)) / ASKED for at in (1, 2))
    return up, down, sum(said == one[1] for said, one in zip(greedy, asked, strict=True)) / ASKED


@pytest.fixture(scope="module")
def sorts(tmp_path_factory):
    """A model that sorts five digits up or down."""
    folder, rng = tmp_path_factory.mktemp("toy"), random.Random(0)
    (folder / "text.txt").write_text("".join(f"{digits(rng)[0]}\n" for _ in range(3000)))
    drawn = [digits(rng) for _ in range(60000)]
    write(folder / "chats.jsonl", [{"prompt": one, "completion": rng.choice(two)} for one, *two in drawn])
    write(folder / "pairs.jsonl", [{"prompt": one, "chosen": up, "rejected": down} for one, up, down in drawn[:4000]])
    run("smedjan_jax.train", f"{folder / 'text.txt'} --checkpoint-dir {folder / 'base'} {TOY} {QUIET} --checkpoint-every 0")
    run("smedjan_jax.sft", f"{folder / 'chats.jsonl'} --pretrained {folder / 'base'} --checkpoint-dir {folder / 'chat'} {SORTED} {QUIET}")
    return folder


@pytest.mark.skipif(not FULL, reason="SMEDJAN_TEST_FULL=1 runs it")
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_the_toy_of_sorted_digits(sorts, backend):
    up, down, _ = shares(backend, sorts / "chat")
    assert up + down >= 0.95
    assert 0.35 < up < 0.65
    learned = {"dpo": "--lr 3.5e-5 --beta 0.1", "nll": "--lr 3.5e-5 --nll-weight 0.2", "simpo": "--lr 3.5e-5 --loss simpo --gamma 0.5"}
    for name, more in learned.items():
        where = f"{sorts / 'pairs.jsonl'} --pretrained {sorts / 'chat'} --checkpoint-dir {sorts / f'{name}-{backend}'}"
        run(f"smedjan_{backend}.dpo", f"{where} {PREFERS} {more} {QUIET}")
        up, down, greedy = shares(backend, sorts / f"{name}-{backend}")
        assert up >= 0.75, name
        assert up + down >= 0.95, name
        assert down < 0.25, name
        assert greedy >= 0.95, name


@pytest.mark.skipif(not FULL, reason="SMEDJAN_TEST_FULL=1 runs it")
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_adapters_learn_an_order_as_the_whole_model_does(sorts, backend):
    """From half and half to down alone, in 150 steps: adapters of rank 8 end within 0.05 of what training every value gives."""
    rng, found = random.Random(2), {}
    downs = sorts / f"downs-{backend}.jsonl"
    write(downs, [{"prompt": one, "completion": down} for one, _, down in (digits(rng) for _ in range(8000))])
    for name, more in {"full": "--lr 3e-4", "lora": "--lr 3e-3 --lora-rank 8"}.items():
        where = f"{downs} --pretrained {sorts / 'chat'} --checkpoint-dir {sorts / f'{name}-{backend}'}"
        run(f"smedjan_{backend}.sft", f"{where} --steps 150 --batch-size 8 --checkpoint-every 0 {more} {QUIET}")
        found[name] = shares(backend, sorts / f"{name}-{backend}")[1]
    assert found["full"] >= 0.95
    assert found["lora"] >= found["full"] - 0.05
