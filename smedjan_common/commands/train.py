"""`smedjan train`, and the body of `python -m smedjan_jax.train` and `python -m smedjan_mlx.train`.

Everything that can be refused is refused before a framework is imported, which takes seconds.
"""

import dataclasses
import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smedjan_common.errors import ConfigError, DamagedError, SmedjanError, run_command

if TYPE_CHECKING:
    from smedjan_common.backend import Backend, Device
    from smedjan_common.checkpoint.mirror import Mirror
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.remote.address import Address
    from smedjan_common.run.asked import Asked
    from smedjan_common.run.data import RunData
    from smedjan_common.run.decided import Decided
    from smedjan_common.run.hosts import Hosts
    from smedjan_common.run.lock import RunLock
    from smedjan_common.run.start import Begin, Say
    from smedjan_common.training.config import TrainConfig
    from smedjan_common.training.mesh import MeshShape

    Framework = tuple[Callable[[ModelConfig, TrainConfig, MeshShape | None], Backend], str]

# imports a framework, with --deterministic or without: -> (the backend's class, the dtype that auto means here)
Load = Callable[[bool], "Framework"]
# meets the other processes of the run, before a framework is used: (flags, the line to the others) where there are any
Connect = Callable[["Asked"], "Hosts"]


def main(argv: list[str], command: str = "train") -> int:
    """`smedjan train`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate(command, [*argv, *_backend_of_config(argv, command)])


def _backend_of_config(argv: list[str], command: str) -> list[str]:
    """--backend of the file that --config names, where the command line has none: the backend's program is chosen by it."""
    from smedjan_common.run.flags import given_names
    from smedjan_common.run.given import KINDS, words_of_config

    if "backend" in given_names(argv) or not any(word.split("=")[0] == "--config" for word in argv):
        return []
    try:
        return [word for word in words_of_config(argv, KINDS[command]) if word.startswith("--backend=")]
    except SmedjanError:
        return []  # the program says it


def run(name: str, load: Load, argv: list[str] | None = None, command: str = "train", connect: Connect | None = None) -> int:
    """Parse and train with the backend `name`; returns the exit code. command: a key of run.given.KINDS. connect: None where a run
    has one process."""
    from smedjan_common.run.asked import Asked
    from smedjan_common.run.given import KINDS, parse

    argv = sys.argv[1:] if argv is None else argv
    prog = f"python -m smedjan_{name}.{command}" if "smedjan_" in Path(sys.argv[0]).parent.name else f"smedjan {command}"
    return run_command(lambda: train(name, load, Asked(*parse(argv, prog, KINDS[command])), connect))


def train(name: str, load: Load, asked: "Asked", connect: Connect | None = None) -> int:
    """Train what is asked for with the backend `name`; returns the exit code. Raises SmedjanError."""
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.run.checks import check_words
    from smedjan_common.run.hosts import ALONE, ONE_HOST, by_hand

    check_backend(name, asked.value("backend"))
    check_words(asked, name)
    if connect is None and by_hand(asked) not in (None, ONE_HOST):
        what = f"--coordinator is not for this command with the backend {name}."
        raise ConfigError(what, "Such a run has one process.", "Leave --coordinator, --num-hosts and --host-id out.")
    hosts = connect(asked) if connect and asked.value("devices") is None else ALONE
    return _train(name, load, asked, hosts) if hosts.alone else _among(hosts, name, load, asked)


