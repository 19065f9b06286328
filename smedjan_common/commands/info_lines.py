"""How `smedjan info` shows facts to a person: a line for each, its name before its value."""

import textwrap
from typing import Any

Facts = dict[str, Any]


def lines(facts: Facts, columns: int = 0) -> list[str]:
    """A text for each fact that has a value, folded where a terminal of so many `columns` is too narrow; columns 0: never.

    What nothing in the model or its training reads is left out of their options.
    """
    width, unread, shown = max(map(len, facts)) + 2, _unread(facts), []
    for name, value in facts.items():
        if name in ("model", "training") and value:
            value = {key: item for key, item in value.items() if key not in unread}
        if value is not None:
            shown.append(f"{name.replace('_', ' '):<{width}}{_folded(_shown(name, value), width, columns)}")
    return shown


def _unread(facts: Facts) -> set[str]:
    """The options that nothing in a model or its training reads: of no interest to a person."""
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.run.options import unread_of_model, unread_of_training
    from smedjan_common.training.config import TrainConfig

    if not facts.get("model"):
        return set()
    model = ModelConfig.from_dict(facts["model"])
    training = unread_of_training(TrainConfig.from_dict(facts["training"]), model) if facts.get("training") else set()
    return unread_of_model(model) | training


def _shown(name: str, value: Any) -> str:
    from smedjan_common.reporting.console import count, size

    if name in ("bytes", "text_bytes", "decode_state_bytes"):
        return size(value)
    if name == "train_flops_per_token":
        return count(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _figure(value)


def _folded(text: str, indent: int, columns: int) -> str:
    """A text on lines that fit into a terminal, those after the first indented; columns 0: on one line, as programs read it."""
    room = columns - indent
    if room < 20 or len(text) <= room:
        return text
    pairs = ", ".join(pair.replace(" ", "\0") for pair in text.split(", "))  # a name stays beside its value
    lines = textwrap.wrap(pairs, room, break_long_words=False, break_on_hyphens=False)
    return f"\n{' ' * indent}".join(lines).replace("\0", " ")


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "/".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else f"{value:.5g}" if isinstance(value, float) else str(value)
