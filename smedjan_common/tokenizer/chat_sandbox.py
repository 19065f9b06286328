"""Jinja as chat templates expect it, in jinja2's sandbox, with bounds on what a template of strangers may take.

The sandbox keeps templates from Python's insides but lets them loop for hours and multiply texts to gigabytes. So lines are counted
while one runs, and no text, list or number grows beyond what a talk can need, not even on the way.

Only chat_jinja.py imports this file: it needs the package jinja2.
"""

import contextlib
import datetime
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

LEAST_VERSION = (3, 1, 6)  # the sandbox of older ones could be left
MAX_SIZE = 16 << 20  # characters of a talk or of any text on the way; entries of a list
MAX_LINES = 2_000_000  # lines of the compiled template: a few seconds
_LARGEST = 1 << 20  # number that a filter or a method is given: a width, say
_WIDE = re.compile(r"\d{6}")  # in a format


class TooMuchError(Exception):
    """What the template would have taken too much of."""


class Bounded(ImmutableSandboxedEnvironment):
    """The environment. Raises TooMuchError while a template runs."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and _size(left) + _size(right) > MAX_SIZE:
            raise TooMuchError("a text or a list of it is too long")
        if operator in ("*", "**"):
            _check_product(operator, left, right)
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TooMuchError("a format of it is too wide")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _bounded(functools.partial(super().call, context, obj))(*args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        if (wrapped := super().wrap_str_format(value)) is not None and _WIDE.search(value.__self__):
            raise TooMuchError("a format of it is too wide")
        return wrapped


class _Generator(CodeGenerator):
    """Texts that are joined by ~ pass through `joined`."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, around what a model writes: here they change nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        _check_names(dict(*args[1:], **values))
        jinja2.utils.Namespace.__init__(args[0], dict(*args[1:], **values))

    def __setitem__(self, name: str, value: Any) -> None:
        _check_names([name])
        super().__setitem__(name, value)


def _check_names(names: Any) -> None:
    if any(str(name).startswith("_") for name in names):
        raise jinja2.exceptions.SecurityError("a name of a namespace begins with an underscore")


def environment() -> jinja2.Environment:
    """With the names, filters and white space rules that templates of Hugging Face are written for."""
    made = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.code_generator_class = _Generator
    made.joined = _joined  # pyright: ignore[reportAttributeAccessIssue]
    made.filters = {name: _bounded(function) for name, function in (made.filters | {"tojson": _tojson}).items()}
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.datetime.now().strftime(format),
        "namespace": _Namespace,
        "dict": lambda *args, **values: dict(*args, **values),
    }
    return made


def version() -> tuple[int, ...]:
    """Of jinja2."""
    return tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3])


@contextlib.contextmanager
def counted_lines() -> Iterator[None]:
    """Raises TooMuchError inside when compiled templates have executed MAX_LINES lines in all."""
    left, before = MAX_LINES, sys.gettrace()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TooMuchError("it runs too long")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own writes <, > and & as escapes, for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _joined(parts: tuple[Any, ...]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_SIZE:
        raise TooMuchError("a text of it is too long")
    return "".join(texts)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, refusing huge numbers and huge results."""

    @functools.wraps(function, assigned=("__name__", "__doc__", "jinja_pass_arg"))
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(type(value) is int and abs(value) > _LARGEST for value in (*args, *kwargs.values())):
            raise TooMuchError("a number in it is too large")
        result = function(*args, **kwargs)
        if _size(result) > MAX_SIZE:
            raise TooMuchError("a text or a list of it is too long")
        return result

    return call


def _check_product(operator: str, left: Any, right: Any) -> None:
    numbers = [abs(value) for value in (left, right) if isinstance(value, int | float)]
    if operator == "**":
        large = len(numbers) < 2 or numbers[0] > _LARGEST or numbers[1] > 64
    else:
        large = max(_size(left), _size(right), 1) * max([*numbers, 1]) > MAX_SIZE if len(numbers) < 2 else max(numbers) > 1 << 64
    if large:
        raise TooMuchError("a product of it is too large")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0
