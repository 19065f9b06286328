"""`smedjan merge`: several models of one shape into one. The table of methods: smedjan_common.checkpoint.averaging."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import CheckpointError, ConfigError, flag, notice, run_command, unknown
from smedjan_common.optional import MaybeFloat, MaybeStr

if TYPE_CHECKING:
    from smedjan_common.checkpoint.averaging import Method, Settings
    from smedjan_common.inference.source import Source
    from smedjan_common.training.config import TrainConfig

EXAMPLES = (
    "smedjan merge runs/a runs/b --output out/merged",
    "smedjan merge runs/a --last 5 --output out/mean",
    "smedjan merge --adapter runs/lora --output out/whole",
)
RANGES = {"t": (0.0, 1.0), "density": (0.0, 1.0)}  # least and most


@dataclass(frozen=True)
class MergeFlags:
    """Merge models of the same shape and tokenizer into one checkpoint, tensor by tensor in float64: the mean of the last checkpoints of a
    run, or of runs that began with the same weights."""

    output: Annotated[str, arg(metavar="DIR")]
    """The checkpoint to write."""
    checkpoints: Annotated[tuple[str, ...], arg(metavar="PATH ...", help_behavior_hint="(required but for --adapter)"), NAMELESS] = ()
    """Run folders (their newest weights), step-*/, final/ or Hugging Face directories. `smedjan merge A B` is the same."""
    last: int = 0
    """Merge this many newest step checkpoints of the one run that is given. 0: what is given."""
    adapter: Annotated[MaybeStr, arg(metavar="PATH", help_behavior_hint="")] = None
    """Instead of several models: a run of adapters (--lora-rank), or its checkpoint, into the whole model that it is with its base."""
    ema: Annotated[bool, FlagCreatePairsOff] = False
    """Take the moving averages that step checkpoints of `smedjan train --ema` keep, not their weights; one is enough."""
    method: Annotated[str, arg(metavar="linear|slerp|ties")] = "linear"
    """linear: the weighted mean. slerp: on the arc between two models. ties: --base moved by what the others agree on."""
    weights: Annotated[tuple[float, ...], arg(metavar="FLOAT ...", help_behavior_hint="(default: equal)")] = ()
    """linear, ties: what each model weighs; they are divided by their sum."""
    t: Annotated[MaybeFloat, arg(metavar="FLOAT", help_behavior_hint="(default: 0.5)")] = None
    """slerp: how far from the first model, 0, to the second, 1."""
    base: Annotated[MaybeStr, arg(metavar="PATH", help_behavior_hint="")] = None
    """ties: the model that the others were trained from."""
    density: Annotated[MaybeFloat, arg(metavar="FLOAT", help_behavior_hint="(default: 0.5)")] = None
    """ties: the part of a difference from --base that is kept, the largest values."""
    scale: Annotated[MaybeFloat, arg(metavar="FLOAT", help_behavior_hint="(default: 1)")] = None
    """ties: what the merged difference is multiplied by before --base is added."""
    force: Annotated[bool, FlagCreatePairsOff] = False
    """Replace a checkpoint at --output."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(MergeFlags, "smedjan merge", argv, *EXAMPLES)
    return run_command(lambda: _run(flags))


def _run(flags: MergeFlags) -> int:
    return _run_adapter(flags, flags.adapter) if flags.adapter is not None else _run_models(flags)


def _run_adapter(flags: MergeFlags, path: str) -> int:
    from smedjan_common.checkpoint import find_base
    from smedjan_common.checkpoint.lazy import watched
    from smedjan_common.commands.outputs import check_directory
    from smedjan_common.inference.source import open_averages, open_source, write_made
    from smedjan_common.reporting.progress import progress_bar

    started, output = time.monotonic(), Path(flags.output)
    plain = MergeFlags("")
    for name in ("checkpoints", "last", "method", "weights", "t", "base", "density", "scale"):
        if getattr(flags, name) != getattr(plain, name):
            what = f"{'Another path' if name == 'checkpoints' else flag(name)} does not go with --adapter."
            why = "One run of adapters is merged with the weights that it was trained beside, which it names itself."
            raise ConfigError(what, why, "Leave it out.")
    source = (open_averages if flags.ema else open_source)(path)
    if not source.info or not source.info.adapter:
        raise ConfigError(f"{source.path} holds a whole model.", "There are no adapters to merge.", "Use it as it is.")
    base = find_base(source.info)
    check_directory(output, flags.force, [path, str(base.path)])
    source.verify()
    how = {"adapter": source.described(), "base": {"path": str(base.path), "sha256": source.info.adapter.base.sha256}}
    with progress_bar() as show:
        write_made(output, source, watched(source.weights, "merging", show), "merge", how)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {base.path} with the adapters of {source.path}, {size / 1e6:,.1f} MB, {time.monotonic() - started:.1f} s")
    return 0


