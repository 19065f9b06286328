"""`--teacher-checkpoint`: which teacher a run can have, what it says of it, and how it goes on with the same one."""

import json
import shutil

import numpy as np
import pytest

from smedjan_common.checkpoint import read_checkpoint, read_info
from smedjan_common.commands import sft
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.reporting.metrics import read_rows, train_rows
from smedjan_common.run.teacher import Teacher
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.cluster import Cluster, cost, hardware
from smedjan_common.training.memory import teacher_bytes, training_bytes
from smedjan_common.training.mesh import MeshShape
from tests.fakes import bigram
from tests.fakes.runs import arguments, train_here, write_text

SMALLER = ("--dim", 8, "--log-every", 1)


class Backend(bigram.BigramBackend):
    """Remembers what it was given to learn from."""

    taught = None

    def learn_from(self, teacher, params, known):
        super().learn_from(teacher, params, known)
        Backend.taught = teacher, params, known


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and the run of a teacher on it."""
    folder = tmp_path_factory.mktemp("teacher")
    assert train_here(*arguments(write_text(folder), folder / "teacher", 6, "--seq-len", 64)) == 0
    return folder


def words(folder, run: str, steps: int = 4, *more: object) -> list[str]:
    return [*arguments(folder / "text.txt", folder / run, steps, *SMALLER, "--teacher-checkpoint", folder / "teacher"), *map(str, more)]


@pytest.fixture(scope="module")
def student(folder):
    """A run that learned from the teacher, with a checkpoint on the way."""
    assert train_here(*words(folder, "student", 4, "--checkpoint-every", 2), backend=Backend) == 0
    return folder / "student"


def test_a_student_has_the_tokenizer_of_its_teacher_and_learns_half_from_it(folder, student):
    info = read_info(student / "final")
    assert info.tokenizer_hash == read_info(folder / "teacher").tokenizer_hash
    assert (info.train.distill_alpha, info.train.distill_temperature, info.model.dim) == (0.5, 1.0, 8)
    model, params, known = Backend.taught
    assert (model.dim, known) == (16, info.model.vocab_size)
    np.testing.assert_array_equal(params["embed.weight"], read_checkpoint(folder / "teacher" / "final").snapshot.params["embed.weight"])
    rows = train_rows(read_rows(student))
    assert all({"kl", "ce"} <= row.keys() for row in rows)
    assert not {"kl", "ce"} & train_rows(read_rows(folder / "teacher"))[0].keys()


def test_checkpoints_and_config_say_who_taught(folder, student):
    weights = read_info(folder / "teacher" / "final").files["model.safetensors"].sha256
    said = {"path": str(folder / "teacher" / "final"), "weights": weights}
    assert read_info(student / "final").extra["teacher"] == said
    assert read_info(student / "step-00000002").extra["teacher"] == said
    assert json.loads((student / "config.json").read_text())["flags"]["teacher_checkpoint"] == str(folder / "teacher")


def test_the_console_shows_kl_and_ce(folder, tmp_path, capsys):
    assert train_here(*words(folder, str(tmp_path / "run"), 2, "--distill-alpha", 0.25, "--distill-temperature", 2)) == 0
    told = capsys.readouterr().out
    assert f"Learning from {folder / 'teacher' / 'final'} too." in told
    assert "alpha 0.25, temperature 2" in told
    assert "  kl 0." in told
    assert "  ce " in told


def test_a_dry_run_counts_the_teacher(folder, tmp_path, capsys):
    plans = []
    for more in ([], ["--teacher-checkpoint", folder / "teacher"]):
        run = [
            *arguments(folder / "text.txt", tmp_path / "run", 4, *SMALLER),
            "--tokenizer",
            folder / "teacher" / "final" / "tokenizer.json",
        ]
        assert train_here(*run, *more, "--dry-run") == 0
        plans.append(capsys.readouterr().out)
    assert "teacher" not in plans[0]
    assert f"teacher  {folder / 'teacher' / 'final'}, " in plans[1]
    memory = [next(line for line in each.splitlines() if line.startswith("memory")) for each in plans]
    assert memory[0] != memory[1]


def test_a_run_goes_on_with_its_teacher_wherever_that_is_now(folder, student, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(student, run)
    assert train_here("--checkpoint-dir", run, "--steps", 5, backend=Backend) == 0
    assert train_rows(read_rows(run))[-1]["kl"] > 0
    shutil.copytree(folder / "teacher", tmp_path / "elsewhere")
    assert train_here("--checkpoint-dir", run, "--steps", 6, "--teacher-checkpoint", tmp_path / "elsewhere") == 0
    assert read_info(run / "final").extra["teacher"]["path"] == str(tmp_path / "elsewhere" / "final")
    shutil.rmtree(tmp_path / "elsewhere")
    capsys.readouterr()
    assert train_here("--checkpoint-dir", run, "--steps", 7) == 2
    told = capsys.readouterr().err
    assert "The teacher of this run cannot be read" in told
    assert "--teacher-checkpoint PATH" in told


def test_a_finished_run_whose_teacher_is_gone_says_that_it_is_done(folder, student, capsys):
    (folder / "teacher").rename(folder / "away")
    try:
        for more in ((), ("--distill-alpha", 0.5)):
            assert train_here("--checkpoint-dir", student, *more) == 0
            assert "Done already" in capsys.readouterr().out
        assert train_here("--checkpoint-dir", student, "--steps", 5) == 2
        assert "The teacher of this run cannot be read" in capsys.readouterr().err
        assert train_here("--checkpoint-dir", student, "--teacher-checkpoint", folder / "teacher") == 2
    finally:
        (folder / "away").rename(folder / "teacher")


def test_another_teacher_than_the_one_that_it_began_with_is_refused(folder, student, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(student, run)
    assert train_here(*arguments(folder / "text.txt", tmp_path / "other", 2)) == 0
    capsys.readouterr()
    assert train_here("--checkpoint-dir", run, "--steps", 6, "--teacher-checkpoint", tmp_path / "other") == 2
    assert "is not the teacher of this run" in capsys.readouterr().err
    assert train_here("--checkpoint-dir", tmp_path / "other", "--steps", 6, "--teacher-checkpoint", folder / "teacher") == 2
    assert "has no teacher. A run goes on with what it began with." in " ".join(capsys.readouterr().err.split())


def test_its_share_may_change_on_the_way_and_is_told(student, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(student, run)
    assert train_here("--checkpoint-dir", run, "--steps", 5, "--distill-alpha", 0.75) == 0
    assert "distill_alpha: 0.5 in the checkpoint, 0.75 now" in capsys.readouterr().out
    assert read_info(run / "final").train.distill_alpha == 0.75


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--distill-alpha", 0), "Nothing would be learned from the teacher"),
        (("--distill-alpha", 1.5), "--distill-alpha is 1.5"),
        (("--distill-temperature", 0), "--distill-temperature is 0"),
        (("--seq-len", 128), "has a context of 64 tokens, and sequences have 128"),
        (("--teacher-checkpoint", "nowhere"), "There is no checkpoint nowhere"),
        (("--vocab-size", 400), "does not fit the tokenizer of"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused(folder, tmp_path, capsys, more, what):
    assert train_here(*words(folder, str(tmp_path / "run"), 4, *more)) == 2
    assert what in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["--distill-alpha", "--distill-temperature"])
def test_options_of_a_teacher_do_nothing_without_one(folder, tmp_path, capsys, name):
    assert train_here(*arguments(folder / "text.txt", tmp_path / "run", 2, name, 0.7)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"{name} would do nothing. It is read with --teacher-checkpoint PATH only." in told


def test_a_teacher_of_another_tokenizer_is_refused(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("zinc and tin and brass and bronze\n" * 300)
    assert train_here(*arguments(tmp_path / "text.txt", tmp_path / "other", 2)) == 0
    tokenizer = tmp_path / "other" / "final" / "tokenizer.json"
    capsys.readouterr()
    assert train_here(*words(folder, str(tmp_path / "run"), 2), "--tokenizer", tokenizer, "--vocab-size", 274) == 2
    assert "has another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_a_student_with_tokens_for_turns_learns_from_a_teacher_without(folder, tmp_path):
    rows = [{"prompt": f"cat no. {n}?", "completion": f"It sat on mat {n}."} for n in range(24)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [tmp_path / "chats.jsonl", "--pretrained", folder / "teacher", "--teacher-checkpoint", folder / "teacher"]
    given += ["--checkpoint-dir", tmp_path / "chat", *"--steps 2 --batch-size 2 --sample-every 0 --val-fraction 0".split()]
    assert sft.run("fake", lambda deterministic: (Backend, "float32"), [str(word) for word in given]) == 0
    model, params, known = Backend.taught
    old, new = Tokenizer.load(folder / "teacher" / "final"), Tokenizer.load(tmp_path / "chat" / "final")
    assert (known, model.vocab_size) == (old.vocab_size, new.vocab_size) == (old.vocab_size, old.vocab_size + 2)
    np.testing.assert_allclose(params["embed.weight"][known], params["embed.weight"][:known].mean(0), rtol=1e-5)


def test_a_teacher_of_more_tokens_gives_the_rows_of_the_student(folder):
    info = read_info(folder / "teacher" / "final")
    model = ModelConfig(**vars(info.model) | {"vocab_size": 70})
    found = Teacher(info, model, 300, 70).weights(None)
    whole = read_checkpoint(folder / "teacher" / "final").snapshot.params
    np.testing.assert_array_equal(found["embed.weight"], whole["embed.weight"][: model.padded_vocab_size])
    assert found.keys() == whole.keys()


def test_memory_and_plans_count_the_teacher():
    student = ModelConfig.preset("small", 32000)
    teacher = ModelConfig.preset("medium", 32000)
    train = TrainConfig(steps=1, batch_size=16, seq_len=1024, lr=1e-3, dtype="bfloat16", distill_alpha=0.5)
    alone, taught = (training_bytes(student, train, teacher=each) for each in (None, teacher))
    assert 2 * teacher.num_params() < teacher_bytes(teacher, train) < 2.01 * teacher.num_params()
    assert alone + 2 * teacher.num_params() < taught
    cluster = Cluster(hardware("h100"), 8, 8, 50e9)
    one, both = (cost(student, train, MeshShape(data=2, fsdp=4), cluster, each) for each in (None, teacher))
    assert both.compute > one.compute
    assert both.needed > one.needed
    assert both.traffic["fsdp"].bytes > one.traffic["fsdp"].bytes
    assert both.traffic["data"] == one.traffic["data"]
