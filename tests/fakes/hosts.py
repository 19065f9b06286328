"""Runs of several hosts for tests: real processes of this machine that meet over loopback, and whether they were as one process is."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.reporting.metrics import read_rows
from tests.conformance.compare import Difference, demand, tensors
from tests.conformance.gates import FLOAT32
from tests.fakes.runs import ROOT

PATIENCE = 900.0  # seconds; a machine may be busy with others


class Processes(list[subprocess.Popen]):
    """The hosts of a run, in order. `ended`: code, what is on standard output and on standard error, of each."""

    def ended(self) -> list[tuple[int, str, str]]:
        """Wait for all."""
        said = [process.communicate(timeout=PATIENCE) for process in self]
        return [(process.returncode, *words) for process, words in zip(self, said, strict=True)]

    def wait_until(self, holds: Callable[[], object]) -> None:
        """Wait for something that they bring about."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            if any(process.poll() is not None for process in self):
                self.kill()
                raise AssertionError(self.ended())
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        """End those that still run."""
        for process in self:
            process.kill()


def free_port() -> int:
    """One that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def begin(count: int, module: str, *words: object, of_host: dict[int, tuple[object, ...]] | None = None, slurm: bool = False) -> Processes:
    """Start `count` hosts of one run: `python -m module words … --coordinator … --num-hosts … --host-id …`, or without these flags as
    srun does, which tells a task in its environment. of_host: more words of one."""
    port, hosts = free_port(), Processes()
    quick = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"  # to compile for speed takes longer than it saves
    for index in range(count):
        by_hand = ("--coordinator", f"127.0.0.1:{port}", "--num-hosts", count, "--host-id", index)
        own = (*(() if slurm else by_hand), *(of_host or {}).get(index, ()))
        command = [sys.executable, "-m", module, *map(str, (*words, *own))]
        environment = os.environ | {"XLA_FLAGS": quick} | (_slurm(count, index, port) if slurm else {})
        hosts.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, encoding="utf-8", cwd=ROOT, env=environment))
    return hosts


def _slurm(count: int, index: int, port: int) -> dict[str, str]:
    """What Slurm tells a task of a job step with one task on each of its nodes, which are all this machine."""
    values = {"JOB_ID": 4711, "STEP_NODELIST": "localhost", "NTASKS": count, "STEP_NUM_NODES": count, "PROCID": index, "LOCALID": 0}
    return {f"SLURM_{name}": str(value) for name, value in values.items()} | {"JAX_COORDINATOR_PORT": str(port)}


LOSSES = ("loss", "balance_loss", "val_loss", "ce", "logps/chosen", "logps/rejected", "val_logps/chosen")
MARGINS = (
    "rewards/margins",
    "val_rewards/margins",
    "kl",
)  # differences of log-probabilities, which may be near 0 and are off by their size


def demand_the_same(got: Path, want: Path) -> None:
    """The figures of every step of two run folders, under the gates of 20-step runs."""
    found, sides = [], [read_rows(folder) for folder in (got, want)]
    for name, gate in {**dict.fromkeys((*LOSSES, *MARGINS), FLOAT32.steps_loss), "grad_norm": FLOAT32.steps_params}.items():
        ours, theirs = ({row["step"]: row[name] for row in rows if row.get(name) is not None} for rows in sides)
        assert list(ours) == list(theirs) or (name.startswith("val_") and ours.keys() > theirs.keys())  # each run validates at its end
        for step, value in theirs.items():
            off = abs(ours[step] - value) / (max(1.0, abs(value)) if name in MARGINS else abs(value) or 1.0)
            found.append(Difference(f"{name} {step}", off, gate))
    demand(found)


def demand_the_same_state(got: Path, want: Path) -> None:
    """Parameters and optimizers of the newest checkpoints of two run folders."""
    ours, theirs = (read_checkpoint(folder).snapshot for folder in (got, want))
    gate = FLOAT32.steps_params
    demand(tensors(ours.params, theirs.params, gate) + tensors(ours.optimizer, theirs.optimizer, gate))
