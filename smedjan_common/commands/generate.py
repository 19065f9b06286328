"""`smedjan generate`, and the body of `python -m smedjan_jax.generate` and `python -m smedjan_mlx.generate`."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from smedjan_common import streams
from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import ConfigError, DataError, run_command
from smedjan_common.optional import MaybeStr
from smedjan_common.run.signals import interrupt_ends_at_once

if TYPE_CHECKING:
    from smedjan_common.backend import Backend
    from smedjan_common.inference.generate import Generation
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.training.config import TrainConfig

# imports a framework: -> (the backend's class, the dtype that auto means here)
Load = Callable[[], tuple[Callable[["ModelConfig", "TrainConfig"], "Backend"], str]]


MAX_PROMPT_BYTES = 64 << 20  # no endless file, as /dev/zero is, fills the memory
EXAMPLES = (
    'smedjan generate runs/mine --prompt "Once" --max-tokens 100',
    "smedjan generate runs/mine/final --prompt-file start.txt --temperature 0.7 --top-p 0.95 --seed 1",
)


@dataclass(frozen=True)
class GenerateFlags:
    """Continue a text with a trained model. The same seed gives the same text, in JAX and in MLX (float32)."""

    checkpoint: Annotated[str, arg(metavar="RUN"), NAMELESS]
    """A run folder (its newest weights), or a checkpoint in one: step-*/ or final/. `smedjan generate RUN` is the same."""
    prompt: Annotated[MaybeStr, arg(metavar="TEXT", help_behavior_hint="(default: the beginning of a document)")] = None
    """The text to continue; - reads it from standard input."""
    prompt_file: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = None
    """A file with the text to continue."""
    max_tokens: int = 200
    """The most tokens to generate. The model's context length is another limit; a note says when it is reached."""
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
    seed: int = 0
    """Fixes the random choices; another seed gives another text."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")] = ()
    """Stop before any of these texts."""
    echo: bool = True
    """Print the prompt before its continuation."""
    dtype: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "float32"
    """Precision of the computation."""
    backend: Annotated[str, arg(metavar="auto|jax|mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""


def main(argv: list[str]) -> int:
    """`smedjan generate`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate("generate", argv)


def run(name: str, load: Load, argv: list[str] | None = None) -> int:
    """Parse and generate with the backend `name`; returns the exit code."""

    def body() -> int:
        flags = parse(GenerateFlags, "smedjan generate", argv, *EXAMPLES)
        with interrupt_ends_at_once():  # in the middle of a compilation an exception would end in a crash of the framework
            return _generate(name, load, flags)

    return run_command(body)


def _generate(name: str, load: Load, flags: GenerateFlags) -> int:
    from smedjan_common.checkpoint import check_readable, read_weights
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.inference.generate import Generation
    from smedjan_common.inference.open import decoding_config, open_model
    from smedjan_common.inference.room import check_room
    from smedjan_common.inference.sampling import Sampling

    check_backend(name, flags.backend)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty, flags.seed)
    sampling.validate()
    if flags.max_tokens < 0:
        raise ConfigError(f"--max-tokens is {flags.max_tokens}.", "It must be at least 0.", "Leave it out for the default.")
    prompt = _prompt(flags)
    info, tokenizer = open_model(flags.checkpoint)
    check_readable(info, name)
    ids = _prompt_ids(prompt, tokenizer, info.model.context_length)
    make_backend, auto = load()
    backend = make_backend(info.model, decoding := decoding_config(info, auto if flags.dtype == "auto" else flags.dtype))
    check_room(info, backend.describe(), decoding.dtype, len(ids), flags.max_tokens)
    length = min(len(ids) + flags.max_tokens, info.model.context_length)
    decoder = backend.decoder(read_weights(info, backend.own), length)
    generation = Generation(decoder, tokenizer, ids, flags.max_tokens, info.model.context_length, sampling, flags.stop)
    _write(prompt if flags.echo else "", generation)
    if generation.reason == "context":
        streams.put(f"note: stopped at the model's context of {info.model.context_length} tokens.", sys.stderr)
    return 0


def _prompt(flags: GenerateFlags) -> str:
    if flags.prompt is not None and flags.prompt_file is not None:
        raise ConfigError("--prompt and --prompt-file are both given.", "Only one prompt is used.", "Give one of them.")
    source = flags.prompt_file or ("-" if flags.prompt == "-" else None)
    if source is None:
        return flags.prompt or ""
    with contextlib.nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as file:
        raw = file.read(MAX_PROMPT_BYTES + 1)
    if len(raw) > MAX_PROMPT_BYTES:
        why = f"It has over {MAX_PROMPT_BYTES >> 20} MiB, more than any model takes."
        raise DataError(f"The prompt in {source!r} is too long.", why, "Give a shorter text.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"The prompt in {source!r} is not UTF-8.", f"Byte {error.start} is no text.", "Convert the file.") from None


def _prompt_ids(prompt: str, tokenizer: Any, context_length: int) -> list[int]:
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot_id]
    if len(ids) > context_length:
        raise ConfigError(
            f"The prompt has {len(ids)} tokens.",
            f"The model was trained with a context of {context_length}.",
            "Shorten the prompt.",
        )
    return list(ids)


def _write(prompt: str, generation: "Generation") -> None:
    """Whole characters as they come."""
    out = sys.stdout
    out.write(prompt)
    out.flush()
    for piece in generation:
        out.write(piece)
        out.flush()
    out.write("\n")
    out.flush()
