"""Tasks made on the spot: nothing is downloaded, what guessing scores is known, and small models show what they have learned.

Each is a choice between answers of the same form and length. A task has sizes: of what makes it harder. The same (seed, task, size) gives
the same questions everywhere.

    sums       12+34=                       46 | 47 | 56 | 57           size: digits of the summands
    copy       k d s w | k d s w                                        size: letters
    reverse    k d s w > w s d k                                        size: letters
    brackets   ( [ { } ]                    ) | ] | }                   size: brackets before the one that is asked for
    recall     ka: r, mo: t, su: b, … mo:   t | r | b | x               size: pairs between those that are asked about and the question
    induction  tel mak ros lid mak          ros | tel | lid | …         size: words                       (Olsson et al., 2022)

Who cannot read the question cannot tell the right answer: the four belong to a group that has no centre (two digits or two exchanges of
letters, each made or not made), or stand in the question in random order. Were the wrong ones each a change of the right one, a model
that guesses by how likely an answer is in itself would be right in 1 of 8, not 1 of 4.
"""

import random
import string
from collections.abc import Callable
from typing import NamedTuple

from smedjan_common.evaluation.items import Item

ALL, ITEMS = "generated", 200  # all rows; how many questions of each size
OPTIONS = 4
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))
KEYS = [a + b for a in "bdfgklmnprst" for b in "aeiou"] + [a + b for a in "aeiou" for b in "bdfgklmnprst"]
WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


class Row(NamedTuple):
    """about: what it asks for. unit: what its sizes count. make(random numbers, size) gives (context, options, the right one first)."""

    about: str
    unit: str
    sizes: tuple[int, ...]
    make: Callable[[random.Random, int], tuple[str, list[str]]]


def make(name: str, size: int, count: int, seed: int) -> list[Item]:
    """`count` questions."""
    rng = random.Random(f"{seed}:{name}:{size}")
    return [_item(rng, *ROWS[name].make(rng, size), f"{name} {size}, question {number}") for number in range(count)]


def _item(rng: random.Random, context: str, options: list[str], where: str) -> Item:
    right = options[0]
    assert len(set(options)) == len(options), "no two options are alike"
    rng.shuffle(options)
    return Item("multiple_choice", (context,), tuple(options), options.index(right), where)


def _sums(rng: random.Random, digits: int) -> tuple[str, list[str]]:
    one, other = (rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits) for _ in range(2))
    right = str(one + other)
    last = len(right) - 1
    units = [_turned(right, last, by) for by in rng.sample(range(1, 10), OPTIONS - 1)]
    if last < 2:  # the first digit is no even draw
        return f"{one}+{other}=", [right, *units]
    before, by = rng.randrange(1, last), rng.randrange(1, 10)
    return f"{one}+{other}=", [right, units[0], _turned(right, before, by), _turned(units[0], before, by)]


def _turned(number: str, at: int, by: int) -> str:
    return number[:at] + str((int(number[at]) + by) % 10) + number[at + 1 :]


def _copy(rng: random.Random, size: int) -> tuple[str, list[str]]:
    letters, exchanges = _letters(rng, size)
    return f"{' '.join(letters)} |", _exchanged(letters, exchanges)


def _reverse(rng: random.Random, size: int) -> tuple[str, list[str]]:
    letters, exchanges = _letters(rng, size)
    return f"{' '.join(letters)} >", [f" {option.strip()[::-1]}" for option in _exchanged(letters, exchanges)]


def _letters(rng: random.Random, size: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Letters, and two pairs of places whose letters differ."""
    while True:
        letters = rng.sample(string.ascii_lowercase, size) if size < OPTIONS * 4 else rng.choices(string.ascii_lowercase, k=size)
        a, b, c, d = rng.sample(range(size), 4)
        if letters[a] != letters[b] and letters[c] != letters[d]:
            return letters, [(a, b), (c, d)]


def _exchanged(letters: list[str], exchanges: list[tuple[int, int]]) -> list[str]:
    """With none, either, and both of two exchanges."""
    found = [letters]
    for one, other in exchanges:
        for before in list(found):
            after = list(before)
            after[one], after[other] = after[other], after[one]
            found.append(after)
    return [" " + " ".join(each) for each in found]


def _brackets(rng: random.Random, size: int) -> tuple[str, list[str]]:
    """A walk that never closes the last open bracket."""
    opened, text = [rng.choice(PAIRS)], []
    text.append(opened[0][0])
    while len(text) < size:
        if len(opened) > 1 and rng.random() < 0.5:
            text.append(opened.pop()[1])
        else:
            opened.append(rng.choice(PAIRS))
            text.append(opened[-1][0])
    right = opened[-1][1]
    return " ".join(text), [f" {closing}" for closing in (right, *(closing for _, closing in PAIRS if closing != right))]


def _recall(rng: random.Random, distance: int) -> tuple[str, list[str]]:
    keys = rng.sample(KEYS, OPTIONS + distance)
    values = rng.sample(string.ascii_lowercase, OPTIONS)
    asked = rng.randrange(OPTIONS)
    pairs = zip(keys, values + rng.choices([letter for letter in string.ascii_lowercase if letter not in values], k=distance), strict=True)
    text = ", ".join(f"{key}: {value}" for key, value in pairs)
    return f"{text}, {keys[asked]}:", [f" {value}" for value in (values[asked], *values[:asked], *values[asked + 1 :])]


def _induction(rng: random.Random, size: int) -> tuple[str, list[str]]:
    words = rng.sample(WORDS, size)
    at = rng.randrange(1, size)
    wrong = rng.sample(words[: at - 1] + words[at + 1 :], OPTIONS - 1)
    return " ".join([*words, words[at - 1]]), [f" {word}" for word in (words[at], *wrong)]


ROWS = {
    "sums": Row("sums of two numbers", "digits", (1, 2, 3, 4), _sums),
    "copy": Row("letters copied", "letters", (4, 16, 64), _copy),
    "reverse": Row("letters reversed", "letters", (4, 16, 64), _reverse),
    "brackets": Row("the bracket that closes", "brackets", (4, 16, 64), _brackets),
    "recall": Row("the value of a key", "pairs between", (1, 4, 16, 64), _recall),
    "induction": Row("the word that came after", "words", (8, 32, 128), _induction),
}
