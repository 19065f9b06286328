"""How long a run will take, and from where that is known: its own rows, a few steps that are measured, or the data sheet of the device."""

import statistics
import time
from typing import NamedTuple

import numpy as np

from smedjan_common.backend import Backend, Device
from smedjan_common.errors import OutOfMemoryError
from smedjan_common.model.params import draw
from smedjan_common.reporting.console import duration, flop
from smedjan_common.reporting.metrics import read_rows, train_rows
from smedjan_common.run.decided import Decided
from smedjan_common.training.objectives import OBJECTIVES

ASSUMED_MFU = 0.4  # of a GPU whose peak is known; what runs reach is in docs/performance.md
MEASURED = 3  # steps of the probe, after the one that compiles
PROBED = 400e9  # FLOP of a step up to which it is measured: seconds on a slow CPU


class Expected(NamedTuple):
    """seconds: of the steps that are left, evaluations and checkpoints not counted; None: not known. why: from where, or why not."""

    seconds: float | None
    why: str

    def __str__(self) -> str:
        return self.why if self.seconds is None else f"about {duration(self.seconds)} {self.why}"


def so_far(decided: Decided, device: Device) -> Expected | None:
    """By the rows of the run that goes on; None where it has none of this device."""
    start = decided.start
    if start is None or start.framework.get("device") != device.name or start.framework.get("name") != device.backend:
        return None
    speeds = [row["tokens_per_second"] for row in train_rows(read_rows(start.path.parent)) if row.get("tokens_per_second")]
    return Expected(_left(decided) / statistics.median(speeds), "at the speed of its steps so far") if speeds else None


def expected(decided: Decided, device: Device, backend: Backend) -> Expected:
    """By the first that is there; a probe computes a few steps on random tokens, and keeps nothing."""
    if known := so_far(decided, device):
        return known
    train = decided.train
    work = decided.flops_per_token * train.batch_size * train.seq_len
    if device.peak_flops and device.kind == "gpu":
        seconds = work / (device.peak_flops * device.count * ASSUMED_MFU)
        steps = _left(decided) / (train.batch_size * train.seq_len)
        return Expected(steps * seconds, f"at {100 * ASSUMED_MFU:.0f} % of the device's data sheet, assumed; the run measures it")
    if work > PROBED:
        return Expected(None, f"not known: a step is {flop(work)}, too much to try; the run tells it after its first steps")
    try:
        seconds = _probe(decided, backend)
    except OutOfMemoryError:
        return Expected(None, "not known: a step found too little memory")
    steps = _left(decided) / (train.batch_size * train.seq_len)
    return Expected(steps * seconds, f"by {MEASURED} steps that were measured, {seconds:.2g} s each")


def _left(decided: Decided) -> float:
    """Tokens to come."""
    done = decided.start.step if decided.start else 0
    return max(0, decided.train.steps - done) * decided.train.batch_size * decided.train.seq_len


def _probe(decided: Decided, backend: Backend) -> float:
    """Seconds of a step: the median of a few, each waited for."""
    train = decided.train
    shape = train.batch_size if backend.rows is None else len(backend.rows), train.seq_len
    tokens = np.random.default_rng(0).integers(0, decided.model.vocab_size, shape, dtype=np.int32)
    documents, reference = np.zeros(shape, np.int32) if train.mask_documents else None, None
    if OBJECTIVES[train.objective].unit == "pairs":  # two answers of half a row
        documents = np.broadcast_to(np.arange(train.seq_len, dtype=np.int32) * 2 // train.seq_len, shape)
        reference = np.zeros((shape[0], 2), np.float32)
    if decided.teacher:  # drawn like the model: how long it takes does not depend on the weights
        backend.learn_from(decided.teacher.model, draw(decided.teacher.model, train.seed)[0], decided.teacher.known)
    state, took = backend.init(draw(decided.model, train.seed)[0]), []
    for _ in range(1 + MEASURED):
        begun = time.perf_counter()
        state, metrics = backend.train_step(state, tokens, tokens, 0.0, documents, reference)
        backend.read(metrics)
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])
