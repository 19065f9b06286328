"""What commands say and return when something is raised."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from smedjan_common import cli
from smedjan_common.errors import OutOfMemoryError, reason, run_command, some


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("[42] bytes"), ["ran out of memory", "[42] bytes.", "--batch-size"]),
        (MemoryError(), ["ran out of memory", "--batch-size"]),
        (OutOfMemoryError("The GPU is full.", "It has 1 GiB.", "Take less."), ["The GPU is full.", "It has 1 GiB.", "Take less."]),
    ],
)
def test_out_of_memory_is_exit_3_with_what_to_do(capsys, error, says):
    def body():
        raise error

    assert run_command(body) == 3
    err = capsys.readouterr().err
    assert all(part in err for part in says)


@pytest.mark.parametrize("text", [b"[" * 99999, b"{", b"\xff", b'{"a": 1}', b"[]", b"3", b'{"b": []}', b'{"b": [1e999]}'])
def test_why_a_file_cannot_be_read_is_told_without_names_of_python(text):
    with pytest.raises((ValueError, RecursionError, LookupError, TypeError, ArithmeticError)) as error:
        int(json.loads(text.decode())["b"][0])
    why = reason(error.value)
    assert re.fullmatch(r"[A-Z].*[^.]\.", why)
    assert not re.search(r"Error|object|indices|subscript|codec|recursion|\bint\b.*float", why)


def test_ctrl_c_while_python_still_reads_its_files_is_quiet(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.streams, "settle", stopped)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr() == ("", "")


def test_an_array_too_large_for_the_machine_is_exit_3(capsys):
    """NumPy's MemoryError has two arguments, a shape and a dtype."""

    def body():
        np.ones((1 << 50, 1 << 8))

    assert run_command(body) == 3
    assert "Unable to allocate" in capsys.readouterr().err


class Closed(io.TextIOBase):
    """Standard output into a pipe whose reader is there (`alive`) or went away."""

    def __init__(self, alive: bool):
        self.reader, self.writer = os.pipe()
        if not alive:
            os.close(self.reader)

    def fileno(self) -> int:
        return self.writer


@pytest.mark.parametrize(("alive", "code"), [(False, 0), (True, 2)])
def test_only_standard_outputs_own_closing_ends_a_command_quietly(monkeypatch, capsys, alive, code):
    def body():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed(alive))
    assert run_command(body) == code
    assert ("Broken pipe" in capsys.readouterr().err) == alive


def test_a_reader_that_stops_early_hears_no_complaint(tmp_path):
    """The output is written when Python ends, unless it is flushed before."""
    command = (
        f"{sys.executable} -c \"from smedjan_common.errors import run_command; import sys; sys.exit(run_command(lambda: print('x')))\""
    )
    shell = f"set -o pipefail; (sleep 0.3; {command}; echo $? >code) | true"
    ended = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.stderr, (tmp_path / "code").read_text()) == ("", "0\n")


def test_the_first_three_of_many_are_named():
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
