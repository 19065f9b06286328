"""Ray's calls as `--executor ray` makes them, in this process: what crosses a cluster is pickled, and workers are lost when a
test says so."""

import pickle
import threading
from types import ModuleType, SimpleNamespace
from typing import Any


class RayActorError(Exception):
    """A worker is gone."""


class RayHere(ModuleType):
    """`deaths`: numbers of the calls of `do` at which the worker is lost, after it has worked; `always`: at each. `lost`: how many were.
    `stillborn`: so many workers are lost before they begin."""

    def __init__(self, cores: int = 3):
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayActorError=RayActorError)
        self.cores, self.deaths, self.always, self.calls, self.lost, self.begun = cores, set(), False, 0, 0, 0
        self.stillborn = 0
        self.lock = threading.Lock()

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        self.begun += 1

    def shutdown(self) -> None:
        self.begun -= 1

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cores)}

    def put(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def get(self, call: Any) -> Any:
        return call()

    def kill(self, actor: Any) -> None:
        actor.dead = True

    def remote(self, **_: Any) -> Any:
        return lambda kind: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *args: Actor(self, kind, args)))

    def dies(self) -> bool:
        with self.lock:
            self.calls += 1
            dies = self.always or self.calls in self.deaths
            self.lost += dies
        return dies


class Actor:
    """A worker."""

    def __init__(self, ray: RayHere, kind: type, args: tuple):
        self._ray, self._object, self.dead, self._lock = ray, kind(*pickle.loads(pickle.dumps(args))), False, threading.Lock()
        self.about = SimpleNamespace(remote=lambda: self._about)
        self.do = SimpleNamespace(remote=lambda kind, item=None: lambda: self._do(kind, item))

    def _about(self) -> Any:
        with self._ray.lock:
            self._ray.stillborn -= 1
            if self._ray.stillborn >= 0:
                raise RayActorError("The actor never ran.")
        return self._object.about()

    def _do(self, kind: str, item: bytes | None) -> Any:
        with self._lock:
            if self.dead:
                raise RayActorError("The actor died.")
            value = pickle.dumps(self._object.do(kind, pickle.loads(item) if item is not None else None))
            if self._ray.dies():
                self.dead = True
                raise RayActorError("The actor died.")
            return pickle.loads(value)
