"""Nothing is written among the files of another program."""

import pytest

from smedjan_common.errors import ForeignFolderError
from smedjan_common.files.foreign import refuse_foreign


def refuse(folder):
    refuse_foreign(folder, lambda path: path.suffix == ".bin", "a folder of token files", "Choose another --output.")


def test_a_folder_that_is_not_there_or_empty_or_ours_or_has_only_dot_files_is_free(tmp_path):
    refuse(tmp_path / "new")
    refuse(tmp_path)
    for name in (".DS_Store", ".gitignore", "a.bin"):
        (tmp_path / name).touch()
        refuse(tmp_path)


def test_the_first_names_of_what_is_in_the_way_are_shown(tmp_path):
    for name in ("b.txt", "a.txt", "d.txt", "c.txt", "ours.bin", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(ForeignFolderError) as error:
        refuse(tmp_path)
    assert error.value.what == f"{tmp_path} is not a folder of token files, and not empty: it holds a.txt, b.txt, c.txt and 1 more."
    assert error.value.fix == "Choose another --output."
