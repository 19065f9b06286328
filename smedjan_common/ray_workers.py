"""Workers of a Ray cluster (`--executor ray`): the same map in the same order, wherever the processes are.

Each is an actor on one core; text goes to it and comes back through Ray's object store. A worker that is lost, with its process or with
its machine, is made anew where there is room, and others do again what it had: the item that it was given, and of a worker that gathers
(the counted words of `tokenizer`) all items since its last `finish`, which is asked for after every LOT_BYTES of text. So nothing is
counted twice or left out.

Ray is where RAY_ADDRESS says or `ray start` has begun it, else it is begun on this machine.
"""

import contextlib
import importlib
import importlib.metadata
import logging
import os
import platform
import queue
import threading
import time
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from smedjan_common import __version__
from smedjan_common.errors import ConfigError, WorkerError
from smedjan_common.workers import Pool, answer, make, result

LOT_BYTES = 64 << 20
_TRIES = 5  # workers that may be lost by one item
_PATIENCE_SECONDS = 300.0  # without any worker, until it counts as an error
_FIX = "Look at the logs of Ray, give the workers more memory, or take --executor local."


@dataclass
class _Hand:
    """One worker. `lot`: what it was given since its last finish, where it gathers; `size`: the bytes of it; `here`: it began."""

    actor: Any
    lot: list[Any] = field(default_factory=list)
    size: int = 0
    here: bool = False
    lost: bool = False


class Remote:
    """What runs as an actor."""

    def __init__(self, target: str, args: tuple):
        self._made = target, args
        self._worker = make(*self._made)

    def about(self) -> dict[str, str]:
        """What results depend on, beside the text."""
        return about()

    def do(self, kind: str, item: Any = None) -> tuple[str, Any]:
        """An answer; one that has finished begins anew."""
        reply = answer(self._worker, kind, item)
        if kind == "finish":
            self._worker = make(*self._made)
        return reply


