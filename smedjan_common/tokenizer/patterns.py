"""Split patterns: how text is cut into words before byte-pair encoding, which never merges across words.

A pattern is the plain regular expression of the field; what it does not match stays a word of its own, as in `tokenizers`. Text that
is all ASCII goes through the standard `re` with an ASCII twin of the pattern (derived here, twice as fast), other text through `regex`.

A safe cut is a place where every pattern of the table ends a word whatever stands on either side, so that long text may be
processed in blocks with exactly the words of the whole: between a letter and a space that a letter follows, or after a single
newline between visible text and a letter.
"""

import functools
import re
from collections.abc import Iterator

from smedjan_common.errors import DataError, near
from smedjan_common.text.cuts import safe_cut

PATTERNS: dict[str, str] = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "cl100k-digits1": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "cl100k-digits2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

DEFAULT_PATTERN = "cl100k"

# \p{…} classes as they are within ASCII; a pattern with another class has no ASCII twin and always uses `regex`.
_ASCII_CLASSES = {"L": "A-Za-z", "N": "0-9", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "Nd": "0-9"}

_ESCAPE = re.compile(r"\\p\{(\w+)\}|\\.|\[\^?|\]", re.DOTALL)


def resolve(pattern: str) -> str:
    """The regular expression that a name of the table stands for; anything that is no plain name is taken as one itself.

    Raises DataError for an unknown name or an expression that does not compile or that matches nothing.
    """
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if re.fullmatch(r"[\w-]+", pattern):
        raise DataError(
            f"There is no split pattern {pattern!r}.", near(pattern, PATTERNS), "Name one of these or give a regular expression."
        )
    Splitter(pattern)
    return pattern


def name_of(expression: str) -> str | None:
    """The table's name of a regular expression, or None for one's own."""
    return next((name for name, known in PATTERNS.items() if known == expression), None)


class Splitter:
    """Cuts text into words. `Splitter(expression).words(text)`: list of str whose concatenation is `text`."""

    def __init__(self, expression: str):
        import regex

        self.expression = expression
        self.known = name_of(expression) is not None
        try:
            self._full = regex.compile(expression)
        except regex.error as error:
            raise DataError(
                f"The split pattern does not compile: {error}.", f"It is {expression!r}.", f"Mend it or use one of {', '.join(PATTERNS)}."
            ) from None
        twin = ascii_twin(expression)
        self._ascii = re.compile(twin, re.ASCII) if twin else self._full

    def words(self, text: str) -> list[str]:
        """The words of `text` in order."""
        pattern = self._ascii if text.isascii() else self._full
        if self.known:  # matches every character and has no groups
            return pattern.findall(text)
        return list(_with_gaps(pattern, text))

    def blocks(self, text: str, size: int = 1 << 20) -> Iterator[str]:
        """`text` in blocks of about `size` characters whose words are the words of the whole; one's own pattern gets one block."""
        start = 0
        while self.known and len(text) - start > 2 * size:
            cut = safe_cut(text, start + size)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:] if start else text


@functools.cache
def ascii_twin(expression: str) -> str | None:
    r"""An expression for `re` with re.ASCII that matches ASCII text as `expression` does, None where that is not certain.

    Each \p{…} becomes its ASCII members; a character class that only has others is left empty, which `re` refuses.
    """
    if "[]" in expression or "[^]" in expression:
        return None
    out, last, in_class = [], 0, False
    for match in _ESCAPE.finditer(expression):
        out.append(expression[last : match.start()])
        last, piece = match.end(), match.group()
        if match.group(1) is not None:
            if match.group(1) not in _ASCII_CLASSES:
                return None
            members = _ASCII_CLASSES[match.group(1)]
            piece = members if in_class else f"[{members}]"
        elif piece[0] == "[" and in_class:
            return None  # nested sets and POSIX classes mean something else to `re`
        elif piece[0] == "[":
            in_class = True
        elif piece == "]":
            in_class = False
        elif piece[1] in "PXRhHKGNmMuUbBwWdD" or (in_class and piece[1] == "S"):
            return None
        out.append(piece)
    twin = "".join(out) + expression[last:]
    if re.search(r"&&|\|\||--|~~|\(\?[^:!=i]", twin):
        return None
    try:
        re.compile(twin, re.ASCII)
    except re.error:
        return None
    return twin


def _with_gaps(pattern, text: str) -> Iterator[str]:
    """Matches and, where something was left out between two of them, that as a word too."""
    last = 0
    for match in pattern.finditer(text):
        start, end = match.span()
        if start > last:
            yield text[last:start]
        if end > start:
            yield text[start:end]
            last = end
        last = max(last, end)
    if last < len(text):
        yield text[last:]
