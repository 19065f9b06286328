"""`smedjan train`, and the body of `python -m smedjan_jax.train` and `python -m smedjan_mlx.train`.

Everything that can be refused is refused before a framework is imported, which takes seconds.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smedjan_common.errors import run_command
from smedjan_common.files.names import CONFIG, FINAL, TOKENIZER

if TYPE_CHECKING:
    from smedjan_common.backend import Backend
    from smedjan_common.checkpoint import CheckpointInfo
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.run.data import RunData
    from smedjan_common.run.flags import TrainFlags
    from smedjan_common.run.lock import RunLock
    from smedjan_common.training.config import TrainConfig
    from smedjan_common.training.mesh import MeshShape


# imports a framework: -> (the backend's class, the dtype that auto means here)
Load = Callable[[bool], tuple[Callable[["ModelConfig", "TrainConfig", "MeshShape | None"], "Backend"], str]]


def main(argv: list[str]) -> int:
    """`smedjan train`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate("train", argv)


def run(name: str, load: Load, argv: list[str] | None = None) -> int:
    """Parse and train with the backend `name`; returns the exit code."""
    from smedjan_common.run.flags import parse

    argv = sys.argv[1:] if argv is None else argv
    prog = f"python -m smedjan_{name}.train" if "smedjan_" in Path(sys.argv[0]).parent.name else "smedjan train"
    return run_command(lambda: _train(name, load, *parse(argv, prog=prog)))


def _train(name: str, load: Load, flags: "TrainFlags", given: frozenset[str]) -> int:
    from smedjan_common.run.lock import RunLock

    with RunLock(writes=not flags.run.dry_run) as lock:
        return _train_alone(name, load, flags, given, lock)


def _train_alone(name: str, load: Load, flags: "TrainFlags", given: frozenset[str], lock: "RunLock") -> int:
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.data.batches import batches
    from smedjan_common.reporting.console import say
    from smedjan_common.run import resume, settings
    from smedjan_common.run.checks import check_counts, check_documents, check_format, check_names
    from smedjan_common.run.room import check_room
    from smedjan_common.run.signals import interrupt_ends_at_once
    from smedjan_common.run.start import find_start
    from smedjan_common.training.mesh import check_mesh, check_mesh_of, parse_mesh

    check_backend(name, flags.run.backend)
    check_counts(flags)
    check_names(flags)
    check_format(flags.run.checkpoint_format, name)
    mesh = parse_mesh(flags.run.mesh)
    check_mesh_of(name, mesh)
    folder = checkpoint_dir(flags)
    lock.take(folder)
    start = find_start(folder, flags.run.resume, say)
    if start is None:
        settings.check_flags(flags, given)
    info, flags, data = _source(name, flags, given, folder, start)
    if info and not start and "seq_len" not in given:
        flags = settings.pretrained_flags(flags, given, info.model)
        say(f"note: --seq-len is {flags.training.seq_len}, {_length_of(flags, info)}.")
    vocab_size = data.tokenizer.vocab_size if data.tokenizer else flags.data.vocab_size
    model = _model(flags, given, info, start, vocab_size)
    base = info.train if info and start else None

    known = base or flags.training
    epoch = batches(data.train, known.seq_len, known.batch_size, 0, known.packing).steps_per_epoch if data.train else 1

    def train_config(dtype: str) -> "TrainConfig":
        return settings.train_config(flags.training, given, base, model.dim, epoch, dtype)

    train = train_config("float32")
    if mesh:
        check_mesh(mesh, model, train.batch_size, train.grad_accum)
    train.check_model(model)
    if train.mask_documents:
        check_documents(data)
    if start and info:
        resume.check_fixed(info, train)
        _changes(info, model, train, data)  # refuses another model
        if train.steps <= info.step and (folder / FINAL).exists():
            say(f"Done already: {start} is at step {info.step} of {train.steps}. More --steps go on from there.")
            return 0
    if not flags.run.dry_run:
        _check_writable(folder)
        lock.take(folder)
    with interrupt_ends_at_once():
        make_backend, dtype = load(train.deterministic)
    train = train_config(dtype)
    if start and info:
        for line in _changes(info, model, train, data):
            say(f"note: {line}")
    backend = make_backend(model, train, mesh)
    device = backend.describe()
    check_room(flags, model, train, device, folder, info, start, say)
    if flags.run.dry_run:
        from smedjan_common.run.plan import plan

        return say(plan(model, train, data, folder, start, device, known_steps=data.train is not None or "steps" in given)) or 0
    return _run(name, flags, folder, start, info, model, train, data, backend)


def _length_of(flags: "TrainFlags", info: "CheckpointInfo") -> str:
    of_weights = f"the context of {info.path}"
    return of_weights if flags.training.seq_len == info.model.context_length else f"{of_weights} times --rope-factor"


