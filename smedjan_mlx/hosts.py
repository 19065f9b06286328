"""Several processes of MLX as one, each on a machine of its own: who they are, by flags or as mlx.launch says it, and their ring.

The line between the hosts (smedjan_common.run.line) takes the coordinator's port; under mlx.launch the one after the ring's.
"""

import functools
import json
import os
import socket
import tempfile
from pathlib import Path

from smedjan_common.errors import ConfigError, HostError
from smedjan_common.run.asked import Asked
from smedjan_common.run.hosts import ALONE, Hosts, Place, by_hand, meet

RING, JACCL = "ring", "jaccl"


def connect(asked: Asked) -> Hosts:
    """The hosts of the run that the flags or mlx.launch name. Raises ConfigError, HostError."""
    place = by_hand(asked)
    found = (place, None) if place else _launched()
    if found is None or found[0].count == 1:
        return ALONE
    hosts = meet(found[0])
    hosts.start = functools.cache(lambda: _start(hosts, found[1]))
    return hosts


def _launched() -> tuple[Place, str] | None:
    """The place of this process and MLX's backend for what travels, in the environment that mlx.launch makes; None where it is alone."""
    try:
        rank = int(os.environ["MLX_RANK"])
        if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
            host, _, port = coordinator.rpartition(":")
            return Place(f"{host}:{int(port) + 1}", rank, len(json.loads(Path(os.environ["MLX_IBV_DEVICES"]).read_text()))), JACCL
        ring = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text() or "[]")
        if len(ring) < 2:
            return None
        ports = [int(address.rpartition(":")[2]) for addresses in ring for address in addresses]
        return Place(f"{ring[0][0].rpartition(':')[0]}:{max(ports) + 1}", rank, len(ring)), RING
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"Its environment says MLX_RANK={os.environ.get('MLX_RANK')}, and the file of hosts cannot be read: {error}."
        raise ConfigError("This looks like one of several hosts of mlx.launch.", why, "Start them again, or unset MLX_RANK.") from error


def _start(hosts: Hosts, backend: str | None) -> None:
    """Begin with MLX's own channels; backend: as mlx.launch has set it up, None: a ring of the hosts. Raises HostError."""
    import mlx.core as mx

    from smedjan_mlx import spread

    if backend is None:
        ring = [[address] for address in hosts.gather("ring", f"{hosts.address()}:{_free_port()}")]
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(ring, file)
        os.environ |= {"MLX_HOSTFILE": file.name, "MLX_RANK": str(hosts.index)}
    hosts.gather("ring of all")
    try:
        spread.begin(mx.distributed.init(strict=True, backend=backend or RING))
    except Exception as error:
        if (shown := hosts.explain(error)) is not error:
            raise shown from error
        why = " ".join(str(error).split())[:400].rstrip(".")
        raise HostError("MLX could not be started on several hosts.", f"{why}.", "Look at what the other hosts say.") from error
    finally:
        if backend is None:
            os.unlink(os.environ["MLX_HOSTFILE"])


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
