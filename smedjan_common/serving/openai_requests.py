"""OpenAI's requests for completions and chats become requests to the engine.

Fields are those of OpenAI's API and of the servers that extend it (top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids). What
would change the answer and cannot be done here is refused by name; what is only told (user, metadata, store) and unknown fields are not
read. A prompt that is longer than the context is refused; more tokens than it has room for are not asked of the model.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from smedjan_common.errors import SmedjanError
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import PENALTIES, Sampling
from smedjan_common.serving.api_error import ApiError, refused
from smedjan_common.serving.fields import Fields, kind, token_ids
from smedjan_common.serving.messages import read_messages
from smedjan_common.serving.served import Served
from smedjan_common.text.cuts import mend_surrogates

LEGACY_MAX_TOKENS = 16  # OpenAI's default for completions
MOST_LOGPROBS = 20
MOST_SAMPLES = 128
MOST_STOPS, LONGEST_STOP = 32, 1000
MASK = (1 << 64) - 1

# fields that ask for what there is not -> the values that do not ask for it; null and absent never do
REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": ([], ["text"]),
    "suffix": ("",),
    "web_search_options": (),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "json_schema": ({},),
    "grammar": ("",),
    "use_beam_search": (False,),
    "min_tokens": (0,),
}
ONLY_COMPLETIONS = {"best_of": (), "echo": (False,)}


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks of the model that it calls `model`: `requests` prompt by prompt, `n` of each.

    starts: the character of each prompt's text at which an answer's first token begins.
    strips: the answer's first space is no part of it (chat templates).
    """

    requests: tuple[Request, ...]
    model: str
    chat: bool
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    logprobs: int | None = None
    starts: tuple[int, ...] = ()
    strips: bool = False


def read_completion(values: dict[str, Any], served: Served) -> Asked:
    """A request to /v1/completions. Raises ApiError."""
    fields = Fields(values)
    _check(fields, served, REFUSED)
    echo, n = fields.flag("echo"), _samples(fields)
    if (best := fields.whole("best_of", 0, MOST_SAMPLES, None)) is not None and best != n:
        fields.refuse("best_of", f"is {best}, and only that of n, {n}, can be done: no choice is thrown away")
    if isinstance(fields.get("logprobs"), bool):
        fields.refuse("logprobs", f"is the number of most probable tokens to tell, from 0 to {MOST_LOGPROBS}")
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS, None)
    prompts = _prompts(fields.get("prompt"), served)
    stops = _stops(fields)
    requests = [
        request
        for ids, _ in prompts
        for request in _requests(fields, served, ids, n, stops, frozenset(), LEGACY_MAX_TOKENS, logprobs, echo)
    ]
    starts = tuple(0 if echo else length for _, length in prompts)
    return _asked(fields, served, requests, chat=False, n=n, echo=echo, logprobs=logprobs, starts=starts)


def read_chat(values: dict[str, Any], served: Served) -> Asked:
    """A request to /v1/chat/completions. Raises ApiError."""
    fields = Fields(values)
    _check(fields, served, REFUSED | ONLY_COMPLETIONS)
    template = served.template
    if template is None:
        why = "This model has no chat template. Use /v1/completions, or start the server with --chat-template plain."
        raise ApiError(400, why, "messages", "no_chat_template")
    logprobs = fields.whole("top_logprobs", 0, MOST_LOGPROBS, None)
    if not fields.flag("logprobs"):
        if logprobs:
            fields.refuse("top_logprobs", "needs logprobs to be true")
        logprobs = None
    else:
        logprobs = logprobs or 0
    messages = read_messages(fields.get("messages"))
    _check_bytes("".join(each["content"] for each in messages), served, "messages")
    go_on = fields.flag("continue_final_message")
    try:
        ids = template.encode(served.tokenizer, messages, add_generation_prompt=not go_on, continue_final=go_on)
    except SmedjanError as error:
        raise refused("messages", str(error)) from None
    _check_length(len(ids), served, "messages")
    n, stops = _samples(fields), _stops(fields)
    ends = template.stop_ids(served.tokenizer)
    requests = _requests(fields, served, ids, n, (*stops, *template.stop), ends, None, logprobs, echo=False)
    return _asked(fields, served, requests, chat=True, n=n, logprobs=logprobs, starts=(0,), strips=template.strips and not go_on)


def check_model(name: Any, served: Served) -> None:
    """Raises ApiError for a model that is not the one served; none need be named."""
    if name is None or name == "" or name in served.names:
        return
    if not isinstance(name, str):
        raise refused("model", f"model must be a string, and is {kind(name)}.")
    raise unknown_model(name, served)


def unknown_model(name: str, served: Served) -> ApiError:
    """The error for a model that is not the one served."""
    return ApiError(404, f"There is no model {name[:100]!r} here. Known: {', '.join(served.names)}.", "model", "model_not_found")


def _check(fields: Fields, served: Served, table: dict[str, tuple[Any, ...]]) -> None:
    check_model(fields.get("model"), served)
    for name, harmless in table.items():
        value = fields.get(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in harmless):
            fields.refuse(name, "asks for what this server does not do", "unsupported_parameter")


