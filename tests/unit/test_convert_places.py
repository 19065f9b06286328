"""Where convert writes: nothing of others is replaced, and the source is never the destination, by any spelling."""

import os
from pathlib import Path

import pytest

from convert.formats import FORMATS
from tests.unit.convert_models import convert as run
from tests.unit.convert_models import neutral
from tests.unit.test_convert import content, refused


def test_what_stands_there_is_kept_without_force_and_what_is_not_ours_with_force_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = neutral(tmp_path)
    for form, name in (("hf", "out"), ("gguf", "out.gguf")):
        run(source, tmp_path / name, "--to", form)
        before = (tmp_path / name).stat().st_mtime_ns
        assert "already exists" in refused(capsys, source, tmp_path / name, "--to", form)
        assert (tmp_path / name).stat().st_mtime_ns == before
        run(source, tmp_path / name, "--to", form, "--force")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    (tmp_path / "letter.txt").write_text("dear")
    for form in FORMATS:
        origin = tmp_path / "out" if form == "neutral" else source
        for place in ("mine", "letter.txt"):
            assert "in the way" in refused(capsys, origin, tmp_path / place, "--to", form, "--force")
    assert (tmp_path / "mine/letter.txt").read_text() == (tmp_path / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty", "--to", "hf")


@pytest.mark.parametrize(("form", "name"), [("hf", ".git"), ("hf", "README.md"), ("hf", "training_args.bin"), ("neutral", "notes.txt")])
def test_what_lies_among_its_files_is_never_lost_with_force_either(tmp_path: Path, capsys: pytest.CaptureFixture, form: str, name: str):
    source, out = neutral(tmp_path / "run"), tmp_path / "out"
    if form == "neutral":
        run(source, tmp_path / "hf", "--to", "hf")
        source = tmp_path / "hf"
    run(source, out, "--to", form)
    (out / name).mkdir() if name == ".git" else (out / name).write_text("mine")
    before = content(tmp_path)
    assert f"it holds {name}" in refused(capsys, source, out, "--to", form, "--force")
    assert content(tmp_path) == before
    (out / name).rmdir() if name == ".git" else (out / name).unlink()
    (out / ".DS_Store").touch()
    run(source, out, "--to", form, "--force")


def test_a_directory_of_several_weight_files_is_replaced_whole(tmp_path: Path):
    source = neutral(tmp_path / "run")
    run(source, tmp_path / "hf", "--to", "hf", "--max-shard-size", "10KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    run(source, tmp_path / "hf", "--to", "hf", "--force")
    assert [path.name for path in (tmp_path / "hf").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("place", ["run/hf", "run/final/hf", "run/../run/hf", "link/hf", "run/final/deep/er"])
def test_a_destination_inside_the_source_is_refused_by_any_spelling(tmp_path: Path, capsys: pytest.CaptureFixture, place: str):
    neutral(tmp_path / "run")
    os.symlink(tmp_path / "run", tmp_path / "link")
    before = content(tmp_path)
    for form in ("hf", "gguf"):
        assert "lies in what is to be converted" in refused(capsys, tmp_path / "run", tmp_path / place, "--to", form)
    assert content(tmp_path) == before


@pytest.mark.parametrize("spelling", ["./hf", "run/../hf", "link", "hf/", "other/../hf"])
def test_the_source_by_another_spelling_is_still_the_source(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch, spelling: str):
    monkeypatch.chdir(tmp_path)
    run(neutral(tmp_path / "run"), "hf", "--to", "hf")
    os.symlink("hf", "link")
    os.mkdir("other")
    before = content(tmp_path)
    for form in ("hf", "neutral"):
        assert "would be lost" in refused(capsys, "hf", spelling, "--to", form, "--force")
    assert content(tmp_path) == before


def test_a_file_system_that_takes_other_letters_for_the_same_name_is_no_way_around(tmp_path: Path, monkeypatch, capsys):
    """On macOS `HF` is `hf`: samefile tells."""
    run(neutral(tmp_path / "run"), tmp_path / "hf", "--to", "hf")
    (tmp_path / "HF").mkdir(exist_ok=True)
    same = Path.samefile
    monkeypatch.setattr(Path, "samefile", lambda one, other: one.name.lower() == other.name.lower() or same(one, other))
    assert "would be lost" in refused(capsys, tmp_path / "hf", tmp_path / "HF", "--to", "neutral", "--force")
    assert "lies in what" in refused(capsys, tmp_path / "hf", tmp_path / "HF" / "x", "--to", "neutral", "--force")


def test_the_source_is_never_the_destination(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = neutral(tmp_path / "run")
    run(source, tmp_path / "hf", "--to", "hf")
    before = content(tmp_path)
    assert "would be lost" in refused(capsys, tmp_path / "hf", tmp_path / "hf", "--to", "hf", "--force")
    os.symlink(tmp_path / "hf", tmp_path / "link")
    assert "would be lost" in refused(capsys, tmp_path / "hf", tmp_path / "link", "--to", "hf", "--force")
    os.unlink(tmp_path / "link")
    assert "would be lost" in refused(capsys, source, tmp_path / "run", "--to", "hf", "--force")
    assert content(tmp_path) == before
