"""Where what came from a store is kept on this machine: SMEDJAN_CACHE, else the user's folder of caches. All of it may be removed."""

import hashlib
import os
from pathlib import Path

from smedjan_common.remote.address import Address


def cache_folder(kind: str) -> Path:
    """The folder of one kind of files; it need not be there yet."""
    if own := os.environ.get("SMEDJAN_CACHE"):
        return Path(own) / kind
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "smedjan" / kind


def run_folder(address: Address) -> Path:
    """Where the run at an address is written on this machine, before it is sent."""
    name = str(address).rstrip("/")
    return cache_folder("runs") / hashlib.sha256(name.encode()).hexdigest()[:16] / (Address(name).name or "run")