class RayWorkers(Pool):
    """`with RayWorkers("module:Class", args, count) as workers:`; count: None, as many as the cluster has cores.

    Raises ConfigError without Ray, WorkerError when the cluster gives none or a machine of it has other versions.
    """

    def __init__(self, target: str, args: tuple, count: int | None):
        self._ray, self._made = _ray(), (target, args)
        self._ours = not self._ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that ends late begins no other cluster
            self._ray.init(log_to_driver=False, logging_level=logging.ERROR)
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        self.count = max(1, cores if count is None else count)
        module, name = target.split(":")
        worker = getattr(importlib.import_module(module), name)
        self._gathers, self._merge = hasattr(worker, "finish"), getattr(worker, "merge", None)
        self._actor = self._ray.remote(num_cpus=1, max_restarts=0)(Remote)
        self._free: queue.Queue[_Hand] = queue.Queue()
        self._change, self._hands, self._gathered = threading.Lock(), [], []
        self._failed: WorkerError | None = None
        self._greeters: list[threading.Thread] = []
        self._closed, self._stillborn = False, 0
        for _ in range(self.count):
            self._begin()

    def finish(self) -> list[Any]:
        while hand := next((hand for hand in self._hands if hand.lot), None):
            try:
                self._collect(hand)
            except self._losses:
                self._work(self._lose(hand))
        return self._gathered

    def close(self) -> None:
        with self._change:
            self._closed = True
            hands, self._hands = self._hands, []
        for hand in hands:
            hand.lost = True
            with contextlib.suppress(Exception):  # what is gone already
                self._ray.kill(hand.actor)

    def __exit__(self, *_: object) -> None:
        self.close()
        for greeter in self._greeters:
            greeter.join(10)
        if self._ours:
            self._ray.shutdown()

    @property
    def _losses(self) -> tuple[type[Exception], ...]:
        """What Ray raises where a worker, or what it gave, is gone."""
        names = ("RayActorError", "OutOfMemoryError", "NodeDiedError", "ObjectLostError", "WorkerCrashedError")
        return tuple(getattr(self._ray.exceptions, name) for name in names if hasattr(self._ray.exceptions, name))

    def _begin(self) -> None:
        """A new worker, free as soon as the cluster has room for it."""
        with self._change:
            if self._closed:
                return
            hand = _Hand(self._actor.options(scheduling_strategy="SPREAD").remote(*self._made))
            self._hands.append(hand)
            greeter = threading.Thread(target=self._greet, args=(hand, hand.actor.about.remote()), daemon=True)
            self._greeters.append(greeter)
        greeter.start()

    def _greet(self, hand: _Hand, asked: Any) -> None:
        try:
            there = self._ray.get(asked)
        except Exception as error:  # it never came: with its machine, without smedjan, or at the end of all
            if hand.lost:
                return
            self._stillborn += 1
            if self._stillborn > _TRIES + 2 * self.count:  # a machine that is lost takes as many as it has cores
                self._failed = WorkerError("Workers of the cluster do not start.", f"{str(error).splitlines()[-1].rstrip('.')}.", _INSTALL)
                self._free.put(hand)
            else:
                self._lose(hand)
            return
        if there != (here := about()):
            other = ", ".join(f"{name} {there[name]} there, {here[name]} here" for name in here if there[name] != here[name])
            self._failed = WorkerError("A machine of the cluster has other versions.", f"Results may differ: {other}.", _INSTALL)
        hand.here = True
        self._free.put(hand)

    def _hand(self) -> _Hand:
        """A free worker."""
        alone = time.monotonic()
        while not self._closed:
            try:
                hand = self._free.get(timeout=0.5)
            except queue.Empty:
                if any(hand.here for hand in self._hands):
                    alone = time.monotonic()  # they work
                elif time.monotonic() - alone > _PATIENCE_SECONDS:
                    raise WorkerError("The cluster has no worker left.", "Its machines are gone, or have no core free.", _FIX) from None
                continue
            if self._failed:
                raise self._failed
            if not hand.lost:
                return hand
        raise WorkerError("The workers of the cluster are closed.", "The work was stopped.", "Give the command again.")

    def _ask(self, item: Any) -> Any:
        size = sum(len(getattr(getattr(part, "block", part), "data", b"")) for part in item) if isinstance(item, list) else 0
        return self._work([(self._ray.put(item), size)])

    def _work(self, todo: list[tuple[Any, int]]) -> Any:
        """The result of the last of these items, all of which are done, by one worker or, where it is lost, by others."""
        value, losses = None, 0
        while True:
            hand = self._hand()
            try:
                while todo:
                    value = result(self._ray.get(hand.actor.do.remote("item", todo[0][0])))
                    if self._gathers:
                        hand.lot.append(todo[0])
                        hand.size += todo[0][1]
                    todo = todo[1:]
                if hand.size >= LOT_BYTES:
                    self._collect(hand)
                self._free.put(hand)
                return value
            except self._losses as error:
                todo, losses = self._lose(hand) + todo, losses + 1
                if losses == _TRIES:
                    why = f"Its text was given to {_TRIES} of them: {str(error).splitlines()[0]}"
                    raise WorkerError("Workers of the cluster end again and again.", why, _FIX) from None

    def _collect(self, hand: _Hand) -> None:
        """Take what a worker has gathered; it begins anew."""
        part = result(self._ray.get(hand.actor.do.remote("finish")))
        with self._change:
            hand.lot, hand.size = [], 0
            self._gathered.append(part)
            if self._merge and len(self._gathered) > 2 * self.count:
                self._gathered = [self._merge(self._gathered)]

    def _lose(self, hand: _Hand) -> list[tuple[Any, int]]:
        """Another one in the place of a worker; what it had is to be done again."""
        hand.lost = True
        with self._change:
            if hand in self._hands:
                self._hands.remove(hand)
        with contextlib.suppress(Exception):  # it is gone already, most of the time
            self._ray.kill(hand.actor)
        self._begin()
        return hand.lot


_INSTALL = "Install the same smedjan and Python on all machines of the cluster."


def about() -> dict[str, str]:
    """The versions that the tokens and the text of this process depend on."""
    return {
        "smedjan": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "Unicode": unicodedata.unidata_version,
        "regex": importlib.metadata.version("regex"),
    }


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        why = "It has the workers of several machines."
        raise ConfigError("--executor ray needs the package ray.", why, "Run: pip install 'smedjan[ray]'.") from None
    return ray
