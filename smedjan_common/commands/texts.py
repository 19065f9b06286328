"""What `smedjan generate` prints: texts as they come, in the order of the prompts; or a JSON object for each."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from smedjan_common import streams
from smedjan_common.inference.request import Piece, Usage
from smedjan_common.inference.stats import Stats
from smedjan_common.reporting.console import counted

BETWEEN = "---\n"  # texts


@dataclass
class Text:
    """One text: its prompt, which sample of it, and what has come of it."""

    prompt: str
    sample: int
    seed: int
    parts: list[str] = field(default_factory=list)
    written: int = 0  # of the parts
    last: Piece | None = None

    def row(self) -> dict:
        """As JSON."""
        assert self.last
        usage = self.last.usage or Usage(0, 0)
        row = {
            "prompt": self.prompt,
            "sample": self.sample,
            "seed": self.seed,
            "text": "".join(self.parts),
            "finish_reason": self.last.finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        return row | ({"error": self.last.error} if self.last.error else {})


def write(texts: Sequence[Text], pieces: Iterable[tuple[int, Piece]], as_json: bool, echo: bool) -> None:
    """Print everything in order, each as far as it has come once those before it are whole. pieces: (number of the text, what is new)."""
    at = 0
    if texts and not as_json:
        _begin(texts[0], echo)
    for number, piece in pieces:
        text = texts[number]
        text.parts.append(piece.text)
        text.last = piece if piece.finish_reason else None
        while at < len(texts):
            if not as_json:
                _go_on(texts[at])
            if texts[at].last is None:
                break
            _put(json.dumps(texts[at].row(), ensure_ascii=False) + "\n" if as_json else "\n")
            at += 1
            if at < len(texts) and not as_json:
                _put(BETWEEN)
                _begin(texts[at], echo)


def speed(stats: Stats, texts: int, seconds: float) -> str:
    """`120 tokens in 2 texts, 1.3 s: 92.1 tokens/s; 62% of 150 guessed tokens were right`."""
    tokens, guessed = stats.generation_tokens, stats.drafted_tokens
    rate = f": {tokens / seconds:.1f} tokens/s" if tokens else ""
    right = f"; {stats.accepted_tokens / guessed:.0%} of {counted(guessed, 'guessed token')} were right" if guessed else ""
    return f"{counted(tokens, 'token')} in {counted(texts, 'text')}, {seconds:.1f} s{rate}{right}"


def _begin(text: Text, echo: bool) -> None:
    if echo:
        _put(text.prompt)


def _go_on(text: Text) -> None:
    new = "".join(text.parts[text.written :])
    text.written = len(text.parts)
    if new:
        _put(new)


def _put(text: str) -> None:
    """To standard output at once; on a terminal nothing that could steer it."""
    sys.stdout.write(streams.harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
