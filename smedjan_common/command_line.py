"""The one way in which commands read their flags: `parse` checks the words, tyro makes the dataclass of flags and writes the help.

tyro's own errors are boxes that show Python's types, so what it would refuse is refused here first, in the three sentences of every
other error. What a flag takes follows from the type of its field: bool (nothing), int, float, str, a Literal, or a tuple of them; with
tyro's UseAppendAction a tuple is a flag that may be given several times.
The name of a flag whose field is annotated with NAMELESS may be left out: `smedjan train my.txt` is `smedjan train --dataset my.txt`. Where
there are two, the first takes one word and the second those after it: `smedjan eval RUN a.txt b.txt`.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar, Union

import tyro

from smedjan_common import streams
from smedjan_common.errors import SmedjanError, flag, run_command
from smedjan_common.hints import instead

Flags = TypeVar("Flags")
WANTED = {int: "a whole number", float: "a number"}
More = Callable[[list[str]], list[str]]
NAMELESS = "nameless"  # an annotation: words without a flag are values of this one
_PATHS = ("FILE", "PATH", "DIR", "FOLDER", "RUN", "SRC", "DST")  # metavars
_NUMBER = re.compile(r"-(\d|\.|inf$|infinity$|nan$)", re.IGNORECASE)


class UsageError(SmedjanError):
    """A command line that a command does not understand."""


@dataclass(frozen=True)
class Flag:
    """What the command line says for one field: `name` with its dashes, `takes` is int, float, str or bool."""

    name: str
    takes: type
    metavar: str
    many: bool = False
    required: bool = False
    positional: bool = False
    negated: bool = False  # --no-NAME too
    choices: tuple[str, ...] = ()
    nameless: bool = False  # words without a flag are its values
    repeats: bool = False  # may be given several times, each with one value


def parse(flags: type[Flags], prog: str, argv: list[str] | None = None, *examples: str, more: More | None = None) -> Flags:
    """The flags of a command line. Exits with 2 and three sentences where it is not understood, with 0 after --help.

    `examples` are whole command lines: the help shows them, and an error about something that is missing shows the first. more: as `read`
    has it.
    """
    return read(flags, prog, argv, *examples, more=more)[0]


def read(
    flags: type[Flags],
    prog: str,
    argv: list[str] | None = None,
    *examples: str,
    first: Mapping[str, str] | None = None,
    more: More | None = None,
) -> tuple[Flags, list[str]]:
    """What `parse` gives, and the words of the command line with every flag by its name.

    first: field -> a few words, of the flags that the help shows before all others. more: words that those of the command line call for,
    such as those of a file that they name; it may raise UsageError.
    """
    words, known = sys.argv[1:] if argv is None else list(argv), list(flags_of(flags))
    if {"-h", "--help"} & set(words):
        about = _about(flags, examples, first or {})
        prog = " ".join((prog, *map(_in_usage, _nameless(known))))
    else:
        about = ""
        try:
            words = check(known, prog, words, *examples, more=more)
        except UsageError as error:
            sys.exit(run_command(functools.partial(_raise, error)))
    return tyro.cli(flags, prog=prog, args=words, description=about, config=(tyro.conf.DisallowNone,)), words


def _about(flags: type, examples: Sequence[str], first: Mapping[str, str]) -> str:
    """The help above the list of flags: what the command does, examples, and the flags to begin with."""
    parts = [inspect.cleandoc(flags.__doc__ or ""), "\n".join(("For example:", *(f"  {line}" for line in examples))) if examples else ""]
    if first:
        width = max(map(len, map(flag, first))) + 2
        parts.append(
            "\n".join(("Begin with these; every flag is below.", *(f"  {flag(name):<{width}}{words}" for name, words in first.items())))
        )
    return "\n\n".join(part for part in parts if part)


def _raise(error: UsageError) -> NoReturn:
    raise error


def flags_of(kind: type) -> Iterator[Flag]:
    """The flags that a dataclass describes, those of its groups among them, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for each in dataclasses.fields(typing.cast(Any, kind)):
        of, notes = _unwrapped(hints[each.name])
        if dataclasses.is_dataclass(of):
            yield from flags_of(typing.cast(type, of))
            continue
        several = typing.get_origin(of) is tuple
        repeats = tyro.conf.UseAppendAction in notes
        many = several and not repeats
        of = typing.get_args(of)[0] if several else of
        choices = tuple(typing.get_args(of)) if typing.get_origin(of) is Literal else ()
        takes = str if choices else of
        metavar = next((note.metavar for note in notes if getattr(note, "metavar", None)), "|".join(choices) or takes.__name__.upper())
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        positional = tyro.conf.Positional in notes
        negated = takes is bool and tyro.conf.FlagCreatePairsOff not in notes
        name = metavar if positional else flag(each.name)
        yield Flag(name, takes, metavar, many, required, positional, negated, choices, NAMELESS in notes, repeats)


