"""One run on several hosts with MLX: real processes on loopback, whose sums go around a ring; mlx.launch starts them, or flags do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smedjan_common.errors import ConfigError
from smedjan_common.run.hosts import GRACE_SECONDS, Place
from tests.fakes.hosts import begin, demand_the_same, demand_the_same_state, free_port
from tests.fakes.runs import ROOT, arguments, saved_steps, write_text

mx = pytest.importorskip("mlx.core")
hosts_mlx = pytest.importorskip("smedjan_mlx.hosts")
train = pytest.importorskip("smedjan_mlx.train")

pytestmark = [
    pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this build of MLX has no ring"),
    pytest.mark.xdist_group("hosts"),
]
TRAIN = "smedjan_mlx.train"
STEADY = ("--lr-schedule", "constant", "--warmup", 2, "--lr", 1e-3, "--log-every", 1, "--eval-every", 3, "--checkpoint-every", 3)
EXPERTS = ("--ffn", "experts", "--experts", 4, "--experts-per-token", 2, "--grad-accum", 2, "--mask-documents", "--ema", 0.9)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def alone(text, folder, steps, *more):
    """The same run by one process, this one."""
    assert train.main([str(word) for word in arguments(text, folder, steps, *STEADY, *more)]) == 0


def test_two_hosts_of_mlx_launch_train_what_one_does(text, tmp_path):
    """Experts, whose balance is one of all hosts; parts of a step; documents; a moving average."""
    words = [str(word) for word in arguments(text, tmp_path / "run", 6, *STEADY, *EXPERTS)]
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring", "--starting-port", str(free_port())]
    command = [*launch, "--", sys.executable, "-m", TRAIN, *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mlx on 2 x " in done.stdout
    assert done.stdout.count("Done: 6 steps") == 1
    alone(text, tmp_path / "alone", 6, *EXPERTS)
    demand_the_same(tmp_path / "run", tmp_path / "alone")
    demand_the_same_state(tmp_path / "run", tmp_path / "alone")


def test_a_signal_on_one_stops_both_and_a_killed_one_ends_the_other(text, tmp_path):
    """By flags. SIGINT reaches host 1; then two start again, and host 0 is killed; one process ends the run."""
    run = tmp_path / "run"
    hosts = begin(2, TRAIN, *arguments(text, run, 100_000, *STEADY))
    hosts.wait_until(lambda: saved_steps(run))
    hosts[1].send_signal(signal.SIGINT)
    (code, out, err), (other, silent, _) = hosts.ended()
    assert (code, other, silent) == (130, 130, ""), err
    stopped = saved_steps(run)[-1]
    assert f"Stopped after step {stopped} of 100000 by SIGINT" in out

    hosts = begin(2, TRAIN, *arguments(text, run, 100_000, *STEADY))
    hosts.wait_until(lambda: saved_steps(run)[-1] > stopped)
    hosts[0].kill()
    begun = time.monotonic()
    code, out, err = hosts.ended()[1]
    assert time.monotonic() - begun < GRACE_SECONDS + 10
    assert (code, out) == (5, ""), err
    assert "error: Host 0 of the run is lost." in err

    last = saved_steps(run)[-1] + 2
    alone(text, run, last)
    alone(text, tmp_path / "alone", last)
    demand_the_same(run, tmp_path / "alone")
    demand_the_same_state(run, tmp_path / "alone")


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "[]"}, None),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": '[["10.0.0.1:5000"], ["10.0.0.2:5001"]]'}, (Place("10.0.0.1:5002", 1, 2), "ring")),
        (
            {"MLX_RANK": "2", "MLX_JACCL_COORDINATOR": "10.0.0.1:5000", "MLX_IBV_DEVICES": "[[null], [null], [null]]"},
            (Place("10.0.0.1:5001", 2, 3), "jaccl"),
        ),
    ],
    ids=["alone", "one of one", "ring", "jaccl"],
)
def test_the_place_of_a_process_is_what_mlx_launch_says(environment, found, monkeypatch, tmp_path):
    for name in ("MLX_RANK", "MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "MLX_IBV_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        if value.startswith("["):
            (tmp_path / name).write_text(value)
            value = str(tmp_path / name)
        monkeypatch.setenv(name, value)
    assert hosts_mlx._launched() == found


def test_a_ring_that_cannot_be_read_does_not_train_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "nothing"))
    monkeypatch.delenv("MLX_JACCL_COORDINATOR", raising=False)
    with pytest.raises(ConfigError, match="one of several hosts of"):
        hosts_mlx._launched()
