"""The same bytes wherever the workers are, however many, and whichever of them are lost. The cluster is tests/fakes/ray_here.py; a real one
is in tests/e2e/test_ray_cluster.py."""

import inspect
import json
import random
import sys
from pathlib import Path

import pytest

from smedjan_common import cli, ray_workers
from smedjan_common.errors import ConfigError, WorkerError
from smedjan_common.ray_workers import RayWorkers
from smedjan_common.text import blocks, dedup, records
from tests.fakes.ray_here import RayHere

SMALL = 1 << 13  # bytes of a bundle
WORDS = [f"word{number}" for number in range(4000)]
FILES = ("t.json", "p.jsonl", "log.jsonl", "d.jsonl", "x.bin", "x.bin.offsets", "x.bin.json", "v.bin")


def texts(folder: Path, times: int = 1) -> Path:
    """A file of documents, with repeats and near ones; `times` as many."""
    drawn = random.Random(7)
    rows = [{"text": " ".join(drawn.choices(WORDS, k=drawn.randint(30, 120)))} for _ in range(700 * times)]
    rows += [dict(row) for row in rows[:90]]  # exact repeats
    rows += [{"text": row["text"] + " more"} for row in rows[100:200]]  # near ones
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def make(text: Path, out: Path, *flags: str) -> dict[str, bytes]:
    """What the four commands write."""
    out.mkdir()

    def smedjan(*words: object) -> None:
        assert cli.main([*map(str, words), *flags]) == 0

    smedjan("tokenizer", text, "--vocab-size", "600", "--output", out / "t.json")
    smedjan("process", text, "--rules", "gopher_words", "--output", out / "p.jsonl", "--log", out / "log.jsonl")
    smedjan("dedup", text, "--output", out / "d.jsonl")
    smedjan(
        "prepare", text, "--tokenizer", out / "t.json", "--output", out / "x.bin", "--val-output", out / "v.bin", "--val-fraction", "0.1"
    )
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> RayHere:
    """A cluster of three cores. Bundles, lots and what is many are small."""
    found = RayHere()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(ray_workers, "LOT_BYTES", 40_000)
    monkeypatch.setattr(dedup, "_MANY", 100)
    monkeypatch.setattr(records, "_CHUNK", SMALL)
    for function, values in ((blocks.blocks, {"size": SMALL}), (blocks.bundles, {"size": SMALL})):
        parameters = [p for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
        monkeypatch.setattr(function, "__defaults__", tuple(values.get(p.name, p.default) for p in parameters))
    return found


def test_the_same_bytes_from_processes_and_from_a_cluster_that_loses_workers(ray: RayHere, tmp_path) -> None:
    text = texts(tmp_path)
    here = make(text, tmp_path / "one", "--workers", "1")
    assert (here["p.jsonl"].count(b"\n"), here["d.jsonl"].count(b"\n")) == (709, 700)
    ray.deaths = {2, 11, 20, 40, 55, 70, 90, 120, 300, 420}
    assert make(text, tmp_path / "cluster", "--executor", "ray") == here
    assert ray.lost >= 6
    assert not ray.begun
    assert make(text, tmp_path / "one-there", "--executor", "ray", "--workers", "1") == here
    assert make(text, tmp_path / "three", "--workers", "3") == here


def test_what_gathers_counts_every_item_once_whichever_call_is_lost(ray: RayHere) -> None:
    for number in range(1, 30):
        ray.calls, ray.deaths = 0, {number, number + 7}
        with RayWorkers("tests.cli.test_executors:Sum", (), 2) as pool:
            items = [[Lump(bytes(9_000), value)] for value in range(20)]
            assert list(pool.map(items)) == list(range(20))
            assert sum(pool.finish()) == sum(range(20)), number


def test_workers_that_are_lost_again_and_again_are_an_error_that_leaves_nothing(ray: RayHere, tmp_path, capsys) -> None:
    ray.always = True
    out = tmp_path / "p.jsonl"
    assert cli.main(["process", str(texts(tmp_path)), "--output", str(out), "--executor", "ray"]) == WorkerError.exit_code
    assert "Workers of the cluster end again and again." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_workers_that_are_lost_before_they_begin_are_begun_again_and_those_that_cannot_begin_are_an_error(ray: RayHere) -> None:
    ray.stillborn = 4
    with RayWorkers("tests.cli.test_executors:Sum", (), 2) as pool:
        assert list(pool.map([[Lump(b"", value)] for value in range(9)])) == list(range(9))
        assert pool.finish()
    ray.stillborn = 1000
    with pytest.raises(WorkerError, match="do not start"), RayWorkers("tests.cli.test_executors:Sum", (), 2) as pool:
        list(pool.map([[Lump(b"", 1)]]))


def test_a_machine_with_other_versions_is_refused(ray: RayHere, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ray_workers.about()
    monkeypatch.setattr(ray_workers.Remote, "about", lambda self: here | {"regex": "1999"})
    with (
        pytest.raises(WorkerError, match="Results may differ: regex 1999 there"),
        RayWorkers("tests.cli.test_executors:Sum", (), 1) as pool,
    ):
        list(pool.map([[Lump(b"", 1)]]))


def test_refusals_of_workers_are_those_of_this_process(ray: RayHere, tmp_path, capsys) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    said = []
    for flags in ((), ("--executor", "ray")):
        assert cli.main(["process", str(tmp_path / "b.jsonl"), "--output", str(tmp_path / "o.jsonl"), *flags]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'smedjan\[ray\]'"):
        RayWorkers("tests.cli.test_executors:Sum", (), 1)


class Lump:
    """An item: bytes, and a number."""

    def __init__(self, data: bytes, value: int):
        self.data, self.value = data, value


class Sum:
    """A worker that gathers."""

    def __init__(self) -> None:
        self._total = 0

    def __call__(self, item: list[Lump]) -> int:
        self._total += item[0].value
        return item[0].value

    def finish(self) -> int:
        return self._total

    @staticmethod
    def merge(parts: list[int]) -> int:
        return sum(parts)
