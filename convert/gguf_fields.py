"""The key-value pairs of a GGUF file, checked as they are read."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from smedjan_common.errors import CheckpointError, ConfigError

LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")  # tensors with what frequencies are divided by


class Fields:
    """`number("block_count")` is `llama.block_count` in a llama. Raises ConfigError for an architecture that is not `known`."""

    def __init__(self, values: Mapping[str, Any], where: str, known: Collection[str]):
        self.values, self.where = values, where
        self.architecture = str(values.get("general.architecture"))
        if self.architecture not in known:
            what = f"{where} is of the architecture {self.architecture!r}."
            raise ConfigError(what, f"These are read: {', '.join(known)}.", "Choose a model of one of them, or its safetensors.")

    def number(self, key: str, default: float | None = None, whole: bool = True) -> Any:
        """Not negative. Raises CheckpointError for what is no number, or missing without a default."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if type(value) not in ((int,) if whole else (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"{self.where} has {key} {value!r:.60}.", "It must be a number.", "Download it again.")
        return value

    def real(self, key: str, default: float) -> float:
        """A float32 of the file as the decimal it was made of."""
        return float(f"{self.number(key, default, whole=False):.7g}")

    def flag(self, key: str, default: bool) -> bool:
        return self.values.get(f"{self.architecture}.{key}", default) is True

    def text(self, key: str) -> str:
        return str(self.values.get(f"{self.architecture}.{key}", ""))

    def inexpressible(self, what: str) -> ConfigError:
        """For a value that asks for what no model of smedjan computes."""
        return ConfigError(f"{self.where} has {what}.", f"No model of {self.architecture} has that here.", "Choose another model.")
