"""`smedjan grow`: a larger model that computes the same. What stems from what: smedjan_common.model.growth."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import ConfigError, run_command
from smedjan_common.optional import MaybeFloat, MaybeInt, MaybeStr

if TYPE_CHECKING:
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.model.growth import Growth, Wanted

EXAMPLES = ("smedjan grow runs/a --layers 8 --output runs/deep", "smedjan grow runs/a --experts 8 --output runs/experts")
AS_IS = "(default: as it is)"


@dataclass(frozen=True)
class GrowFlags:
    """Make a larger model of a trained one: more layers, wider feed-forwards, more heads, experts. It computes the same until it is trained
    on, and every new part learns something of its own."""

    checkpoint: Annotated[str, arg(metavar="PATH"), NAMELESS]
    """A run folder (its newest weights), step-*/, final/ or Hugging Face directory. `smedjan grow RUN` is the same."""
    output: Annotated[str, arg(metavar="DIR")]
    """The run folder to begin, which `smedjan train --checkpoint-dir DIR` goes on with."""
    layers: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint=AS_IS)] = None
    """Number of blocks. Each new one stands behind the one that it is made of, and adds nothing at first."""
    ffn_mult: Annotated[MaybeFloat, arg(metavar="FLOAT", help_behavior_hint=AS_IS)] = None
    """Feed-forward width over the model's, rounded up to a multiple of 256."""
    heads: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint=AS_IS)] = None
    """Number of query heads, of the size that they have (attention, block-sparse)."""
    kv_heads: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: as it is, or --heads)")] = None
    """Number of key/value heads."""
    experts: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="")] = None
    """Make this many experts of every dense feed-forward."""
    ffn: Annotated[MaybeStr, arg(metavar="NAME,...", help_behavior_hint="(default: experts)")] = None
    """With --experts: which layers get them, a pattern over the new depth (swiglu,experts: every second one)."""
    experts_per_token: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: 2)")] = None
    """With --experts: experts that each token is sent to."""
    shared_experts: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: 0)")] = None
    """With --experts: experts that see every token besides."""
    router: Annotated[MaybeStr, arg(metavar="softmax|bias", help_behavior_hint="(default: softmax)")] = None
    """With --experts: how they are balanced, as for `smedjan train`."""
    expert_dim: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint=AS_IS)] = None
    """Width of one expert, of a model that has some."""
    seed: int = 0
    """Of what makes copies differ."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(GrowFlags, "smedjan grow", argv, *EXAMPLES)
    return run_command(lambda: _run(flags))


def _run(flags: GrowFlags) -> int:
    from smedjan_common.checkpoint.growing import grown
    from smedjan_common.checkpoint.lazy import watched
    from smedjan_common.checkpoint.load import step_name
    from smedjan_common.commands.outputs import check_directory
    from smedjan_common.inference.source import open_source, write_made
    from smedjan_common.model.growth import plan
    from smedjan_common.reporting.progress import progress_bar

    started, output = time.monotonic(), Path(flags.output)
    check_directory(output, False, [flags.checkpoint])
    source = open_source(flags.checkpoint)
    growth = plan(source.model, _wanted(flags, source.model))
    source.verify()
    how = {"of": source.described(), "seed": flags.seed, "model": source.model.to_dict(), "layers": list(growth.layers)}
    anew = dataclasses.replace(source, model=growth.new, info=None)  # no step is done, and no optimizer state goes along
    with progress_bar() as show:
        write_made(output / step_name(0), anew, watched(grown(source.weights, growth, flags.seed), "growing", show), "grow", how)
    print(f"{output}: {', '.join(_changes(growth))}, {time.monotonic() - started:.1f} s")
    print(f"next: smedjan train my.txt --checkpoint-dir {output}")
    return 0


def _wanted(flags: GrowFlags, model: "ModelConfig") -> "Wanted":
    from smedjan_common.model.config import ffn_width, parse_pattern
    from smedjan_common.model.growth import Wanted

    given: dict[str, Any] = {name: getattr(flags, name) for name in Wanted._fields if name not in ("ffn_dim", "ffn")}
    for name, value in given.items():
        if isinstance(value, int) and value < (name != "shared_experts"):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}.", "It counts what the larger model has.", "Give a larger number.")
    ffn_dim = None if flags.ffn_mult is None else ffn_width(model.dim, flags.ffn_mult)
    return Wanted(**given, ffn_dim=ffn_dim, ffn=None if flags.ffn is None else parse_pattern(flags.ffn))


def _changes(growth: "Growth") -> list[str]:
    """What became of what."""
    old, new = growth.old, growth.new
    names = {"layers": "layers", "ffn_dim": "feed-forward", "heads": "heads", "kv_heads": "key/value heads", "experts": "experts"}
    lines = [f"{text} {a} -> {b}" for name, text in names.items() if (a := getattr(old, name)) != (b := getattr(new, name))]
    if new.expert_dim != old.expert_dim:
        lines.append(f"width of an expert {old.expert_dim or old.ffn_dim} -> {new.expert_dim}")
    return [*lines, f"parameters {old.num_params() / 1e6:,.2f}M -> {new.num_params() / 1e6:,.2f}M"]
