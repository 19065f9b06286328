"""Quality rules of the field as a table: each has a name, what it drops, and counts by itself; presets name groups of them.

Gopher: Rae et al. 2021 (arXiv:2112.11446), table A1. C4: Raffel et al. 2020 (arXiv:1910.10683), section 2.2. They were made for web
prose in English and drop most code and many manuals, so no rule is on unless named.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from smedjan_common.errors import DataError, near

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("•", "-", "*", "‣", "●")
_ELLIPSES = ("...", "…")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]?(?:\s|$)")
_TERMINAL = (".", "!", "?", '"', "”")


class Document:
    """A text and what the rules ask of it, each found once."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @functools.cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @functools.cached_property
    def word_characters(self) -> int:
        return max(1, sum(map(len, self.words)))


class Rule(NamedTuple):
    """`value(document)` is a figure; the document is dropped when it is below `least` or above `most`."""

    value: Callable[[Document], float]
    least: float
    most: float
    about: str


_ANY = float("inf")


def _share(members: list[str], test: Callable[[str], bool]) -> float:
    return sum(map(test, members)) / len(members) if members else 0.0


def _repeated_share(members: list[str]) -> float:
    """Part of the members that equal an earlier one."""
    return 1 - len(set(members)) / len(members) if members else 0.0


def _repeated_characters(members: list[str], whole: int) -> float:
    seen: set[str] = set()
    repeated = 0
    for member in members:
        repeated += len(member) if member in seen else 0
        seen.add(member)
    return repeated / max(1, whole)


def _top_ngram(size: int) -> Callable[[Document], float]:
    """Part of the characters that the most frequent run of `size` words covers; a run that occurs once covers none."""

    def value(document: Document) -> float:
        words = document.words
        runs = Counter(zip(*(words[i:] for i in range(size)), strict=False))
        if not runs:
            return 0.0
        run, count = max(runs.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
        return count * sum(map(len, run)) / document.word_characters if count > 1 else 0.0

    return value


def _repeated_ngrams(size: int) -> Callable[[Document], float]:
    """Part of the characters in runs of `size` words that stood before, without overlap."""

    def value(document: Document) -> float:
        words, seen, repeated, at = document.words, set(), 0, 0
        while at + size <= len(words):
            run = tuple(words[at : at + size])
            if run in seen:
                repeated += sum(map(len, run))
                at += size
            else:
                seen.add(run)
                at += 1
        return repeated / document.word_characters

    return value


def _symbols_per_word(document: Document) -> float:
    symbols = document.text.count("#") + document.text.count("…") + document.text.count("...")
    return symbols / max(1, len(document.words))


RULES: dict[str, Rule] = {
    "gopher_words": Rule(lambda d: len(d.words), 50, 100_000, "50 to 100,000 words"),
    "gopher_word_length": Rule(lambda d: d.word_characters / max(1, len(d.words)), 3, 10, "mean word length 3 to 10"),
    "gopher_symbols": Rule(_symbols_per_word, 0, 0.1, "at most 0.1 hash signs and ellipses per word"),
    "gopher_bullets": Rule(
        lambda d: _share(d.lines, lambda line: line.lstrip().startswith(_BULLETS)), 0, 0.9, "at most 90 % bulleted lines"
    ),
    "gopher_ellipsis_lines": Rule(
        lambda d: _share(d.lines, lambda line: line.rstrip().endswith(_ELLIPSES)), 0, 0.3, "at most 30 % lines end in …"
    ),
    "gopher_letters": Rule(lambda d: _share(d.words, lambda word: any(map(str.isalpha, word))), 0.8, _ANY, "80 % of words have a letter"),
    "gopher_stop_words": Rule(lambda d: len(_STOP_WORDS.intersection(map(str.lower, d.words))), 2, _ANY, "two of the, be, to, of, and, …"),
    "gopher_repeated_lines": Rule(lambda d: _repeated_share(d.lines), 0, 0.3, "at most 30 % repeated lines"),
    "gopher_repeated_paragraphs": Rule(lambda d: _repeated_share(d.paragraphs), 0, 0.3, "at most 30 % repeated paragraphs"),
    "gopher_repeated_line_characters": Rule(lambda d: _repeated_characters(d.lines, len(d.text)), 0, 0.2, "at most 20 % in repeated lines"),
    "gopher_repeated_paragraph_characters": Rule(
        lambda d: _repeated_characters(d.paragraphs, len(d.text)), 0, 0.2, "at most 20 % in repeated paragraphs"
    ),
    **{
        f"gopher_top_{n}gram": Rule(_top_ngram(n), 0, most, f"at most {most:.0%} in the top {n}-gram")
        for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))
    },
    **{
        f"gopher_repeated_{n}grams": Rule(_repeated_ngrams(n), 0, most, f"at most {most:.0%} in repeated {n}-grams")
        for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    },
    "c4_sentences": Rule(lambda d: len(_SENTENCE_END.findall(d.text)), 5, _ANY, "5 sentences"),
    "c4_lorem_ipsum": Rule(lambda d: d.text.lower().count("lorem ipsum"), 0, 0, "no lorem ipsum"),
    "c4_curly_brackets": Rule(lambda d: d.text.count("{"), 0, 0, "no curly brackets"),
}

# Line rules change a document instead of dropping it: lines that fail are left out.
LINE_RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "c4_line_end": (lambda line: line.rstrip().endswith(_TERMINAL) and not line.rstrip().endswith("..."), "lines end in a terminal mark"),
    "c4_line_words": (lambda line: len(line.split()) >= 3, "lines have 3 words"),
    "c4_javascript": (lambda line: "javascript" not in line.lower(), "lines without javascript"),
}

PRESETS: dict[str, list[str]] = {
    "gopher-quality": [name for name in RULES if name.startswith("gopher_") and "repeated" not in name and "top" not in name],
    "gopher-repetition": [name for name in RULES if name.startswith("gopher_") and ("repeated" in name or "top" in name)],
    "gopher": [name for name in RULES if name.startswith("gopher_")],
    "c4": [name for name in (*LINE_RULES, *RULES) if name.startswith("c4_")],
}


def choose(names: list[str]) -> tuple[list[str], list[str]]:
    """(rules, line rules) for names of rules and presets, "-name" taking one away. Raises DataError for an unknown name."""
    chosen: dict[str, None] = {}
    for given in names:
        name = given.removeprefix("-")
        if name not in PRESETS and name not in RULES and name not in LINE_RULES:
            raise DataError(
                f"There is no rule {name!r}.", near(name, [*PRESETS, *RULES, *LINE_RULES]), "Name rules or presets after --rules."
            )
        for one in PRESETS.get(name, [name]):
            if given.startswith("-"):
                chosen.pop(one, None)
            else:
                chosen[one] = None
    return [name for name in chosen if name in RULES], [name for name in chosen if name in LINE_RULES]


def first_broken(text: str, rules: list[str]) -> tuple[str, float] | None:
    """The first rule that drops the text, and the figure it found; None when all hold."""
    document = Document(text)
    for name in rules:
        rule = RULES[name]
        value = rule.value(document)
        if not rule.least <= value <= rule.most:
            return name, value
    return None


def filter_lines(text: str, rules: list[str]) -> tuple[str, dict[str, int]]:
    """(the text without the lines that fail, how many lines each rule took)."""
    if not rules:
        return text, {}
    kept, taken = [], dict.fromkeys(rules, 0)
    for line in text.splitlines(keepends=True):
        broken = next((name for name in rules if line.strip() and not LINE_RULES[name][0](line)), None)
        if broken is None:
            kept.append(line)
        else:
            taken[broken] += 1
    return "".join(kept), taken
