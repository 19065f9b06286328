"""One answer after another from a model that stays loaded in a thread of its own, while this one listens to the user."""

import contextlib
import dataclasses
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smedjan_common.chat.settings import Settings
from smedjan_common.errors import SmedjanError
from smedjan_common.inference.request import Piece, Request
from smedjan_common.inference.service import Service

_LOOK_SECONDS = 0.05  # how often the user is listened to while nothing comes


@dataclass
class Answer:
    """What came of a prompt. finish_reason: stop, length or cancelled. cached_tokens: of the prompt, those that were not computed again.

    speed: tokens per second without the prompt; None: not known. fills_context: whether it could not be longer in the model's context.
    """

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    speed: float | None = None
    fills_context: bool = False


class Answering:
    """service: has the model. talk: a Talk or a Notebook."""

    def __init__(self, service: Service, talk: Any, settings: Settings):
        self.service, self.talk, self.settings = service, talk, settings
        self.tries = 0  # of the same question: each with a seed of its own

    def answer(self, show: Callable[[str], None], told: Callable[[str], None], stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Let the model go on, and take what it says into the talk. show: gets its text; told: gets notes, before the text; stopped:
        whether the user wants no more of it. Raises SmedjanError; a question that makes no prompt is taken back then."""
        context, most = self.talk.context, self.settings.max_tokens
        try:
            prompt = self.talk.prompt(min(most or context, max(context // 4, 1)))
        except SmedjanError:
            if not self.talk.is_answered:
                self.talk.take_back()
            raise
        if prompt.note:
            told(prompt.note)
        left = context - len(prompt.ids)
        sampling = dataclasses.replace(self.settings.sampling, seed=(self.settings.sampling.seed + self.tries) % (1 << 64))
        request = Request(
            tuple(prompt.ids),
            min(most, left) if most else left,
            sampling,
            stop=(*self.talk.stop, *self.settings.stop),
            stop_ids=self.talk.stop_ids,
        )
        answer = self._collect(request, show, stopped)
        answer.fills_context = not most or left <= most
        self.talk.take(answer.text)
        return answer

    def _collect(self, request: Request, show: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        answer, strip = Answer(), self.talk.strips
        begin, before, first = time.monotonic(), 0, None  # tokens of the first piece, and when it came
        for now, piece in self._pieces(request, stopped):
            if first is None:
                first, before = now, len(piece.tokens)
            text = piece.text.lstrip() if strip and not answer.text else piece.text
            if text:
                answer.text += text
                show(text)
            if piece.finish_reason == "error":
                raise SmedjanError("The model could not answer.", piece.error, "/retry tries again.")
            if piece.finish_reason and piece.usage:
                answer.finish_reason = piece.finish_reason
                answer.prompt_tokens, answer.tokens = piece.usage.prompt_tokens, piece.usage.completion_tokens
                answer.cached_tokens = piece.usage.cached_tokens
                since, tokens = (first, answer.tokens - before) if answer.tokens > before else (begin, answer.tokens)
                answer.speed = tokens / max(now - since, 1e-9) if tokens else None
        return answer

    def _pieces(self, request: Request, stopped: Callable[[], bool]) -> Iterator[tuple[float, Piece]]:
        """Each with when it was made, of time.monotonic: this thread may be slow to take it."""
        come: queue.SimpleQueue[tuple[float, Piece]] = queue.SimpleQueue()

        def deliver(pieces: list[Piece]) -> None:
            for piece in pieces:
                come.put((time.monotonic(), piece))

        handle = self.service.submit(request, deliver)
        try:
            while True:
                if stopped():
                    handle.cancel()
                try:
                    now, piece = come.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    continue
                yield now, piece
                if piece.finish_reason:
                    return
        finally:
            handle.cancel()


class Interrupts:
    """A context in which Ctrl-C is counted and does nothing else: an exception may come in the middle of a line that is printed, and a
    framework that compiles may crash by one. The third ends the process at once: then something hangs."""

    def __init__(self, last: Callable[[], None]):
        self.count, self._last = 0, last

    def __enter__(self) -> "Interrupts":
        self.count = 0
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AttributeError):
            signal.signal(signal.SIGINT, self._before)

    def __bool__(self) -> bool:
        return self.count > 0

    def _note(self, *_: object) -> None:
        self.count += 1
        if self.count == 3:
            self._last()