def _run_models(flags: MergeFlags) -> int:
    from smedjan_common.checkpoint.averaging import merged
    from smedjan_common.checkpoint.lazy import watched
    from smedjan_common.commands.outputs import check_directory
    from smedjan_common.inference.source import check_alike, open_averages, open_source, write_made
    from smedjan_common.reporting.progress import progress_bar

    started, output, method = time.monotonic(), Path(flags.output), _method(flags)
    paths = _last(flags) if flags.last else list(flags.checkpoints)
    settings = _settings(flags, method, len(paths))
    check_directory(output, flags.force, [*paths, *filter(None, [flags.base])])
    sources = [(open_averages if flags.ema else open_source)(path) for path in paths]
    base = open_source(flags.base) if flags.base else None
    everything = [*sources, base] if base else sources
    for other in everything[1:]:
        check_alike(sources[0], other)
    if any(source.tokenizer.chat != sources[0].tokenizer.chat for source in sources):
        notice(f"The models have different chat templates; the merged one has that of {sources[0].path}.")
    for source in {each.path: each for each in everything}.values():
        source.verify()
    with progress_bar() as show:
        made = merged(method, settings, [source.weights for source in sources], base.weights if base else None)
        tensors = watched(made, "merging", show)
        write_made(output, sources[0], tensors, "merge", _how(method, settings, sources, base), train=_training(sources))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    what = f"{method.about} ({method.name}) of {len(sources)} models" if len(sources) > 1 or base else "the moving average of the weights"
    print(f"{output}: {what}, {size / 1e6:,.1f} MB, {time.monotonic() - started:.1f} s")
    return 0


def _how(method: "Method", settings: "Settings", sources: "Sequence[Source]", base: "Source | None") -> dict[str, Any]:
    """What checkpoint.json says of it."""
    how = {"method": method.name, "models": [source.described() for source in sources]}
    how |= {"base": base.described()} if base else {}
    return how | {name: getattr(settings, name) for name in method.reads if name != "base"}


def _method(flags: MergeFlags) -> "Method":
    """Raises ConfigError for one that is not known, and for a flag that it does not read."""
    from smedjan_common.checkpoint.averaging import METHODS

    if flags.method not in METHODS:
        raise unknown("--method", flags.method, METHODS)
    method = METHODS[flags.method]
    for name in ("weights", "t", "base", "density", "scale"):
        if getattr(flags, name) not in (None, ()) and name not in method.reads:
            readers = [row.name for row in METHODS.values() if name in row.reads]
            why, fix = f"--method is {method.name}.", f"Leave it out, or take --method {' or '.join(readers)}."
            raise ConfigError(f"{flag(name)} would do nothing.", why, fix)
    if method.needs_base and flags.base is None:
        what, why = f"--method {method.name} needs --base.", "It merges what training changed, from the weights that all began with."
        raise ConfigError(what, why, "Give the model that the others were trained from: --base PATH.")
    return method


def _settings(flags: MergeFlags, method: "Method", models: int) -> "Settings":
    """Raises ConfigError for what cannot be merged so."""
    from smedjan_common.checkpoint.averaging import Settings

    if method.models not in (None, models):
        fix = f"Give {method.models} models, or take --method linear."
        raise ConfigError(f"--method {method.name} is given {models} models.", f"It takes {method.models}.", fix)
    if models < (least := 1 if method.needs_base or flags.ema else 2):
        what = f"{models or 'No'} model is given, where at least {least} are merged."
        raise ConfigError(what, "There is nothing to merge.", "Give several models, or --last 5 with a run folder.")
    if flags.weights and len(flags.weights) != models:
        what = f"--weights has {len(flags.weights)} values for {models} models."
        raise ConfigError(what, "Each model has its weight.", "Give one value for each model, in their order.")
    weights = flags.weights or (1.0,) * models
    if not 0 < abs(sum(weights)) < float("inf"):
        raise ConfigError(f"--weights add up to {sum(weights):g}.", "They are divided by their sum.", "Give weights that add up to 1, say.")
    for name, (least, most) in RANGES.items():
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"{flag(name)} is {value}.", f"It must be from {least:g} to {most:g}.", "Leave it out for 0.5.")
    if flags.scale is not None and not abs(flags.scale) < float("inf"):
        raise ConfigError(f"--scale is {flags.scale}.", "It must be finite.", "Leave it out for 1.")
    given = {name: getattr(flags, name) for name in ("t", "density", "scale") if getattr(flags, name) is not None}
    return Settings(weights, **given)


def _last(flags: MergeFlags) -> list[str]:
    """The newest step checkpoints of the run. Raises ConfigError, CheckpointError where it has fewer."""
    from smedjan_common.checkpoint import find_checkpoints

    if len(flags.checkpoints) != 1 or flags.last < 2:
        what = f"--last {flags.last} is given with {len(flags.checkpoints)} paths."
        raise ConfigError(what, "It takes that many checkpoints, at least 2, of one run.", "Write smedjan merge runs/a --last 5.")
    run = flags.checkpoints[0]
    if not Path(run).is_dir():
        from smedjan_common.checkpoint import read_info

        read_info(run)  # says what there is instead
    found = find_checkpoints(run, on_skip=notice)
    if len(found) < flags.last:
        what = f"{run} has {len(found)} step checkpoints, not {flags.last}."
        fix = f"Take --last {len(found)}." if len(found) > 1 else "Train with a larger --keep, or --keep 0 for all."
        raise CheckpointError(what, "Older ones are removed as --keep says.", fix)
    return [str(each.path) for each in found[-flags.last :]]


def _training(sources: "Sequence[Source]") -> "TrainConfig | None":
    """How they were trained, where that is the same of all."""
    trained = [source.train for source in sources]
    return trained[0] if all(each == trained[0] for each in trained) else None
