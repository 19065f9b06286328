"""From tokens to the text of an answer, as they come: whole characters only, and nothing of a stop text.

Bytes that are only the beginning of a character wait for its end, and text that may be the beginning of a stop text waits until it is
known. A token is given out with the text that it completes.
"""

import codecs
from collections import deque
from collections.abc import Sequence

from smedjan_common.inference.request import TokenInfo


class TextStream:
    """`push` tokens; `take` what can be given out by now. `stopped`: a stop text was met, and what follows it is left out."""

    def __init__(self, stop: Sequence[str] = ()):
        self.stopped = False
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ready, self._held = "", ""  # what can be given out; what may be the beginning of a stop text
        self._bytes, self._characters, self._given = 0, 0, 0  # pushed; decoded of them; ready or given out of those
        self._open: deque[tuple[TokenInfo, int, int]] = deque()  # the token, its first character, its last byte + 1
        self._whole: deque[tuple[TokenInfo, int, int]] = deque()  # the token, its first and its last character + 1

    def push(self, token: TokenInfo, given: bool = False) -> None:
        """One more token. given: of the prompt, where no stop text is looked for."""
        if self.stopped:
            return
        self._bytes += len(token.bytes)
        self._open.append((token, self._characters, self._bytes))
        text = self._decoder.decode(token.bytes)
        self._characters += len(text)
        self._settle(self._bytes - len(self._decoder.getstate()[0]))
        self._give(text, () if given else self._stop)

    def finish(self) -> None:
        """There are no more tokens: what waits is text, and bytes of a character that was cut off are U+FFFD."""
        if not self.stopped:
            text = self._decoder.decode(b"", final=True)
            self._characters += len(text)
            self._settle(self._bytes)
            self._give(text, self._stop)
            self._ready, self._held, self._given = self._ready + self._held, "", self._given + len(self._held)

    def take(self, last: bool = False) -> tuple[str, tuple[TokenInfo, ...]]:
        """The text that is ready and the tokens that it completes; no token without text, but with the `last` all that belong to it."""
        if not self._ready and not last:
            return "", ()
        text, self._ready, tokens = self._ready, "", []
        while self._whole and self._whole[0][2] <= self._given:
            tokens.append(self._whole.popleft()[0])
        if last:  # a token of which a part comes before the stop text
            tokens += [token for token, first, _ in self._whole if first < self._given]
        return text, tuple(tokens)

    def _settle(self, complete: int) -> None:
        """Tokens that end within the first `complete` bytes are whole."""
        while self._open and self._open[0][2] <= complete:
            token, first, _ = self._open.popleft()
            self._whole.append((token, first, self._characters))

    def _give(self, text: str, stop: tuple[str, ...]) -> None:
        text, self._held, self.stopped = cut_at_stop(self._held + text, stop)
        self._ready += text
        self._given += len(text)


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
