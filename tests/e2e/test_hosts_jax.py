"""One run on several hosts with JAX: real processes on loopback, whose arrays travel by gloo."""

import os
import signal
import time

import pytest

import smedjan_jax.train
from smedjan_common.model.mixers import MIXERS
from smedjan_common.run.hosts import GRACE_SECONDS
from tests.fakes.hosts import begin, demand_the_same, demand_the_same_state
from tests.fakes.runs import arguments, saved_steps, write_text

pytestmark = [
    pytest.mark.skipif(os.environ.get("SMEDJAN_TEST_DEVICE") == "gpu", reason="hosts of the CPU"),
    pytest.mark.xdist_group("hosts"),
]
FULL = pytest.mark.skipif(os.environ.get("SMEDJAN_TEST_FULL") != "1", reason="make test-full")
TRAIN = "smedjan_jax.train"
STEADY = ("--lr-schedule", "constant", "--warmup", 2, "--lr", 1e-3, "--log-every", 1, "--eval-every", 4, "--checkpoint-every", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def alone(text, folder, steps, *more):
    """The same run by one process, this one."""
    assert smedjan_jax.train.main([str(word) for word in arguments(text, folder, steps, *STEADY, *more)]) == 0


def test_two_hosts_train_what_one_does_are_stopped_together_and_go_on_as_one(text, tmp_path):
    """Started as by srun; matrices split over the hosts, Orbax written by both; SIGTERM reaches host 1 alone; one process goes on."""
    run = tmp_path / "run"
    hosts = begin(2, TRAIN, *arguments(text, run, 100_000, *STEADY, "--mesh", "fsdp=2", "--checkpoint-format", "orbax"), slurm=True)
    hosts.wait_until(lambda: saved_steps(run))
    hosts[1].send_signal(signal.SIGTERM)
    (code, out, err), (other, silent, _) = hosts.ended()
    assert (code, other, silent) == (143, 143, ""), err
    last = saved_steps(run)[-1]
    assert "2 x cpu, float32, mesh fsdp=2" in out
    assert f"Stopped after step {last} of 100000 by SIGTERM" in out
    assert f"saved {run}/orbax-{last:08d}" in out

    alone(text, run, last + 2, "--checkpoint-format", "neutral")
    alone(text, tmp_path / "alone", last + 2)
    demand_the_same(run, tmp_path / "alone")
    demand_the_same_state(run, tmp_path / "alone")


def test_a_killed_host_ends_the_other_and_both_go_on(text, tmp_path):
    """kill -9 of host 0, at which everything of JAX hangs; then two start again, with samples, to the end."""
    run = tmp_path / "run"
    hosts = begin(2, TRAIN, *arguments(text, run, 100_000, *STEADY))
    hosts.wait_until(lambda: saved_steps(run))
    hosts[0].kill()
    begun = time.monotonic()
    code, out, err = hosts.ended()[1]
    assert time.monotonic() - begun < GRACE_SECONDS + 10
    assert (code, out) == (5, "")
    assert "error: Host 0 of the run is lost." in err
    assert "Start all hosts again with the same command" in err

    last = saved_steps(run)[-1] + 3
    done = begin(2, TRAIN, *arguments(text, run, last, *STEADY, "--sample-every", 100_000, "--sample-tokens", 2)).ended()
    assert [code for code, _, _ in done] == [0, 0], done
    assert "  | " in done[0][1]
    assert (run / "final" / "model.safetensors").exists()
    alone(text, tmp_path / "alone", last)
    demand_the_same(run, tmp_path / "alone")
    demand_the_same_state(run, tmp_path / "alone")


def test_hosts_that_were_told_different_things_end_with_a_sentence_before_jax_is_there(text, tmp_path):
    words = arguments(text, tmp_path / "run", 4, *STEADY)
    done = begin(2, TRAIN, *words, of_host={1: ("--seed", 7)}).ended()
    assert [(code, out) for code, out, _ in done] == [(2, "")] * 2
    for _, _, err in done:
        assert "error: Host 1 differs from host 0 in --seed." in err
        assert "Start all hosts with the same command" in err
    assert not (tmp_path / "run").exists()


SIZES = ("--ssm-head-dim", 16, "--rwkv-head-dim", 8, "--block-size", 4)
EVERY = ("--mixer", ",".join(MIXERS), "--layers", len(MIXERS), *SIZES)
EXPERTS = ("--ffn", "experts", "--experts", 4, "--experts-per-token", 2, "--optimizer", "muon", "--ema", 0.9, "--grad-accum", 2)


@FULL
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("mesh", "model"), [("data=2,fsdp=2", EVERY), ("fsdp=2,tensor=2", EXPERTS), ("data=4", EXPERTS)], ids=str)
def test_four_hosts_train_what_one_does_and_two_and_one_go_on(text, tmp_path, mesh, model):
    """SIGINT reaches host 3; two hosts with another mesh go on; one process ends it."""
    run, words = tmp_path / "run", (*STEADY, "--batch-size", 8, *model)
    hosts = begin(4, TRAIN, *arguments(text, run, 100_000, *words, "--mesh", mesh, "--checkpoint-format", "orbax"))
    hosts.wait_until(lambda: saved_steps(run))
    hosts[3].send_signal(signal.SIGINT)
    done = hosts.ended()
    assert [code for code, _, _ in done] == [130] * 4, done
    last = saved_steps(run)[-1]
    done = begin(2, TRAIN, *arguments(text, run, last + 2, *words, "--mesh", "tensor=2")).ended()
    assert [code for code, _, _ in done] == [0] * 2, done
    alone(text, run, last + 4, *words, "--checkpoint-format", "neutral")
    alone(text, tmp_path / "alone", last + 4, *words)
    demand_the_same(run, tmp_path / "alone")
    demand_the_same_state(run, tmp_path / "alone")


@FULL
@pytest.mark.parametrize("index", [1, 3])
def test_a_killed_host_of_four_ends_the_others(text, tmp_path, index):
    hosts = begin(4, TRAIN, *arguments(text, tmp_path / "run", 100_000, *STEADY, "--mesh", "fsdp=4"))
    hosts.wait_until(lambda: saved_steps(tmp_path / "run"))
    hosts[index].kill()
    begun = time.monotonic()
    done = hosts.ended()
    assert time.monotonic() - begun < GRACE_SECONDS + 15
    for other, (code, _, err) in enumerate(done):
        assert other == index or (code == 5 and f"error: Host {index} of the run is lost." in err), done
