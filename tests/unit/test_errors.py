"""What commands say and return when something is raised."""

import pytest

from smedjan_common.errors import run_command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("[42] bytes",), ["ran out of memory", "[42] bytes", "--batch-size"]),
        (("A worker ended.", "Take fewer."), ["ran out of memory", "A worker ended.", "Take fewer."]),
        ((), ["ran out of memory", "--batch-size"]),
    ],
)
def test_out_of_memory_is_exit_3_with_the_fix_of_what_raised_it(capsys, arguments, says):
    def body():
        raise MemoryError(*arguments)

    assert run_command(body) == 3
    err = capsys.readouterr().err
    assert all(part in err for part in says)
