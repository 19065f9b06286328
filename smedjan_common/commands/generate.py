"""`smedjan generate`, and the body of `python -m smedjan_jax.generate` and `python -m smedjan_mlx.generate`."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg

from smedjan_common import streams
from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import ConfigError, run_command
from smedjan_common.optional import MaybeInt, MaybeStr
from smedjan_common.run.signals import interrupt_ends_at_once

if TYPE_CHECKING:
    from smedjan_common.commands.texts import Text
    from smedjan_common.inference.opened import Load
    from smedjan_common.inference.request import Request
    from smedjan_common.inference.sampling import Sampling

MOST_TEXTS = 100_000
MOST_ROWS = 64  # texts side by side; more wait for a free row
EXAMPLES = (
    'smedjan generate runs/mine --prompt "Once" --max-tokens 100',
    "smedjan generate runs/mine --prompts starts.txt --num-samples 4 --temperature 0.7 --json",
)


@dataclass(frozen=True)
class GenerateFlags:
    """Continue texts with a trained model. The same seed gives the same text, in JAX and in MLX (float32), alone or among others."""

    checkpoint: Annotated[str, arg(metavar="RUN"), NAMELESS]
    """A run folder (its newest weights), a checkpoint in it, or a Hugging Face directory. `smedjan generate RUN` is the same."""
    prompt: Annotated[
        tuple[str, ...],
        arg(metavar="TEXT", help_behavior_hint="(default: what is piped in, or the beginning of a document)"),
        UseAppendAction,
        NAMELESS,
    ] = ()
    """A text to continue; may be given several times. - reads it from standard input. `smedjan generate RUN TEXT` is the same."""
    prompt_file: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = None
    """A file with the text to continue."""
    prompts: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = None
    """A file with a text to continue in each line, plain or as JSON objects with "prompt". Empty lines are left out."""
    num_samples: int = 1
    """How many texts to write for each prompt. The first has the seed --seed, the next one more, and so on."""
    max_tokens: int = 200
    """The most tokens to generate for a text. Past its context length a model with attention sees the last tokens only."""
    temperature: float = 1.0
    """Above 1 the text is more random, below 1 less; 0: always the most probable token."""
    top_k: int = 0
    """Choose among this many most probable tokens. 0: all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that make up this probability. 1: all."""
    min_p: float = 0.0
    """Choose among tokens of at least this probability, relative to the most probable one. 0: all."""
    repetition_penalty: float = 1.0
    """Make tokens that are already in the text less likely, for example 1.1. 1: off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that was generated already, -2 to 2. 0: off."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that it was generated, -2 to 2. 0: off."""
    seed: int = 0
    """Fixes the random choices; another seed gives another text."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")] = ()
    """Stop before any of these texts."""
    echo: bool = True
    """Print the prompt before its continuation."""
    special: Annotated[bool, FlagCreatePairsOff] = False
    """Show control tokens that the model writes by their names."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print a JSON object a line for each text: prompt, sample, seed, text, finish_reason, prompt_tokens, completion_tokens."""
    stats: Annotated[bool, FlagCreatePairsOff] = False
    """Say at the end, on standard error, how many tokens per second were generated. A terminal is told anyway."""
    draft: Annotated[MaybeStr, arg(metavar="RUN", help_behavior_hint="")] = None
    """A smaller model of the same tokenizer that guesses tokens ahead: the text is the same, and where it guesses well it comes faster."""
    draft_tokens: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: 4)")] = None
    """How many tokens the draft guesses at a time, 1 to 16."""
    ema: Annotated[bool, FlagCreatePairsOff] = False
    """Take the moving average of the weights that a step of `smedjan train --ema` keeps; final/ of such a run is the average."""
    dtype: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "float32"
    """Precision of the computation."""
    backend: Annotated[str, arg(metavar="auto|jax|mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""


def main(argv: list[str]) -> int:
    """`smedjan generate`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate("generate", argv)


def run(name: str, load: "Load", argv: list[str] | None = None) -> int:
    """Parse and generate with the backend `name`; returns the exit code."""

    def body() -> int:
        flags = parse(GenerateFlags, "smedjan generate", argv, *EXAMPLES)
        with interrupt_ends_at_once():  # in the middle of a compilation an exception would end in a crash of the framework
            return _generate(name, load, flags)

    return run_command(body)


def _generate(name: str, load: "Load", flags: GenerateFlags) -> int:
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.commands.prompts import read_prompts
    from smedjan_common.commands.texts import speed, write
    from smedjan_common.inference.chunks import by_position
    from smedjan_common.inference.opened import OpenModel

    check_backend(name, flags.backend)
    for what, number, least in (("--max-tokens", flags.max_tokens, 0), ("--num-samples", flags.num_samples, 1)):
        if number < least:
            raise ConfigError(f"{what} is {number}.", f"It must be at least {least}.", "Leave it out for the default.")
    _sampling(flags, 0).validate()
    prompts = read_prompts(flags.prompt, flags.prompt_file, flags.prompts)
    if (many := flags.num_samples * len(prompts)) > MOST_TEXTS:
        why = f"They and {len(prompts):,} prompts make {many:,} texts, all of which are kept until they are written."
        raise ConfigError(
            f"--num-samples is {flags.num_samples:,}.", why, f"Take {MOST_TEXTS:,} texts at most, and another --seed for more."
        )
    opened = OpenModel(flags.checkpoint, flags.draft, flags.draft_tokens, flags.ema)
    length = opened.model.context_length
    ids = [_prompt_ids(prompt, opened.tokenizer, length) for prompt in prompts]
    opened.use(name, load, flags.dtype)
    texts, requests = _texts(flags, prompts, ids)
    longest = max(map(len, ids))
    kept = int(flags.num_samples > 1)  # the state of a prompt, for its other samples
    rows = opened.rows(min(len(texts), MOST_ROWS), longest + flags.max_tokens, kept)
    engine = opened.engine(rows, longest, flags.max_tokens, kept, keep_answers=False)
    started = time.monotonic()
    tickets = [engine.submit(request) for request in requests]
    write(texts, engine.answer(tickets), flags.json, flags.echo)
    if any(len(ticket.ids) > length for ticket in tickets) and by_position(opened.model, length):
        streams.put(f"note: past the model's context of {length} tokens it saw the last {length} only.", sys.stderr)
    if flags.stats or sys.stderr.isatty():
        streams.put(speed(engine.stats, len(texts), time.monotonic() - started), sys.stderr)
    if error := next((ticket.error for ticket in tickets if ticket.error), None):
        raise error
    return 0


def _sampling(flags: GenerateFlags, sample: int) -> "Sampling":
    from smedjan_common.inference.sampling import Sampling

    return Sampling(
        flags.temperature,
        flags.top_k,
        flags.top_p,
        flags.min_p,
        flags.repetition_penalty,
        flags.seed if sample == 0 else (flags.seed + sample) % (1 << 64),
        flags.presence_penalty,
        flags.frequency_penalty,
    )


def _texts(flags: GenerateFlags, prompts: list[str], ids: list[list[int]]) -> "tuple[list[Text], list[Request]]":
    """What is to be written, and what is asked for it: the samples of the first prompt, of the second, …"""
    from smedjan_common.commands.texts import Text
    from smedjan_common.inference.request import Request

    texts, requests = [], []
    for prompt, its in zip(prompts, ids, strict=True):
        for number in range(flags.num_samples):
            sampling = _sampling(flags, number)
            texts.append(Text(prompt, number, sampling.seed))
            requests.append(Request(its, flags.max_tokens, sampling, flags.stop, special=flags.special))
    return texts, requests


def _prompt_ids(prompt: str, tokenizer: Any, context_length: int) -> list[int]:
    ids = tokenizer.begin(prompt)
    if len(ids) > context_length:
        raise ConfigError(
            f"The prompt has {len(ids)} tokens.",
            f"The model was trained with a context of {context_length}.",
            "Shorten the prompt.",
        )
    return list(ids)
