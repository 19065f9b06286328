"""Where a chat template is kept: chat_template.jinja beside tokenizer.json, and the names that it reads in tokenizer_config.json.

chat_template.jinja     the text, as transformers 5 writes it
tokenizer_config.json   {"bos_token": name, "eos_token": name, …}; older: the text itself under "chat_template", or a list of
                        {"name", "template"}, of which "default" is taken
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smedjan_common.errors import TemplateError, reason
from smedjan_common.files.names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

MAX_BYTES = 64 << 10  # of a template
_MAX_CONFIG_BYTES = 64 << 20  # tokenizer_config.json lists every added token
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

# What the built-in `chatml` writes, for transformers, mlx-lm and llama.cpp
CHATML_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatSource:
    """The text of a template, and the special tokens that it reads by their roles: {"bos_token": "<s>", …}."""

    template: str
    specials: Mapping[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """File name -> content."""
        config = {TOKENIZER_CONFIG: json.dumps(dict(self.specials), indent=2, ensure_ascii=False).encode() + b"\n"}
        return {CHAT_TEMPLATE: self.template.encode()} | (config if self.specials else {})


def read(folder: Path) -> ChatSource | None:
    """The template in a folder; None where there is none. Raises TemplateError."""
    config = _config(folder / TOKENIZER_CONFIG)
    specials = {name: value for name in SPECIALS if (value := _name(config.get(name))) is not None}
    if (folder / CHAT_TEMPLATE).is_file():
        return ChatSource(read_text(folder / CHAT_TEMPLATE), specials)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"), None)
    if template is None:
        return None
    if not isinstance(template, str) or len(template.encode()) > MAX_BYTES:
        why = f"It is not a text of at most {MAX_BYTES >> 10} KiB."
        raise TemplateError(f"Cannot use the chat template in {folder / TOKENIZER_CONFIG}.", why, _FIX)
    return ChatSource(template, specials)


def beside(tokenizer: Path) -> ChatSource | None:
    """The template beside a tokenizer.json. One that cannot be read counts as none here: who chats reads it again, and is told."""
    try:
        return read(tokenizer.parent) if tokenizer.name == TOKENIZER else None
    except TemplateError:
        return None


def read_text(path: Path) -> str:
    """The text of a template. Raises TemplateError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it has over {MAX_BYTES >> 10} KiB")
        return raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise TemplateError(f"Cannot read the chat template {path}.", reason(error), _FIX) from None


_FIX = "Restore it from a good copy, or name another template: plain, say."


def _config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; nothing where there is none. Raises TemplateError."""
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(_MAX_CONFIG_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TemplateError(f"Cannot read {path}.", reason(error), "Restore it from a good copy, or remove it.") from None
    return values if isinstance(values, dict) else {}


def _name(token: Any) -> str | None:
    """A special token's name, given plainly or as an object that has it as its content."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
