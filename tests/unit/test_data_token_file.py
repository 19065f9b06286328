"""The token file: what is written is read; what is damaged is refused with file and remedy; nothing half-written is left."""

import errno
import json

import numpy as np
import pytest

from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError


def write(path, vocab_size=300, pieces=((0, 1, 2), (3, 4))):
    with TokenFileWriter(path, vocab_size, "abc", {"pattern": "x"}) as writer:
        for piece in pieces:
            writer.append(np.array(piece), np.array([0]), len(piece) * 2)
    return TokenFile.open(path)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_written_and_read_it_is_the_same(tmp_path, vocab_size, dtype):
    file = write(tmp_path / "a" / "t.bin", vocab_size)
    assert file.tokens.tolist() == [0, 1, 2, 3, 4]
    assert file.tokens.dtype == dtype
    assert isinstance(file.tokens, np.memmap)
    assert file.documents is not None
    assert file.documents.tolist() == [0, 3]
    assert (file.num_tokens, file.num_bytes, file.vocab_size, file.tokenizer_hash) == (5, 10, vocab_size, "abc")
    assert file.manifest["pattern"] == "x"
    assert file.hash == file.manifest["sha256"]
    file.verify()
    assert np.fromfile(file.path, dtype).tolist() == [0, 1, 2, 3, 4]  # as nanoGPT reads it
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["t.bin", "t.bin.json", "t.bin.offsets"]


def test_the_tokenizer_is_checked(tmp_path):
    file = write(tmp_path / "t.bin")
    file.check_tokenizer("abc")
    with pytest.raises(DataError, match="another tokenizer"):
        file.check_tokenizer("abd")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing_and_the_older_file_as_it_was(tmp_path, error):
    write(tmp_path / "t.bin")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = TokenFileWriter(tmp_path / "t.bin", 300, "other")
    writer.append(np.arange(1000) % 300, np.array([0]), 1)
    with pytest.raises(error), writer:
        raise error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def damage_manifest(path, **changes):
    place = path.with_name(path.name + ".json")
    manifest = json.loads(place.read_text()) | changes
    place.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": None}, "'tokens'"),
        ({"tokens": "5"}, "'tokens'"),
        ({"sha256": None}, "'sha256'"),
        ({"dtype": "float32"}, "wrong dtype"),
        ({"vocab_size": 70000}, "does not fit uint16"),
        ({"tokens": 6}, "cut short"),
        ({"tokens": 4}, "too long"),
        ({"documents": 3}, "offsets"),
        ({"format_version": 99}, "Update smedjan"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, changes, says):
    write(tmp_path / "t.bin")
    damage_manifest(tmp_path / "t.bin", **changes)
    with pytest.raises(DataError, match=says) as caught:
        TokenFile.open(tmp_path / "t.bin")
    assert "t.bin" in str(caught.value)


def test_an_id_beyond_the_vocabulary_is_refused_at_opening(tmp_path):
    """JAX takes the last row for it, MLX whatever lies there: nothing else would notice."""
    path = tmp_path / "t.bin"
    assert write(path).manifest["max_id"] == 4
    with pytest.raises(DataError, match=r"new\.bin.*token 300"):
        write(tmp_path / "new.bin", pieces=((0, 299), (300, 1)))
    assert not (tmp_path / "new.bin").exists()
    damage_manifest(path, vocab_size=4)
    with pytest.raises(DataError, match=r"t\.bin.*token 4, .*vocabulary of 4"):
        TokenFile.open(path)
    for unknown in (None, "4"):  # as older files have it: looked for in the tokens
        damage_manifest(path, vocab_size=4, max_id=unknown)
        with pytest.raises(DataError, match="token 4, "):
            TokenFile.open(path)
        damage_manifest(path, vocab_size=5)
        assert TokenFile.open(path).num_tokens == 5


def test_a_file_that_is_resumed_knows_the_largest_id_of_both_parts(tmp_path):
    writer = TokenFileWriter(tmp_path / "t.bin", 300, "abc")
    writer.append(np.array([7, 299]), np.array([0]), 2)
    state = writer.state()
    writer.close()
    with TokenFileWriter(tmp_path / "t.bin", 300, "abc", resume=state) as again:
        again.append(np.array([5]), np.array([0]), 1)
    assert TokenFile.open(tmp_path / "t.bin").manifest["max_id"] == 299


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    with pytest.raises(DataError, match="no token file"):
        TokenFile.open(path)
    write(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="cut short"):
        TokenFile.open(path)
    write(path)
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="was changed"):
        TokenFile.open(path).verify()
    for content, says in (("{", "not JSON"), ("[]", "is incomplete")):
        (tmp_path / "t.bin.json").write_text(content)
        with pytest.raises(DataError, match=says):
            TokenFile.open(path)
    (tmp_path / "t.bin.json").unlink()
    with pytest.raises(DataError, match="no manifest"):
        TokenFile.open(path)


def test_without_offsets_the_file_still_opens(tmp_path):
    write(tmp_path / "t.bin")
    (tmp_path / "t.bin.offsets").unlink()
    assert TokenFile.open(tmp_path / "t.bin").documents is None


def test_an_empty_file_opens(tmp_path):
    assert write(tmp_path / "t.bin", pieces=()).num_tokens == 0


def test_a_full_disk_is_told_with_the_name_of_the_token_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as error, TokenFileWriter(tmp_path / "t.bin", 300, "0" * 64):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == []
