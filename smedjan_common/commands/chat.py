"""`smedjan chat`, and the body of `python -m smedjan_jax.chat` and `python -m smedjan_mlx.chat`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from smedjan_common import streams
from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import ConfigError, run_command
from smedjan_common.optional import MaybeInt, MaybeStr
from smedjan_common.reporting.console import count
from smedjan_common.run.signals import interrupt_ends_at_once

if TYPE_CHECKING:
    from smedjan_common.inference.opened import Load, OpenModel
    from smedjan_common.inference.sampling import Sampling
    from smedjan_common.tokenizer.chat_template import ChatTemplate

EXAMPLES = ("smedjan chat runs/mine", "smedjan chat runs/mine --template plain --temperature 0.5 --max-tokens 200")
NOTEBOOK_TOKENS = 200  # that a base model, which knows no end of an answer, goes on with
_WARM_UP = 31  # tokens of a prompt: chunks of 16, 8, 4, 2 and 1
_KEPT_STATES = 2  # of the talk so far, where the model cannot go back in it


@dataclass(frozen=True)
class ChatFlags:
    """Talk with a model in the terminal; it stays loaded. /help lists what can be typed.

    A base model, which has no chat template, opens a notebook: what is typed is added to a text, and the model goes on with it.
    Without a terminal each line of standard input is a message, and each answer is printed on one line.
    """

    checkpoint: Annotated[str, arg(metavar="RUN"), NAMELESS]
    """A run folder (its newest weights), or a checkpoint in one: step-*/ or final/. `smedjan chat RUN` is the same."""
    system: Annotated[MaybeStr, arg(metavar="TEXT", help_behavior_hint="")] = None
    """What the model is told first."""
    template: Annotated[str, arg(metavar="auto|none|plain|chatml|FILE")] = "auto"
    """How turns are written. auto: the model's own; none: a notebook; plain: "User: …" and "Assistant: …"; or a file of Jinja."""
    load: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = None
    """Go on with a talk that /save wrote."""
    max_tokens: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: as many as the context holds; notebook: 200)")] = None
    """The most tokens of an answer."""
    temperature: float = 0.7
    """Above 1 the text is more random, below 1 less; 0: always the most probable token."""
    top_k: int = 0
    """Choose among this many most probable tokens. 0: all."""
    top_p: float = 0.95
    """Choose among the most probable tokens that make up this probability. 1: all."""
    min_p: float = 0.0
    """Choose among tokens of at least this probability, relative to the most probable one. 0: all."""
    repetition_penalty: float = 1.0
    """Make tokens that are already in the talk less likely, for example 1.1. 1: off."""
    seed: int = 0
    """Fixes the random choices; another seed gives other answers."""
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")] = ()
    """End an answer before any of these texts."""
    json: bool = False
    """Print each answer as a line of JSON, and take each line of standard input as a message, in a terminal too."""
    draft: Annotated[MaybeStr, arg(metavar="RUN", help_behavior_hint="")] = None
    """A smaller model of the same tokenizer that guesses tokens ahead: answers are the same, and where it guesses well they come faster."""
    draft_tokens: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: 4)")] = None
    """How many tokens the draft guesses at a time, 1 to 16."""
    ema: Annotated[bool, FlagCreatePairsOff] = False
    """Take the moving average of the weights that a step of `smedjan train --ema` keeps; final/ of such a run is the average."""
    dtype: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "float32"
    """Precision of the computation."""
    backend: Annotated[str, arg(metavar="auto|jax|mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""


def main(argv: list[str]) -> int:
    """`smedjan chat`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate("chat", argv)


def run(name: str, load: "Load", argv: list[str] | None = None) -> int:
    """Parse and talk with the backend `name`; returns the exit code."""
    return run_command(lambda: _chat(name, load, parse(ChatFlags, "smedjan chat", argv, *EXAMPLES)))


def _chat(name: str, load: "Load", flags: ChatFlags) -> int:
    from smedjan_common.chat import files
    from smedjan_common.chat.answering import Answering
    from smedjan_common.chat.settings import Settings
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.inference.opened import OpenModel
    from smedjan_common.inference.service import Service
    from smedjan_common.tokenizer.chat import named_template

    check_backend(name, flags.backend)
    sampling = _sampling(flags)
    opened = OpenModel(flags.checkpoint, flags.draft, flags.draft_tokens, flags.ema)
    template = named_template(flags.template, opened.info.path, opened.tokenizer)
    talk = _talk(flags, opened, template)
    if flags.load is not None:
        files.load(Path(flags.load), talk)

    def engine():
        opened.use(name, load, flags.dtype)
        engine = opened.engine(1, 0, opened.model.context_length, _KEPT_STATES)
        engine.warm_up(min(_WARM_UP, opened.model.context_length))
        return engine

    in_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not flags.json
    if in_terminal:
        streams.put(f"Loading {opened.path} …", sys.stdout)
    service = Service(engine)
    with interrupt_ends_at_once():  # nothing is said yet that could be lost
        service.start()
    most = flags.max_tokens if flags.max_tokens is not None else 0 if template else NOTEBOOK_TOKENS
    answering = Answering(service, talk, Settings(sampling, most, flags.stop))
    try:
        return _terminal(flags, opened, template, answering) if in_terminal else _piped(flags, answering)
    finally:
        service.close(timeout=2)


def _piped(flags: ChatFlags, answering: Any) -> int:
    from smedjan_common.chat import piped

    with interrupt_ends_at_once():
        return piped.run(answering, sys.stdin.buffer, flags.json)


def _terminal(flags: ChatFlags, opened: "OpenModel", template: "ChatTemplate | None", answering: Any) -> int:
    from smedjan_common.chat.app import App
    from smedjan_common.chat.reader import Reader, history_path
    from smedjan_common.chat.screen import Screen
    from smedjan_common.chat.signals import signals_leave
    from smedjan_common.chat.slash import COMMANDS

    screen = Screen()
    about = f"{count(opened.model.num_params())} parameters, {opened.dtype} on {opened.backend.describe().name}"
    screen.line(f"{opened.path}: {about}, context {opened.model.context_length:,}. /help lists the commands.")
    screen.line(how_it_goes(flags.template, template), "dim")
    app = App(answering, screen, Reader(screen, list(COMMANDS), history_path()), opened.name)
    with signals_leave():
        return app.run()


def how_it_goes(asked: str, template: "ChatTemplate | None") -> str:
    """One line that says what the model makes of what is typed, and why."""
    if template is not None:
        return f"Turns are written with the chat template {template.name}{' of the model' if asked == 'auto' else ''}."
    why = "This is a base model: it has no chat template" if asked == "auto" else "Without a chat template there are no turns"
    other = " --template plain makes turns." if asked == "auto" else ""
    return f"{why}. So this is a notebook: what you type is added to the text, and the model goes on with it.{other}"


def _talk(flags: ChatFlags, opened: "OpenModel", template: "ChatTemplate | None") -> Any:
    from smedjan_common.chat.notebook import Notebook
    from smedjan_common.chat.talk import Talk

    if template is not None:
        return Talk(opened.tokenizer, template, opened.model.context_length, flags.system or "")
    if flags.system is not None:
        raise ConfigError("--system needs turns.", "The model has no chat template, so there are none.", "Add --template plain.")
    return Notebook(opened.tokenizer, opened.model.context_length)


def _sampling(flags: ChatFlags) -> "Sampling":
    from smedjan_common.inference.sampling import Sampling

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty, flags.seed)
    sampling.validate()
    if flags.max_tokens is not None and flags.max_tokens < 0:
        raise ConfigError(f"--max-tokens is {flags.max_tokens}.", "It must be at least 0.", "Leave it out for the default.")
    return sampling
