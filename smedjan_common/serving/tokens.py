"""/tokenize, /detokenize and /tokenizer_info, in the shapes of vLLM (which lm-evaluation-harness reads) and of llama.cpp."""

from typing import Any

from smedjan_common.errors import SmedjanError
from smedjan_common.serving.api_error import refused
from smedjan_common.serving.fields import Fields, kind
from smedjan_common.serving.messages import read_messages
from smedjan_common.serving.served import Served
from smedjan_common.text.cuts import mend_surrogates

LONGEST = 1 << 20  # characters to tokenise at a time: others wait for as long


def tokenize(values: dict[str, Any], served: Served) -> dict[str, Any]:
    """{prompt | content | text} or {messages} -> {tokens, count, max_model_len}.

    Control tokens in a text are text, as in prompts, unless parse_special is true; a text that is nothing but the name of one is that one.
    add_special_tokens: whether a token that stands before every text is among them, true by default, as in prompts.
    """
    fields = Fields(values)
    ids = _ids(fields, served)
    found = {"tokens": ids, "count": len(ids), "max_model_len": served.context_length}
    if fields.flag("return_token_strs"):
        found["token_strs"] = [served.control.get(each) or served.tokenizer.decode([each]) for each in ids]
    return found


def _ids(fields: Fields, served: Served) -> list[int]:
    tokenizer = served.tokenizer
    if fields.get("messages") is not None:
        if served.template is None:
            fields.refuse("messages", "needs a chat template, and this model has none", "no_chat_template")
        try:
            return list(served.template.encode(tokenizer, read_messages(fields.get("messages"))))
        except SmedjanError as error:
            raise refused("messages", str(error)) from None
    name = next((name for name in ("prompt", "content", "text") if fields.get(name) is not None), "prompt")
    text = fields.get(name)
    if not isinstance(text, str):
        fields.refuse(name, f"must be a string, and is {kind(text)}")
    if len(text) > LONGEST:
        fields.refuse(name, f"has {len(text)} characters, and {LONGEST} are the most. Send it in parts")
    if text in tokenizer.special_tokens:
        return [tokenizer.special_tokens[text]]
    bare = fields.get("add_special_tokens") is not None and not fields.flag("add_special_tokens")
    before = [] if bare or tokenizer.bos_id is None else [tokenizer.bos_id]
    return before + tokenizer.encode(mend_surrogates(text), "all" if fields.flag("parse_special") else ())


def detokenize(values: dict[str, Any], served: Served) -> dict[str, Any]:
    """{tokens} -> {prompt, content}, the same text twice; control tokens by their names."""
    fields = Fields(values)
    if fields.get("tokens") is None:
        fields.refuse("tokens", "must be an array of token ids, and is null")
    text = served.tokenizer.decode(fields.ids("tokens", served.vocab_size))
    return {"prompt": text, "content": text}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """What a client must know to count tokens as the server does."""
    tokenizer = served.tokenizer
    bos = None if tokenizer.bos_id is None else served.control.get(tokenizer.bos_id)
    return {
        "tokenizer_class": "smedjan",
        "vocab_size": served.vocab_size,
        "model_max_length": served.context_length,
        "bos_token": bos,
        "eos_token": tokenizer.eot_name,
        "eos_token_id": None if tokenizer.eot_name is None else tokenizer.eot_id,
        "pad_token": None,
        "add_bos_token": bos is not None,
        "special_tokens": tokenizer.special_tokens,
        "hash": tokenizer.hash,
    }