def _unwrapped(hint: Any) -> tuple[Any, tuple]:
    """The type in an annotation without Annotated and None, and what was annotated."""
    notes: tuple = ()
    while True:
        if hasattr(hint, "__metadata__"):
            hint, notes = hint.__origin__, (*notes, *hint.__metadata__)
        elif typing.get_origin(hint) in (Union, types.UnionType):
            [hint] = [part for part in typing.get_args(hint) if part is not type(None)]
        else:
            return hint, notes


def check(flags: list[Flag], prog: str, words: list[str], *examples: str, more: More | None = None) -> list[str]:
    """The words with every flag by its name, after those that they call for, as `read` has it. Raises UsageError for the first that the
    command does not understand, and for missing ones."""
    given, named_words, loose = _read(flags, prog, words)
    nameless = _nameless(flags)
    free = [each for each in nameless if each not in given and nameless[0] not in given]
    most = len(loose) if any(each.many for each in free) else len(free)
    if nameless and loose[most:] and (named := [each for each in nameless if each in given]):
        raise UsageError(f"{loose[most]!r} and {named[0].name} are both given.", f"A word alone is {named[0].name}.", "Give one of them.")
    _check_loose([each for each in flags if each.positional or each in free], loose, prog, *examples)
    if nameless and loose:
        words = named_words
        for each, values in zip(free, (loose[:1], loose[1:]) if free[1:] else (loose,), strict=True):
            if values:
                given[each] = values
                words = [*words, *_named(each, values)]
    called = more(words) if more else []
    had = {word.partition("=")[0] for word in called}
    if missing := [each for each in flags if each.required and not each.positional and each not in given and each.name not in had]:
        raise _missing(missing, prog, *examples)
    return [*called, *words]


def _nameless(flags: list[Flag]) -> list[Flag]:
    return [each for each in flags if each.nameless]


def _named(one: Flag, values: list[str]) -> list[str]:
    """Words that stood alone, with the flag that they belong to; one that begins with a dash stays a value."""
    if one.metavar.split()[0] not in _PATHS:
        return [f"{one.name}={value}" for value in values]
    return [one.name, *(f"./{value}" if value[:1] == "-" != value else value for value in values)]


def _in_usage(one: Flag) -> str:
    return one.metavar if one.required else f"[{one.metavar}]"


def _read(flags: list[Flag], prog: str, words: list[str]) -> tuple[dict[Flag, list[str]], list[str], list[str]]:
    """The flags that are given with their values, the words that are flags and their values, and the others."""
    named = {each.name: each for each in flags if not each.positional} | {f"--no-{each.name[2:]}": each for each in flags if each.negated}
    given: dict[Flag, list[str]] = {}
    named_words, loose, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return given, named_words, loose + rest
        if not _is_flag(word):
            loose.append(word)
            continue
        name, equals, value = word.partition("=")
        one = named.get("--" + name[2:].replace("_", "-"))
        if one is None:
            raise _unknown(name, named, prog)
        named_words.append(word)
        if one.takes is bool:
            _refuse_value(one, name, [value] if equals else rest[:1] if rest and rest[0].lower() in _TRUTH else [])
            _give(given, one, [name])
            continue
        values = [value] if equals else []
        while rest and not _is_flag(rest[0]) and (one.many or not values):
            values.append(rest.pop(0))
            named_words.append(values[-1])
        if not values or (values == [""] and one.takes is not str):
            raise _without_value(one, rest[:1], named)
        for value in values:
            _check_value(one, value)
        _give(given, one, values)
    return given, named_words, loose


_TRUTH = ("true", "false", "yes", "no", "on", "off", "1", "0")


def _is_flag(word: str) -> bool:
    return word == "--" or (word.startswith("-") and not _NUMBER.match(word) and word.lstrip("-")[:1].isalpha())


def _unknown(name: str, named: dict[str, Flag], prog: str) -> UsageError:
    wanted = "--" + name.lstrip("-").replace("_", "-")
    close = difflib.get_close_matches(wanted, named, n=3, cutoff=0.65)
    why = instead(wanted, named) or (f"Did you mean {' or '.join(close)}?" if close else "")
    return UsageError(f"{prog} has no flag {name}.", why, f"`{prog} --help` lists its flags.")


def _refuse_value(one: Flag, name: str, value: list[str]) -> None:
    if value:
        other = f" or --no-{one.name[2:]}" if one.negated else " or leave it out"
        raise UsageError(f"{name} is given the value {value[0]!r}.", "It is a switch and takes none.", f"Write {one.name}{other}.")


