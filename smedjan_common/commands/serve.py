"""`smedjan serve`, and the body of `python -m smedjan_jax.serve` and `python -m smedjan_mlx.serve`."""

import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff, arg

from smedjan_common import __version__, streams
from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import ConfigError, OutOfMemoryError, run_command
from smedjan_common.optional import MaybeInt, MaybeStr

if TYPE_CHECKING:
    from smedjan_common.inference.engine import Engine
    from smedjan_common.inference.opened import Load, OpenModel
    from smedjan_common.serving.served import Served

KEY_VARIABLE = "SMEDJAN_API_KEY"
MOST_ROWS = {"gpu": 64, "cpu": 16}  # without --max-batch: more of them only wait for one another
WARM_UP = {"gpu": 511, "cpu": 1}  # tokens of a first prompt: a chunk of each power of two is compiled, where that does not take a minute
KEPT = 4  # states of earlier texts, so that the next turn of a talk need not begin anew
EXAMPLES = (
    "smedjan serve runs/mine",
    "smedjan serve runs/mine --port 9000 --max-batch 8 --cors-origin https://app.example",
)


@dataclass(frozen=True)
class ServeFlags:
    """Answer over HTTP as OpenAI's API does: chats, completions, log-probabilities, streams. Any OpenAI client can talk to it."""

    checkpoint: Annotated[str, arg(metavar="RUN"), NAMELESS]
    """A run folder (its newest weights), a checkpoint in it, or a Hugging Face directory. `smedjan serve RUN` is the same."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen. The default is reached from this machine alone; 0.0.0.0 from everywhere: then give an --api-key."""
    port: int = 8080
    """The port. 0: any free one, which is told."""
    api_key: Annotated[MaybeStr, arg(metavar="KEY", help_behavior_hint="(default: SMEDJAN_API_KEY, or none)")] = None
    """What requests must bring as `Authorization: Bearer KEY`. Others on the machine can read a command line, but not the variable."""
    alias: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """More names that requests may give to the model, beside that of the run."""
    context: Annotated[MaybeInt, arg(help_behavior_hint="(default: the model's)")] = None
    """The most tokens of a prompt and its answer together. Memory is taken for so many, --max-batch times."""
    max_batch: Annotated[MaybeInt, arg(help_behavior_hint="(default: 64 on a GPU, 16 on a CPU, or as many as fit)")] = None
    """How many texts are written at the same time."""
    max_queue: int = 256
    """How many more may wait for their turn. Who comes after them is told to try again (status 429)."""
    max_tokens: Annotated[MaybeInt, arg(help_behavior_hint="(default: up to the context)")] = None
    """The most tokens to generate for a text, whatever a request asks for."""
    queue_timeout: float = 60.0
    """Seconds that a request may wait for its turn; then it is told so (status 503). 0: without end."""
    drain_timeout: float = 8.0
    """Seconds that answers have to end, once Ctrl-C or SIGTERM has closed the door."""
    chat_template: Annotated[str, arg(metavar="auto|plain|chatml|none|FILE")] = "auto"
    """How a chat becomes a text. auto: as the model was trained, and plain (User: … Assistant: …) where it was not; none: no chats."""
    cors_origin: Annotated[tuple[str, ...], arg(metavar="ORIGIN ...", help_behavior_hint="")] = ()
    """Web pages of these origins may ask, such as https://app.example; * is all of them."""
    allowed_host: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Host names that the server answers to, beside those of the loopback; * is all of them."""
    draft: Annotated[MaybeStr, arg(metavar="RUN", help_behavior_hint="")] = None
    """A smaller model of the same tokenizer that guesses tokens ahead: texts are the same, and where it guesses well they come faster."""
    draft_tokens: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: 4)")] = None
    """How many tokens the draft guesses at a time, 1 to 16."""
    ema: Annotated[bool, FlagCreatePairsOff] = False
    """Take the moving average of the weights that a step of `smedjan train --ema` keeps; final/ of such a run is the average."""
    dtype: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "auto"
    """Precision of the computation. auto: bfloat16 where the device has it, else float32."""
    backend: Annotated[str, arg(metavar="auto|jax|mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""
    log: bool = True
    """Print a line for each request, without its text."""


def main(argv: list[str]) -> int:
    """`smedjan serve`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate("serve", argv)


def run(name: str, load: "Load", argv: list[str] | None = None) -> int:
    """Parse and serve with the backend `name`; returns the exit code."""
    return run_command(lambda: _serve(name, load, parse(ServeFlags, "smedjan serve", argv, *EXAMPLES)))


def _serve(name: str, load: "Load", flags: ServeFlags) -> int:
    _check(flags)
    _check_installed()
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.inference.opened import OpenModel
    from smedjan_common.serving.access import Access, is_loopback
    from smedjan_common.serving.sockets import addresses, allow_many_files, listen
    from smedjan_common.serving.start import Settings, start

    check_backend(name, flags.backend)
    opened = OpenModel(flags.checkpoint, flags.draft, flags.draft_tokens, flags.ema)
    served = _served(opened, flags)
    key = _key(flags)
    loopback = is_loopback(flags.host)
    access = Access(key, tuple(map(str.lower, flags.allowed_host)), flags.cors_origin, loopback)
    allow_many_files()
    sockets = listen(flags.host, flags.port)
    where = addresses(sockets)[0]
    if not loopback and not key:
        streams.put(f"warning: everybody who reaches {flags.host} can use the model: give an --api-key.", sys.stderr)
    streams.put(f"Loading {served.names[0]}, to answer at {where}/v1 …", sys.stdout)
    info = {"model": served.names[0], "backend": name, "version": __version__}
    settings = Settings(access, flags.max_queue, flags.queue_timeout, flags.drain_timeout, not flags.log, info)
    said: list[str] = []

    def engine() -> "Engine":
        made = _engine(opened, name, load, flags, served.context_length)
        said.append(_said(opened, served, where, made.rows, bool(key)))  # here, as the device is this thread's
        return made

    return start(served, engine, settings, sockets, lambda: streams.put(said[0], sys.stdout))


