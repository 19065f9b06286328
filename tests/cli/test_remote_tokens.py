"""Token files at addresses: brought once, hash by hash; what is cut, changed or wrong is never taken for whole."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from smedjan_common import cli
from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError
from smedjan_common.files.hashing import file_hash
from smedjan_common.remote import reading, store
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.store import Door, Fault, put, s3

for package in ("s3fs", "moto", "flask"):
    pytest.importorskip(package, reason=f"needs the package {package}: pip install -e '.[remote,oracle]'")
pytestmark = pytest.mark.xdist_group("remote")

URL = "s3://bucket/tokens/train.bin"
NAMES = ("train.bin", "train.bin.offsets", "train.bin.json", "tokenizer.json")


@pytest.fixture(scope="module")
def bucket():
    with s3() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path, bucket: Door) -> None:
    monkeypatch.setenv("SMEDJAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(reading, "PART", 1 << 15)
    bucket.faults, bucket.seen = [], []


@pytest.fixture
def made(tmp_path, bucket: Door):
    """A token file of 300,000 tokens with its tokenizer, here and in the bucket."""
    folder = tmp_path / "made"
    folder.mkdir()
    text = folder / "a.txt"
    text.write_text("Some words, and some more words. " * 20)
    tokenizer = Tokenizer.train([str(text)], vocab_size=270)
    tokenizer.save(folder / "tokenizer.json")
    tokens = np.random.default_rng(5).integers(0, 270, 300_000).astype(np.uint16)
    with TokenFileWriter(folder / "train.bin", tokenizer.vocab_size, tokenizer.hash) as writer:
        writer.append(tokens, np.arange(0, 300_000, 1000), 900_000)
    send(bucket, folder)
    return folder


def send(bucket: Door, folder) -> None:
    for name in NAMES:
        put(bucket, f"tokens/{name}", (folder / name).read_bytes())


def in_cache(tmp_path) -> list[str]:
    """Whole files in the cache."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.startswith("."))


def gets(bucket: Door) -> int:
    return sum(method == "GET" and target.startswith("/bucket/tokens/train.bin") for method, target in bucket.seen)


@pytest.mark.parametrize("kind", ["", "500", "cut", "slow"])
def test_it_is_brought_once_and_is_the_same(made, bucket: Door, tmp_path, kind: str) -> None:
    bucket.faults = [Fault(kind, "GET", "train.bin", 3)] if kind else []
    file, own = TokenFile.open(URL), TokenFile.open(made / "train.bin")
    assert np.array_equal(file.tokens, own.tokens)
    assert file.documents is not None
    assert np.array_equal(file.documents, np.arange(0, 300_000, 1000))
    file.verify()
    assert in_cache(tmp_path) == sorted(NAMES)
    before = gets(bucket)
    assert TokenFile.open(URL).path == file.path
    assert gets(bucket) == before + 1  # the manifest


def test_a_download_that_broke_off_goes_on(made, bucket: Door, tmp_path) -> None:
    put(bucket, "tokens/train.bin.json", (made / "train.bin.json").read_bytes())
    whole = (made / "train.bin").stat().st_size // reading.PART
    bucket.faults = [Fault("", "GET", "train.bin", 8), Fault("cut", "GET", "train.bin", 99)]
    with pytest.raises(DataError, match="Cannot read"):
        TokenFile.open(URL)
    assert not in_cache(tmp_path)
    (part,) = (tmp_path / "cache").rglob(".train.bin.part")
    has = part.stat().st_size
    assert has > 3 * reading.PART
    bucket.faults, bucket.seen = [], []
    assert file_hash(TokenFile.open(URL).path) == file_hash(made / "train.bin")
    assert sum(target == "/bucket/tokens/train.bin" for method, target in bucket.seen if method == "GET") <= whole - has // reading.PART + 1