def _run(name: str, flags, folder: Path, start: Path | None, info, model, train, data, backend) -> int:
    from smedjan_common.reporting.console import say
    from smedjan_common.reporting.metrics import read_rows
    from smedjan_common.run import loop
    from smedjan_common.run.folder import RunConfig
    from smedjan_common.run.plan import heading
    from smedjan_common.run.recorded import to_record

    config = RunConfig(
        model,
        train,
        folder,
        data.train,
        data.val,
        data.tokenizer,
        start=start,
        pretrained=info.path if info and not start else None,
        history=read_rows(start.parent) if start else None,
        checkpoint_every=flags.run.checkpoint_every,
        keep=flags.run.keep,
        keep_every=flags.run.keep_every,
        checkpoint_format=_format_here(flags.run.checkpoint_format, name, say),
        flags=to_record(flags),
        **dataclasses.asdict(flags.report),
    )
    if flags.report.sample_every:
        from smedjan_common.run.checks import check_sample_prompt

        check_sample_prompt(flags.report.sample_prompt, data.tokenizer, model.context_length)
    say(heading(model, train, data, folder, backend.describe()))
    return loop.run(config, backend)


def _format_here(kind: str, backend: str, say: Callable[[str], object]) -> str:
    """The format that this backend writes in a run whose format is `kind`; config.json keeps that one for when the run goes back."""
    from smedjan_common.training.config import CHECKPOINT_FORMATS

    if CHECKPOINT_FORMATS[kind] in {None, backend}:
        return kind
    say(f"note: checkpoints are neutral from here on: {kind}, which the run asks for, is of the backend {CHECKPOINT_FORMATS[kind]}.")
    return "neutral"


def checkpoint_dir(flags: "TrainFlags") -> Path:
    """--checkpoint-dir, or runs/DATASET-SIZE."""
    from smedjan_common.errors import ConfigError

    if flags.run.checkpoint_dir:
        return Path(flags.run.checkpoint_dir)
    if not flags.data.dataset:
        raise ConfigError(
            "There is nothing to train on.", "--dataset is not given.", "Give --dataset FILE, or the --checkpoint-dir of a run."
        )
    return Path("runs") / f"{Path(flags.data.dataset[0]).name.split('.')[0] or 'data'}-{flags.model.size}"


def _source(
    name: str, flags: "TrainFlags", given: frozenset[str], folder: Path, start: Path | None
) -> "tuple[CheckpointInfo | None, TrainFlags, RunData]":
    """The checkpoint that the run begins with, the flags completed from the run, and the data."""
    from smedjan_common.checkpoint import check_readable, read_info
    from smedjan_common.reporting.console import say
    from smedjan_common.run.data import check_same_share, check_vocab_size, recorded_datasets, run_data
    from smedjan_common.run.folder import read_config
    from smedjan_common.run.recorded import check_recorded, is_dataset, recall
    from smedjan_common.run.resume import check_tokenizer
    from smedjan_common.tokenizer import Tokenizer

    begin = start or (Path(flags.run.pretrained) if flags.run.pretrained else None)
    info = read_info(begin) if begin else None
    if info:
        check_readable(info, name)
    own = Tokenizer.load(info.path) if info and (info.path / TOKENIZER).is_file() else None
    recorded = read_config(start.parent) if start else None
    if recorded and start:
        check_recorded(start.parent / CONFIG, recorded)
        flags = recall(flags, given, recorded.get("flags") or {})
    elif start and info:
        say(f"note: {start.parent / CONFIG} is missing or not readable: flags of the run are not known, those not given are defaults.")
        recorded = {"dataset": info.dataset if is_dataset(info.dataset) else None}
    known = recorded_datasets(start.parent, recorded) if recorded and start and "dataset" not in given else {}
    if known and recorded:
        check_same_share(flags.data, given, recorded.get("flags") or {})
    if "val_dataset" in given:
        known.pop("val_dataset", None)

    def check(tokenizer: Tokenizer) -> None:
        if info:
            check_tokenizer(info, tokenizer)
        if info and not start:
            check_vocab_size(flags.data, given, tokenizer, f"the tokenizer of {info.path}")

    asked = given - {"vocab_size"} if known else given  # it was for the tokenizer that the run has by now
    return info, flags, run_data(dataclasses.replace(flags.data, **known), asked, folder, own, flags.run.dry_run, check)


def _model(flags: "TrainFlags", given: frozenset[str], info: "CheckpointInfo | None", start: Path | None, vocab_size: int) -> "ModelConfig":
    from smedjan_common.run import settings

    if info is None:
        return settings.new_model(flags, vocab_size)
    if start is None:
        return settings.pretrained_model(info.model, info.path, flags, given)
    return settings.same_model(info.model, flags, given)


def _changes(info: "CheckpointInfo", model: "ModelConfig", train: "TrainConfig", data: "RunData") -> list[str]:
    from smedjan_common.run.resume import check_resume

    tokenizer_hash, dataset_hash = data.tokenizer.hash if data.tokenizer else None, data.train.hash if data.train else None
    return check_resume(info, model, train, tokenizer_hash, dataset_hash)


def _check_writable(folder: Path) -> None:
    """Make the run folder, so that a place that cannot be written is refused before anything takes time."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "Permission denied", str(folder))
