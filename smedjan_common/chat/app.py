"""A talk in a terminal: read, answer as it comes, say what it took; Ctrl-C and every error leave the talk as it is."""

import os
from typing import Any

from smedjan_common.chat import slash
from smedjan_common.chat.answering import Answer, Answering, Interrupts
from smedjan_common.chat.reader import Reader
from smedjan_common.chat.screen import Screen
from smedjan_common.errors import SmedjanError

PROMPT = ">>> "


class App:
    """model: its name. `leaves`: whether the user wants to go."""

    def __init__(self, answering: Answering, screen: Screen, reader: Reader, model: str):
        self.answering, self.screen, self.reader, self.model = answering, screen, reader, model
        self.leaves = False

    @property
    def talk(self) -> Any:
        """The Talk or Notebook."""
        return self.answering.talk

    def run(self) -> int:
        """Until the user leaves; the exit code."""
        warned = False  # by one Ctrl-C at the prompt
        while not self.leaves:
            try:
                line = self.reader.read(PROMPT)
                warned = False
                if line is None:
                    self.screen.line()
                    break
                self.take(line)
            except KeyboardInterrupt:
                self.screen.line()
                if warned:
                    break
                warned = True
                self.note("Ctrl-C once more, Ctrl-D or /bye leaves.")
            except SmedjanError as error:
                self.tell(error)
            except OSError as error:
                self.screen.line(f"error: {error.strerror or error}: {error.filename or ''}", "error")
        return 0

    def take(self, line: str) -> None:
        """Do what was typed. Raises SmedjanError, OSError."""
        if line.startswith("/") and not line.startswith("//"):
            wanted = slash.run(self, line.strip())
        else:
            wanted = bool(line.strip()) or (not self.talk.in_turns and not line)
            if wanted:
                self.say(line[1:] if line.startswith("//") else line)
        if wanted:
            self.answer()

    def say(self, text: str) -> None:
        """What the user says; the answer to it is the first."""
        self.talk.say(text)
        self.answering.tries = 0

    def answer(self) -> None:
        """Let the model go on. Raises SmedjanError; what was said can be taken back then."""
        with Interrupts(self._end_at_once) as interrupts:
            answer = self.answering.answer(self.screen.model, self.note, lambda: bool(interrupts))
        self.screen.end_line()
        for note in notes(answer, self.talk.in_turns):
            self.note(note)
        self.screen.line(f"[{figures(answer, self.talk.length(), self.talk.context)}]", "dim")

    def note(self, text: str) -> None:
        """Say something of our own."""
        self.screen.line(f"note: {text}", "dim")

    def tell(self, error: SmedjanError) -> None:
        """Say what went wrong, and what to do."""
        self.screen.line(" ".join(part for part in (f"error: {error.what}", error.why, error.fix) if part), "error")

    def _end_at_once(self) -> None:
        self.screen.line("stopped at once.")
        os._exit(130)


def notes(answer: Answer, in_turns: bool) -> list[str]:
    """What a user should know of how an answer ended."""
    if answer.finish_reason == "cancelled":
        return ["stopped; what came is kept."] if in_turns else []
    if answer.finish_reason != "length" or not in_turns:
        return []
    if answer.fills_context:
        return ["the context is full here; /continue leaves out the oldest messages, /reset begins anew."]
    return ["the answer has max_tokens; /continue goes on."]


def figures(answer: Answer, length: int, context: int) -> str:
    """`120 tokens, 35.2 tokens/s, context 310 of 1,024`."""
    speed = f"{answer.speed:,.{0 if answer.speed >= 100 else 1}f} tokens/s" if answer.speed else ""
    tokens = f"{answer.tokens:,} token{'' if answer.tokens == 1 else 's'}"
    return ", ".join(part for part in (tokens, speed, f"context {min(length, context):,} of {context:,}") if part)
