"""A run at an address: it is written to a folder of this machine, and a thread sends behind it what is whole there.

    s3://bucket/runs/mine/   step-00001000/   final/   config.json   metrics.jsonl   loss.png   data/   writer.json

The store is brought to what the folder is, newest checkpoint first. Of a checkpoint checkpoint.json is sent last and removed first, so
one that has it has all of its files; nothing is removed there before all that stands here is there. Who starts later takes the run over
(writer.json): the process before it sends no more.
"""

import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smedjan_common.checkpoint.directory import find_checkpoints
from smedjan_common.checkpoint.load import step_of
from smedjan_common.errors import CheckpointError, ConfigError, DataError, SmedjanError
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.files.leftovers import host_name
from smedjan_common.files.names import CONFIG, DATA, FINAL, GIVEN, MANIFEST, METRICS, PLOT, SAMPLES
from smedjan_common.remote.address import HTTP, Address, scheme_of
from smedjan_common.remote.store import Abandoned, Place

WRITER, RUN = "writer.json", ".remote.json"  # there: whose run it is; here: which run the folder is of
Say = Callable[[str], object]


class Mirror:
    """Sends the run in `folder` to `place`. `say`: is told what was sent, and what failed and is tried again."""

    def __init__(self, place: Place, folder: Path, say: Say):
        self.place, self.folder, self._say = place, folder, say
        self._id, self._claimed = secrets.token_hex(8), False
        self._keep = self._keep_every = 0
        self._change, self._due, self._ends = threading.Condition(), False, False
        self._thread: threading.Thread | None = None
        self._sending: Path | None = None
        self._known: dict[str, str] = {}  # checkpoint -> SHA-256 of its checkpoint.json there
        self._error: SmedjanError | OSError | None = None

    @property
    def spared(self) -> list[Path]:
        """The checkpoint that is being sent, which must stay until it is there."""
        return [self._sending] if self._sending else []

    def claim(self, keep: int, keep_every: int) -> None:
        """Take the run over, and begin to send. keep, keep_every: as prune_checkpoints has them. Raises DataError where the store cannot be
        written."""
        self._keep, self._keep_every = keep, keep_every
        run = self.run_there() or self.run_here() or secrets.token_hex(8)
        self.keep_run(run)
        (self.place / WRITER).write(json.dumps({"run": run, "writer": self._id, "host": host_name()}).encode())
        self._known, self._claimed = self._checkpoints_there(), True
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def run_there(self) -> str | None:
        """Which run is at the address; None where none was begun."""
        return self._writer().get("run")

    def run_here(self) -> str | None:
        """Which run the folder is of."""
        try:
            return json.loads((self.folder / RUN).read_bytes())["run"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_run(self, run: str) -> None:
        """Note which run the folder is of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RUN, json.dumps({"url": str(self.place), "run": run}).encode())

    def put(self) -> None:
        """What is in the folder is to be sent. Raises CheckpointError when another process took the run over."""
        if isinstance(self._error, CheckpointError):
            raise self._error
        with self._change:
            self._due = True
            self._change.notify_all()

    def finish(self) -> None:
        """Send what is left, and wait for it. Raises CheckpointError where it is not all there."""
        if self._thread is None:
            return
        self.put()
        with self._change:
            self._ends = True
            self._change.notify_all()
        while self._thread.is_alive():
            self._thread.join(0.2)  # short, so that signals are seen
        self._thread = None
        if isinstance(self._error, CheckpointError):
            raise self._error
        if self._error:
            why = getattr(self._error, "why", "") or f"{self._error}."
            what = f"The run is not all at {self.place}."
            raise CheckpointError(what, f"{why} It is whole in {self.folder}.", "Give the same command again: it sends the rest.")

    def abandon(self) -> None:
        """Stop as soon as may be; the next start sends the rest."""
        self._thread, thread = None, self._thread
        with self._change:
            self._claimed = False
            self._ends = True
            self._change.notify_all()
        if thread:
            thread.join(5)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._due or self._ends)
                if not self._due:
                    return
                self._due = False
            try:
                self._send_all()
                self._error = None
            except Abandoned:
                return
            except CheckpointError as error:
                self._error = error
                return
            except (SmedjanError, OSError) as error:
                self._error = error
                self._say(f"note: the run was not sent: {error} It is tried again with the next checkpoint.")

    def _send_all(self) -> None:
        self._check_mine()
        self._send_data()
        while path := self._next():
            self._sending = path
            try:
                started = time.monotonic()
                self._send_checkpoint(path)
                self._say(f"sent {self.place / path.name} in {time.monotonic() - started:.1f} s")
            except FileNotFoundError:  # it was removed here meanwhile: newer ones are there
                if path.exists():
                    raise
            finally:
                self._sending = None
        self._send_files()
        self._remove_old()

    def _next(self) -> Path | None:
        """The newest checkpoint here that is not there, and is to be."""
        kept = self._kept()
        return next((path for path in reversed(self._here()) if path.name in kept and self._known.get(path.name) != _digest(path)), None)

    def _kept(self) -> set[str]:
        """The checkpoints, here or there, that --keep and --keep-every keep."""
        names = {path.name for path in self._here()} | set(self._known)
        steps = sorted((step, name) for name in names if (step := step_of(name)) is not None)
        newest = steps[-self._keep :] if self._keep else steps
        every = [(step, name) for step, name in steps if self._keep_every and step % self._keep_every == 0]
        return {name for _, name in newest + every} | {FINAL}

    def _here(self) -> list[Path]:
        """Whole checkpoints here, the newest last; final/ is the newest where it is."""
        final = [self.folder / FINAL] if (self.folder / FINAL / MANIFEST).is_file() else []
        return [path for _, path in find_checkpoints(self.folder)] + final

    def _send_checkpoint(self, path: Path) -> None:
        there, digest = self.place / path.name, _digest(path)
        self._known.pop(path.name, None)
        (there / MANIFEST).remove()
        self._send_files()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            if (name := file.relative_to(path).as_posix()) != MANIFEST:
                (there / name).send(file, self._goes_on)
        self._check_mine()
        (there / MANIFEST).send(path / MANIFEST, self._goes_on)
        if digest:
            self._known[path.name] = digest

    def _send_files(self) -> None:
        """What stands beside the checkpoints. Rows of metrics past a checkpoint are dropped by who goes on from it."""
        for name in (CONFIG, GIVEN, PLOT):
            if (file := self.folder / name).is_file():
                (self.place / name).send(file, self._goes_on)
        if (metrics := self.folder / METRICS).is_file():
            (self.place / METRICS).write(metrics.read_bytes().rpartition(b"\n")[0] + b"\n")  # the last row may be half written
        self._send_missing(SAMPLES)

    def _send_data(self) -> None:
        """Texts that the run made tokens of; manifests of token files last, so that one that is there has its file."""
        self._send_missing(DATA, last=".bin.json")

    def _send_missing(self, name: str, last: str = "\0") -> None:
        files = [file for file in (self.folder / name).rglob("*") if file.is_file() and not file.name.startswith(".")]
        there = (self.place / name).files() if files else {}
        for file in sorted(files, key=lambda file: (file.name.endswith(last), str(file))):
            below = file.relative_to(self.folder / name).as_posix()
            if below not in there or there[below].size != file.stat().st_size:
                (self.place / name / below).send(file, self._goes_on)

    def _remove_old(self) -> None:
        """What is not kept, now that all that is to be there is there."""
        kept = self._kept()
        for name in [name for name in self._known if name not in kept]:
            self._check_mine()
            (self.place / name / MANIFEST).remove()
            for file in (self.place / name).files():
                (self.place / name / file).remove()
            del self._known[name]

    def _checkpoints_there(self) -> dict[str, str]:
        return {name: hashlib.sha256(manifest_there(self.place, name)).hexdigest() for name in checkpoints_there(self.place)}

    def _goes_on(self) -> bool:
        return self._claimed

    def _check_mine(self) -> None:
        if not self._claimed:
            raise Abandoned
        if (writer := self._writer()).get("writer") != self._id:
            raise CheckpointError(
                f"Another process writes the run at {self.place}.",
                f"It began on {writer.get('host') or 'another machine'}, after this one: this one sends no more.",
                f"What it did is in {self.folder}. Stop one of the two, or give another --checkpoint-dir.",
            )

    def _writer(self) -> dict[str, Any]:
        try:
            found = json.loads((self.place / WRITER).read_all())
        except DataError as error:
            if error.case != "absent":
                raise
            return {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def mirrored(address: Address | None, folder: Path, say: Say) -> Iterator[Mirror | None]:
    """A context that ends when the run is sent; None without an address. An error of the run is not hidden by one of sending."""
    if address is None:
        yield None
        return
    if scheme_of(address.url) in HTTP:
        why = "A web server takes no checkpoints."
        raise ConfigError(f"--checkpoint-dir is {address}.", why, "Take s3://, gs://, az://, or a folder of this machine.")
    mirror = Mirror(Place(address), folder, say)
    try:
        yield mirror
    except SmedjanError:
        try:
            mirror.finish()
        except SmedjanError as error:
            say(f"note: {error}")
        raise
    except BaseException:
        mirror.abandon()
        raise
    mirror.finish()


def checkpoints_there(place: Place) -> list[str]:
    """The names of the whole checkpoints at an address, oldest first, final/ last."""
    tops = [name.split("/")[0] for name in place.files() if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")]
    steps = sorted((step, name) for name in tops if (step := step_of(name)) is not None)
    return [name for _, name in steps] + [name for name in tops if name == FINAL]


def manifest_there(place: Place, name: str) -> bytes:
    """checkpoint.json of one of them."""
    return (place / name / MANIFEST).read_all()


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None