def _among(hosts: "Hosts", name: str, load: Load, asked: "Asked") -> int:
    """Train as one of several processes. This one ends here: what a framework does when Python ends waits for hosts that may be lost."""
    from smedjan_common.run.hosts import of_command, silence

    def body() -> int:
        try:
            hosts.check_same(of_command(asked, name))
            if not hosts.first:
                silence()
            code = _train(name, load, asked, hosts)
            hosts.end()
            return code
        except BaseException as error:
            shown = hosts.explain(error) if isinstance(error, Exception) else error
            hosts.leave(shown)
            hosts.spoken()
            raise shown from (None if shown is error else error)

    try:
        code = run_command(body)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _train(name: str, load: Load, asked: "Asked", hosts: "Hosts") -> int:
    from smedjan_common.checkpoint.mirror import mirrored
    from smedjan_common.reporting.console import say
    from smedjan_common.run.lock import RunLock

    damaged: set[Path] = set()
    there = address(asked) if hosts.first else None
    with RunLock(writes=hosts.first and not asked.value("dry_run")) as lock, mirrored(there, checkpoint_dir(asked), say) as mirror:
        while True:
            try:
                return _train_into(name, load, asked, lock, mirror, damaged, hosts)
            except DamagedError as error:
                if error.path.parent != checkpoint_dir(asked) or asked.value("resume") != "auto":
                    raise
                say(f"note: {error.what} {error.why}")  # the one before it is taken
                damaged.add(error.path)


def _train_into(name: str, load: Load, asked: "Asked", lock: "RunLock", mirror: "Mirror | None", damaged: set[Path], hosts: "Hosts") -> int:
    """The steps of a run. mirror: where --checkpoint-dir is an address. damaged: checkpoints that turned out not to be whole."""
    from smedjan_common.data.token_file import TokenFile
    from smedjan_common.reporting.console import say
    from smedjan_common.run import loop
    from smedjan_common.run.chat_data import shown_rows
    from smedjan_common.run.config_file import sources
    from smedjan_common.run.decided import run_config, settled
    from smedjan_common.run.expected import expected, so_far
    from smedjan_common.run.plan import as_list, heading, plan
    from smedjan_common.run.reference_scores import reference_scores

    folder, dry_run = checkpoint_dir(asked), asked.value("dry_run")
    made = None if dry_run else folder
    begun = hosts.in_turn(lambda: _begun(name, asked, lock, mirror, damaged), made)
    if isinstance(begun, int):
        return begun
    framework = functools.cache(lambda: _imported(load, begun[0].train.deterministic))
    if not hosts.alone:
        hosts.together("framework", lambda: (hosts.start(), framework()))
    found = hosts.in_turn(lambda: _decided(*begun, framework, mirror), made)
    if isinstance(found, int):
        return found
    decided, backend, device = found
    if not hosts.alone:
        hosts.check_same(settled(decided, device))
        backend.meet(lambda: hosts.gather("meet"))
    if dry_run:
        if decided.asked.value("config"):
            say(as_list(sources(decided.asked.value("config"), decided.asked.given_values())))
        say(plan(decided, device, expected(decided, device, backend)))
        return 0
    say(heading(decided, device, so_far(decided, device)))
    config = run_config(decided, say, reference_scores(decided, framework()[0], hosts))
    if config.objective != "lm" and isinstance(config.train_data, TokenFile) and config.train_data.mask is not None:
        rows = shown_rows(config.train_data, config.train.seq_len, config.tokenizer)
        for what, row in zip(("The better of two answers" if rows[1:] else "One conversation", "The worse one"), rows, strict=False):
            say(f"{what} as it is learned; what is trained stands in brackets:\n  | " + row.rstrip("\n").replace("\n", "\n  | "))
    if mirror:
        say(f"The run is written to {folder}, and sent to {mirror.place} behind it.")
        mirror.claim(config.keep, config.keep_every)
    return loop.run(dataclasses.replace(config, mirror=mirror), backend, hosts)


def _begun(name: str, asked: "Asked", lock: "RunLock", mirror: "Mirror | None", damaged: set[Path]) -> "int | tuple[Decided, Begin]":
    """How the run begins and what it will be, as far as that is known without data; an exit code where there is nothing to do."""
    from smedjan_common.checkpoint.pulled import pull
    from smedjan_common.reporting.console import say
    from smedjan_common.run.checks import check
    from smedjan_common.run.claim import check_folder
    from smedjan_common.run.completed import complete
    from smedjan_common.run.decided import decide
    from smedjan_common.run.start import find_begin

    folder = checkpoint_dir(asked)
    lock.take(folder)
    if mirror:
        pull(mirror, say)
    check_folder(folder, asked)
    begin = find_begin(folder, asked, name, say, damaged)
    asked = complete(asked, begin, say)
    check(early := decide(name, asked, begin, folder))
    return _done_already(early, mirror, say) if early.done else (early, begin)


