r"""The split patterns of the table as array arithmetic: where words begin, for a whole block of text at once.

The plain twin is the regular expression (`patterns.Splitter`); tests hold the two together on random text. What the expressions say
about a character follows from its class and its neighbours' classes. Classes: letter L, number N, blank B (U+0020), other space H,
newline R (\r \n), anything else P. A run is a maximal stretch of one class; W = B, H, R together.

    L, N    a word begins at a run's start, unless the character before it is a prefix: of L (cl100k) the last B or H of a run, or a P
            that is alone and has no B before it; of L and N (gpt2) a B. Numbers in groups (cl100k): also at every third of a run.
    P       begins at a run's start unless B is before it.
    's …    a lone apostrophe that is no prefix's tail takes its letters; another word begins after them.
    W       cl100k: newlines right after P belong to P. Of the rest, up to the last newline is one word. What remains of it leaves its
            last character to what follows, at the end of the text nothing. gpt2: the same without the rules for newlines.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smedjan_common.tokenizer.patterns import PATTERNS

_L, _N, _B, _H, _R, _P = 1, 2, 4, 8, 16, 32


class Rules(NamedTuple):
    """What distinguishes the patterns. `digits`: size of groups of numbers, 0 for whole runs that may have a B before them."""

    digits: int
    newlines: bool  # newlines are treated apart, P and H may be the prefix of L, contractions ignore case


RULES: dict[str, Rules] = {
    PATTERNS["gpt2"]: Rules(0, False),
    PATTERNS["cl100k"]: Rules(3, True),
    PATTERNS["cl100k-digits1"]: Rules(1, True),
    PATTERNS["cl100k-digits2"]: Rules(2, True),
}


def word_starts(text: str, data: bytes, rules: Rules, breaks: np.ndarray | None = None) -> np.ndarray:
    """Byte offsets int64 [words] in `data`, the UTF-8 of `text`, at which words begin.

    `breaks`: positions of characters that stand between texts: each is a word, and the texts beside it do not see each other.
    """
    if text.isascii():
        codes = np.frombuffer(data, np.uint8)
        classes = np.frombuffer(data.translate(_ascii_classes()), np.uint8)
        return np.flatnonzero(_begins(codes, classes, rules, breaks))
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    classes = _classes(codes)
    characters = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
    return characters[_begins(codes, classes, rules, breaks)]


def joined_word_starts(texts: Sequence[str], rules: Rules) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Many texts at once: (their UTF-8 with a newline after each, word starts in it, which of these words are the newlines)."""
    text = "\n".join(texts) + "\n"
    data = text.encode()
    breaks = np.cumsum(np.fromiter((len(one) + 1 for one in texts), np.int64, len(texts))) - 1
    starts = word_starts(text, data, rules, breaks)
    if len(data) > len(text):
        breaks = np.cumsum(np.fromiter((len(one.encode()) + 1 for one in texts), np.int64, len(texts))) - 1
    return data, starts, np.searchsorted(starts, breaks)


def _begins(codes: np.ndarray, classes: np.ndarray, rules: Rules, breaks: np.ndarray | None) -> np.ndarray:
    """Whether a word begins at each character, bool [n]; codes and classes uint [n]."""
    padded = np.concatenate([np.zeros(2, np.uint8), classes, np.zeros(2, np.uint8)])
    if breaks is not None:
        padded[2 + breaks] = 0  # what stands before and after every text
    here, before, earlier, after = padded[2:-2], padded[1:-3], padded[:-4], padded[3:-1]
    starts = here != before
    space = (here & (_B | _H | _R)) != 0
    space_before = (before & (_B | _H | _R)) != 0
    starts &= ~(((here & (_P if rules.newlines else _L | _N | _P)) != 0) & (before == _B))
    lone = (before == _P) & (earlier != _P) & (earlier != _B)  # a P that begins a word and is followed by something else
    if rules.newlines:
        starts &= ~((here == _L) & (((before & (_B | _H)) != 0) | lone))
    starts &= ~(space & space_before)
    last_space = space & (after != 0) & ((after & (_B | _H | _R)) == 0)
    if rules.newlines:
        last_space &= here != _R
        starts &= ~((here == _R) & (before == _P))
        _newline_starts(here, before, starts)
    starts |= last_space
    if rules.digits:
        _digit_starts(here, before, starts, rules.digits)
    _contraction_starts(codes, here, lone, starts, rules)
    if len(starts):
        starts[0] = True
    if breaks is not None:
        starts[breaks] = True
    return starts


