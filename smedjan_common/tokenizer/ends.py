"""Which tokens begin and end a text: generation_config.json beside tokenizer.json.

    eos_token_id     an id or a list of them: generation ends at any (transformers)
    bos_token_id     what stands before a text, where add_bos_token says that it is put there (the second key is of smedjan's checkpoints)

In directories of others it is tokenizer_config.json (add_bos_token) or tokenizer.json (a TemplateProcessing step) that says whether a text
gets a beginning.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan_common.files.names import GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

_MAX_BYTES = 64 << 20  # tokenizer_config.json lists every added token


@dataclass(frozen=True)
class Ends:
    """eos_ids: generation ends at any of them, beside the token between documents. bos_id: put before every text; None: nothing is."""

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def files(self) -> dict[str, bytes]:
        """File name -> content; nothing for a tokenizer that has neither."""
        if self == Ends():
            return {}
        bos = {} if self.bos_id is None else {"bos_token_id": self.bos_id, "add_bos_token": True}
        return {GENERATION_CONFIG: json.dumps({"eos_token_id": list(self.eos_ids), **bos}, indent=2).encode() + b"\n"}


def beside(tokenizer: Path, document: Mapping[str, Any], ids: Mapping[str, int]) -> Ends:
    """What the files beside a tokenizer.json, and its own `document`, say. ids: name -> id of its added tokens.

    Files that cannot be read say nothing: they are of other programs.
    """
    if tokenizer.name not in (TOKENIZER, "tokenizer.model"):
        return Ends(bos_id=_template_bos(document, ids))
    generation, config = _values(tokenizer.with_name(GENERATION_CONFIG)), _values(tokenizer.with_name(TOKENIZER_CONFIG))
    model = _values(tokenizer.with_name("config.json"))
    eos = generation.get("eos_token_id", model.get("eos_token_id"))
    known = set(ids.values())
    eos_ids = [number for number in (eos if isinstance(eos, list) else [eos]) if type(number) is int and number in known]
    return Ends(tuple(dict.fromkeys(eos_ids)), _bos(generation, config, document, ids))


def _bos(generation: Mapping[str, Any], config: Mapping[str, Any], document: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    if generation.get("add_bos_token") is True and generation.get("bos_token_id") in ids.values():
        return generation["bos_token_id"]
    adds, bos = config.get("add_bos_token"), config.get("bos_token")
    name = bos.get("content") if isinstance(bos, dict) else bos
    if adds is True and isinstance(name, str):
        return ids.get(name)
    return None if adds is False else _template_bos(document, ids)


def _template_bos(document: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """The special token that a TemplateProcessing step of tokenizer.json puts before a single text."""
    step = document.get("post_processor")
    steps = step.get("processors") if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    for one in steps if isinstance(steps, list) else ():
        single = one.get("single") if isinstance(one, dict) and one.get("type") == "TemplateProcessing" else None
        first = single[0].get("SpecialToken") if isinstance(single, list) and single and isinstance(single[0], dict) else None
        if isinstance(first, dict) and isinstance(first.get("id"), str):
            return ids.get(first["id"])
    return None


def _values(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
