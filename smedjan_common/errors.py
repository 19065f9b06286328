"""Errors for users: what is wrong, why, what to do; one class per exit code.

Exit codes: 0 done, 2 wrong usage or input, 3 out of memory, 4 loss or gradients not finite, 5 another host of the run was lost,
129/130/143 stopped by a signal.
"""

import contextlib
import difflib
import errno
import math
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smedjan_common import streams
from smedjan_common.hints import instead
from smedjan_common.nearby import beside


class SmedjanError(ValueError):
    """An error that a user can mend. `what` happened, `why`, and `fix`: what to do; each one sentence.

    `case`: a name for callers that know better what to do in that case.
    """

    exit_code = 2

    def __init__(self, what: str, why: str = "", fix: str = "", *, case: str = ""):
        self.what, self.why, self.fix, self.case = what, why, fix, case
        super().__init__(" ".join(part for part in (what, why, fix) if part))


class Notice(UserWarning):
    """What a user should know though nothing is wrong; a command prints it as `note: …` on standard error."""


def notice(sentence: str) -> None:
    """Tell it, as a warning of Python's to those who call functions."""
    warnings.warn(sentence, Notice, stacklevel=2)


class ConfigError(SmedjanError):
    """A model or training configuration that cannot work; raised before anything is allocated."""


class DataError(SmedjanError):
    """An input text, token file or tokenizer that cannot be read or does not fit."""


class TemplateError(SmedjanError):
    """A chat template that cannot be used, or messages that it does not take."""


class CheckpointError(SmedjanError):
    """A checkpoint that is cut short, corrupted, of another model or of a newer format."""


class DamagedError(CheckpointError):
    """A checkpoint that turned out not to be whole when it was read. `path`: its directory."""

    def __init__(self, path: Path, what: str, why: str = "", fix: str = ""):
        self.path = path
        super().__init__(what, why, fix)


class NewerFormatError(CheckpointError):
    """A checkpoint of a format that only a newer smedjan reads: nothing is wrong with it."""


class ForeignFolderError(SmedjanError):
    """A folder that holds what smedjan did not write, where smedjan would write."""


class OutOfMemoryError(SmedjanError):
    """The device or the machine has too little memory."""

    exit_code = 3


class WorkerError(SmedjanError):
    """A process that ended before its part of the work was done, mostly because the system ran out of memory and took it."""

    exit_code = 3


class HostError(SmedjanError):
    """Another process of the run is gone or cannot go on. The same command goes on from the newest checkpoint."""

    exit_code = 5


class NotFiniteError(SmedjanError):
    """The loss or the gradients became infinite or NaN."""

    exit_code = 4


def near(name: str, known: Iterable[str]) -> str:
    """A hint that lists the known names nearest to `name` (first what others call so), or all of them when none is near."""
    known = list(known)
    return _nearest(name, known) or f"Known: {', '.join(known)}."


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of `known`; `what` it names, mostly a flag."""
    known = list(known)
    return ConfigError(
        f"{what} {name!r} is unknown.", _nearest(name, known) or "No known name is similar.", f"Choose one of {', '.join(known)}."
    )


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return instead(name, known) or (f"Did you mean {' or '.join(close)}?" if close else "")


def reason(error: Exception) -> str:
    """Why a file cannot be read, of an error of Python's that tells it: a sentence without Python's names."""
    if isinstance(error, RecursionError):
        return "It is nested too deeply."
    if isinstance(error, UnicodeDecodeError):
        return f"It is not UTF-8: byte {error.start}, 0x{error.object[error.start]:02x}, is not part of any character."
    if isinstance(error, KeyError):
        return f"It lacks {error}."
    if isinstance(error, TypeError | AttributeError | IndexError):
        return "A value in it is of the wrong kind."
    if isinstance(error, ArithmeticError):
        return "A number in it is too large."
    text = str(error).rstrip(".")
    return f"{text[:1].upper()}{text[1:] if len(text) <= 120 else text[1:117] + '…'}."


def nearest_divisor(of: int, wanted: int, least: int = 1) -> int:
    """The divisor of `of` that is nearest to `wanted` and at least `least`; `of` itself where it has no other."""
    small = [n for n in range(1, math.isqrt(of) + 1) if of % n == 0]
    fits = [n for n in sorted({*small, *(of // n for n in small)}) if n >= least]
    return min(fits, key=lambda n: abs(n - wanted), default=of)


def some(names: Sequence[str]) -> str:
    """`a, b, c and 4 more`: the first three of many."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def flag(name: str) -> str:
    """The flag that sets a field: batch_size -> --batch-size, context_length -> --seq-len."""
    return "--" + {"context_length": "seq_len"}.get(name, name).replace("_", "-")


def run_command(function: Callable[[], int | None]) -> int:
    """Run a command's body and turn what it raises into an exit code and three plain sentences on standard error.

    With SMEDJAN_DEBUG=1 the traceback is printed as well.
    """
    streams.settle()
    with _notices():
        return _run(function)


def _run(function: Callable[[], int | None]) -> int:
    try:
        code = function() or 0
        sys.stdout.flush()
        return code
    except SmedjanError as error:
        return _report(error, error.exit_code, error.what, error.why, error.fix)
    except MemoryError as error:
        why = f"{str(error).rstrip('.')}." if str(error) else ""
        return _report(error, 3, "The machine ran out of memory.", why, "Take less at once: in training a smaller --batch-size or --size.")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            return 0
        where = f" {error.filename!r}" if error.filename else ""
        fix = _OS_FIXES.get(error.errno or 0, "Check the path.")
        if error.errno == errno.ENOENT and error.filename:
            fix = beside(os.fsdecode(error.filename)) or fix
        return _report(error, 2, f"Cannot use the file{where}.", f"{error.strerror or error}.", fix)
    except KeyboardInterrupt:
        return _report(None, 130, "Stopped by SIGINT.", "", "")


@contextlib.contextmanager
def _notices() -> Iterator[None]:
    """Notices as plain lines on standard error, other warnings as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        other, told = warnings.showwarning, set()

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                if str(message) not in told:
                    streams.put(streams.harmless(f"note: {message}"), sys.stderr)
                told.add(str(message))
            else:
                other(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _is_reader_gone() -> bool:
    """Whether standard output is a pipe whose reader went away (`| head`): then nobody hears more, and Python is not to complain."""
    try:
        fd = sys.stdout.fileno()
        poll = select.poll()
        poll.register(fd, 0)  # errors and hang-ups are always told
        if not poll.poll(0):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)  # what is still buffered is flushed when Python ends
    except (OSError, ValueError, AttributeError):
        return False
    return True


_OS_FIXES = {
    1: "Choose a place you may write to.",
    2: "Check the path.",
    13: "Choose a place you may read and write.",
    20: "Check the path: a part of it is a file.",
    28: "Free some space or choose another disk.",
    30: "Choose a disk that is writable.",
}


def _report(error: BaseException | None, code: int, *sentences: str) -> int:
    if error is not None and os.environ.get("SMEDJAN_DEBUG") == "1":
        traceback.print_exception(error)
    streams.put(streams.harmless("error: " + "\n       ".join(s for s in sentences if s)), sys.stderr)  # names may be a stranger's
    return code
