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

_MOST_COPIES = 1_000_000  # that {n} within {m} may ask for: the compiled expression holds every one
_PIECE = re.compile(r"\\p\{[^}]*\}|\\.|\[:|\[\^?\]?|\]|&&|\{\d+(?:,\d*)?\}|\(\?(?:R|&|P>|[+-]?\d)", re.DOTALL)
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
        if not self.known and (odd := _odd_in(expression)):
            raise _refused(f"The split pattern has {odd}.", expression)
        try:
            self._full = regex.compile(expression)
        except (regex.error, RecursionError) as error:
            raise _refused(f"The split pattern does not compile: {error}.", expression) from None
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


def _refused(what: str, expression: str) -> DataError:
    shown = expression if len(expression) < 200 else expression[:200] + "…"
    return DataError(what, f"It is {shown!r}.", f"Correct it or use one of {', '.join(PATTERNS)}.")


def _odd_in(expression: str) -> str:
    """What tools read differently, or what takes for ever, in an expression; empty where nothing is odd.

    Oniguruma (`tokenizers`) has sets inside sets and their intersection; `regex` takes the same characters literally.
    """
    if any("\ud800" <= character <= "\udfff" for character in expression):
        return "a lone surrogate, which no UTF-8 file holds"
    in_class, copies = False, 1
    for match in _PIECE.finditer(expression):
        piece = match.group()
        if piece[0] == "[" and in_class and not piece.startswith("[:"):
            return "a set inside a set ([ within [ ]), which tools read differently"
        if piece == "&&" and in_class:
            return "an intersection of sets (&&), which tools read differently"
        if piece in (r"\h", r"\H", r"\L"):
            return f"{piece}, which tools read differently"
        if piece.startswith("(?"):
            return f"a recursion ({piece}), which may never end"
        in_class = piece[0] == "[" or (in_class and piece != "]")
        if piece[0] == "{" and not in_class:
            copies *= max(1, *(int(number[:9]) for number in re.findall(r"\d+", piece)))
        if copies > _MOST_COPIES:
            return f"repetitions ({piece}) of more than {_MOST_COPIES} copies"
    return ""


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
