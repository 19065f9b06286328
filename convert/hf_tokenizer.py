"""tokenizer.json and its companions, as transformers and mlx-lm read them, and the way back.

The embedding has more rows than the tokenizer has tokens (a multiple of 64), so the ids that are left get reserved names,
<|reserved_ID|>: len(tokenizer) is then the number of rows, which trainers and servers check. Coming back they are taken away.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from smedjan_common.errors import CheckpointError, DataError, TemplateError
from smedjan_common.files.names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from smedjan_common.tokenizer import Tokenizer, sentencepiece_model
from smedjan_common.tokenizer.chat import template_of
from smedjan_common.tokenizer.library import LibraryTokenizer

FILE, CONFIG, SPECIAL, CHAT = TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def reserved(number: int) -> str:
    """The name of an id that stands for nothing."""
    return f"<|reserved_{number}|>"


def files(tokenizer: Tokenizer, rows: int, context_length: int) -> dict[str, str | dict[str, Any]]:
    """File name -> text or JSON value, but for the chat template (`chat_of`). rows: those of the embedding."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    eos = end_of_text(tokenizer)
    bos = eos if tokenizer.bos_id is None else names[tokenizer.bos_id]  # a document begins after the one before it
    special = {} if eos is None else {"bos_token": bos, "eos_token": eos}
    special |= dict(tokenizer.chat.specials) if tokenizer.chat else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if isinstance(tokenizer, LibraryTokenizer):
        return {FILE: tokenizer.raw, CONFIG: config, SPECIAL: special}
    document = json.loads(tokenizer.to_json())
    used = set(document["model"]["vocab"].values()) | set(tokenizer.special_tokens.values())
    spare = {reserved(number): number for number in range(rows) if number not in used}
    if taken := spare.keys() & (tokenizer.special_tokens.keys() | document["model"]["vocab"].keys()):
        raise CheckpointError(f"The tokenizer has a token {min(taken)}.", "That name is needed for an id without a token.", "Rename it.")
    added = sorted((tokenizer.special_tokens | spare).items(), key=lambda item: item[1])
    document["added_tokens"] = [{"id": number, "content": name} | _FLAGS for name, number in added]
    document["model"]["vocab"] |= dict(added)  # so that each keeps its id, whatever gaps there are
    if tokenizer.bos_id is not None:
        document["post_processor"] = _with_beginning(str(bos), tokenizer.bos_id)
    config["added_tokens_decoder"] = {str(number): {"content": name} | _FLAGS for name, number in added}
    return {FILE: json.dumps(document, ensure_ascii=False), CONFIG: config, SPECIAL: special}


def _with_beginning(name: str, number: int) -> dict[str, Any]:
    """The step of tokenizer.json that puts a special token before a text."""
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], first, text[1]],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def end_of_text(tokenizer: Tokenizer) -> str | None:
    """The name of the token between documents; None where the tokenizer has none."""
    try:
        number = tokenizer.eot_id
    except DataError:
        return None
    return next(name for name, known in tokenizer.special_tokens.items() if known == number)


def chat_of(tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """(the chat template in Jinja, None where there is none; the ids that end a turn beside the end of text)."""
    try:
        template = template_of(None, tokenizer)
    except TemplateError:  # it is kept as it is, and who chats is told
        return tokenizer.chat and tokenizer.chat.template, []
    source = template.source() if template else None
    ends = [tokenizer.special_tokens[name] for name in template.end_names()] if template else []
    return source.template if source else None, ends


def read(directory: Path, rows: int) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a Hugging Face directory without its reserved names, and what its users should know.

    None when there is no tokenizer.json. Raises DataError for one that is damaged or has more ids than `rows`.
    """
    path = directory / (FILE if (directory / FILE).is_file() else sentencepiece_model.FILE)
    if not path.is_file():
        return None, [f"There is no {FILE}: only the weights are converted, and text needs a tokenizer with the same ids."]
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > rows:
        why = f"Its largest id is {tokenizer.vocab_size - 1}, and the model has {rows} embedding rows."
        raise DataError(f"{path} has ids that the model does not have.", why, "Use the tokenizer of this model.")
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer, _notes(tokenizer)
    vocabulary = tokenizer.vocabulary
    kept = {name: number for name, number in vocabulary.specials.items() if name != reserved(number)}
    if kept != vocabulary.specials:
        whole, tokenizer = tokenizer, Tokenizer(dataclasses.replace(vocabulary, specials=kept))
        tokenizer.chat, tokenizer.ends = whole.chat, whole.ends
    return tokenizer, _notes(tokenizer)


def _notes(tokenizer: Tokenizer | LibraryTokenizer) -> list[str]:
    notes = []
    if tokenizer.eot_name is None:
        notes.append("The tokenizer has no end-of-text token by any known name: `prepare` needs one.")
    if isinstance(tokenizer, LibraryTokenizer):
        notes.append("Its tokenizer is run by the library tokenizers, and its file kept as it is.")
        if missing := tokenizer.missing_bytes:
            notes.append(f"{missing} of the 256 bytes have no token: they are left out of a text, as its own programs do.")
    return notes
