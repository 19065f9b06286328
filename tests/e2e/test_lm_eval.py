"""lm-evaluation-harness: its tasks give the same figures with both backends as with its own `hf` model of the exported run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smedjan_common.commands import eval
from tests.e2e.test_evaluation_docs import in_folder
from tests.e2e.test_readme import TEXT

# a vocabulary that is a multiple of 64: an exported model has no rows that are no tokens
MODEL = "--size custom --dim 32 --layers 2 --heads 2 --ffn-mult 2 --vocab-size 320 --seq-len 64 --batch-size 4 --steps 30 --sample-every 0"
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {folder}/choice.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
num_fewshot: 1
fewshot_split: train
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {folder}/rolling.jsonl}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {folder}/words.jsonl}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], do_sample: false, max_gen_toks: 24}}
metric_list: [{{metric: exact_match}}, {{metric: chrf}}]
"""
QUESTIONS = [
    {"query": f"The smith of village {n} strikes the", "choices": ["iron", "anvil of the sparks", "village"], "gold": n % 3}
    for n in range(12)
]
PASSAGES = ["Sparks flew over the anvil: é, 火. " * 9 + TEXT[:900], "Once", TEXT[300:420]]
PROMPTS = [{"prompt": f"Once the smith of village {n}", "answer": " struck the iron"} for n in range(5)]
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "SMEDJAN_NO_OPENBLAS": "1"}


def test_without_the_harness_what_to_install_is_told(tmp_path: Path):
    """In a process that cannot import it. The command's own checks come first."""
    code = "import sys; sys.modules['lm_eval'] = None\nfrom smedjan_common.evaluation.harness import model_class\nmodel_class()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'smedjan[lm-eval]'" in done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run, and tasks of each kind as YAML files over JSON lines."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra: lm-eval)")
    folder = tmp_path_factory.mktemp("harness")
    (folder / "my.txt").write_text(TEXT[:60_000])
    done = in_folder(folder, f"{sys.executable} -m smedjan_common.cli train my.txt --checkpoint-dir run {MODEL}")
    assert done.returncode == 0, done.stderr
    (folder / "tasks").mkdir()
    texts = [{"text": text} for text in PASSAGES]
    for name, form, rows in (("choice", CHOICE, QUESTIONS), ("rolling", ROLLING, texts), ("words", WORDS, PROMPTS)):
        (folder / "tasks" / f"{name}.yaml").write_text(form.format(folder=folder))
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, value in (QUIET | {"HF_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)


def by_smedjan(backend: str, place: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    load = __import__(f"smedjan_{backend}.eval", fromlist=["load"]).load
    words = [
        str(place / "run"),
        "--lm-eval",
        str(place / "tasks"),
        "--json",
        "--backend",
        backend,
        "--output",
        str(place / f"{backend}.json"),
    ]
    assert eval.run(backend, load, words) == 0
    return figures(json.loads((place / f"{backend}.json").read_text())["lm_eval"]["results"])


def figures(results: dict) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, row in results.items()
        for name, value in row.items()
        if isinstance(value, float) and "stderr" not in name
    }


def test_tasks_of_the_harness_give_the_same_figures_as_its_own_model(place: Path, capsys):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed; the harness's hf model needs it: lm-eval[hf]")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    done = in_folder(place, f"{sys.executable} -m convert run hf --to hf")
    assert done.returncode == 0, done.stderr
    ours, other = by_smedjan("jax", place, capsys), by_smedjan("mlx", place, capsys)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(place / "hf"), device="cpu", dtype="float32", batch_size=4),
        tasks=["choice", "rolling", "words"],
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    assert theirs
    expected = figures(theirs["results"])
    assert {"choice brier_score,none", "rolling bits_per_byte,none", "words chrf,none"} <= expected.keys()
    assert expected["words chrf,none"] > 1, "the answers have something in common, so that different ones would be seen"
    assert ours == pytest.approx(expected, rel=1e-5)
    assert other == pytest.approx(expected, rel=1e-5)


def test_an_unknown_task_is_told(place: Path, capsys):
    load = __import__("smedjan_jax.eval", fromlist=["load"]).load
    assert eval.run("jax", load, [str(place / "run"), "--lm-eval", str(place / "tasks" / "gone.yaml")]) == 2
    assert "has no task" in capsys.readouterr().err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
