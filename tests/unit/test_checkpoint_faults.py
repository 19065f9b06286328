"""Wrong files: each is refused with the file, the tensor and the reason, as CheckpointError and nothing else; never a part is loaded."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smedjan_common.checkpoint import latest_checkpoint, read_checkpoint, read_info, verify_checkpoint
from smedjan_common.checkpoint.manifest import manifest_hash
from smedjan_common.errors import CheckpointError
from tests.unit.test_checkpoint import assert_same, flip, sample_snapshot, write

FILES = ("checkpoint.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a good step 1 and a step 3 to spoil."""
    write(tmp_path, 1)
    write(tmp_path, 3)
    return tmp_path


def sign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change checkpoint.json as one would who knows the format: with a right hash."""
    values = json.loads((path / "checkpoint.json").read_text())
    change(values)
    values["sha256"] = manifest_hash(values)
    (path / "checkpoint.json").write_text(json.dumps(values))


def replace_header(path: Path, change: Callable[[dict[str, Any]], Any] | bytes, name: str = "model.safetensors") -> None:
    """Change the header of a safetensors file, and make size and hash of the file right in a right checkpoint.json."""
    raw = (path / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if callable(change):
        entries = json.loads(raw[8 : 8 + length])
        entries = change(entries) or entries
        header = json.dumps(entries).encode()
    else:
        header = change
    replace_file(path, name, len(header).to_bytes(8, "little") + header + raw[8 + length :])


def replace_file(path: Path, name: str, raw: bytes) -> None:
    """Other bytes, which checkpoint.json says are right."""
    (path / name).write_bytes(raw)
    sign(path, lambda values: values["files"].update({name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}))


def truncate(path: Path, size: int) -> None:
    """Cut a file short."""
    with open(path, "rb+") as file:
        file.truncate(size)


def link(path: Path) -> None:
    """Put a symbolic link to the same bytes in place of a file."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    """The same tensor under another name, in file and manifest."""

    def change(path: Path) -> None:
        replace_header(path, lambda entries: entries.update({new: entries.pop(old)}))
        sign(path, lambda v: v["tensors"]["model.safetensors"].update({new: v["tensors"]["model.safetensors"].pop(old)}))

    return change


def entry(**changes: Any) -> Callable[[Path], None]:
    """Change what the header says of norm.weight."""
    return lambda path: replace_header(path, lambda entries: entries["norm.weight"].update(changes))


def value(key: str, new: Any) -> Callable[[Path], None]:
    """Change a value of checkpoint.json, `a/b` being "b" inside "a"."""

    def change(values: dict[str, Any]) -> None:
        *parents, last = key.split("/")
        for parent in parents:
            values = values[parent]
        values[last] = new

    return lambda path: sign(path, change)


def pickled(path: Path) -> None:
    """What torch.save and pickle leave."""
    (path / "model.safetensors").write_bytes(pickle.dumps(sample_snapshot().params))


# name -> (how step 3 is spoiled, what the message must say)
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut in a tensor": (lambda p: truncate(p / "model.safetensors", 4000), r"model\.safetensors is cut short: layers\.0\.\S+ is the first"),
    "cut by a byte": (
        lambda p: truncate(p / "optimizer.safetensors", (p / "optimizer.safetensors").stat().st_size - 1),
        r"nu\.norm\.weight",
    ),
    "cut in the header": (lambda p: truncate(p / "model.safetensors", 20), r"cut short: embed\.weight"),
    "empty file": (lambda p: truncate(p / "model.safetensors", 0), r"model\.safetensors is cut short"),
    "grown": (lambda p: (p / "model.safetensors").open("ab").write(b"x"), r"model\.safetensors is too long"),
    "bit in a tensor": (lambda p: flip(p / "model.safetensors", -2), r"model\.safetensors is damaged in norm\.weight"),
    "bit in the header": (lambda p: flip(p / "model.safetensors", 9), r"model\.safetensors"),
    "bit in the padding": (lambda p: flip(p / "optimizer.safetensors", 7, 0x80), r"optimizer\.safetensors has no safetensors header"),
    "bit in the tokenizer": (lambda p: flip(p / "tokenizer.json", 5), r"tokenizer\.json is damaged"),
    "tokenizer cut": (lambda p: truncate(p / "tokenizer.json", 5), r"tokenizer\.json is damaged"),
    "tokenizer not text": (lambda p: replace_file(p, "tokenizer.json", b"\xff\xfe"), r"not UTF-8"),
    "no manifest": (lambda p: (p / "checkpoint.json").unlink(), r"checkpoint\.json is missing"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no optimizer": (lambda p: (p / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "broken JSON": (lambda p: truncate(p / "checkpoint.json", 400), r"checkpoint\.json is not readable JSON"),
    "JSON not UTF-8": (lambda p: (p / "checkpoint.json").write_bytes(b"\xff{}"), r"not readable JSON"),
    "JSON a list": (lambda p: (p / "checkpoint.json").write_text("[1]"), r"not readable JSON"),
    "JSON too deep": (lambda p: (p / "checkpoint.json").write_text("[" * 100_000), r"not readable JSON"),
    "JSON key twice": (lambda p: (p / "checkpoint.json").write_text('{"step": 1, "step": 2}'), r"key 'step' appears twice"),
    "JSON of others": (lambda p: (p / "checkpoint.json").write_text('{"format": "pt"}'), r"does not belong to a smedjan checkpoint"),
    "JSON NaN": (lambda p: sign_text(p, '"step": 3', '"step": NaN'), r"damaged, or was edited"),
    "edited step": (lambda p: sign_text(p, '"lr": 0.001', '"lr": 0.002'), r"damaged, or was edited"),
    "newer format": (value("format_version", 2), r"checkpoint format 2.*Install a newer smedjan"),
    "older format": (value("format_version", 0), r"checkpoint format 0"),
    "version a bool": (value("format_version", True), r"does not belong to"),
    "unknown key": (value("shards", 4), r"keys 'shards' are missing or unknown"),
    "other step": (value("step", 4), r"is of step 4"),
    "negative step": (value("step", -1), r"\"step\" is -1"),
    "step a float": (value("step", 3.0), r"\"step\" is 3\.0"),
    "other width": (value("model/dim", 16), r"embed\.weight has shape \(64, 8\), the model needs \(64, 16\)"),
    "more layers": (value("model/layers", 2), r"layers\.1\.mixer_norm\.weight is missing"),
    "endless layers": (value("model/layers", 16_000_000), r"16,000,000 layers"),
    "absurd number": (value("model/dim", 10**30), r"ModelConfig\.dim"),
    "width a text": (value("model/dim", "8"), r"ModelConfig\.dim is 8"),
    "heads that do not divide": (value("model/heads", 3), r"--heads 3"),
    "unknown mixer": (value("model/mixer", ["warp"]), r"'warp' is unknown"),
    "unknown model field": (value("model/warp", 9), r"no field 'warp'"),
    "dataset a list": (value("dataset", []), r"\"dataset\" is \[\]"),
    "file over there": (
        lambda p: sign(p, lambda v: v["files"].update({"../../etc/passwd": v["files"]["model.safetensors"]})),
        r"names \.\./",
    ),
    "path in tensor names": (rename_tensor("norm.weight", "../../evil"), r"norm\.weight is missing"),
    "missing tensor": (lambda p: replace_header(p, lambda e: drop(e, "norm.weight")), r"lacks the tensor norm\.weight"),
    "extra tensor": (lambda p: replace_header(p, lambda e: e.update({"x": e["norm.weight"]})), r"has an extra tensor 'x'"),
    "missing everywhere": (lambda p: sign(p, lambda v: v["tensors"]["model.safetensors"].pop("norm.weight")), r"norm\.weight is missing"),
    "misshaped tensor": (entry(shape=[2, 4]), r"norm\.weight in \S+ has shape \[2, 4\]"),
    "optimizer of nothing": (lambda p: sign(p, lambda v: drop_file(v, "optimizer.safetensors")), r"\"optimizer\" is 'adamw'"),
    "wrong dtype": (entry(dtype="I32"), r"norm\.weight in \S+ has dtype 'I32'"),
    "dtype of the manifest": (value("tensors/model.safetensors/norm.weight/dtype", "F64"), r"norm\.weight"),
    "overlap": (entry(data_offsets=[0, 32]), r"has data_offsets"),
    "offsets backwards": (entry(data_offsets=[64, 32]), r"data_offsets"),
    "offsets huge": (entry(data_offsets=[10**18, 10**18 + 32]), r"data_offsets"),
    "offsets text": (entry(data_offsets="ab"), r"header of \S+ is not a safetensors header"),
    "entry no object": (lambda p: replace_header(p, lambda e: e.update({"norm.weight": 5})), r"header of \S+ is not a"),
    "header a list": (lambda p: replace_header(p, b"[1, 2]  "), r"header of \S+ is not a"),
    "header key twice": (lambda p: replace_header(p, b'{"a": 1, "a": 2}'), r"key 'a' appears twice"),
    "header too deep": (lambda p: replace_header(p, b"[" * 100_000), r"header of \S+ is not a"),
    "header length huge": (lambda p: replace_file(p, "model.safetensors", b"\xff" * 8 + b"{}"), r"promise a header of 18,446,744"),
    "header length 0": (lambda p: replace_file(p, "model.safetensors", bytes(100)), r"promise a header of 0"),
    "bytes of nobody": (
        lambda p: replace_file(p, "model.safetensors", (p / "model.safetensors").read_bytes() + b"12345678"),
        r"belong to no",
    ),
    "a pickle": (pickled, r"is a pickle, not safetensors"),
    "a zip": (lambda p: (p / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100)), r"is a pickle, not safetensors"),
    "linked weights": (lambda p: link(p / "model.safetensors"), r"model\.safetensors cannot be read\. It is a symbolic link"),
    "linked manifest": (lambda p: link(p / "checkpoint.json"), r"checkpoint\.json cannot be read\. It is a symbolic link"),
    "linked tokenizer": (lambda p: link(p / "tokenizer.json"), r"It is a symbolic link"),
    "a pipe": (lambda p: ((p / "model.safetensors").unlink(), os.mkfifo(p / "model.safetensors")), r"not a regular file"),
    "a directory": (lambda p: ((p / "model.safetensors").unlink(), (p / "model.safetensors").mkdir()), r"not a regular file"),
}


def sign_text(path: Path, old: str, new: str) -> None:
    """Edit checkpoint.json by hand."""
    text = (path / "checkpoint.json").read_text()
    assert old in text
    (path / "checkpoint.json").write_text(text.replace(old, new))


def drop(values: dict[str, Any], key: str) -> None:
    """Remove a key, returning None."""
    del values[key]


def drop_file(values: dict[str, Any], name: str) -> None:
    """Remove a file from the lists of checkpoint.json."""
    del values["files"][name], values["tensors"][name]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_by_name_and_the_good_checkpoint_is_offered(run, fault):
    spoil, words = FAULTS[fault]
    spoiled = run / "step-00000003"
    spoil(spoiled)
    for path in (run, spoiled):
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(path)
        assert "/step-00000003/" in caught.value.what
        assert caught.value.why
        assert caught.value.fix.endswith(f"The newest good checkpoint beside it is {run / 'step-00000001'}.")
    with pytest.raises(CheckpointError):
        verify_checkpoint(spoiled)
    assert latest_checkpoint(run) == run / "step-00000001"
    assert_same(read_checkpoint(run, on_skip=lambda line: None), sample_snapshot(1))


def test_without_another_checkpoint_the_message_says_so(tmp_path):
    pickled(write(tmp_path))
    with pytest.raises(CheckpointError, match="no good checkpoint beside it: restore it"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no good checkpoint\. .*is a pickle"):
        read_checkpoint(tmp_path, on_skip=lambda line: None)


def test_damage_in_several_tensors_is_summed_up(tmp_path):
    path = write(tmp_path)
    raw = (path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    (path / "model.safetensors").write_bytes(raw[:start] + bytes(byte ^ 1 for byte in raw[start:]))
    with pytest.raises(CheckpointError, match=r"damaged in embed\.weight, layers\.0\.mixer_norm\.weight, \S+ and \d+ more"):
        read_checkpoint(path)


def test_without_verifying_the_structure_is_still_checked(tmp_path):
    path = write(tmp_path)
    flip(path / "model.safetensors", -2)
    damaged = read_checkpoint(path, verify=False).snapshot.params
    assert damaged.keys() == sample_snapshot().params.keys()
    assert not np.array_equal(damaged["norm.weight"], sample_snapshot().params["norm.weight"])
    entry(shape=[2, 4])(path)
    with pytest.raises(CheckpointError, match="has shape"):
        read_checkpoint(path, verify=False)


# --- any bytes ---------------------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("SMEDJAN_FUZZ", "120"))  # a soak sets it to thousands
FUZZ = settings(
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
    database=None,
)

positions = st.integers(0, 1 << 15)
mutations = st.one_of(
    st.tuples(st.just("flip"), positions, st.integers(1, 255)),
    st.tuples(st.just("cut"), positions, st.just(0)),
    st.tuples(st.just("delete"), positions, st.integers(1, 64)),
    st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("overwrite"), positions, st.binary(min_size=1, max_size=16)),
)


def mutate(raw: bytes, kind: str, at: int, what: Any) -> bytes:
    """One mutation; the position wraps around the length."""
    at %= len(raw) or 1
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ what]) + raw[at + 1 :] if raw else raw
    if kind == "cut":
        return raw[:at]
    if kind == "delete":
        return raw[:at] + raw[at + what :]
    return raw[:at] + what + raw[at + (len(what) if kind == "overwrite" else 0) :]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint to copy from."""
    return write(tmp_path_factory.mktemp("good"))


