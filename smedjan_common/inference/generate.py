"""Generation over a Decoder: feed the prompt, then draw token by token, giving out whole characters as they are complete."""

from collections.abc import Iterator, Sequence
from typing import Any

from smedjan_common.backend import Decoder
from smedjan_common.inference.sampling import Sampling, sample


class Generation:
    """Iterating gives pieces of text. Then `reason` says why it ended: "length", "context", "end of text" or "stop"."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        prompt: Sequence[int],
        max_tokens: int,
        context_length: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ):
        assert 0 < len(prompt) <= context_length
        self.decoder, self.tokenizer, self.sampling = decoder, tokenizer, sampling
        self.ids, self.prompt_length = list(prompt), len(prompt)
        self.max_tokens, self.context_length = max_tokens, context_length
        self.stop = tuple(text for text in stop if text)
        self.reason = "length"

    def __iter__(self) -> Iterator[str]:
        held = ""  # the end of the text that may be the beginning of a stop text
        for piece in self._pieces():
            text, held, stopped = cut_at_stop(held + piece, self.stop)
            if text:
                yield text
            if stopped:
                self.reason = "stop"
                return
        if held:
            yield held

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - self.prompt_length

    def _pieces(self) -> Iterator[str]:
        stream = self.tokenizer.stream()
        for token in self._tokens():
            if text := stream.push(token):
                yield text
        if text := stream.finish():
            yield text

    def _tokens(self) -> Iterator[int]:
        fed = 0
        for _ in range(self.max_tokens):
            if len(self.ids) >= self.context_length:
                self.reason = "context"
                return
            logits = self.decoder.feed(self.ids[fed:])[: self.tokenizer.vocab_size]
            fed = len(self.ids)
            token = sample(logits, self.ids, self.sampling, position=fed)
            if token == self.tokenizer.eot_id:
                self.reason = "end of text"
                return
            self.ids.append(token)
            yield token


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """(what may be given out, what must wait, whether a stop text was met): the first stop text and all after it are left out."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], "", True
    wait = max((overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - wait], text[len(text) - wait :], False


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