def _check(flags: ServeFlags) -> None:
    """Raises ConfigError for flags that cannot be."""
    for field, least in (("context", 1), ("max_batch", 1), ("max_queue", 0), ("max_tokens", 1), ("queue_timeout", 0), ("drain_timeout", 0)):
        value = getattr(flags, field)
        if value is not None and not value >= least:
            raise ConfigError(f"--{field.replace('_', '-')} is {value}.", f"It must be at least {least}.", "Leave it out for the default.")
    _key(flags)
    for origin in flags.cors_origin:
        if origin != "*" and ("://" not in origin or origin.rstrip("/").count("/") != 2 or origin.endswith("/")):
            raise ConfigError(f"--cors-origin {origin} is no origin.", "One is a scheme and a host.", "Write it as https://app.example.")


def _key(flags: ServeFlags) -> str:
    """What requests must bring, without white space around it, which a header does not keep; "": nothing. Raises ConfigError."""
    name, given = (KEY_VARIABLE, os.environ.get(KEY_VARIABLE)) if flags.api_key is None else ("--api-key", flags.api_key)
    key = (given or "").strip()
    if given and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{name} has letters that no header carries.", "Clients send them in several ways, or not at all.", "Use ASCII.")
    if not key and (given or flags.api_key is not None):
        raise ConfigError(f"{name} is empty.", "An unset shell variable has this effect.", "Give it a value, or leave it out.")
    return key


def _check_installed() -> None:
    """Raises ConfigError where the packages of the extra `serve` are missing."""
    if missing := [package for package in ("starlette", "uvicorn") if importlib.util.find_spec(package) is None]:
        raise ConfigError(
            "`smedjan serve` is not installed.", f"Missing: {', '.join(missing)}.", "Install it: pip install 'smedjan[serve]'."
        )


def _served(opened: "OpenModel", flags: ServeFlags) -> "Served":
    from smedjan_common.serving.served import Served
    from smedjan_common.tokenizer.chat import named_template

    most = opened.model.context_length
    if flags.context is not None and flags.context > most:
        raise ConfigError(f"--context is {flags.context}.", f"The model was trained with a context of {most}.", "Take that or less.")
    template = named_template(flags.chat_template, opened.info.path, opened.tokenizer)
    if template is None and flags.chat_template == "auto":
        template = named_template("plain", opened.info.path, opened.tokenizer)
        streams.put(
            "note: the model has no chat template; chats are written as User: … Assistant: … (--chat-template none refuses them).",
            sys.stderr,
        )
    created = int(opened.info.path.stat().st_mtime)
    return Served(
        names=tuple(dict.fromkeys((opened.name, *flags.alias))),
        created=created,
        tokenizer=opened.tokenizer,
        vocab_size=opened.tokenizer.vocab_size,
        context_length=flags.context or most,
        max_tokens=flags.max_tokens,
        at_once=flags.max_queue + (flags.max_batch or 1),
        template=template,
        fingerprint=f"fp_{hashlib.sha256(f'{opened.name} {created} {__version__}'.encode()).hexdigest()[:10]}",
    )


def _engine(opened: "OpenModel", name: str, load: "Load", flags: ServeFlags, context: int) -> "Engine":
    """In the thread that keeps the device. Raises OutOfMemoryError before anything is allocated."""
    opened.use(name, load, flags.dtype)
    kind = opened.backend.describe().kind
    rows = flags.max_batch or opened.rows(MOST_ROWS.get(kind, MOST_ROWS["gpu"]), context, KEPT, scores=True)
    try:
        engine = opened.engine(rows, 0, context, keep_rows=min(KEPT, rows), scores=True)
    except OutOfMemoryError as error:
        fix = "Take a smaller --max-batch or --context, or a machine with more memory."
        raise OutOfMemoryError(error.what, error.why, fix) from None
    engine.warm_up(min(WARM_UP.get(kind, WARM_UP["gpu"]), context))
    return engine


def _said(opened: "OpenModel", served: "Served", where: str, rows: int, key: bool) -> str:
    """What a user needs to know once it answers."""
    from smedjan_common.inference.memory import state_bytes
    from smedjan_common.reporting.console import size

    memory = size(state_bytes(opened.model, rows, served.context_length, opened.dtype))
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if key else ""
    return "\n".join(
        (
            f"{served.names[0]} answers at {where}/v1",
            f"  {opened.dtype} on {opened.backend.describe().name}; context {served.context_length} tokens; "
            f"{rows} texts at once, {memory} for their states",
            f"  chats: {served.template.name if served.template else 'none'}",
            *([f"  draft: {opened.draft.name}, {opened.ahead} tokens ahead"] if opened.draft else ()),
            f"  in a browser: {where}/",
            f'  curl {where}/v1/completions{header} -d \'{{"prompt": "Once", "max_tokens": 50}}\'',
            "Ctrl-C ends it.",
        )
    )
