"""A Hugging Face directory that several files of tests copy and spoil."""

import shutil
from pathlib import Path

import pytest

from tests.unit.convert_models import convert, neutral


@pytest.fixture(scope="session")
def good_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good directory in three shards, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("good")
    convert(neutral(folder), folder / "hf", "--to", "hf", "--max-shard-size", "80KB")
    return folder / "hf"


@pytest.fixture
def hf(good_hf: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return Path(shutil.copytree(good_hf, tmp_path / "hf"))
