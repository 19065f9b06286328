"""Runs that do not fit: what is refused, with what advice, and that the advice is true. The machine's memory and disk are said here."""

import collections
import dataclasses
import re

import pytest

from smedjan_common.backend import Device
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import OutOfMemoryError
from smedjan_common.model.presets import PRESETS
from smedjan_common.run import room
from smedjan_common.run.given import parse
from smedjan_common.run.room import check_disk, check_memory, needed, new_checkpoints, smaller_models
from smedjan_common.training.memory import PROCESS_BYTES, state_bytes

GIB = 1 << 30
CPU = Device("jax", "cpu", "cpu", versions={"jax": "0.11.2"})
GPU = Device("jax", "gpu", "NVIDIA H100 80GB HBM3", memory_bytes=70 * GIB, versions={"jax": "0.11.2"})
MLX = Device("mlx", "cpu", "cpu", versions={"mlx": "0.32.4"})
TINY = ModelConfig.preset("tiny", context_length=2048)
TRAIN = TrainConfig(steps=1000, batch_size=8, seq_len=2048, lr=1e-3)


@pytest.fixture
def memory(monkeypatch):
    """Sets what the machine has left."""
    return lambda found: monkeypatch.setattr(room, "available_memory", lambda: found)


def check(model: ModelConfig, train: TrainConfig, device: Device = CPU, resumed: bool = False, smaller=dict, force: bool = False):
    said = []
    check_memory(model, train, device, resumed=resumed, smaller=smaller, force=force, say=said.append)
    return said


def test_plain_attention_at_8_times_2048_counts_its_scores_and_is_refused_on_7_gib(memory):
    assert 7.5 * GIB < needed(TINY, TRAIN, CPU) < 9 * GIB  # XLA lays out 8.0, the process takes 8.8
    memory(7 * GIB)
    with pytest.raises(OutOfMemoryError, match=r"about \d+\.\d GiB of memory, and 7\.0 GiB are there") as caught:
        check(TINY, TRAIN)
    assert caught.value.exit_code == 3
    assert "8 x 2048 tokens" in caught.value.why


@pytest.mark.parametrize("device", [CPU, MLX], ids=["jax", "mlx"])
def test_what_fits_is_taken(memory, device: Device):
    memory(needed(TINY, TRAIN, device))
    assert check(TINY, TRAIN, device) == []
    memory(None)  # a system that does not say
    assert check(TINY, TRAIN, device) == []


def advice(error: OutOfMemoryError) -> list[tuple[dict[str, str], str]]:
    """The flags of each line, and the memory that it names."""
    lines = [re.split(r"  +about ", line.strip().removesuffix(", the same result")) for line in error.fix.splitlines()[1:]]
    return [(dict(re.findall(r"--(\S+) (\S+)", flags)), said) for flags, said in lines]


@pytest.mark.parametrize("device", [CPU, MLX, GPU], ids=["jax", "mlx", "gpu"])
def test_each_line_of_the_advice_makes_the_run_fit_and_says_what_it_takes(memory, device: Device):
    model = ModelConfig.preset("medium", context_length=2048)
    there = needed(model, TRAIN, device) // 3
    memory(there if device.kind == "cpu" else 100 * GIB)
    device = dataclasses.replace(device, memory_bytes=there)
    flags, _ = parse(["--size", "medium", "--seq-len", "2048"])
    with pytest.raises(OutOfMemoryError) as caught:
        check(model, TRAIN, device, smaller=lambda: smaller_models(flags, model.vocab_size))
    found = advice(caught.value)
    same = [line for line in caught.value.fix.splitlines() if line.endswith(", the same result")]
    assert same == [line for line in caught.value.fix.splitlines()[1:] if "--grad" in line]
    assert next(iter(found[0][0])) == "grad-accum"  # the same result at the least cost comes first
    assert {"grad-accum", "gradient-checkpointing", "batch-size", "seq-len", "size"} <= {name for line, _ in found for name in line}
    for line, said in found:
        values = {name.replace("-", "_"): int(value) if value.isdecimal() else value for name, value in line.items()}
        other = ModelConfig.preset(values.pop("size"), context_length=2048) if "size" in values else model
        changed = dataclasses.replace(TRAIN, **values)
        changed.validate()
        assert needed(other, changed, device) <= there
        assert said == room.size(needed(other, changed, device))


