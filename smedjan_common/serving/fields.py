"""Reading the fields of a JSON object that a stranger sent: each is of its type and in its range, or refused by its name.

null is absent, everywhere: clients write the fields that they do not set. A whole number may be written as 16.0, as some languages do;
true is no number. What is asked for and is no field here stays unread.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from smedjan_common.serving.api_error import ApiError, refused
from smedjan_common.text.cuts import mend_surrogates


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError for what is none."""
    try:
        found = json.loads(raw, parse_constant=_no_number)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:  # JSONDecodeError, bytes that are not UTF-8, numbers with thousands of digits
        raise ApiError(400, f"The body is not JSON: {str(error)[:200]}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"The body must be a JSON object, and is {kind(found)}.", code="invalid_json")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def kind(value: Any) -> str:
    """What JSON calls a value, with its article."""
    kinds = ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (list, "an array"), (dict, "an object"))
    return next((name for of, name in kinds if isinstance(value, of)), "null")


class Fields:
    """The fields of an object. `at`: what comes before their names in errors, as messages[0]. is."""

    def __init__(self, values: dict[str, Any], at: str = ""):
        self._values, self._at = values, at

    def get(self, name: str) -> Any:
        """The value as it is; None where it is absent or null."""
        return self._values.get(name)

    def refuse(self, name: str, why: str, code: str | None = None) -> NoReturn:
        """Raise the error about a field; `why` goes on after its name."""
        raise refused(f"{self._at}{name}", f"{self._at}{name} {why}.", code)

    def number(self, name: str, least: float, most: float, default: float) -> float:
        """A number from `least` to `most`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"must be a number, and is {kind(value)}")
        if not least <= value <= most:
            self.refuse(name, f"is {value:g}, and must be from {least:g} to {most:g}" if _short(value) else "is out of range")
        return float(value)

    def whole(self, name: str, least: int, most: int, default: int | None) -> int | None:
        """A whole number from `least` to `most`."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, f"must be a whole number, and is {kind(value) if not isinstance(value, float) else value}")
        if not least <= value <= most:
            self.refuse(name, f"is {value}, and must be from {least} to {most}" if _short(value) else "is out of range")
        return value

    def flag(self, name: str) -> bool:
        """true or false; false where it is absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, f"must be true or false, and is {kind(value)}")
        return bool(value)

    def object(self, name: str) -> "Fields":
        """An object inside this one; empty where it is absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, f"must be an object, and is {kind(value)}")
        return Fields(value or {}, f"{self._at}{name}.")

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """One string or several; empty ones are left out."""
        value = self.get(name)
        values: Sequence[Any] = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            self.refuse(name, "must be a string or an array of strings")
        if len(values) > most:
            self.refuse(name, f"has {len(values)} strings, and {most} are the most")
        if any(len(each) > longest for each in values):
            self.refuse(name, f"has a string of over {longest} characters")
        return tuple(mend_surrogates(each) for each in values if each)

    def ids(self, name: str, vocab_size: int) -> list[int]:
        """Token ids; none where it is absent."""
        value = self.get(name)
        return [] if value is None else token_ids(value, f"{self._at}{name}", vocab_size)


def token_ids(value: Any, name: str, vocab_size: int) -> list[int]:
    """An array of token ids. Raises ApiError about the field `name`."""
    if not isinstance(value, list) or any(type(each) is not int for each in value):
        raise refused(name, f"{name} must be an array of token ids.")
    if value and not (min(value) >= 0 and max(value) < vocab_size):
        wrong = next(each for each in value if not 0 <= each < vocab_size)
        shown = wrong if _short(wrong) else "a number of many digits"
        raise refused(name, f"{name} has the token {shown}, and the model has tokens 0 to {vocab_size - 1}.")
    return value


def _short(value: float) -> bool:
    """Whether a number is short enough to be shown."""
    return abs(value) < 1e20
