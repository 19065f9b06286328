"""What is asked of the engine, and what it answers: a request is tokens in, pieces of text out.

Tokens are ids of the model's own tokenizer throughout; log-probabilities are natural and of the model's distribution itself, before
temperature, penalties and filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from smedjan_common.errors import ConfigError
from smedjan_common.inference.sampling import Sampling

MAX_LOGPROBS = 64  # most probable tokens beside the chosen one
FINISH_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it.

    max_tokens: None goes on until the model ends the text. stop: texts that end it; nothing of them is given out. stop_ids: tokens that
    end it; None: the tokenizer's end of text. ignore_eot: no token ends it. logprobs: how many of the most probable tokens to tell beside
    the chosen one (0: that one alone), None: none. echo: the prompt is given out first. special: show control tokens by their names.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] | None = None
    ignore_eot: bool = False
    logprobs: int | None = None
    echo: bool = False
    special: bool = False

    def validate(self, vocab_size: int) -> None:
        """Raises ConfigError for a request that no model of `vocab_size` tokens can answer."""
        check_ids(self.prompt, vocab_size)
        for name, value in (("max_tokens", self.max_tokens), ("logprobs", self.logprobs)):
            if value is not None and not isinstance(value, Integral):
                raise ConfigError(f"{name} is {value!r:.60}.", "It must be a whole number.", "Leave it out for the default.")
        if wrong := next((text for text in self.stop if not isinstance(text, str)), None):
            raise ConfigError(f"A stop text is {wrong!r:.60}.", "It must be text.", "Put it in quotes.")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ConfigError(f"--max-tokens is {self.max_tokens}.", "It must be at least 0.", "Leave it out for the default.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs is {self.logprobs}.", "That is out of range.", f"Take 0 to {MAX_LOGPROBS}.")
        self.sampling.validate()
        if wrong := next((i for i, _ in self.sampling.logit_bias if not 0 <= i < vocab_size), None):
            known = f"The model has tokens 0 to {vocab_size - 1}."
            raise ConfigError(f"logit_bias names the token {wrong}.", known, "Name one of them.")


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ConfigError for a text without a token, and for a token that a model of `vocab_size` does not have."""
    if not len(ids):
        raise ConfigError("The prompt has no token.", "A model goes on from at least one.", "Begin with the end of text.")
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        known = f"The model has tokens 0 to {vocab_size - 1}."
        raise ConfigError(f"The prompt has the token {wrong}.", known, "Use its own tokenizer.")


@dataclass(frozen=True)
class TokenInfo:
    """One token. logprob: None where none was asked for, and for the first token of a text. top: (id, logprob), most probable first."""

    id: int
    bytes: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens that a request took. The end token that was drawn is one of those generated; `cached_tokens` were not computed anew."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """What is new of an answer. text: whole characters only, never part of a stop text; tokens: those whose text it completes. The
    token that ended a text, if one did, is the last one and has no bytes.

    The last piece of a request, and no other, has a finish_reason (one of FINISH_REASONS) and the usage. error: what went wrong, in words.
    """

    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str = ""
