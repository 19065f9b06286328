"""Runs at an address: sent behind the training and gone on with elsewhere; whatever is cut on the way, nothing half is taken for whole."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from smedjan_common import cli
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import (
    About,
    SavedTokenizer,
    find_checkpoints,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
    write_final,
)
from smedjan_common.checkpoint.mirror import Mirror, checkpoints_there, mirrored
from smedjan_common.checkpoint.pulled import checkpoint_here, pull
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import parameter_table
from smedjan_common.remote import reading, store
from smedjan_common.remote.address import Address
from smedjan_common.remote.store import Place
from tests.fakes.store import Door, Fault, put, s3

for package in ("s3fs", "moto", "flask"):
    pytest.importorskip(package, reason=f"needs the package {package}: pip install -e '.[remote,oracle]'")
pytestmark = pytest.mark.xdist_group("remote")

MODEL = ModelConfig(vocab_size=256, dim=32, layers=1, heads=2, kv_heads=2, ffn_dim=64)
ABOUT = About(model=MODEL, tokenizer=SavedTokenizer("{}", "t"), framework={})
NUMBER = iter(range(1000))


@pytest.fixture(scope="module")
def bucket():
    with s3() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, bucket: Door) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(reading, "PART", 1 << 15)
    bucket.faults, bucket.seen = [], []


@pytest.fixture
def place(bucket: Door) -> Place:
    """An address that nothing is at."""
    return Place(f"s3://bucket/run-{next(NUMBER)}")


def snapshot(step: int, value: float | None = None) -> Snapshot:
    full = float(step if value is None else value)
    params = {name: np.full(spec.shape, full, np.float32) for name, spec in parameter_table(MODEL).items()}
    return Snapshot(step, params, {f"mu.{name}": array for name, array in params.items()})


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(folder, snapshot(step), ABOUT)
    (folder / "config.json").write_text(json.dumps({"versions": {"smedjan": "0"}}))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1.0, "tokens": n}) + "\n" for n in range(1, steps[-1] + 1))
    )


@contextlib.contextmanager
def sending(place: Place, folder: Path, keep: int = 3, keep_every: int = 0, lines: list | None = None):
    with mirrored(place.address, folder, (lines if lines is not None else []).append) as mirror:
        assert mirror
        mirror.claim(keep, keep_every)
        yield mirror


def pulled(place: Place, folder: Path, lines: list | None = None) -> list[int]:
    """The steps that a machine that has nothing gets, every byte of them compared."""
    pull(Mirror(place, folder, print), (lines if lines is not None else []).append)
    return [verify_checkpoint(path).step for _, path in find_checkpoints(folder)]


@pytest.mark.parametrize("kind", ["", "500", "cut upload", "silent", "slow"])
def test_all_of_a_run_is_sent_whatever_happens_once(place: Place, bucket: Door, tmp_path, kind: str, monkeypatch) -> None:
    monkeypatch.setenv("SMEDJAN_REMOTE_TIMEOUT", "0.7")
    save(tmp_path / "run", 10, 20)
    write_final(tmp_path / "run", snapshot(20), ABOUT)
    bucket.faults = [Fault(kind, "PUT", name, 1) for name in ("model.safetensors", "checkpoint.json", "metrics.jsonl")] if kind else []
    with sending(place, tmp_path / "run"):
        pass
    assert not any(fault.times for fault in bucket.faults)
    assert checkpoints_there(place) == ["step-00000010", "step-00000020", "final"]
    assert pulled(place, tmp_path / "there") == [20]
    for name in ("config.json", "metrics.jsonl", "step-00000020/model.safetensors"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_large_files_go_in_parts_and_a_part_that_failed_goes_again(place: Place, bucket: Door, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "_WHOLE", 1 << 20)
    monkeypatch.setattr(store, "_PART", 5 << 20)
    file = tmp_path / "large"
    file.write_bytes(np.random.default_rng(1).bytes(12 << 20))
    bucket.faults = [Fault("500", "PUT", "partNumber=2", 1), Fault("cut upload", "PUT", "partNumber=3", 1)]
    (place / "large").send(file)
    assert (place / "large").read_all() == file.read_bytes()
    parts = [target.split("partNumber=")[1][0] for method, target in bucket.seen if "partNumber=" in target]
    assert parts == ["1", "2", "2", "3", "3"]
    bucket.faults = [Fault("cut upload", "PUT", "partNumber=2", 99)]
    with pytest.raises(Exception, match="Cannot write"):
        (place / "other").send(file)
    assert (place / "other").stat_if_there() is None


def test_an_upload_that_fails_leaves_the_one_before_and_the_next_start_sends_it(place: Place, bucket: Door, tmp_path) -> None:
    run, lines = tmp_path / "run", []
    save(run, 10)
    with sending(place, run, keep=1):
        pass
    save(run, 20)
    bucket.faults = [Fault("500", "PUT", "step-00000020/optimizer.safetensors", 99)]
    with pytest.raises(CheckpointError, match="is not all at"), sending(place, run, keep=1, lines=lines):
        pass
    assert any("It is tried again with the next checkpoint" in line for line in lines)
    assert checkpoints_there(place) == ["step-00000010"]
    assert pulled(place, tmp_path / "there") == [10]
    bucket.faults = []
    with sending(place, run, keep=1):
        pass
    assert checkpoints_there(place) == ["step-00000020"]
    assert not [name for name in place.files() if name.startswith("step-00000010")]


def test_what_keep_keeps_stays_though_this_machine_has_only_the_newest(place: Place, tmp_path) -> None:
    save(tmp_path / "run", 10, 20, 30, 40)
    with sending(place, tmp_path / "run", keep=2, keep_every=10):
        pass
    assert pulled(place, tmp_path / "other") == [40]
    save(tmp_path / "other", 50)
    with sending(place, tmp_path / "other", keep=2, keep_every=20):
        pass
    assert checkpoints_there(place) == ["step-00000020", "step-00000040", "step-00000050"]


def test_a_checkpoint_that_is_written_anew_is_not_whole_before_all_of_it_is_there(place: Place, bucket: Door, tmp_path) -> None:
    run = tmp_path / "run"
    save(run, 10, 20)
    with sending(place, run):
        pass
    write_checkpoint(run, snapshot(20, 7.0), ABOUT)
    bucket.faults = [Fault("500", "PUT", "step-00000020/optimizer.safetensors", 99)]
    with pytest.raises(CheckpointError), sending(place, run):
        pass
    assert pulled(place, tmp_path / "there") == [10]


def test_a_killed_upload_is_nothing(place: Place, bucket: Door, tmp_path) -> None:
    run = tmp_path / "run"
    save(run, 10)
    with sending(place, run):
        pass
    save(run, 20)
    bucket.faults, bucket.seen = [Fault("silent", "PUT", "step-00000020/optimizer.safetensors", 99)], []
    code = (
        "import sys; from pathlib import Path; from smedjan_common.checkpoint.mirror import Mirror;"
        "from smedjan_common.remote.store import Place;"
        "mirror = Mirror(Place(sys.argv[1]), Path(sys.argv[2]), print); mirror.claim(1, 0); mirror.finish()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(place), str(run)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any("step-00000020/optimizer" in target for method, target in bucket.seen if method == "PUT"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    bucket.faults = []
    assert pulled(place, tmp_path / "there") == [10]


def test_a_damaged_checkpoint_there_is_left_out_for_the_one_before(place: Place, bucket: Door, tmp_path) -> None:
    save(tmp_path / "run", 10, 20)
    with sending(place, tmp_path / "run"):
        pass
    name = f"{str(place).rpartition('/')[2]}/step-00000020/model.safetensors"
    data = bytearray((tmp_path / "run" / "step-00000020" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    put(bucket, name, bytes(data))
    lines: list[str] = []
    assert pulled(place, tmp_path / "there", lines) == [10]
    assert any("is not what was written" in line for line in lines)
    assert not [path for path in (tmp_path / "there").iterdir() if path.name.startswith(".pull")]


def test_a_name_that_leads_out_of_the_checkpoint_is_not_followed(place: Place, bucket: Door, tmp_path) -> None:
    save(tmp_path / "run", 10, 20)
    with sending(place, tmp_path / "run"):
        pass
    manifest = json.loads((tmp_path / "run" / "step-00000020" / "checkpoint.json").read_text())
    manifest["files"]["../../../escaped"] = {"bytes": 1, "sha256": "0"}
    put(bucket, f"{str(place).rpartition('/')[2]}/step-00000020/checkpoint.json", json.dumps(manifest).encode())
    assert pulled(place, tmp_path / "there") == [10]
    assert not list(tmp_path.rglob("escaped*"))


def test_a_pull_that_broke_off_goes_on(place: Place, bucket: Door, tmp_path) -> None:
    save(tmp_path / "run", 10)
    with sending(place, tmp_path / "run"):
        pass
    bucket.faults = [Fault("cut", "GET", "step-00000010/optimizer.safetensors", 99)]
    with pytest.raises(Exception, match="Cannot read"):
        pulled(place, tmp_path / "there")
    assert not find_checkpoints(tmp_path / "there")
    bucket.faults, bucket.seen = [], []
    assert pulled(place, tmp_path / "there") == [10]
    assert not [target for method, target in bucket.seen if method == "GET" and "model.safetensors" in target]


def test_what_a_reference_gave_to_pairs_goes_along_and_is_not_computed_again(place: Place, tmp_path) -> None:
    save(tmp_path / "a", 1)
    name = f"reference-{'0123' * 4}.npy"
    (tmp_path / "a" / "data").mkdir()
    (tmp_path / "a" / "data" / name).write_bytes(b"scores")
    (tmp_path / "a" / "data" / "else.npy").write_bytes(b"nobody's")
    with sending(place, tmp_path / "a"):
        pass
    assert pulled(place, tmp_path / "b") == [1]
    assert (tmp_path / "b" / "data" / name).read_bytes() == b"scores"
    assert not (tmp_path / "b" / "data" / "else.npy").exists()


def test_who_starts_later_takes_the_run_over(place: Place, tmp_path) -> None:
    save(tmp_path / "run", 10)
    first = Mirror(place, tmp_path / "run", print)
    first.claim(3, 0)
    while checkpoints_there(place) != ["step-00000010"]:
        first.put()
        time.sleep(0.02)
    assert pulled(place, tmp_path / "other") == [10]
    with sending(place, tmp_path / "other"):
        save(tmp_path / "run", 20)
        with pytest.raises(CheckpointError, match="Another process writes the run"):
            first.finish()
    assert checkpoints_there(place) == ["step-00000010"]


def test_a_folder_of_another_run_is_refused(place: Place, tmp_path) -> None:
    save(tmp_path / "run", 10)
    with sending(place, tmp_path / "run"):
        pass
    for name in place.files():
        (place / name).remove()
    save(tmp_path / "new", 5)
    with sending(place, tmp_path / "new"):
        pass
    with pytest.raises(CheckpointError, match="is of another run than"):
        pulled(place, tmp_path / "run")
    with pytest.raises(ConfigError, match="takes no checkpoints"), mirrored(Address("https://host/run"), tmp_path, print):
        pass


def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(place: Place, bucket: Door, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "a.txt").write_text("The smith strikes the iron while it is hot. " * 60)
    shape = "--size custom --dim 16 --layers 1 --heads 2 --seq-len 16 --batch-size 2 --vocab-size 270 --checkpoint-every 2 --keep 2"
    shape = [*shape.split(), *"--warmup 0 --lr-schedule constant --log-every 1 --sample-every 0 --eval-every 0".split()]
    text = str(tmp_path / "a.txt")

    def train(steps: int, folder: str, *more: str) -> int:
        return cli.main(["train", *more, "--checkpoint-dir", folder, "--steps", str(steps), "--backend", "mlx"])

    assert train(9, str(tmp_path / "plain"), text, *shape) == 0
    monkeypatch.setenv("SMEDJAN_CACHE", str(tmp_path / "one"))
    bucket.faults = [Fault("500", "PUT", "step-00000004", 2), Fault("cut upload", "PUT", "metrics.jsonl", 1)]
    assert train(6, str(place), text, *shape) == 0
    assert checkpoints_there(place) == ["step-00000004", "step-00000006", "final"]
    monkeypatch.setenv("SMEDJAN_CACHE", str(tmp_path / "two"))
    (tmp_path / "a.txt").unlink()
    shutil.rmtree(tmp_path / "one")
    bucket.faults = [Fault("cut", "GET", "model.safetensors", 2)]
    assert train(9, str(place)) == 0
    assert f"sent {place}/final" in capsys.readouterr().out
    assert checkpoints_there(place) == ["step-00000008", "step-00000009", "final"]
    (run,) = (path.parent for path in (tmp_path / "two").rglob("config.json"))
    ours, plain = (read_checkpoint(folder / "step-00000009").snapshot for folder in (run, tmp_path / "plain"))
    for mine, theirs in ((ours.params, plain.params), (ours.optimizer, plain.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    assert cli.main(["generate", str(place), "--prompt", "The", "--max-tokens", "2", "--backend", "mlx"]) == 0
    there = [json.loads(line) for line in (place / "metrics.jsonl").read_all().decode().splitlines()]
    assert [row["loss"] for row in there if row.get("loss")] == losses(tmp_path / "plain")


def test_weights_at_an_address_are_opened(place: Place, bucket: Door, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SMEDJAN_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "run", 10, 20)
    write_final(tmp_path / "run", snapshot(20), ABOUT)
    save(tmp_path / "run", 30)
    with sending(place, tmp_path / "run"):
        pass
    for url, step in ((f"{place}", 30), (f"{place}/final", 20), (f"{place}/step-00000010", 10)):
        for _ in range(2):
            assert read_checkpoint(checkpoint_here(url)).step == step
    assert checkpoint_here(f"{place}", step=True).name == "step-00000030"
    (place / "step-00000030" / "checkpoint.json").remove()
    assert checkpoint_here(str(place)).name == "final"
    name = f"{str(place).rpartition('/')[2]}/step-00000020/model.safetensors"
    put(bucket, name, bytes((tmp_path / "run" / "step-00000020" / "model.safetensors").stat().st_size))
    with pytest.warns(match="is not what was written"), pytest.raises(CheckpointError, match="is damaged"):
        checkpoint_here(f"{place}/step-00000020")
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        checkpoint_here("s3://bucket/nothing")
    assert checkpoint_here("runs/mine") == Path("runs/mine")


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row.get("loss")]
