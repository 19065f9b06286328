"""How Python asks for text: keywords of `generate`, `stream` and `chat`, and what comes back. The names are those of the command line."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from smedjan_common.hints import instead
from smedjan_common.inference.request import Request, TokenInfo, Usage
from smedjan_common.inference.sampling import Sampling

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Options(TypedDict, total=False):
    """max_tokens: 200; None: until the model ends the text. temperature 1, top_k 0, top_p 1, min_p 0, repetition_penalty 1,
    presence_penalty 0, frequency_penalty 0, logit_bias {id: what is added to its logit}, seed 0. stop: a text or several that end it.
    logprobs: how many of the most probable tokens to tell beside each; echo: give the prompt first; special: show control tokens."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    seed: int
    logprobs: int | None
    echo: bool
    special: bool


def request(prompt: Sequence[int], options: Mapping[str, Any], sample: int = 0, stop_ids: frozenset[int] | None = None) -> Request:
    """What `options` ask for; `sample`: which text of several, each of its own seed. Raises TypeError for a keyword that there is not."""
    stop, seed = options.get("stop") or (), options.get("seed", 0)
    sampling = Sampling(
        **{name: options[name] for name in SAMPLING if name in options},
        seed=seed if not sample else (seed + sample) % (1 << 64),
        logit_bias=tuple(dict(options.get("logit_bias") or {}).items()),
    )
    return Request(
        list(prompt),
        options.get("max_tokens", 200),
        sampling,
        (stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids,
        logprobs=options.get("logprobs"),
        echo=options.get("echo", False),
        special=options.get("special", False),
    )


def check_keywords(function: str, given: Collection[str], more: Sequence[str] = (), known: Collection[str] | None = None) -> None:
    """Raises TypeError for the first keyword that a function does not have, with the one that is meant. more: its own beside Options."""
    known = [*Options.__annotations__, *more] if known is None else known
    for name in given:
        if name not in known:
            theirs = instead(f"--{name}", ["--" + each.replace("_", "-") for each in known]).replace("--", "").replace("-", "_")
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = theirs or (f"Did you mean {close[0]}?" if close else f"It has {', '.join(known)}.")
            raise TypeError(f"{function}() has no keyword {name!r}. {hint}")


@dataclass(frozen=True, repr=False)
class Completion:
    """A text that a model wrote. tokens: its ids, and the one that ended it; finish_reason: "stop" or "length"; logprobs: a TokenInfo for
    each, where asked for."""

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    logprobs: list[TokenInfo] | None = field(default=None)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Completion({_short(self.text)}, {len(self.tokens)} tokens, {self.finish_reason})"


@dataclass(frozen=True)
class Loss:
    """How well a model foretells a text. loss: nats per token; bits_per_byte: of the text's UTF-8."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def __repr__(self) -> str:
        return f"Loss({self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte, {self.tokens} tokens)"


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 1] + "…")
