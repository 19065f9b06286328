"""Several processes of JAX as one: who they are, as JAX finds out in SLURM, Open MPI and Kubernetes, and its runtime started.

The line between the hosts (smedjan_common.run.line) takes the coordinator's port, where it says what is wrong in sentences; host 0 then
takes any free port for JAX's own service and tells it to the others.
"""

import functools
import os
import socket
import threading

from smedjan_common.errors import ConfigError, HostError
from smedjan_common.run.asked import Asked
from smedjan_common.run.hosts import ALONE, Hosts, Place, by_hand, meet
from smedjan_common.run.line import split_address

# what JAX looks for in the environment; a task of Kubernetes that is none of a numbered job is alone
_MARKS = (
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
    ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"),
)
_OPEN_MPI_5 = "OMPI_COMM_WORLD_SIZE"
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_A_DAY = 24 * 3600


def connect(asked: Asked) -> Hosts:
    """The hosts of the run that the flags or the environment name. Raises ConfigError, HostError."""
    place = by_hand(asked)
    found = (place, None) if place else _detected()
    if found is None or found[0].count == 1:
        return ALONE
    hosts = meet(found[0])
    hosts.start = functools.cache(lambda: _start(hosts, *found))  # once, however often a damaged checkpoint makes the run begin
    return hosts


def _detected() -> tuple[Place, list[int] | None] | None:
    """The place of this process and the devices that it takes of its machine, by JAX's own detection; None where it is alone."""
    if _OPEN_MPI_5 in os.environ and _MARKS[1][0] not in os.environ and int(os.environ[_OPEN_MPI_5]) > 1:
        why = "From version 5 on it does not say where the first of them is."
        fix = "Give --coordinator HOST:PORT --num-hosts $OMPI_COMM_WORLD_SIZE --host-id $OMPI_COMM_WORLD_RANK (docs/scale.md)."
        raise ConfigError("Open MPI has started several processes that do not know of each other.", why, fix)
    present = [marks for marks in _MARKS if all(name in os.environ for name in marks)]
    if not present or any(os.environ.get(name) == "1" for name in _COUNTS if name in present[0]):
        return None
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    except Exception as error:
        why = f"JAX says: {' '.join(str(error).split())[:400]}."
        fix = "Mend that, name them with --coordinator, --num-hosts and --host-id, or train alone with --num-hosts 1."
        raise ConfigError("This looks like one of several hosts, and the others cannot be found out.", why, fix) from error
    if not address or not count or index is None:
        return None
    return Place(address, index, count), list(devices) if devices and not _has_its_own_gpus(count) else None


def _has_its_own_gpus(count: int) -> bool:
    """Whether all GPUs that this process sees are its own: it is the only one of its machine, or was given one. JAX would take the one
    with the number of the process."""
    alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or os.environ.get("SLURM_STEP_NUM_NODES") == str(count)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return alone or (seen != "" and "," not in seen)


def _start(hosts: Hosts, place: Place, devices: list[int] | None) -> None:
    """Start JAX's runtime on all hosts; `devices`: the GPUs of the machine that are this process's, None: all. Raises HostError."""
    import jax

    from smedjan_jax.startup import CPU_HOSTS, add_flags

    host = split_address(place.address)[0]
    port = hosts.tell("port", _free_port() if hosts.first else None)
    try:
        jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM
        if "cpu" in (jax.config.values["jax_platforms"] or "cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            add_flags(CPU_HOSTS)
        address = f"{host}:{port}" if hosts.first else f"127.0.0.1:{_Relay(host, port).port}"
        jax.distributed.initialize(
            address,
            place.count,
            place.index,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=f"[::]:{port}" if socket.has_dualstack_ipv6() else f"0.0.0.0:{port}",
            heartbeat_timeout_seconds=_A_DAY,  # the line knows at once, and says it in words
        )
    except Exception as error:
        if (shown := hosts.explain(error)) is not error:
            raise shown from error
        why = " ".join(str(error).split())[:400].rstrip(".")
        raise HostError("JAX could not be started on several hosts.", f"{why}.", "Look at what the other hosts say.") from error
    hosts.at_end = jax.distributed.shutdown


class _Relay:
    """A port here for JAX's client, passed on to host 0. JAX ends a process by SIGABRT and a trace of its own calls in the moment in which
    its connection to host 0 closes. This one stays open, so that the run can end by a sentence."""

    def __init__(self, host: str, port: int):
        self._there = host, port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            here, _ = self._server.accept()
            try:
                there = socket.create_connection(self._there, timeout=10)
            except OSError:
                here.close()  # JAX tries again
                continue
            there.settimeout(None)
            for pair in ((here, there), (there, here)):
                threading.Thread(target=_pass_on, args=pair, name="relay", daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
