"""Where the processes of `tokenizer`, `process`, `dedup` and `prepare` are: here, or on the machines of a Ray cluster.

Results come in the order of what was given, so that what is written is the same for each of them and for any number of workers.
"""

from smedjan_common.errors import ConfigError, near
from smedjan_common.workers import Pool, Workers, processes

EXECUTORS = ("local", "ray")


def start(executor: str, target: str, args: tuple, asked: int | None, size: int) -> Pool:
    """The workers for `size` bytes: as many as were `asked` for, else all cores of the machine where that is worth it, or of the cluster.

    Raises ConfigError for fewer than one, an unknown executor, or one whose package is missing; WorkerError.
    """
    count = processes(asked, size)
    if executor == "local":
        return Workers(target, args, count)
    if executor != "ray":
        raise ConfigError(f"There is no executor {executor!r}.", near(executor, EXECUTORS), "Take local or ray.")
    from smedjan_common.ray_workers import RayWorkers

    return RayWorkers(target, args, asked)
