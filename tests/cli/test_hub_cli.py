"""`convert hf://…` and `smedjan push` against a Hub on this machine: the real client, real commands, failures and pickles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert import hub as hub_source
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.errors import ConfigError
from tests.fakes.hub import COMMIT, Hub
from tests.unit.convert_models import convert, neutral

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra: hub)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub's folder with one model, code and pickles beside it, and the checkpoint that it was made of."""
    folder = tmp_path_factory.mktemp("hub")
    convert(neutral(folder / "run"), folder / "me" / "model", "--to", "hf", "--max-shard-size", "80KB")
    for name in ("pytorch_model.bin", "modeling_own.py", "model.safetensors.bak"):
        (folder / "me/model" / name).write_bytes(b"never fetched")
    return folder


def command(hub: Hub, home: Path, *words: object) -> subprocess.CompletedProcess:
    environment = os.environ | hub.environment(home)
    parts = [sys.executable, "-m", "smedjan_common.cli", *map(str, words)]
    return subprocess.run(parts, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_a_model_comes_from_the_hub_by_its_name_at_one_commit(models: Path, tmp_path: Path):
    with Hub(models) as hub:
        done = command(hub, tmp_path / "home", "convert", "hf://me/model", tmp_path / "neutral", "--to", "neutral")
    assert done.returncode == 0, done.stderr
    got, made = read_checkpoint(tmp_path / "neutral"), read_checkpoint(models / "run/final")
    assert all((got.snapshot.params[name] == value).all() for name, value in made.snapshot.params.items())
    origin = json.loads((tmp_path / "neutral/checkpoint.json").read_text())["extra"]["converted_from"]
    assert (origin["repository"], origin["revision"]) == ("me/model", COMMIT)
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert fetched
    assert all(f"/resolve/{COMMIT}/" in path for path in fetched)
    assert not [path for path in fetched if path.endswith((".bin", ".py", ".bak"))]
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://me/nothing", "There is no me/nothing."),
        ("hf://me/model@v9", "There is no me/model at v9."),
    ],
)
def test_a_name_that_is_none_is_an_error_of_three_sentences(models: Path, tmp_path: Path, name: str, words: str):
    with Hub(models) as hub:
        done = command(hub, tmp_path / "home", "convert", name, tmp_path / "neutral", "--to", "neutral")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "neutral").exists()


@pytest.mark.parametrize("name", ["hf://model", "hf://../model", "hf://me/..", "hf://me/model@a b", "hf://a/b/c", "hf://"])
def test_an_address_that_is_none_is_refused_before_anything_is_asked(name: str):
    with pytest.raises(ConfigError, match="is no model on the Hub"):
        hub_source.parse(name)


@pytest.mark.parametrize("how", ["cut", "500"])
def test_a_download_that_fails_leaves_nothing_half_and_goes_on(models: Path, tmp_path: Path, how: str):
    """The client tries again by itself, or the command says so and its second start takes what is there."""
    shard = next(file.name for file in (models / "me/model").glob("*.safetensors"))
    with Hub(models) as hub:
        hub.fail = {shard: how}
        done = command(hub, tmp_path / "home", "convert", "hf://me/model", tmp_path / "neutral", "--to", "neutral")
        if done.returncode:
            assert done.returncode == 2
            assert "could not be reached" in done.stderr
            assert not (tmp_path / "neutral").exists()
            done = command(hub, tmp_path / "home", "convert", "hf://me/model", tmp_path / "neutral", "--to", "neutral")
    assert done.returncode == 0, done.stderr
    assert read_checkpoint(tmp_path / "neutral").snapshot.params


class Strange(Hub):
    """One whose list of files has `extra` ones."""

    extra: tuple[str, ...] = ()

    def files(self, name: str) -> dict[str, bytes]:
        return super().files(name) | {file: b"strange" for file in self.extra}


def test_files_that_lead_out_of_the_cache_or_that_nothing_reads_are_not_fetched(models: Path, tmp_path: Path):
    words = ("convert", "hf://me/model", tmp_path / "neutral", "--to", "neutral")
    with Strange(models) as hub:
        hub.extra = ("../../../out.safetensors", "/out.safetensors", "original/model.safetensors", "consolidated.safetensors")
        done = command(hub, tmp_path / "home", *words)
        assert done.returncode == 0, done.stderr
        assert not [path for path in hub.asked if "/resolve/" in path and path.endswith(hub.extra)]
        hub.extra = ("C:out.safetensors",)  # a drive on Windows
        done = command(hub, tmp_path / "other", *words, "--force")
    assert done.returncode == 2
    assert "error: me/model cannot be fetched." in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_it_is_said_what_was_not_reached(tmp_path: Path, models: Path):
    with Hub(models) as hub:
        pass
    done = command(hub, tmp_path / "home", "convert", "hf://me/model", tmp_path / "neutral", "--to", "neutral")
    assert done.returncode == 2
    assert "me/model could not be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_push_sends_a_private_model_with_its_card_and_public_only_when_asked(models: Path, tmp_path: Path):
    with Hub(models) as hub:
        shown = command(hub, tmp_path / "home", "push", models / "run", "me/new", "--dry-run")
        assert shown.returncode == 0, shown.stderr
        assert "parameters" in shown.stdout
        assert hub.made == hub.sent == {}
        done = command(hub, tmp_path / "home", "push", models / "run", "me/new", "--license", "mit", "--dtype", "float32")
        assert done.returncode == 0, done.stderr
        assert hub.made == {"me/new": True}
        sent = hub.sent["me/new"]
        assert {"README.md", "config.json", "tokenizer.json", "model.safetensors"} <= sent.keys()
        card = sent["README.md"].decode()
        assert 'license: "mit"' in card
        assert 'library_name: "transformers"' in card
        assert "steps | 7" in card
        assert command(hub, tmp_path / "home", "push", models / "run", "me/open", "--public").returncode == 0
        assert hub.made["me/open"] is False
    folder = tmp_path / "sent"
    folder.mkdir()
    for name, content in sent.items():
        (folder / name).write_bytes(content)
    convert(folder, tmp_path / "back", "--to", "neutral")
    before, after = read_checkpoint(models / "run/final"), read_checkpoint(tmp_path / "back")
    assert all((after.snapshot.params[name] == value).all() for name, value in before.snapshot.params.items())
    assert "hf_secret" not in done.stdout + done.stderr
