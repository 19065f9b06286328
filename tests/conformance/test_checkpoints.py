"""A run survives its checkpoint: the same bits in the same backend, the same run within the gates when the other one takes over."""

import pathlib

import pytest

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, read_checkpoint, write_checkpoint
from tests.conformance import checks, rows, subjects
from tests.conformance.cases import STEPS, Case
from tests.conformance.compare import demand, demand_equal_bits

HALF = STEPS // 2


def through_a_file(directory: pathlib.Path, case: Case, snapshot: Snapshot, backend: str) -> Snapshot:
    """Write the snapshot as a checkpoint and read it back."""
    path = write_checkpoint(directory, snapshot, About(model=case.model, train=case.train, framework={"name": backend}))
    checkpoint = read_checkpoint(path)
    assert checkpoint.model == case.model
    assert checkpoint.train == case.train
    return checkpoint.snapshot


def first_half(backend: str, case: Case) -> Snapshot:
    return subjects.train(backend, case.model, case.train, case.start, case.batches[:HALF]).snapshot


def test_a_checkpoint_gives_back_every_bit(backend: str, case: Case, tmp_path: pathlib.Path):
    side = subjects.backend(backend, case.model, case.train)
    saved = rows.run(backend, case).snapshot
    read = through_a_file(tmp_path, case, saved, backend)
    restored = side.save(side.restore(read))
    for snapshot in (read, restored):
        assert snapshot.step == saved.step == STEPS
        demand_equal_bits(snapshot.params, saved.params)
        demand_equal_bits(snapshot.optimizer, saved.optimizer)


def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_run(backend: str, default_case: Case, tmp_path: pathlib.Path):
    case = default_case
    read = through_a_file(tmp_path, case, first_half(backend, case), backend)
    resumed = subjects.train(backend, case.model, case.train, read, case.batches[HALF:])
    whole = rows.run(backend, case)
    assert resumed.losses == whole.losses[HALF:]
    assert resumed.grad_norms == whole.grad_norms[HALF:]
    demand_equal_bits(resumed.snapshot.params, whole.snapshot.params)
    demand_equal_bits(resumed.snapshot.optimizer, whole.snapshot.optimizer)


@pytest.mark.parametrize(("first", "second"), [("jax", "mlx"), ("mlx", "jax")])
def test_a_run_handed_to_the_other_backend_is_the_same_run(
    both_backends, default_case: Case, first: str, second: str, tmp_path: pathlib.Path
):
    case = default_case
    read = through_a_file(tmp_path, case, first_half(first, case), first)
    handed = subjects.train(second, case.model, case.train, read, case.batches[HALF:])
    for owner in both_backends:
        whole = rows.run(owner, case)
        expected = subjects.Run(whole.losses[HALF:], whole.grad_norms[HALF:], whole.tokens[HALF:], whole.snapshot)
        demand(checks.runs(handed, expected, f"{first}, then {second}, against {owner}: "))


def test_a_run_handed_over_and_back_is_the_same_run(both_backends, default_case: Case, tmp_path: pathlib.Path):
    case, snapshot = default_case, None
    for turn, name in enumerate(("mlx", "jax", "mlx", "jax")):
        start = snapshot or case.start
        run = subjects.train(name, case.model, case.train, start, case.batches[turn * 5 : turn * 5 + 5])
        snapshot = through_a_file(tmp_path, case, run.snapshot, name)
    whole = rows.run("jax", case)
    demand(checks.runs(run, subjects.Run(*(part[15:] for part in whole[:3]), whole.snapshot)))
