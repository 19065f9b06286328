"""A small model learns from a larger one: nearer to it than by the text alone, in both backends alike, and to the same bits when it was
stopped."""

import importlib
import shutil

import numpy as np
import pytest

from smedjan_common.commands import train
from smedjan_common.data.batches import batches
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import ConfigError
from smedjan_common.files.names import TRAIN_TOKENS
from smedjan_common.inference.open import open_model
from smedjan_common.reporting.metrics import read_rows, train_rows
from tests.conformance.gates import FLOAT32
from tests.fakes.runs import arrays, write_text

TEACHER = "--size custom --dim 32 --layers 2 --heads 2 --ffn-mult 1 --vocab-size 300 --steps 60 --lr 1e-2"
STUDENT = "--size custom --dim 16 --layers 1 --heads 2 --ffn-mult 1 --steps 30 --lr 1e-2 --grad-accum 2"
COMMON = "--seq-len 32 --batch-size 8 --val-fraction 0 --sample-every 0 --log-every 1 --checkpoint-every 20 --keep 0 --dtype float32"


def run(backend: str, words: str) -> None:
    """Train in this process with a real backend."""
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    assert train.run(backend, importlib.import_module(f"smedjan_{backend}.train").load, words.split()) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text and the run of a teacher on it."""
    folder = tmp_path_factory.mktemp("teacher_run")
    run("mlx", f"--dataset {write_text(folder)} --checkpoint-dir {folder / 'teacher'} {TEACHER} {COMMON}")
    return folder


def taught(folder, backend: str, name: str, more: str = ""):
    """The run folder of a student."""
    words = f"--dataset {folder / 'text.txt'} --teacher-checkpoint {folder / 'teacher'} --checkpoint-dir {folder / name}"
    run(backend, f"{words} {STUDENT} {COMMON} {more}")
    return folder / name


def column(folder, name: str) -> list[float]:
    return [row[name] for row in train_rows(read_rows(folder))]


@pytest.fixture(scope="module")
def student(folder):
    return taught(folder, "mlx", "student")


def test_a_student_comes_nearer_to_its_teacher_than_by_the_text_alone(folder, student):
    by_text = taught(folder, "mlx", "by_text", "--distill-alpha 1e-9")
    last = {run.name: sum(column(run, "kl")[-5:]) for run in (by_text, student)}
    assert last["student"] < 0.99 * last["by_text"], last
    assert column(student, "kl")[-1] < 0.7 * column(student, "kl")[0]


def test_what_is_told_is_the_loss(student):
    for loss, kl, ce in zip(*(column(student, name) for name in ("batch_loss", "kl", "ce")), strict=True):
        assert loss == pytest.approx(0.5 * (kl + ce), rel=1e-6)


def test_a_run_that_goes_on_has_the_same_bits(folder, student):
    stopped = folder / "stopped"
    shutil.copytree(student, stopped, ignore=shutil.ignore_patterns("step-00000030", "final"))
    run("mlx", f"--checkpoint-dir {stopped}")
    assert arrays(stopped) == arrays(student)
    assert column(stopped, "kl") == column(student, "kl")


def test_jax_learns_the_same(folder, student):
    other = taught(folder, "jax", "other")
    for name in ("kl", "ce", "grad_norm"):
        assert column(other, name)[:10] == pytest.approx(column(student, name)[:10], rel=1e-3)


@pytest.mark.parametrize("backend", ["mlx", "jax"])
def test_a_trainer_learns_from_a_teacher_as_the_command_does(folder, student, backend):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    trainer_of = importlib.import_module(f"smedjan_{backend}").trainer
    info, tokenizer = open_model(student)
    (data,) = (student / "data").glob(f"*/{TRAIN_TOKENS}")
    batch = batches(TokenFile.open(data), 32, 8, 0).batch(0)
    trainer = trainer_of(info.model, tokenizer, teacher=folder / "teacher", grad_accum=2)
    found, row = trainer.step(batch.inputs, batch.targets), train_rows(read_rows(student))[0]
    for name, told in (("loss", "batch_loss"), ("kl", "kl"), ("ce", "ce"), ("grad_norm", "grad_norm")):
        assert found[name] == pytest.approx(row[told], rel=FLOAT32.steps_loss if name != "grad_norm" else FLOAT32.steps_params), name
    assert trainer.evaluate(batch.inputs, batch.targets)["loss"] < row["ce"]
    if backend == "mlx":
        with pytest.raises(ConfigError, match="The batch has sequences of 33 tokens"):
            trainer.step(np.ones((2, 34), int))
        with pytest.raises(ConfigError, match="--distill-alpha is 0"):
            trainer_of(info.model, tokenizer, teacher=folder / "teacher", distill_alpha=0.0)
        with pytest.raises(ConfigError, match="distill_temperature would do nothing"):
            trainer_of(info.model, tokenizer, distill_temperature=2.0)
