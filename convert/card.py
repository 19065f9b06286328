"""README.md of a model on the Hub: what it is, how it was made, how to use it; nothing that is not known."""

import json
from typing import Any

from convert.portable import Portable


def card(model: Portable, name: str, license: str | None) -> str:
    """Markdown with the Hub's header. license: as the Hub names it; None leaves it out."""
    info = model.info
    origin = (info.extra or {}).get("converted_from", {}) if info else {}
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["smedjan"]}
    if license:
        header["license"] = license
    if isinstance(base := origin.get("repository"), str):
        header["base_model"] = base
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", "", f"# {name.partition('/')[2]}", ""]
    config = model.config
    mixers, ffns = (", ".join(dict.fromkeys(names)) for names in (config.mixer, config.ffn))
    lines += [
        f"A language model of {config.num_params():,} parameters: {config.layers} layers of width {config.dim} ({mixers}; {ffns}),"
        f" a vocabulary of {config.vocab_size:,} and a context of {config.context_length:,} tokens. Trained with smedjan.",
        "",
    ]
    if facts := _training(model):
        lines += ["| training | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts), ""]
    lines += [
        "```python",
        "from transformers import pipeline",
        "",
        f'print(pipeline("text-generation", "{name}")("Once", max_new_tokens=100))',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _training(model: Portable) -> list[tuple[str, str]]:
    info, facts = model.info, []
    if info is None or not info.step:
        return facts
    facts.append(("steps", f"{info.step:,}"))
    if info.train:
        facts.append(("tokens", f"{info.step * info.train.batch_size * info.train.seq_len:,}"))
        facts.append(("optimizer", f"{info.train.optimizer}, learning rate {info.train.lr:g}, {info.train.lr_schedule}"))
    metrics = info.metrics or {}
    for key, words in (("loss", "training loss"), ("val_loss", "validation loss"), ("val_bits_per_byte", "validation bits per byte")):
        if isinstance(metrics.get(key), float):
            facts.append((words, f"{metrics[key]:.4f}"))
    if info.framework.get("name"):
        facts.append(("framework", str(info.framework["name"])))
    return facts
