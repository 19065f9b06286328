"""The processes that train one run together, and what each of them does: host 0 decides, writes and speaks, the others follow.

`ALONE` is a run of one process: nothing is asked, nothing is waited for, and no code but this knows the difference. A process is a host
here whether it has a machine of its own or one of the GPUs of a machine.
"""

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from smedjan_common.errors import ConfigError, HostError, SmedjanError, flag
from smedjan_common.run.asked import Asked
from smedjan_common.run.line import Line, join, listen, serve, split_address, told
from smedjan_common.streams import put_now

T = TypeVar("T")

GRACE_SECONDS = 5.0  # a process whose host is lost ends by itself in that time, or is ended
WRITE_SECONDS = 600.0  # what is being written then may still become whole
_SHARED_SECONDS = 15.0  # for a file of host 0 to be seen through a network file system
_PATHS = ("dataset", "val_dataset", "tokenizer", "config", "checkpoint_dir", "pretrained", "resume", "teacher_checkpoint", "reference")
_OF_ONE_HOST = {"host_id", *_PATHS}  # what paths lead to is compared by its hash


class Place(NamedTuple):
    """Where a process stands among those of a run: host 0 is at `address`, HOST:PORT."""

    address: str
    index: int
    count: int


ONE_HOST = Place("", 0, 1)


class Hosts:
    """The hosts of a run, seen from one of them. `first`: this is host 0. lost_work: says what is lost when the run ends now; writing:
    whether this process writes a checkpoint by itself. start, at_end: what the framework does when all
    begin with it, and when all have come to the end."""

    def __init__(self, line: Line | None = None):
        self.index, self.count = (line.index, line.count) if line else (0, 1)
        self.first, self.alone = self.index == 0, self.count == 1
        self.lost_work: Callable[[], str] = lambda: ""
        self.writing: Callable[[], bool] = lambda: False
        self.start: Callable[[], None] = lambda: None
        self.at_end: Callable[[], None] = lambda: None
        self._line = line
        self._spoken = threading.Lock()
        if line:
            line.lost = lambda error: threading.Thread(target=self._end, args=(error,), name="lost host", daemon=True).start()

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """What every host says to `what`, by index; JSON. Raises HostError when one is lost."""
        return self._line.gather(what, value) if self._line else [value]

    def tell(self, what: str, value: Any = None) -> Any:
        """What host 0 says."""
        return self.gather(what, value)[0]

    def in_turn(self, work: Callable[[], T], folder: Path | None = None) -> T:
        """Host 0 does the work, then the others do it, which find what it has made in `folder`; None: nothing is made.

        Raises ConfigError where they do not see that folder.
        """
        if self.alone:
            return work()
        if not self.first:
            self._check_shared(folder, self.tell("turn"))
            result = work()
            self.gather("turns")
            return result
        result = work()
        with _marked(folder) as name:
            self.tell("turn", name)
            self.gather("turns")
        return result

    def together(self, what: str, work: Callable[[], T]) -> T:
        """All do the work; where it fails on one, all end."""
        if self.alone:
            return work()
        error, result = None, None
        try:
            result = work()
        except Exception as found:
            error = found
        failed = self.gather(what, None if error is None else told(error))
        if error is not None:
            raise error
        index = next((index for index, why in enumerate(failed) if why), None)
        if index is not None:
            raise HostError(f"Host {index} could not go on.", failed[index], "What it says itself tells what to do.")
        return result  # type: ignore[return-value]

    def check_same(self, known: dict[str, Any]) -> None:
        """Raises ConfigError, on all, where hosts know different things: name -> what must be the same, JSON."""
        if self.alone:
            return
        every = self.gather("same", {name: json.loads(json.dumps(value)) for name, value in known.items()})
        for index, theirs in enumerate(every):
            for name in {**every[0], **theirs}:
                if theirs.get(name) != every[0].get(name):
                    raise _differs(index, name, every[0].get(name), theirs.get(name))

    def explain(self, error: BaseException) -> BaseException:
        """Why the run ends by `error`: by a lost host, where one is, whose end the framework tells in its own way."""
        if self._line and self._line.gone is not None and error is self._line.gone:
            return self._whole(self._line.gone)
        if self._line and not isinstance(error, SmedjanError):
            end = time.monotonic() + 2.0
            while not self._line.gone and time.monotonic() < end:
                time.sleep(0.02)
            if self._line.gone:
                return self._whole(self._line.gone)
        return error

    def address(self) -> str:
        """The number of this machine in the network of the hosts."""
        return self._line.address() if self._line else "127.0.0.1"

    def end(self) -> None:
        """All have come to the end of the run."""
        self.gather("end")
        self.at_end()
        self.leave()

    def leave(self, error: BaseException | None = None) -> None:
        """This process ends: by an error, of which the others hear."""
        if self._line:
            self._line.close(told(error) if error else "")

    def spoken(self) -> bool:
        """Whether nobody has told yet why the run ends; from here on somebody has."""
        return self._spoken.acquire(blocking=False)

    def _whole(self, error: HostError) -> HostError:
        return HostError(error.what, " ".join(filter(None, (error.why, self.lost_work()))), error.fix)

    def _end(self, error: HostError) -> None:
        """End this process, whatever its main thread waits for: a collective with a lost host never returns."""
        time.sleep(GRACE_SECONDS)
        end = time.monotonic() + WRITE_SECONDS
        while self.writing() and time.monotonic() < end:
            time.sleep(0.1)
        if self.spoken():
            whole = self._whole(error)
            put_now(f"error: {whole.what}\n       {whole.why}\n       {whole.fix}", sys.stderr)
        os._exit(HostError.exit_code)

    def _check_shared(self, folder: Path | None, name: str | None) -> None:
        if folder is None or name is None:
            return
        end = time.monotonic() + _SHARED_SECONDS
        while not (folder / name).exists():
            with contextlib.suppress(OSError):
                os.listdir(folder)  # a network file system looks again
            if time.monotonic() > end:
                what, why = (
                    f"--checkpoint-dir {folder} is not shared.",
                    f"Host {self.index} does not find there what host 0 has just written.",
                )
                raise ConfigError(what, why, "Give a directory that all hosts see under this name, on a network file system, say.")
            time.sleep(0.1)


