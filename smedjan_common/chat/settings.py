"""What /set changes: how tokens are chosen, and how many."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from smedjan_common.errors import ConfigError, near
from smedjan_common.inference.sampling import Sampling


class Setting(NamedTuple):
    """A setting: what a value must be, what it does, and what other programs call it."""

    kind: Callable[[str], Any]
    about: str
    others: tuple[str, ...] = ()


SETTINGS = {
    "temperature": Setting(float, "above 1 more random, below 1 less; 0: always the most probable token", ("temp",)),
    "top_k": Setting(int, "choose among this many tokens; 0: all"),
    "top_p": Setting(float, "choose among the tokens that make up this probability; 1: all"),
    "min_p": Setting(float, "choose among tokens of at least this probability, relative to the most probable; 0: all"),
    "repetition_penalty": Setting(float, "make tokens of the talk less likely; 1: off", ("repeat_penalty",)),
    "presence_penalty": Setting(float, "make tokens of the answer less likely; 0: off"),
    "frequency_penalty": Setting(float, "the same for each time that it occurs; 0: off"),
    "seed": Setting(int, "another seed gives other answers"),
    "max_tokens": Setting(int, "the most tokens of an answer; 0: as many as the context holds", ("num_predict", "n_predict")),
    "stop": Setting(str, "a text that ends an answer; without a text: none"),
}
_WANTED = {float: "a number", int: "a whole number"}


@dataclass(frozen=True)
class Settings:
    """The values. max_tokens 0: as many as the context holds."""

    sampling: Sampling
    max_tokens: int = 0
    stop: tuple[str, ...] = ()

    def shown(self) -> list[tuple[str, str, str]]:
        """(name, value, what it does) of each."""
        values = dataclasses.asdict(self.sampling) | {"max_tokens": self.max_tokens, "stop": " ".join(map(repr, self.stop)) or "none"}
        return [(name, str(values[name]), row.about) for name, row in SETTINGS.items()]

    def having(self, name: str, text: str) -> "Settings":
        """The same with another value. Raises ConfigError for a name or value that is none."""
        name = name.replace("-", "_").lower()
        name = next((own for own, row in SETTINGS.items() if name in row.others), name)
        if name not in SETTINGS:
            raise ConfigError(f"There is no setting {name!r}.", near(name, SETTINGS), "/set lists them.")
        if name == "stop":
            return dataclasses.replace(self, stop=(text.replace("\\n", "\n").replace("\\t", "\t"),) if text else ())
        try:
            value = SETTINGS[name].kind(text)
        except ValueError:
            wanted = _WANTED[SETTINGS[name].kind]
            raise ConfigError(f"{name} cannot be {text!r}.", f"It is {wanted}.", f"/set {name} takes {wanted}.") from None
        if name == "max_tokens":
            if value < 0:
                raise ConfigError(f"max_tokens cannot be {value}.", "It must be at least 0.", "0 is as many as the context holds.")
            return dataclasses.replace(self, max_tokens=value)
        sampling = dataclasses.replace(self.sampling, **{name: value})
        try:
            sampling.validate()
        except ConfigError as error:
            raise ConfigError(f"{name} cannot be {text}.", error.why, error.fix) from None
        return dataclasses.replace(self, sampling=sampling)
