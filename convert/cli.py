"""`convert SRC DST --to FORMAT`, `smedjan convert`, `python -m convert`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, Positional, arg

from smedjan_common import errors
from smedjan_common.command_line import parse
from smedjan_common.errors import ConfigError, unknown
from smedjan_common.optional import MaybeStr


@dataclass(frozen=True)
class Flags:
    """Convert a model between smedjan's checkpoints and the formats of other programs; the format of SRC is detected.

    Nothing is overwritten without --force. What was written is read back and compared before it gets its name, and no value changes:
    float32 holds bfloat16 and float16 exactly.
    """

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """A run folder (docs/convert.md says what of it), a step-*/, orbax-*/ or final/, a Hugging Face directory, a GGUF file, or hf://OWNER/NAME."""
    dst: Annotated[Positional[str], arg(metavar="DST")]
    """What to write: a directory, or a file for gguf."""
    to: Annotated[str, arg(metavar="neutral|orbax|hf|quantized|gguf|peft|mlx-lm")]
    """neutral: smedjan's own. orbax: JAX's. hf: transformers, mlx-lm. quantized: to infer with. gguf: llama.cpp. peft, mlx-lm: adapters."""
    dtype: Annotated[str, arg(metavar="float32|bfloat16|float16|q8_0")] = "float32"
    """Precision of the weights that are written; q8_0 (8 bits and a scale per 32 weights) for gguf only, float32 for neutral and orbax."""
    bits: int = 8
    """quantized: bits of a weight, 8 or 4; the embedding and the head have 8."""
    max_shard_size: Annotated[str, arg(metavar="SIZE")] = "5GB"
    """hf: a larger model is written in several files of at most this size (a number with KB, MB or GB)."""
    base: Annotated[MaybeStr, arg(metavar="PATH", help_behavior_hint="")] = None
    """SRC holds adapters of PEFT or mlx-lm: the run or checkpoint of smedjan that they belong to."""
    force: Annotated[bool, FlagCreatePairsOff] = False
    """Replace DST if it exists. Only what `convert` could have written is ever replaced."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    prog = "convert" if argv is None else "smedjan convert"
    example = f"{prog} runs/mine out"
    flags = parse(Flags, prog, argv, f"{example}/hf --to hf", f"{example}/model.gguf --to gguf --dtype q8_0")
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from convert import adapters

    if flags.to in adapters.KINDS or adapters.found(Path(flags.src)):
        return _adapters(flags)
    if flags.base is not None:
        raise ConfigError("--base would do nothing.", f"{flags.src} holds no adapters of PEFT or mlx-lm.", "Leave it out.")
    return _model(flags)


def _adapters(flags: Flags) -> int:
    """Adapters in or out."""
    from convert import adapters
    from convert.formats import FLOATS, FORMATS, dtype_name
    from convert.output import check_target
    from smedjan_common.checkpoint import newest

    started, src, dst = time.monotonic(), Path(flags.src), Path(flags.dst)
    if not (kind := adapters.found(src)):
        target = adapters.KINDS[flags.to]
        check_target(src, dst, flags.force, target)
        info = newest(src)
        adapters.export(info, target, dst, FLOATS[dtype_name(flags.dtype, FORMATS["hf"])])
        print(f"{dst}: {target.about} of {info.path}, read back and equal, {time.monotonic() - started:.1f} s")
        return 0
    if flags.to != "neutral" or flags.base is None:
        what = f"{src} holds {kind.about}, which become a checkpoint of smedjan beside their base."
        fix = f"Write: smedjan convert {src} {dst} --to neutral --base RUN (a Hugging Face base: convert it to neutral before)."
        raise ConfigError(what, "They are no model by themselves.", fix)
    check_target(src, dst, flags.force, FORMATS["neutral"])
    check_target(Path(flags.base), dst, flags.force, FORMATS["neutral"])
    count = adapters.import_into(src, kind, Path(flags.base), dst)
    print(f"{dst}: a checkpoint of adapters of {count} linear maps beside {flags.base}, {time.monotonic() - started:.1f} s")
    return 0


def _model(flags: Flags) -> int:
    from convert.formats import FORMATS, Options, dtype_name, source_format
    from convert.neutral import training_state
    from convert.output import check_target
    from convert.quantized import note as rounded
    from smedjan_common.model.quantization import BITS
    from smedjan_common.reporting.progress import progress_bar

    if flags.to not in FORMATS:
        raise unknown("--to", flags.to, FORMATS)
    started, target = time.monotonic(), FORMATS[flags.to]
    if flags.bits not in BITS:
        raise unknown("--bits", str(flags.bits), [str(bits) for bits in BITS])
    options = Options(dtype_name(flags.dtype, target), parse_size(flags.max_shard_size), flags.bits)
    dst = Path(flags.dst)
    keeps_training = target.name in ("neutral", "orbax")
    place, origin = _fetched(flags.src)
    src = training_state(place) if keeps_training else place
    source = source_format(src)
    if source is target and (keeps_training or target.name == "quantized"):
        source.read(src)  # a broken one is told so
        raise ConfigError(f"{src} is {target.name} already.", "There is nothing to convert.", "Copy it, or name another --to.")
    check_target(src, dst, flags.force, target)
    model = source.read(src)
    if origin:
        model = replace(model, source={**model.source, **origin})
    with progress_bar() as show:
        notes = target.write(model, dst, options, show)
    if model.packed and target.name in ("neutral", "orbax", "hf") and source.name == "quantized":
        notes = [rounded(model), *notes]
    for note in (*model.notes, *notes):
        print(f"note: {note}")
    size = sum(file.stat().st_size for file in dst.rglob("*") if file.is_file()) if dst.is_dir() else dst.stat().st_size
    parameters, taken = model.config.num_params(), model.info.path if model.info else flags.src if origin else src
    small = (
        f"{options.bits} bits"
        if target.name == "quantized"
        else "the bits that they have"
        if model.packed and target.name == "gguf"
        else ""
    )
    form = small or options.dtype
    state = " and optimizer state" if keeps_training and model.slots else ""
    print(
        f"{dst}: {target.about} of {taken}, {parameters:,} parameters{state} in {form}, {size / 1e6:,.1f} MB, "
        f"read back and equal, {time.monotonic() - started:.1f} s"
    )
    return 0


def _fetched(src: str) -> tuple[Path, dict[str, str]]:
    """Where the source is on this machine, and which commit of which model it is when it comes from the Hub."""
    from convert import hub

    if not hub.is_address(src):
        return Path(src), {}
    repository = hub.parse(src)
    folder, commit = hub.fetch(repository)
    return folder, {"repository": repository.name, "revision": commit}


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1000`. Raises ConfigError."""
    number, unit = text.strip().upper(), 1
    for name, scale in (("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)):
        if number.endswith(name):
            number, unit = number.removesuffix(name), scale
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text!r} is not a size.", "It is a number with KB, MB or GB.", "Write 5GB, for example.")
    return size
