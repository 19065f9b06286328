"""Evaluation with real models: both backends agree with each other and with transformers on the exported model; the page's commands run."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.commands import eval
from smedjan_common.inference.scoring import windows
from smedjan_common.tokenizer import Tokenizer
from tests.e2e.test_readme import TEXT, commands

MODEL = "--size custom --dim 32 --layers 2 --heads 2 --ffn-mult 2 --vocab-size 300 --seq-len 64 --batch-size 4 --steps 30 --sample-every 0"
PAGE = "docs/evaluation.md"
QUESTIONS = [
    {"query": f"The smith of village {n} strikes the", "choices": ["iron", "anvil of the sparks", "i"], "gold": n % 3} for n in range(6)
]
SCHEMAS = [{"context_options": ["iron and", "the anvil and"], "continuation": "sparks flew", "gold": n % 2} for n in range(3)]
FILLED = [{"context": "Once the smith of ", "continuation": word} for word in ("village", "the", "over")]

pytestmark = pytest.mark.xdist_group("evaluation")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run in runs/mine, texts, and questions of each kind."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "my.txt").write_text(TEXT[:60_000])
    done = in_folder(folder, f"smedjan train my.txt --checkpoint-dir runs/mine {MODEL} --val-fraction 0.05")
    assert done.returncode == 0, done.stderr
    (folder / "held-out.txt").write_text("Sparks flew over the anvil: é, 火. " * 9 + TEXT[-900:])
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("Once the smith")
    (folder / "texts" / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("of village 3", "struck the iron 火")))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "core").mkdir()
    for name, items in (("schema", SCHEMAS), ("filled", FILLED)):
        (folder / "core" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def in_folder(folder: Path, command: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SMEDJAN_NO_OPENBLAS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, text=True, capture_output=True, timeout=300, check=False)


def found(backend: str, place: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict, list[dict]]:
    """What `smedjan eval` finds with a backend: its JSON, and the answers."""
    load = __import__(f"smedjan_{backend}.eval", fromlist=["load"]).load
    answers = place / f"answers-{backend}.jsonl"
    assert eval.run(backend, load, [str(place / "runs" / "mine"), "--json", "--answers", str(answers), *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out), [json.loads(line) for line in answers.read_text().splitlines()]


WORDS = ("--stride", 24, "--dataset")


def test_both_backends_say_the_same(place: Path, capsys):
    words = (*WORDS, place / "held-out.txt", place / "texts", "--tasks", place / "questions.jsonl", place / "core", "--shots", 1)
    (jax, jax_answers), (mlx, mlx_answers) = (found(backend, place, capsys, *words) for backend in ("jax", "mlx"))
    assert len(jax["texts"]) == 2
    for one, other in zip(jax["texts"], mlx["texts"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert [row["where"] for row in jax_answers] == [row["where"] for row in mlx_answers]
    assert len(jax_answers) == len(QUESTIONS) + len(SCHEMAS) + len(FILLED)
    for one, other in zip(jax_answers, mlx_answers, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], rel=1e-5)
        assert one["right"] == other["right"]


@pytest.mark.oracle
def test_the_figures_are_those_of_transformers_on_the_exported_model(place: Path, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")
    from convert.cli import main as convert

    out = place / "hf"
    assert convert([str(place / "runs" / "mine"), str(out), "--to", "hf"]) == 0
    capsys.readouterr()
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(out).eval(), Tokenizer.load(place / "runs" / "mine" / "final")

    def logprobs(ids: list[int]) -> np.ndarray:
        """Over the model's own 300 tokens: the exported table has 20 rows more, which are no tokens."""
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double()[:, : tokenizer.vocab_size], -1).numpy()

    ((row,), answers) = (lambda both: (both[0]["texts"], both[1]))(
        found("jax", place, capsys, *WORDS, place / "held-out.txt", "--tasks", place / "questions.jsonl", place / "core")
    )
    text, end = (place / "held-out.txt").read_text(), tokenizer.eot_id
    ids = [end, *tokenizer.encode(text), end]
    scored = []
    for begin, first, last in windows(len(ids), 64, 24):
        table = logprobs(ids[begin : last - 1])
        scored += [table[at - begin - 1, ids[at]] for at in range(first, last)]
    nats = -sum(scored[:-1])
    assert len(scored) == len(ids) - 1 > 64
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert row["loss_with_end_of_text"] == pytest.approx(-sum(scored) / len(scored), rel=1e-5)
    for answer in answers:
        contexts = answer["contexts"] * (len(answer["options"]) if len(answer["contexts"]) == 1 else 1)
        options = answer["options"] * (len(contexts) if len(answer["options"]) == 1 else 1)
        for context, option, value in zip(contexts, options, answer["logprobs"], strict=True):
            context = context.strip()
            head, whole = [end, *tokenizer.encode(context)], [end, *tokenizer.encode(f"{context} {option}")]
            assert whole[: len(head)] == head
            start = len(head)
            if answer["task"] == "schema":  # both texts end with " and sparks flew"
                start = len(whole) - len(tokenizer.encode(" and sparks flew"))
                assert tokenizer.decode(whole[start:]) == " and sparks flew"
            table = logprobs(whole[:-1])
            expected = sum(table[at - 1, whole[at]] for at in range(start, len(whole)))
            assert value == pytest.approx(expected, rel=1e-5)
            if answer["task"] == "filled":
                greedy = all(table[at - 1].argmax() == whole[at] for at in range(start, len(whole)))
                assert answer["right"]["exact"] == greedy


def test_every_command_of_the_page_runs(place: Path):
    lines = commands(PAGE)
    assert len(lines) >= 5
    for command in lines:
        done = in_folder(place, command.replace("--limit 20", "--limit 4"))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    found = json.loads((place / "results.json").read_text())
    assert len(found["tasks"]) > 20
    assert {"generated", "core"} & set(found["groups"]) == {"core"}
    shutil.rmtree(place / "hf", ignore_errors=True)
