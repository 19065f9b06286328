"""A model to use from Python: `smedjan_jax.load(path)`, `smedjan_mlx.load(path)`.

    lm = smedjan_jax.load("runs/mine")
    lm.generate("Once", max_tokens=50).text

It may be used from any thread: whatever touches arrays happens in one thread of its own, one call after another, since a framework may
bind its arrays to the thread that made them. Ctrl-C ends a call, not the model.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from numbers import Integral
from typing import Any, TypeVar, Unpack, overload

import numpy as np

from smedjan_common.errors import ConfigError
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.keywords import Completion, Loss, Options, check_keywords, request
from smedjan_common.inference.one_thread import OneThread
from smedjan_common.inference.opened import Load, OpenModel
from smedjan_common.inference.pieces import power_of_two
from smedjan_common.inference.request import Piece, Request, check_ids
from smedjan_common.inference.scoring import Likelihood, beginning, seam
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import count_params
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import Plain, template_of

Result = TypeVar("Result")
Prompt = str | Sequence[int]  # a text, or its ids
KEPT = 2  # states of earlier texts
ROWS = (1, 4, 16, 64)  # texts side by side: few numbers, since each is compiled


class LanguageModel:
    """A model, its tokenizer and a device to compute on. Close it, or use it as a context, to give the memory back."""

    def __init__(
        self,
        path: str | os.PathLike,
        name: str,
        load: Load,
        dtype: str = "float32",
        draft: str | os.PathLike | None = None,
        draft_tokens: int | None = None,
        ema: bool = False,
    ):
        """name, load: of the backend. Raises what OpenModel and its `use` raise."""
        self._opened = OpenModel(path, draft, draft_tokens, ema)
        self._thread = OneThread("smedjan-model")
        self._engine: Engine | None = None
        self._call(self._opened.use, name, load, dtype)
        self._device = self._call(self._opened.backend.describe)

    @property
    def name(self) -> str:
        """Of the run, or of the directory."""
        return self._opened.name

    @property
    def config(self) -> ModelConfig:
        return self._opened.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self._opened.tokenizer

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained to see at once."""
        return self.config.context_length

    @property
    def num_parameters(self) -> int:
        return count_params(self.config)

    def __repr__(self) -> str:
        where = f"{self._device.backend} on {self._device.name}"
        return f"LanguageModel({self.name!r}, {self.num_parameters:,} parameters, {where}, {self._opened.dtype})"

    @overload
    def generate(self, prompt: str, n: None = None, **options: Unpack[Options]) -> Completion: ...

    @overload
    def generate(self, prompt: str, n: int, **options: Unpack[Options]) -> list[Completion]: ...

    @overload
    def generate(self, prompt: Sequence[Any], n: int | None = None, **options: Unpack[Options]) -> Any: ...

    def generate(self, prompt: Any, n: int | None = None, **options: Unpack[Options]) -> Any:
        """Go on from a text (or from ids, or begin a document with ""): a Completion. With `n`, a list of n, of the seeds seed, seed + 1, …

        A list of texts, or of lists of ids, gives a list of what each would give alone; they are decoded side by side.
        Options: see smedjan_common.inference.keywords.Options. Raises TypeError for an unknown one, ConfigError for a wrong one.
        """
        check_keywords("generate", options, ("n",))
        if n is not None and (not isinstance(n, Integral) or n < 1):
            raise ConfigError(f"n is {n}.", "It counts texts.", "Take 1 or more, or leave it out.")
        many = not isinstance(prompt, str) and any(not isinstance(each, int | np.integer) for each in prompt)
        asked = [request(self.ids(each), options, sample) for each in (prompt if many else [prompt]) for sample in range(n or 1)]
        found = self._completions(asked)
        grouped = [found[start : start + n] for start in range(0, len(found), n)] if n is not None else found
        return grouped if many else grouped[0]

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Piece]:
        """The same text as it is written: Pieces with `text` and `tokens`, the last one with finish_reason and usage. Closing it, or
        leaving a `for` and dropping it, ends the writing."""
        check_keywords("stream", options)
        return self._streamed(request(self.ids(prompt), options))

    def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Unpack[Options]) -> Any:
        """The answer to [{"role": "user", "content": "…"}, …], a Completion; with stream=True its Pieces as they are written.

        The model's own chat template tells how; a model without one is asked in the plain form "User: … Assistant:".
        """
        check_keywords("chat", options, ("stream",))
        template = template_of(None, self.tokenizer) or Plain(self.tokenizer)
        stop = options.get("stop") or ()
        options["stop"] = (*template.stop, *((stop,) if isinstance(stop, str) else stop))
        ids = template.encode(self.tokenizer, messages)
        asked = request(ids, {"max_tokens": max(1, self.context_length - len(ids))} | options, stop_ids=template.stop_ids(self.tokenizer))
        return self._streamed(asked) if stream else self._completions([asked])[0]

    def logits(self, text: Prompt) -> np.ndarray:
        """float32 [T, V]: row t is about the token after the first t + 1. Raises ConfigError for more tokens than the context has."""
        ids = self._known(self._within(self.ids(text), self.context_length))
        inputs = np.zeros((1, min(power_of_two(len(ids)), self.context_length)), np.int32)
        inputs[0, : len(ids)] = ids
        return self._call(lambda: self._opened.backend.logits(self._opened.params, inputs)[0, : len(ids)])

    def loss(self, text: Prompt) -> Loss:
        """How well the model foretells a text as a document of its own, however long it is; of ids, all after the first."""
        ids = [beginning(self.tokenizer), *self.tokenizer.encode(text)] if isinstance(text, str) else self._known(self.ids(text))
        if len(ids) < 2:
            raise ConfigError("There is nothing to score.", "The text has no token after the first.", "Give a longer text.")
        logprobs = self._call(lambda: self._opened.scorer.documents([np.array(ids, np.int32)])[0])
        nats, size = -float(logprobs.sum(dtype=np.float64)), int(self.tokenizer.token_bytes()[ids[1:]].sum())
        return Loss(nats / len(logprobs), nats / np.log(2) / size if size else float("nan"), len(logprobs), size)

    def score(self, context: str, continuation: str | Sequence[str]) -> Any:
        """Log-probability of a text after another: a Likelihood(logprob in nats, tokens, greedy); of several texts, a list of them."""
        several = [continuation] if isinstance(continuation, str) else list(continuation)
        cut = seam(self.tokenizer, context, several, [beginning(self.tokenizer)])
        found: list[Likelihood] = self._call(lambda: self._opened.scorer.continuations([(cut.context, ids) for ids in cut.continuations]))
        return found[0] if isinstance(continuation, str) else found

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a text to continue: with the token that stands before every text where the model has one; of "" the beginning of a
        document."""
        if isinstance(prompt, str):
            return self.tokenizer.begin(prompt)
        return [int(each) for each in prompt]

    def close(self) -> None:
        """Give the memory back. What is asked after that raises RuntimeError."""
        if not self._thread.ending.is_set():
            self._thread.submit(self._forget)
            self._thread.close()

    def __enter__(self) -> "LanguageModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _completions(self, asked: list[Request]) -> list[Completion]:
        pieces: list[list[Piece]] = [[] for _ in asked]
        stopped = threading.Event()
        for each in asked:
            self._check(each)
        self._call(self._answer, asked, lambda number, piece: pieces[number].append(piece), stopped, stopped=stopped)
        return [_completion(each, its) for each, its in zip(asked, pieces, strict=True)]

    def _streamed(self, asked: Request) -> Iterator[Piece]:
        self._check(asked)
        return self._pieces(asked)

    def _pieces(self, asked: Request) -> Iterator[Piece]:
        stopped, pieces = threading.Event(), queue.SimpleQueue()
        future = self._thread.submit(self._answer, [asked], lambda _, piece: pieces.put(piece), stopped)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            stopped.set()
            if not self._thread.ending.is_set():  # when Python ends, what a future needs may be gone
                future.result()

    def _check(self, asked: Request) -> None:
        asked.validate(self.tokenizer.vocab_size)
        self._within(asked.prompt, self.context_length)

    def _known(self, ids: Sequence[int]) -> Sequence[int]:
        check_ids(ids, self.tokenizer.vocab_size)
        return ids

    def _within(self, ids: Sequence[int], most: int) -> Sequence[int]:
        if len(ids) > most:
            raise ConfigError(f"The text has {len(ids)} tokens.", f"The model was trained with a context of {most}.", "Shorten it.")
        return ids

    def _answer(self, asked: list[Request], deliver: Callable[[int, Piece], Any], stopped: threading.Event) -> None:
        """Answer in the model's thread; what ends one request with an error is raised once all are answered."""
        engine = self._side_by_side(len(asked))
        try:
            tickets = [engine.submit(each) for each in asked]
            pieces = engine.answer(tickets)
            for number, piece in pieces:
                deliver(number, piece)
                if stopped.is_set() or self._thread.ending.is_set():
                    pieces.close()  # type: ignore[attr-defined]
        except BaseException:
            self._forget()  # its requests are unfinished, and its state may be used up; the next call makes a new one
            raise
        if error := next((ticket.error for ticket in tickets if ticket.error), None):
            raise error

    def _side_by_side(self, texts: int) -> Engine:
        """An engine for so many texts at once; the one that is there, if it has as many rows."""
        wanted = next(rows for rows in ROWS if rows >= min(texts, ROWS[-1]))
        fit = self._opened.rows(wanted, self.context_length, KEPT)
        rows = max(each for each in ROWS if each <= fit)
        if self._engine is None or self._engine.rows != rows:
            self._forget()
            self._engine = self._opened.engine(rows, self.context_length, 0, keep_rows=KEPT)
        return self._engine

    def _forget(self) -> None:
        if self._engine:
            self._engine.close()
        self._engine = None

    def _call(self, function: Callable[..., Result], *args: Any, stopped: threading.Event | None = None) -> Result:
        """What a function gives in the model's thread. An interrupt ends the waiting at once, and the work with its next token."""
        future: Future[Result] = self._thread.submit(function, *args)
        try:
            return future.result()
        except KeyboardInterrupt:
            if stopped:
                stopped.set()
            raise


def _completion(asked: Request, pieces: list[Piece]) -> Completion:
    last, tokens = pieces[-1], [token for piece in pieces for token in piece.tokens]
    assert last.finish_reason
    assert last.usage
    logprobs = tokens if asked.logprobs is not None else None
    return Completion("".join(piece.text for piece in pieces), [token.id for token in tokens], last.finish_reason, last.usage, logprobs)
