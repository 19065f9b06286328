"""What checkpoint.json says besides arrays, step and metrics: the same for every checkpoint of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from smedjan_common.model.config import ModelConfig
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.ends import Ends
from smedjan_common.training.config import TrainConfig


class SavedTokenizer(NamedTuple):
    """The text of tokenizer.json, the tokenizer's hash, and what stands beside it: the chat template, beginnings and ends."""

    json: str
    hash: str
    chat: ChatSource | None = None
    ends: Ends = Ends()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SavedTokenizer":
        """A tokenizer as checkpoints hold it."""
        return cls(tokenizer.to_json(), tokenizer.hash, tokenizer.chat, tokenizer.ends)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a checkpoint is of.

    train: how it was trained; None: not known. tokenizer: None: it has none. dataset: {"hash", "path", "tokens"}, or None.
    framework: {"name", and versions}. optimizer: its name, where it is not train.optimizer. extra: anything more that is JSON.
    """

    model: ModelConfig
    train: TrainConfig | None = None
    tokenizer: SavedTokenizer | None = None
    dataset: Mapping[str, Any] | None = None
    framework: Mapping[str, Any]
    optimizer: str | None = None
    extra: Mapping[str, Any] | None = None