def _newline_starts(here: np.ndarray, before: np.ndarray, starts: np.ndarray) -> None:
    """Blanks after the last newline of a run of white space begin a word, and so do those after newlines that belong to P."""
    blank = (here & (_B | _H)) != 0
    first = np.flatnonzero(blank & (before == _R))
    if not len(first):
        return
    not_blank = np.flatnonzero(~blank)
    end = np.searchsorted(not_blank, first)
    follower = np.where(end < len(not_blank), here[not_blank[np.minimum(end, len(not_blank) - 1)]], 0)
    starts[first[follower != _R]] = True
    more = first[follower == _R]
    if len(more):
        not_newline = np.flatnonzero(here != _R)
        before_run = np.searchsorted(not_newline, more) - 1
        starts[more[(before_run >= 0) & (here[not_newline[before_run]] == _P)]] = True


def _digit_starts(here: np.ndarray, before: np.ndarray, starts: np.ndarray, size: int) -> None:
    """Every `size`-th of a run of numbers begins a word."""
    numbers = np.flatnonzero(here == _N)
    if len(numbers):
        opens = before[numbers] != _N
        offset = numbers - numbers[opens][np.cumsum(opens) - 1]
        starts[numbers[offset % size == 0]] = True


def _contraction_starts(codes: np.ndarray, here: np.ndarray, lone: np.ndarray, starts: np.ndarray, rules: Rules) -> None:
    """A word begins after 's 't 'm 'd 're 've 'll where letters go on; in gpt2 also no word begins at their own letters."""
    first = np.flatnonzero(lone & (here == _L))
    first = first[codes[first - 1] == ord("'")]
    if not len(first):
        return
    one = _fold(codes[first], rules)
    two = _fold(codes[np.minimum(first + 1, len(codes) - 1)], rules)
    two[first + 1 >= len(codes)] = 0
    short = (one == ord("s")) | (one == ord("t")) | (one == ord("m")) | (one == ord("d"))
    long = (((one == ord("r")) | (one == ord("v"))) & (two == ord("e"))) | ((one == ord("l")) & (two == ord("l")))
    if not rules.newlines:
        starts[first[short | long]] = False
    for rows, length in ((short, 1), (long, 2)):
        rest = first[rows] + length
        rest = rest[rest < len(here)]
        starts[rest[here[rest] == _L]] = True


def _fold(codes: np.ndarray, rules: Rules) -> np.ndarray:
    """Lower case of the ASCII letters and of U+017F (the long s), where the pattern ignores case."""
    codes = codes.astype(np.int64)
    if not rules.newlines:
        return codes
    codes = np.where((codes >= ord("A")) & (codes <= ord("Z")), codes + 32, codes)
    return np.where(codes == 0x17F, ord("s"), codes)


_BLOCK_BITS = 12  # classes are looked up in `regex` by blocks of 4096 code points, when one is first met
_table = np.zeros(0x110000, np.uint8)  # a cache of facts, filled by `_classes`; 0: not looked up yet


def _classes(codes: np.ndarray) -> np.ndarray:
    """The class of every code point, by the same engine that runs the expressions; uint8 like `codes`."""
    classes = _table.take(codes)
    if not classes.all():
        for block in np.unique(codes[classes == 0] >> _BLOCK_BITS).tolist():
            _table[block << _BLOCK_BITS : (block + 1) << _BLOCK_BITS] = _look_up(block << _BLOCK_BITS, 1 << _BLOCK_BITS)
        classes = _table.take(codes)
    return classes


def _look_up(first: int, count: int) -> np.ndarray:
    import regex

    classes = np.full(count, _P, np.uint8)
    text = "".join("\0" if 0xD800 <= code < 0xE000 else chr(code) for code in range(first, first + count))
    for expression, value in ((r"\p{L}+", _L), (r"\p{N}+", _N), (r"\s+", _H), (r"[\r\n]+", _R), (r"\x20", _B)):
        for match in regex.finditer(expression, text):
            classes[match.start() : match.end()] = value
    return classes


@functools.cache
def _ascii_classes() -> bytes:
    return _look_up(0, 256).tobytes()
