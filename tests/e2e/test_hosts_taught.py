"""What a model is taught on several hosts, real processes on loopback: conversations beside adapters and a teacher, and preferences."""

import importlib
import json
import os
import signal

import numpy as np
import pytest

from smedjan_common.checkpoint import read_info
from smedjan_common.reporting.metrics import read_rows
from tests.conformance.gates import FLOAT32
from tests.fakes import models
from tests.fakes.hosts import begin, demand_the_same, demand_the_same_state
from tests.fakes.runs import saved_steps

pytestmark = [
    pytest.mark.skipif(os.environ.get("SMEDJAN_TEST_DEVICE") == "gpu", reason="hosts of the CPU"),
    pytest.mark.xdist_group("hosts"),
]
FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
STEADY = "--lr-schedule constant --warmup 2 --lr 1e-3 --log-every 1 --eval-every 3 --checkpoint-every 3 --sample-every 0 --val-fraction 0.3"
BATCH = "--batch-size 4 --grad-accum 2 --dtype float32"
SPLIT = {"jax": "--mesh fsdp=2", "mlx": ""}  # how two hosts share a model
LORA = "--lora-rank 2"


@pytest.fixture(scope="module", params=["jax", "mlx"])
def backend(request):
    """One with which hosts can speak to each other."""
    if request.param == "mlx" and not pytest.importorskip("mlx.core").distributed.is_available("ring"):
        pytest.skip("this build of MLX has no ring")
    pytest.importorskip(request.param if request.param == "jax" else "mlx.core")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a larger one, conversations and pairs of answers."""
    folder = tmp_path_factory.mktemp("hosts_taught")
    models.save_initial(folder / "base" / "final", 1, models.model(context_length=64))
    models.save_initial(folder / "teacher" / "final", 2, models.model(context_length=64, dim=32))
    asked = [f"the cat no. {n}?" for n in range(24)]
    rows = {
        "chats": [{"prompt": one, "completion": f"sat on mat {n}."} for n, one in enumerate(asked)],
        "pairs": [{"prompt": one, "chosen": f"sat on mat {n}.", "rejected": "ran off."} for n, one in enumerate(asked)],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder


def words(folder, what: str, run, steps: int, *more: str) -> list[str]:
    """A command line of sft or dpo."""
    where = f"{folder / what}.jsonl --pretrained {folder / 'base'} --checkpoint-dir {run} --steps {steps}"
    return " ".join((where, STEADY, BATCH, *more)).split()


def alone(backend: str, command: str, given: list[str]) -> None:
    """The same by one process, this one."""
    assert importlib.import_module(f"smedjan_{backend}.{command}").main(given) == 0


def stopped(hosts, run, number: int = signal.SIGTERM) -> int:
    """The step after which all hosts have stopped, saved, by a signal that reaches the last one."""
    hosts.wait_until(lambda: saved_steps(run))
    hosts[-1].send_signal(number)
    done = hosts.ended()
    assert [code for code, _, _ in done] == [128 + number] * len(hosts), done
    assert f"Stopped after step {saved_steps(run)[-1]} of " in done[0][1]
    assert not any(out for _, out, _ in done[1:]), "host 0 speaks for all"
    return saved_steps(run)[-1]


def scores(run) -> dict[str, np.ndarray]:
    """What the reference gave to the answers that are trained on and to those that are held out, whole, by file."""
    found = sorted((run / "data").glob("reference-*"))
    assert [path.suffix for path in found] == [".npy", ".npy"]
    return {path.name: np.load(path) for path in found}


def demand_the_same_scores(run, other) -> None:
    ours, theirs = scores(run), scores(other)
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[name], theirs[name], rtol=FLOAT32.steps_loss, atol=0) for name in ours)


def test_two_hosts_learn_answers_with_adapters_from_a_teacher_as_one_does(backend, folder, tmp_path):
    if backend == "jax" and not FULL:
        pytest.skip("make test-full")
    more = LORA, f"--teacher-checkpoint {folder / 'teacher'}"
    done = begin(2, f"smedjan_{backend}.sft", *words(folder, "chats", tmp_path / "run", 4, *more, SPLIT[backend])).ended()
    assert [code for code, _, _ in done] == [0, 0], done
    assert "which knows 300 of the tokens" in done[0][1]
    alone(backend, "sft", words(folder, "chats", tmp_path / "alone", 4, *more))
    demand_the_same(tmp_path / "run", tmp_path / "alone")
    demand_the_same_state(tmp_path / "run", tmp_path / "alone")
    assert read_info(tmp_path / "run" / "final").adapter
    assert all(row["kl"] > 0 for row in read_rows(tmp_path / "run") if "batch_loss" in row)


def test_two_hosts_learn_preferences_as_one_does_are_stopped_together_and_go_on_as_one(backend, folder, tmp_path):
    """The reference is asked by both, once; SIGTERM reaches host 1 alone; one process goes on and asks nobody."""
    run, more = tmp_path / "run", LORA if backend == "jax" else ""
    last = stopped(begin(2, f"smedjan_{backend}.dpo", *words(folder, "pairs", run, 100_000, more, SPLIT[backend])), run) + 2
    before = (run / "data").stat().st_mtime_ns
    alone(backend, "dpo", words(folder, "pairs", run, last, more))
    assert (run / "data").stat().st_mtime_ns == before
    alone(backend, "dpo", words(folder, "pairs", tmp_path / "alone", last, more))
    demand_the_same_scores(run, tmp_path / "alone")
    demand_the_same(run, tmp_path / "alone")
    demand_the_same_state(run, tmp_path / "alone")


@pytest.mark.skipif(not FULL, reason="make test-full")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("command", "what", "more"),
    [("dpo", "pairs", ""), ("sft", "chats", "--ema 0.9 --teacher-checkpoint {teacher}"), ("sft", "chats", LORA + " --pretrained {own}")],
    ids=["preferences", "a teacher", "adapters"],
)
def test_four_hosts_teach_as_one_does_and_two_and_one_go_on(backend, folder, tmp_path, command, what, more):
    """SIGINT reaches host 3; two hosts go on; one process ends it. With JAX weights come from Orbax and go there."""
    own, run = tmp_path / "own", tmp_path / "run"
    orbax = "--checkpoint-format orbax" if backend == "jax" else ""
    alone(backend, "sft", words(folder, "chats", own, 2, orbax))
    more = more.format(teacher=own / "orbax-00000002" if orbax else own, own=own / "orbax-00000002" if orbax else own) + " --batch-size 8"
    written, meshes = orbax if LORA not in more else "", ("--mesh data=2,fsdp=2", "--mesh tensor=2") if orbax else ("", "")
    hosts = begin(4, f"smedjan_{backend}.{command}", *words(folder, what, run, 100_000, more, written, meshes[0]))
    last = stopped(hosts, run, signal.SIGINT)
    done = begin(2, f"smedjan_{backend}.{command}", *words(folder, what, run, last + 2, more, written, meshes[1])).ended()
    assert [code for code, _, _ in done] == [0, 0], done
    alone(backend, command, words(folder, what, run, last + 4, more, "--checkpoint-format neutral"))
    alone(backend, command, words(folder, what, tmp_path / "alone", last + 4, more))
    demand_the_same(run, tmp_path / "alone")
    demand_the_same_state(run, tmp_path / "alone")
