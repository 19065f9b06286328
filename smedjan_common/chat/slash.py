"""The commands of a talk: a line that begins with /. Names of other programs (ollama, llama.cpp) are known too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smedjan_common.chat import files
from smedjan_common.chat.answering import Answering
from smedjan_common.chat.screen import Screen
from smedjan_common.errors import ConfigError, SmedjanError, near

NO, YES = False, True  # whether the model is to go on now


class App(Protocol):
    """What commands work on: the App of app.py."""

    screen: Screen
    answering: Answering
    model: str
    leaves: bool

    @property
    def talk(self) -> Any: ...

    def note(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...


class Slash(NamedTuple):
    """A command: what it takes, what it does, and whether an answer is wanted after it."""

    run: Callable[[App, str], bool]
    about: str
    takes: str = ""
    others: tuple[str, ...] = ()


def run(app: App, line: str) -> bool:
    """Do what the line asks for; whether the model is to answer then. Raises SmedjanError."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name) or next((row for row in COMMANDS.values() if name in row.others), None)
    if command is None:
        fix = "/help lists them; a message that begins with / is written with two."
        raise SmedjanError(f"There is no command {name!r}.", near(name, COMMANDS) if len(name) > 2 else "", fix)
    return command.run(app, argument.strip())


def _help(app: App, _: str) -> bool:
    width = max(len(f"{name} {row.takes}") for name, row in COMMANDS.items())
    for name, row in COMMANDS.items():
        app.screen.line(f"  {f'{name} {row.takes}':<{width}}  {row.about}")
    app.screen.line()
    for text in (
        'Several lines: """ before and after them, or paste them.',
        "Ctrl-C ends an answer and keeps it; at the prompt, twice leaves.",
    ):
        app.screen.line(f"  {text}")
    app.screen.line("  Ctrl-D leaves." if app.talk.in_turns else "  Enter alone lets the model go on. Ctrl-D leaves.")
    return NO


def _reset(app: App, _: str) -> bool:
    app.talk.reset()
    app.answering.tries = 0
    app.note("a new talk begins." if app.talk.in_turns else "a new text begins.")
    return NO


def _undo(app: App, _: str) -> bool:
    taken = app.talk.take_back()
    app.note("there is nothing to take back." if taken is None else f"taken back: {_first_line(taken)}")
    return NO


def _retry(app: App, _: str) -> bool:
    if not app.talk.take_answer_back():
        app.note("there is nothing to answer yet.")
        return NO
    app.answering.tries += 1
    if app.answering.settings.sampling.temperature == 0:
        app.note("at temperature 0 the answer is always the same.")
    return YES


def _continue(app: App, _: str) -> bool:
    if not app.talk.is_answered:
        app.note("there is no answer to go on with.")
        return NO
    return YES


def _system(app: App, text: str) -> bool:
    if not app.talk.in_turns:
        raise ConfigError("A notebook has no system text.", "It is one text without turns.", "Begin the text with it.")
    if not text:
        app.screen.line(app.talk.system or "There is no system text.")
        return NO
    app.talk.system = "" if text in ('""', "none") else text
    app.note("the system text is changed; what was said stays." if app.talk.messages else "the system text is set.")
    return NO


def _set(app: App, argument: str) -> bool:
    name, _, value = argument.removeprefix("parameter ").partition(" ")
    if name == "system":
        return _system(app, value.strip())
    if not name or (not value and name != "stop"):
        width = max(len(each) for each, _, _ in app.answering.settings.shown())
        for each, now, about in app.answering.settings.shown():
            if name in ("", each):
                app.screen.line(f"  {each:<{width}}  {now:<8}  {about}")
        return NO
    app.answering.settings = app.answering.settings.having(name, value.strip())
    return NO


def _context(app: App, _: str) -> bool:
    if shown := app.talk.shown():
        app.screen.model(shown)
    app.screen.end_line()
    app.note(f"{_fill(app)}.")
    return NO


def _fill(app: App) -> str:
    """How many tokens of its context what was said takes."""
    length, context = app.talk.length(), app.talk.context
    return (
        f"{length:,} of {context:,} tokens"
        if length <= context
        else f"{length:,} tokens, of which the model sees the last {context:,} at most"
    )


def _save(app: App, path: str) -> bool:
    files.save(_path(path), app.talk, app.model)
    app.note(f"saved in {path}.")
    return NO


def _load(app: App, path: str) -> bool:
    files.load(_path(path), app.talk)
    app.answering.tries = 0
    app.note(f"{path} goes on: {_fill(app)}.")
    return NO


def _read(app: App, argument: str) -> bool:
    path, _, words = argument.partition(" ")
    text = files.read_text(_path(path))
    app.say(f"{words}\n\n{text}" if words else text)
    return YES


def _bye(app: App, _: str) -> bool:
    app.leaves = True
    return NO


def _path(text: str) -> Path:
    if not text:
        raise ConfigError("The command needs a file.", "It has no default.", "Write its path after it.")
    return Path(text).expanduser()


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["(nothing)"]
    return lines[0][:60] + ("…" if len(lines) > 1 or len(lines[0]) > 60 else "")


COMMANDS = {
    "/help": Slash(_help, "this list", others=("/?", "/h")),
    "/reset": Slash(_reset, "forget what was said and begin anew", others=("/clear", "/new")),
    "/undo": Slash(_undo, "take back the last question and its answer"),
    "/retry": Slash(_retry, "another answer to the last question", others=("/regen", "/regenerate", "/again")),
    "/continue": Slash(_continue, "let the model go on with its last answer", others=("/more",)),
    "/system": Slash(_system, "what the model is told first; alone: show it; none: remove it", "[TEXT]"),
    "/set": Slash(_set, "temperature, top_p, max_tokens, seed …; alone: show them", "[NAME VALUE]", ("/show", "/parameter")),
    "/context": Slash(_context, "what the model sees now, and how much of its context that takes", others=("/tokens", "/history")),
    "/save": Slash(_save, "keep the talk in a file", "FILE"),
    "/load": Slash(_load, "go on with a talk that was saved", "FILE"),
    "/read": Slash(_read, "say what is in a file, after the words if there are some", "FILE [WORDS]", ("/file",)),
    "/bye": Slash(_bye, "leave", others=("/exit", "/quit", "/q")),
}