def _decided(
    early: "Decided", begin: "Begin", framework: "Callable[[], Framework]", mirror: "Mirror | None"
) -> "int | tuple[Decided, Backend, Device]":
    """What the run will be, its data made and its devices started; an exit code where there is nothing to do."""
    from smedjan_common.reporting.console import say
    from smedjan_common.run.checks import check
    from smedjan_common.run.cluster_plan import cluster_plan
    from smedjan_common.run.completed import data_of
    from smedjan_common.run.decided import decide
    from smedjan_common.run.notes import notes

    name, asked, folder = early.backend, early.asked, early.folder
    elsewhere = asked.value("devices") is not None

    def check_known(data: "RunData") -> None:  # by its devices too, before texts are tokenised, which may take hours
        check(known := decide(name, asked, begin, folder, data))
        if not elsewhere:
            _on_devices(known, framework(), say=lambda line: None)

    decided = decide(name, asked, begin, folder, data_of(asked, begin, folder, asked.value("dry_run"), check_known))
    check(decided)
    if decided.done:
        return _done_already(decided, mirror, say)
    decided = decided.computing_in("bfloat16" if elsewhere else framework()[1])
    for line in notes(decided):
        say(f"note: {line}")
    if elsewhere:
        say(cluster_plan(decided))
        return 0
    return decided, *_on_devices(decided, framework(), say)


def _on_devices(decided: "Decided", framework: "Framework", say: "Say") -> "tuple[Backend, Device]":
    """The backend of a run, and its devices. Raises ConfigError, OutOfMemoryError for a run that is not for them."""
    from smedjan_common.run.room import check_room

    make_backend, auto = framework
    decided = decided.computing_in(auto)
    backend = make_backend(decided.model, decided.train, decided.mesh)
    device = backend.describe()
    check_room(decided, device, say)
    return backend, device


def _imported(load: Load, deterministic: bool) -> "Framework":
    from smedjan_common.run.signals import interrupt_ends_at_once

    with interrupt_ends_at_once():
        return load(deterministic)


def _done_already(decided: "Decided", mirror: "Mirror | None", say: "Say") -> int:
    """Tell that all steps are done, and which flags would count if there were more; what was not sent yet is."""
    from smedjan_common.run.completed import data_of
    from smedjan_common.run.notes import notes

    if decided.asked.given & {"dataset", "val_dataset", "val_fraction", "tokenizer"}:
        data = data_of(decided.asked, decided.begin, decided.folder, dry_run=True)
        decided = dataclasses.replace(decided, data=data)
    for line in (lines := notes(decided)):
        say(f"note: {line}")
    assert decided.start
    done = f"Done already: {decided.start.path} is at step {decided.start.step} of {decided.train.steps}."
    say(f"{done} More --steps go on from there{', with what the notes say' if lines else ''}.")
    if mirror and not decided.asked.value("dry_run"):
        mirror.claim(decided.asked.value("keep"), decided.asked.value("keep_every"))
    return 0


def address(asked: "Asked") -> "Address | None":
    """--checkpoint-dir, where it is no folder of this machine."""
    from smedjan_common.remote.address import Address, is_remote

    given = asked.value("checkpoint_dir")
    return Address(given) if is_remote(given) else None


def checkpoint_dir(asked: "Asked") -> Path:
    """--checkpoint-dir, or where the run that it names is written before it is sent, or runs/DATASET-SIZE."""
    from smedjan_common.remote.cache import run_folder

    if there := address(asked):
        return run_folder(there)
    if asked.value("checkpoint_dir"):
        return Path(asked.value("checkpoint_dir"))
    if not (dataset := asked.value("dataset")):
        raise ConfigError(
            "There is nothing to train on.", "No text is given.", "Give one: smedjan train my.txt, or the --checkpoint-dir of a run."
        )
    return Path("runs") / f"{Path(dataset[0]).name.split('.')[0] or 'data'}-{asked.command if asked.chats else asked.value('size')}"