def test_a_killed_download_is_nothing_and_goes_on(made, bucket: Door, tmp_path) -> None:
    bucket.faults = [Fault("", "GET", "train.bin", 7), Fault("silent", "GET", "train.bin", 99)]
    code = "from smedjan_common.remote import reading; reading.PART = 1 << 15;" + (
        f"from smedjan_common.data.token_file import TokenFile; TokenFile.open({URL!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").rglob(".train.bin.part")) or gets(bucket) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert not in_cache(tmp_path)
    bucket.faults = []
    assert file_hash(TokenFile.open(URL).path) == file_hash(made / "train.bin")


def test_a_part_that_is_wrong_here_is_brought_anew(made, bucket: Door, tmp_path) -> None:
    path = TokenFile.open(URL).path
    path.rename(path.with_name(".train.bin.part"))
    path.with_name("train.bin.json").unlink()
    with open(path.with_name(".train.bin.part"), "r+b") as file:
        file.truncate(100_000)
        file.write(b"\0" * 50)
    assert file_hash(TokenFile.open(URL).path) == file_hash(made / "train.bin")


@pytest.mark.parametrize("name", ["train.bin", "train.bin.offsets"])
def test_what_is_not_as_its_manifest_says_is_refused(made, bucket: Door, tmp_path, name: str, capsys) -> None:
    data = bytearray((made / name).read_bytes())
    data[8] ^= 1
    put(bucket, f"tokens/{name}", bytes(data))
    assert cli.main(["hash", URL]) == 2
    assert f"s3://bucket/tokens/{name} is not what was written." in capsys.readouterr().err
    assert "train.bin.json" not in in_cache(tmp_path)
    assert name not in in_cache(tmp_path)
    put(bucket, f"tokens/{name}", (made / name).read_bytes())
    assert cli.main(["hash", URL]) == 0
    assert capsys.readouterr().out == f"{file_hash(made / 'train.bin')}  {URL}\n"


def test_other_tokens_at_the_address_are_other_files(made, bucket: Door) -> None:
    first = TokenFile.open(URL)
    with TokenFileWriter(made / "train.bin", 270, first.tokenizer_hash) as writer:
        writer.append(np.arange(200), np.array([0]), 400)
    send(bucket, made)
    assert TokenFile.open(URL).num_tokens == 200
    assert first.path.is_file()


def test_what_is_missing_is_named(made, bucket: Door, capsys) -> None:
    for url, expected in {
        "s3://bucket/none/train.bin": "There is no token file s3://bucket/none/train.bin.",
        "s3://bucket/cut/train.bin": "Cannot read s3://bucket/cut/train.bin.",
        "s3://bucket/odd/train.bin": "The manifest of s3://bucket/odd/train.bin cannot be read.",
    }.items():
        put(bucket, "cut/train.bin.json", (made / "train.bin.json").read_bytes())
        put(bucket, "odd/train.bin.json", b"{")
        assert cli.main(["hash", url]) == 2
        assert expected in capsys.readouterr().err


def test_commands_train_and_mix_on_it_and_a_run_records_the_address(made, bucket: Door, tmp_path, capsys) -> None:
    mixed = tmp_path / "mixed.bin"
    assert cli.main(["mix", "--shards", f"{URL}:1,{made / 'train.bin'}:1", "--output", str(mixed)]) == 0
    assert TokenFile.open(mixed).num_tokens > 300_000
    run = tmp_path / "run"
    shape = ["--size", "custom", "--dim", "16", "--layers", "1", "--heads", "2", "--seq-len", "16", "--batch-size", "2", "--steps", "1"]
    assert (
        cli.main(["train", "--dataset", f"{URL}:2", str(made / "train.bin"), *shape, "--checkpoint-dir", str(run), "--backend", "mlx"]) == 0
    )
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["dataset"] == [f"{URL}:2", str(made / "train.bin")]
    assert cli.main(["hash", "s3://bucket/tokens/tokenizer.json"]) == 0
    assert capsys.readouterr().out.split()[-2] == file_hash(made / "tokenizer.json")