def _samples(fields: Fields) -> int:
    return fields.whole("n", 1, MOST_SAMPLES, 1) or 1


def _stops(fields: Fields) -> tuple[str, ...]:
    return fields.texts("stop", MOST_STOPS, LONGEST_STOP)


def _asked(fields: Fields, served: Served, requests: list[Request], **more: Any) -> Asked:
    if len(requests) > served.at_once:
        why = f"The request asks for {len(requests)} texts at once, and {served.at_once} are the most that this server takes."
        raise ApiError(400, f"{why} Send fewer prompts or a smaller n.", "n")
    usage = fields.object("stream_options").flag("include_usage")
    return Asked(tuple(requests), fields.get("model") or served.names[0], stream=fields.flag("stream"), include_usage=usage, **more)


def _prompts(prompt: Any, served: Served) -> list[tuple[list[int], int]]:
    """(ids, characters) of each prompt: a text, several, token ids, or several arrays of them."""
    if prompt is None:
        prompt = ""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
        return [_prompt(prompt, "prompt", served)]
    if not isinstance(prompt, list):
        raise refused("prompt", f"prompt must be a string, token ids, or an array of those, and is {kind(prompt)}.")
    if not prompt:
        raise refused("prompt", "prompt is an empty array.")
    return [_prompt(each, f"prompt[{i}]", served) for i, each in enumerate(prompt[: served.at_once + 1])]


def _prompt(prompt: Any, name: str, served: Served) -> tuple[list[int], int]:
    """Ids of one prompt, and how many characters it has. An empty text begins a document."""
    if not isinstance(prompt, str):
        ids = token_ids(prompt, name, served.vocab_size)
        if not ids:
            raise refused(name, f"{name} has no token.")
        _check_length(len(ids), served, name)
        return ids, len(served.tokenizer.decode([each for each in ids if each not in served.control]))
    text = mend_surrogates(prompt)
    _check_bytes(text, served, name)
    try:
        ids = served.tokenizer.begin(text)
    except SmedjanError as error:
        raise refused(name, str(error)) from None
    _check_length(len(ids), served, name)
    return ids, len(text)


def _check_bytes(text: str, served: Served, name: str) -> None:
    """Refuse a text that is too long whatever its tokens are, without looking for them. Tokenizers of others may shorten a text first."""
    if served.tokenizer.pattern:
        _check_length(len(text.encode()) // served.longest_token, served, name, "at least ")


def _check_length(tokens: int, served: Served, name: str, about: str = "") -> None:
    if tokens > served.context_length:
        why = f"context_length_exceeded: the model's context is {served.context_length} tokens, and {name} has {about}{tokens}."
        raise refused(name, f"{why} Shorten it.", "context_length_exceeded")


def _requests(
    fields: Fields,
    served: Served,
    ids: list[int],
    n: int,
    stops: tuple[str, ...],
    ends: frozenset[int],
    default: int | None,
    logprobs: int | None,
    echo: bool,
) -> list[Request]:
    """The `n` requests of one prompt. The first sample has the seed that was asked for, the next one more, and so on."""
    room = max(served.context_length - len(ids), 1)  # the last token needs no place: nothing is generated after it
    most = fields.whole("max_tokens", 0, 1 << 62, default)
    most = fields.whole("max_completion_tokens", 0, 1 << 62, most)
    limit = min(each for each in (most, served.max_tokens, room) if each is not None)
    own = frozenset() if fields.flag("ignore_eos") else ends or served.tokenizer.eos_ids
    ends = own | set(fields.ids("stop_token_ids", served.vocab_size))
    seed = fields.whole("seed", -(1 << 63), MASK, None)
    seed = secrets.randbits(64) if seed is None else seed & MASK
    return [
        Request(tuple(ids), limit, _sampling(fields, served, (seed + i) & MASK), stops, ends, logprobs=logprobs, echo=echo)
        for i in range(n)
    ]


def _sampling(fields: Fields, served: Served, seed: int) -> Sampling:
    penalty = "repetition_penalty" if fields.get("repetition_penalty") is not None else "repeat_penalty"
    return Sampling(
        temperature=fields.number("temperature", 0, 2, 1),
        top_k=max(fields.whole("top_k", -1, 1 << 62, 0) or 0, 0),
        top_p=fields.number("top_p", 0, 1, 1) or 1e-9,  # 0 leaves one token too
        min_p=fields.number("min_p", 0, 1, 0),
        repetition_penalty=fields.number(penalty, *PENALTIES, 1),
        seed=seed,
        presence_penalty=fields.number("presence_penalty", -2, 2, 0),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0),
        logit_bias=_biases(fields, served),
    )


def _biases(fields: Fields, served: Served) -> tuple[tuple[int, float], ...]:
    value = fields.get("logit_bias")
    if value is None:
        return ()
    if not isinstance(value, dict):
        fields.refuse("logit_bias", f"must be an object of token ids and numbers, and is {kind(value)}")
    biases = Fields(value, "logit_bias.")
    for name in value:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < served.vocab_size):
            biases.refuse(name[:20], f"names no token: the model has tokens 0 to {served.vocab_size - 1}")
    return tuple((int(name), biases.number(name, -100, 100, 0)) for name in value)