def test_a_smaller_step_than_the_advice_does_not_fit(memory):
    memory(needed(TINY, TRAIN, CPU) // 3)
    with pytest.raises(OutOfMemoryError) as caught:
        check(TINY, TRAIN)
    parts = int(advice(caught.value)[0][0]["grad-accum"])
    memory(needed(TINY, dataclasses.replace(TRAIN, grad_accum=parts // 2), CPU) - 1)
    with pytest.raises(OutOfMemoryError):
        check(TINY, dataclasses.replace(TRAIN, grad_accum=parts // 2))


def test_a_run_that_goes_on_is_not_told_to_change_the_order_of_its_data(memory):
    memory(needed(TINY, TRAIN, CPU) // 3)
    with pytest.raises(OutOfMemoryError) as caught:
        check(TINY, TRAIN, resumed=True, smaller=lambda: {"tiny": TINY})
    names = {name for line, _ in advice(caught.value) for name in line}
    assert names
    assert not names & {"batch-size", "seq-len", "size"}


def test_gradient_checkpointing_is_no_advice_where_the_compiler_undoes_it(memory):
    old = dataclasses.replace(CPU, versions={"jax": "0.10.2"})
    memory(needed(TINY, TRAIN, old) // 3)
    with pytest.raises(OutOfMemoryError) as caught:
        check(TINY, TRAIN, old)
    assert not any(set(line) == {"gradient-checkpointing"} for line, _ in advice(caught.value))


def test_devices_of_a_cpu_share_the_memory_of_the_machine():
    two = dataclasses.replace(CPU, count=2, mesh="data=2")
    once, half = state_bytes(TINY, TRAIN) + PROCESS_BYTES["jax"], dataclasses.replace(TRAIN, batch_size=4)
    assert needed(TINY, TRAIN, two) - once == 2 * (needed(TINY, half, CPU) - once)


def test_advice_for_a_batch_of_a_billion_takes_no_walk_over_it(memory):
    memory(needed(TINY, TRAIN, CPU))
    with pytest.raises(OutOfMemoryError) as caught:
        check(TINY, dataclasses.replace(TRAIN, batch_size=735_134_400))  # 1344 divisors
    assert int(advice(caught.value)[0][0]["grad-accum"]) > 735_134_400 // 9


def test_where_no_single_change_helps_the_error_says_so(memory):
    memory(1 << 20)
    with pytest.raises(OutOfMemoryError, match="No single change makes it fit"):
        check(TINY, TRAIN)


def test_force_goes_on_with_a_note(memory):
    memory(GIB)
    assert [line for line in check(TINY, TRAIN, force=True) if line.startswith("note: The run needs about")]


def test_a_gpu_is_held_against_its_own_memory_and_the_machine_against_the_copy_for_checkpoints(memory):
    memory(GIB)
    model = ModelConfig.preset("medium", context_length=2048)
    short = dataclasses.replace(TRAIN, dtype="bfloat16")
    check(model, short, GPU)
    large = ModelConfig.preset("xl", context_length=2048)
    with pytest.raises(OutOfMemoryError, match="the machine's memory"):
        check(large, short, GPU)
    with pytest.raises(OutOfMemoryError, match=r"and 1\.0 GiB are there"):
        check(model, short, dataclasses.replace(GPU, memory_bytes=GIB))


def test_a_gpu_that_shares_the_memory_of_the_machine_has_no_more_than_is_left_of_it(memory):
    metal = Device("mlx", "gpu", "Apple M4 Max", memory_bytes=48 * GIB, shares_memory=True)
    memory(2 * GIB)
    assert room.room(metal) == 2 * GIB
    memory(60 * GIB)
    assert room.room(metal) == 48 * GIB


def test_only_smaller_presets_that_can_be_are_tried():
    flags, _ = parse(["--size", "large", "--heads", "16"])
    assert list(smaller_models(flags, 8192)) == list(reversed(list(PRESETS)[: list(PRESETS).index("large")]))
    assert smaller_models(parse(["--size", "custom"])[0], 8192) == {}


@pytest.mark.parametrize(
    ("numbers", "count"),
    [
        # begin, steps, every, keep, keep_every, there
        ((0, 1000, 100, 3, 0, 0), 4),  # the newest three and the one that is being written
        ((0, 200, 100, 3, 0, 0), 2),  # there are no more
        ((0, 1000, 0, 3, 0, 0), 1),
        ((0, 1000, 300, 0, 0, 0), 4),  # all: 300, 600, 900, 1000
        ((0, 1000, 100, 3, 500, 0), 5),  # 500 for ever
        ((0, 1000, 100, 1, 100, 0), 10),  # every one, for ever
        ((500, 1000, 100, 3, 0, 3), 1),  # those that are there go one by one
        ((1000, 1000, 100, 3, 0, 3), 0),
        ((0, 10**15, 1, 3, 0, 0), 4),
    ],
)
def test_the_checkpoints_that_are_there_at_one_time_are_counted(numbers: tuple[int, ...], count: int):
    assert new_checkpoints(*numbers) == count


def disk(monkeypatch, tmp_path, free: float, force: bool = False, **options):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage(1 << 60, 0, int(free)))
    said = []
    saving = {"begin": 0, "checkpoint_every": 100, "keep": 3, "keep_every": 0} | options
    check_disk(tmp_path / "new" / "run", TINY, TRAIN, **saving, force=force, say=said.append)
    return said


def test_a_disk_that_holds_keep_and_one_more_is_enough_and_a_smaller_one_is_refused(monkeypatch, tmp_path):
    one, final = state_bytes(TINY, TRAIN), state_bytes(TINY, TRAIN) // 3
    assert disk(monkeypatch, tmp_path, 4 * one + final) == []
    with pytest.raises(OutOfMemoryError, match="4 new ones") as caught:
        disk(monkeypatch, tmp_path, 4 * one + final - 1)
    assert caught.value.exit_code == 3
    assert "--checkpoint-dir" in caught.value.fix
    assert disk(monkeypatch, tmp_path, 2 * one + final, keep=1) == []
    assert "of disk" in disk(monkeypatch, tmp_path, one, force=True)[0]


def test_keeping_all_needs_room_for_all(monkeypatch, tmp_path):
    with pytest.raises(OutOfMemoryError, match="--keep 0, which keeps all, 10 new ones"):
        disk(monkeypatch, tmp_path, 9 * state_bytes(TINY, TRAIN), keep=0)


@pytest.mark.parametrize(
    ("free", "options", "advised"),
    [
        (9, {"keep": 0}, "--keep 7"),  # seven, the one being written and final/
        (2.5, {"keep": 0}, "--keep 1"),
        (1.5, {"keep": 0}, None),  # not even one and the one being written
        (4, {}, "--keep 2"),
        (1.5, {}, None),
        (3, {"keep": 1, "keep_every": 100}, "a higher --keep-every"),
        (1.5, {"keep": 1, "keep_every": 100}, None),  # nor without any that stays for ever
    ],
)
def test_only_what_fits_on_the_disk_is_advised(monkeypatch, tmp_path, free, options, advised):
    with pytest.raises(OutOfMemoryError) as caught:
        disk(monkeypatch, tmp_path, free * state_bytes(TINY, TRAIN), **options)
    assert f"or take {f'{advised}, ' if advised else ''}another disk" in caught.value.fix


def test_one_checkpoint_that_does_not_fit_is_one_and_a_run_that_goes_on_keeps_its_size(monkeypatch, tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"1 new one of .* is there at one time") as caught:
        disk(monkeypatch, tmp_path, 1, begin=900)
    assert "--size" not in caught.value.fix
    with pytest.raises(OutOfMemoryError, match="--size"):
        disk(monkeypatch, tmp_path, 1)