def _give(given: dict[Flag, list[str]], one: Flag, now: list[str]) -> None:
    """Adds a flag with its values to those that are given; of two values the last counts, and a note on standard error says so.

    Raises UsageError for a flag of several values that is given again with others: whether all of them count is not to be guessed.
    """
    if one.repeats:
        given[one] = [*given.get(one, ()), *now]
        return
    before = given.get(one, now)
    given[one] = now
    if before == now:
        return
    if one.takes is bool:
        streams.put(f"note: {before[0]} and {now[0]} are both given: the last one counts.", sys.stderr)
    elif one.many:
        why = f"The values are {shlex.join(before)} the first time and {shlex.join(now)} later."
        raise UsageError(f"{one.name} is given twice.", why, f"Write all values after one flag: {one.name} {shlex.join([*before, *now])}")
    else:
        what = f"{one.name} is given twice, as {shlex.join(before)} and as {shlex.join(now)}"
        streams.put(f"note: {what}: the last one counts.", sys.stderr)


def _without_value(one: Flag, after: list[str], named: dict[str, Flag]) -> UsageError:
    what, why = f"{one.name} has no value.", f"It takes {_wanted(one)}."
    if one.takes is str and after and after != ["--"] and after[0] not in named:
        return UsageError(what, f"{after[0]!r} after it looks like a flag.", f"If it is the value, write {one.name}={after[0]}")
    return UsageError(what, why, f"Write {one.name} {one.metavar.removesuffix(' ...')}.")


def _wanted(one: Flag) -> str:
    if one.choices:
        return f"one of {', '.join(one.choices)}"
    return WANTED.get(one.takes, "one or several values" if one.many else "a value")


def _check_value(one: Flag, value: str) -> None:
    """Raises UsageError for a value that is not of the flag's type."""
    if value == "" and one.metavar.split()[0] in _PATHS:  # which would be the current directory
        name = one.name.split()[0]
        raise UsageError(f"{name} is empty.", "An unset shell variable has this effect.", f"Give {name} a value.")
    if one.choices and value not in one.choices:
        close = difflib.get_close_matches(value, one.choices, n=1)
        fix = instead(value, one.choices) or (
            f"Did you mean {close[0]}?" if close else f"Write {'' if one.positional else f'{one.name} '}{one.choices[0]}, for example."
        )
        raise UsageError(f"{one.name} cannot be {value!r}.", f"It must be {_wanted(one)}.", fix)
    if one.takes in WANTED:
        try:
            one.takes(value)
        except ValueError:
            raise UsageError(f"{one.name} cannot be {value!r}.", f"It must be {WANTED[one.takes]}.", _as_number(one, value)) from None


def _as_number(one: Flag, value: str) -> str:
    """What to write instead of 1e4, 10k or 1,000."""
    digits = value.replace(",", "").replace(" ", "").lower()
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(digits[-1:], 1)
    try:
        number = float(digits.rstrip("kmb")) * scale
        whole = number.is_integer()
        if one.takes is int and not whole:
            return f"Write {one.name} {round(number)}, for example."
        return f"Write {one.name} {int(number) if whole else number}."
    except (ValueError, OverflowError):
        return f"Write it in digits, such as {one.name} {10 if one.takes is int else 0.5}."


def _check_loose(takers: list[Flag], loose: list[str], prog: str, *examples: str) -> None:
    """Raises UsageError for words without a flag where the command takes none, or for too few of them. takers: the flags they are for."""
    most = sum(1 for each in takers) if not any(each.many for each in takers) else len(loose)
    if loose[most:]:
        takes = " ".join(map(_in_usage, takers)) or "only flags and their values"
        text = takers and takers[-1].repeats
        fix = "Put a text of several words into quotes." if text else f"Name the flag that it belongs to; `{prog} --help` lists them."
        raise UsageError(f"{loose[most]!r} is not understood.", f"{prog} takes {takes}.", fix)
    if missing := [each for each in takers[len(loose) :] if each.required and each.positional]:
        raise _missing(missing, prog, *examples)
    for each, word in zip([*takers, *takers[-1:] * len(loose)], loose, strict=False):
        _check_value(each, word)


def _missing(missing: list[Flag], prog: str, *examples: str) -> UsageError:
    names = [each.metavar if each.positional or each.nameless else f"{each.name} {each.metavar}" for each in missing]
    names = [name.removesuffix(" ...") for name in names]
    listed = ", ".join(names[:-1]) + (" and " if names[1:] else "") + names[-1]
    fix = f"For example: {examples[0]}" if examples else f"`{prog} --help` says what each flag takes."
    return UsageError(f"{prog} needs {listed}.", f"{'They have' if names[1:] else 'It has'} no default.", fix)