def fresh(good: Path) -> Path:
    """A directory like `good`, alone in its parent."""
    path = good.parent / "fuzz" / good.name
    shutil.rmtree(path.parent, ignore_errors=True)
    return shutil.copytree(good, path)


@FUZZ
@given(name=st.sampled_from(FILES), changes=st.lists(mutations, min_size=1, max_size=3))
def test_changed_bytes_are_noticed_or_change_nothing(good, name, changes):
    path = fresh(good)
    raw = (path / name).read_bytes()
    for change in changes:
        raw = mutate(raw, *change)
    (path / name).write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        assert_same(read_checkpoint(path), sample_snapshot())
        assert name == "checkpoint.json" or raw == (good / name).read_bytes()
    with contextlib.suppress(CheckpointError):
        assert_whole(read_checkpoint(path, verify=False).snapshot.params)


@FUZZ
@given(name=st.sampled_from(FILES[1:]), changes=st.lists(mutations, min_size=1, max_size=3))
def test_changed_bytes_under_right_hashes_do_no_harm(good, name, changes):
    path = fresh(good)
    raw = (path / name).read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little") if name != "tokenizer.json" else len(raw)
    head, data = raw[:length], raw[length:]
    for change in changes:  # in the header, where it could mean something
        head = mutate(head, *change)
    replace_file(path, name, head + data)
    with contextlib.suppress(CheckpointError):
        assert_whole(read_checkpoint(path).snapshot.params)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_any_json_under_a_right_hash_does_no_harm(good, data):
    path = fresh(good)

    def change(values: Any) -> None:
        while True:  # walk to some place, then put something else there
            keys = sorted(values) if isinstance(values, dict) else list(range(len(values)))
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if isinstance(values[key], (dict, list)) and data.draw(st.integers(0, 4)):
                values = values[key]
                continue
            if isinstance(values, dict) and data.draw(st.integers(0, 5)) == 0:
                values[data.draw(st.text(max_size=8))] = values.pop(key)
            else:
                values[key] = data.draw(json_values)
            return

    sign(path, change)
    with contextlib.suppress(CheckpointError):
        read_info(path)
    with contextlib.suppress(CheckpointError):
        assert_whole(read_checkpoint(path).snapshot.params)


def assert_whole(params: dict[str, np.ndarray]) -> None:
    """Every parameter is there in its shape: nothing was loaded in part."""
    expected = sample_snapshot().params
    assert {name: array.shape for name, array in params.items()} == {name: array.shape for name, array in expected.items()}
