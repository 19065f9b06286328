"""One request on its way through the engine: its tokens so far, the text that they give, and why it ended."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from smedjan_common.errors import SmedjanError
from smedjan_common.inference.drawing import on_device
from smedjan_common.inference.logprobs import log_softmax, most_probable
from smedjan_common.inference.request import Piece, Request, TokenInfo, Usage
from smedjan_common.inference.sampling import sample
from smedjan_common.inference.streaming import TextStream

Scored = Sequence[tuple[float | None, tuple[tuple[int, float], ...]]]  # of each token: its log-probability, and the most probable


class Ticket:
    """`ids`: the prompt and what was generated. `reason`: None until it ended. `error`: the exception that ended it, if one did."""

    def __init__(self, request: Request, tokenizer: Any, number: int, arrived: float | None = None):
        self.request, self.number = request, number
        self.ids, self.prompt_length = list(request.prompt), len(request.prompt)
        self.begun = False  # whether a row was brought to the beginning of its prompt
        self.fed, self.cached = 0, 0  # tokens of the prompt that its row has consumed; those of them that were there already
        self.generated, self.counted = 0, 0  # tokens, and those that are counted in statistics
        self.reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.arrived = self.last_time = time.monotonic() if arrived is None else arrived
        self._tokenizer = tokenizer
        self._stream = TextStream(request.stop)
        self._hidden = frozenset() if request.special else frozenset(tokenizer.special_tokens.values())
        self.stop_ids = _stop_ids(request, tokenizer)
        self.draws_on_device = request.logprobs is None and on_device(request.sampling, self.stop_ids)
        begins = request.echo or not set(request.prompt) - set(tokenizer.special_tokens.values())
        self._begins = tokenizer.strips_first_space and begins  # the text given out does, with a space that is not part of it

    @property
    def filled(self) -> bool:
        """Whether the whole prompt was consumed: it is decoding."""
        return self.fed == self.prompt_length

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_length, self.generated, self.cached)

    def most(self, tokens: int) -> int:
        """As many of `tokens` more as it may still generate."""
        return tokens if self.request.max_tokens is None else min(tokens, self.request.max_tokens - self.generated)

    @property
    def needs_prompt_scores(self) -> bool:
        return self.request.echo and self.request.logprobs is not None

    def echo(self, scored: Scored | None = None) -> None:
        """Give out the prompt."""
        for position, token in enumerate(self.request.prompt):
            logprob, top = scored[position] if scored else (None, ())
            self._stream.push(TokenInfo(token, self._bytes(token), logprob, top), given=True)

    def draw(self, logits: np.ndarray) -> int:
        """Choose the next token, and take it. logits: [V], after the last of `ids`. Raises NotFiniteError."""
        request = self.request
        token = sample(logits, self.ids, request.sampling, len(self.ids), self.prompt_length)
        logprob, top = None, ()
        if request.logprobs is not None:
            logprobs = log_softmax(logits)
            logprob, top = float(logprobs[token]), most_probable(logprobs, request.logprobs)
        self.take(token, logprob, top)
        return token

    def foretell(self, logits: np.ndarray, guessed: Sequence[int]) -> int:
        """The token that it would choose from these logits [V], after `ids` and what was guessed of what comes. Raises NotFiniteError."""
        ids = [*self.ids, *guessed]
        return sample(logits, ids, self.request.sampling, len(ids), self.prompt_length)

    def take(self, token: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> None:
        """The next token is this one."""
        self.generated += 1
        if token in self.stop_ids:
            self.reason = "stop"
            self._stream.push(TokenInfo(token, b"", logprob, top))
            return
        self.ids.append(token)
        self._stream.push(TokenInfo(token, self._bytes(token), logprob, top))
        if self._stream.stopped:
            self.reason = "stop"
        elif self.most(1) == 0:
            self.reason = "length"

    def fail(self, error: Exception) -> None:
        """It ended with this error."""
        self.reason, self.error = "error", error

    def piece(self) -> Piece | None:
        """What is new, if anything; with a reason, the last piece."""
        if self.reason is None:
            text, tokens = self._stream.take()
            return Piece(text, tokens) if text else None
        if self.reason in ("stop", "length"):  # else what waits may be the beginning of a character or of a stop text
            self._stream.finish()
        text, tokens = self._stream.take(last=True)
        return Piece(text, tokens, self.reason, self.usage, words(self.error))

    def _bytes(self, token: int) -> bytes:
        """What a token adds to the text."""
        raw = b"" if token in self._hidden else self._tokenizer.decode_bytes([token])
        if self._begins and raw:
            self._begins, raw = False, raw.removeprefix(b" ")
        return raw


def words(error: BaseException | None) -> str:
    """What went wrong, for whoever asked; details of what is not theirs to mend are for the log."""
    if error is None:
        return ""
    return str(error) if isinstance(error, SmedjanError) else f"The request failed: {type(error).__name__}: {str(error)[:200]}"


def _stop_ids(request: Request, tokenizer: Any) -> frozenset[int]:
    if request.ignore_eot:
        return frozenset()
    return tokenizer.eos_ids if request.stop_ids is None else request.stop_ids
