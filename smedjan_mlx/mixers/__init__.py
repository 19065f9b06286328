"""Sequence mixers in MLX, one file each; `mixer_class` finds the class that a row of smedjan_common.model.mixers names."""

import importlib
from typing import Any

from smedjan_common.model.mixers import MIXERS


def mixer_class(name: str) -> Any:
    """The class of the mixer `name`, a key of MIXERS."""
    return getattr(importlib.import_module(f"{__name__}.{MIXERS[name].module}"), MIXERS[name].class_name)