ALONE = Hosts()


def by_hand(asked: Asked) -> Place | None:
    """The place that --coordinator, --num-hosts and --host-id name; None where none is given. Raises ConfigError."""
    address, count, index = asked.value("coordinator"), asked.value("num_hosts"), asked.value("host_id")
    flags = {"--coordinator": address, "--num-hosts": count, "--host-id": index}
    if all(value is None for value in flags.values()):
        return None
    if count == 1 and address is None and not index:
        return ONE_HOST
    if missing := [name for name, value in flags.items() if value is None]:
        why = "A host must know where host 0 is, how many there are, and which it is."
        fix = "Give all three, on host 0 too: --coordinator HOST:PORT --num-hosts 2 --host-id 0."
        raise ConfigError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given.", why, fix)
    split_address(str(address))
    if count < 1:
        raise ConfigError(f"--num-hosts is {count}.", "It must be at least 1.", "Give the number of processes of the run.")
    if not 0 <= index < count:
        fix = f"Take {'0' if count == 1 else f'0 to {count - 1}, each once'}."
        raise ConfigError(f"--host-id {index} is not one of {count} hosts.", "They count from 0.", fix)
    return Place(str(address), index, count)


def meet(place: Place) -> Hosts:
    """Wait for all hosts of the run. Raises ConfigError, HostError."""
    if place.index == 0:
        return Hosts(serve(listen(split_address(place.address)[1]), place.count))
    return Hosts(join(*place))


def of_command(asked: Asked, backend: str) -> dict[str, Any]:
    """What must be the same in the command lines of all hosts: their flags but for paths, which a machine may have of its own."""
    flags = {name: value for name, value in asked.given_values().items() if name not in _OF_ONE_HOST}
    return {"--backend": backend, **{flag(name): value for name, value in flags.items()}}


def silence() -> None:
    """This host does not speak: what it would print goes nowhere, errors aside."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


@contextlib.contextmanager
def _marked(folder: Path | None) -> Iterator[str | None]:
    """The name of a file in the folder that others are to look for."""
    if folder is None or not folder.is_dir():
        yield None
        return
    path = folder / f".hosts-{secrets.token_hex(8)}"
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _differs(index: int, name: str, here: Any, there: Any) -> ConfigError:
    if isinstance(here, dict) and isinstance(there, dict):
        name, here, there = next(
            (f"{key} in {name}", here.get(key), there.get(key)) for key in {**here, **there} if here.get(key) != there.get(key)
        )
    fix = "Start all hosts with the same command, data and versions."
    return ConfigError(f"Host {index} differs from host 0 in {name}.", f"Host 0 has {_shown(here)}, host {index} {_shown(there)}.", fix)


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
