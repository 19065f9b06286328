"""Settings from a TOML file, as words of a command line: what --config reads.

    vocab_size = 4096           # flat: the names of flags, - or _ in them
    [prepare]                   # or in tables
    input = ["my.txt"]

A setting becomes the words of its flag, so it is checked as they are. What the command line gives wins.
"""

import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smedjan_common.command_line import WANTED, Flag, More, UsageError, flags_of
from smedjan_common.errors import flag, near, reason
from smedjan_common.files.regular import read_regular

NEVER = ("config", "force")  # of one start
FieldOf = Callable[[str, str, str], str | None]  # (table or nothing, name, where it stands) -> the flag's field; None: of another command


class Setting(NamedTuple):
    """A flag's field, its value, and where in the file it stands."""

    name: str
    value: Any
    where: str


def from_file(kind: type, table: str, others: Sequence[str]) -> More:
    """For a command whose flags are in no groups: the words that `--config FILE` adds to those of a command line.

    table: that of the command; flat names are its too. others: tables of other commands, which are not read.
    """

    def words_of(words: list[str]) -> list[str]:
        known, given = {each.name: each for each in flags_of(kind)}, given_fields(words)
        found = [one for path in paths(words)[-1:] for one in settings(path) if one.name not in given]
        return [word for one in found for word in words_for(known[flag(one.name)], one)]

    def settings(path: str) -> list[Setting]:
        return of_toml(Path(path), read_text(Path(path), "Name a .toml file."), field)

    def field(of: str, name: str, where: str) -> str | None:
        if of and of != table:
            if of not in others:
                tables = ", ".join(f"[{each}]" for each in (table, *others))
                raise UsageError(f"{where}: there is no table [{of}].", near(of, (table, *others)), f"The tables are {tables}.")
            return None
        known = {each.name: each for each in flags_of(kind)}
        if flag(own := name.replace("-", "_")) not in known:
            why = near(flag(own), known)
            raise UsageError(f"{where}: {name} is no flag of {table}.", why, f"`smedjan {table} --help` lists them.")
        return for_a_file(own, name, where, NEVER)

    return words_of


def paths(words: Sequence[str]) -> list[str]:
    """What `--config` names in a command line."""
    after = zip(words, [*words[1:], ""], strict=False)
    return [word.partition("=")[2] or value for word, value in after if word.split("=")[0] == "--config"]


def given_fields(words: Sequence[str]) -> set[str]:
    """Names in a command line that a field of its flags may have."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def for_a_file(field: str, name: str, where: str, never: Sequence[str]) -> str:
    """The field. Raises UsageError for one that a file cannot say."""
    if field in never:
        why = "It is about one start, and a file is for many."
        raise UsageError(f"{where}: {name} is for the command line.", why, f"Write {flag(field)} there.")
    return field


def read_text(path: Path, fix: str) -> str:
    """The text of a file of settings. Raises UsageError."""
    try:
        return read_regular(path).decode("utf-8-sig")  # Windows' editors begin with a byte order mark
    except FileNotFoundError:
        raise UsageError(f"There is no file {str(path)!r}.", "It is what --config names.", fix) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", f"{error.strerror or error}.", fix) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read.", reason(error), "A configuration is text in UTF-8.") from None


def of_toml(path: Path, text: str, field: FieldOf) -> list[Setting]:
    """What a TOML file says. Raises UsageError, with the line."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"{str(error)[:1].upper()}{str(error)[1:]}."
        raise UsageError(f"{path} is not TOML.", why, 'A line of it is such as: lr = 3e-4, or size = "tiny".') from None
    places = _places(text)
    found: dict[str, Setting] = {}
    for table, name, value in flat(values):
        where = f"{path}, line {places.get((table, name), '?')}"
        if (own := field(table, name, where)) is None:
            continue
        if own in found:
            raise UsageError(f"{where}: {name} is set twice.", f"It is in {found[own].where} too.", "Leave one of them out.")
        found[own] = Setting(own, value, where)
    return list(found.values())


def flat(values: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(table or nothing, name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((name, inner, part) for inner, part in value.items())
        else:
            yield "", name, value


def _places(text: str) -> dict[tuple[str, str], int]:
    """(table, name) -> the line where it is set, counted from 1."""
    table, places = "", {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith("["):
            table = line.strip("[] ").partition("]")[0].strip().strip("\"'")
        elif "=" in line and not line.startswith("#"):
            places.setdefault((table, line.partition("=")[0].strip().strip("\"'")), number)
    return places


def words_for(one: Flag, setting: Setting) -> list[str]:
    """The words of a setting. Raises UsageError for a value that is not of the flag's type."""
    values = list(setting.value) if isinstance(setting.value, list) else [setting.value]
    if one.takes is bool:
        if values not in ([True], [False]):
            raise _wrong(one, setting, "true or false")
        return [one.name] if values[0] else [f"--no-{one.name[2:]}"] if one.negated else []
    wanted = {int: (int,), float: (int, float), str: (str,)}[one.takes]
    if not all(type(value) in wanted for value in values) or not values:
        raise _wrong(one, setting, WANTED.get(one.takes, "text in quotes"))
    if one.choices and not set(values) <= set(one.choices):
        raise _wrong(one, setting, f"one of {', '.join(one.choices)}")
    shown = [str(value) for value in values]
    if any("\0" in value for value in shown):  # no command line can have one, and no path
        raise _wrong(one, setting, "text without a zero byte")
    if one.many:
        return [one.name, *(f"./{value}" if value.startswith("-") else value for value in shown)]
    return [f"{one.name}={','.join(shown)}"]  # a pattern, such as mixer = ["ssm", "attention"]


def _wrong(one: Flag, setting: Setting, wanted: str) -> UsageError:
    return UsageError(
        f"{setting.where}: {setting.name} cannot be {setting.value!r}.", f"It must be {wanted}.", f"It is the flag {one.name}."
    )
