"""Conversations to begin with when nobody gives any: short ones in English from the small package `chatterbot-corpus` (BSD licence)."""

import importlib.util
import random
from pathlib import Path

from smedjan_common.errors import DataError

PACKAGE = "chatterbot-corpus==1.3.3"
# what people say to a machine; the rest of the package are quizzes and the log of a help desk
SUBJECTS = (
    *("ai", "botprofile", "emotion", "food", "gossip", "greetings", "humor", "literature", "money", "movies", "politics", "psychology"),
    *("science", "sports"),
)
BEFORE = (1, 1, 2, 3)  # how many others stand before a conversation, each time that it is shown again
MOST, MOST_IN_ALL = 60, 200  # characters: of a message on average, and of conversations in a row; a small model has a small context


def chat_corpus() -> list[list[str]]:
    """Conversations, each its messages in turn, the user's first: every short one as it is, and some times after others, so that training
    sees answers that have nothing to do with what was said before. Always the same. Raises DataError where the package, or PyYAML to read
    it, is not installed."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or importlib.util.find_spec("yaml") is None:
        raise DataError(
            "There are no conversations to learn from.",
            "They come from the package chatterbot-corpus, whose files PyYAML reads; one of the two is not installed.",
            f"Run `make chat`, which installs both, or: pip install --no-deps {PACKAGE} PyYAML. Your own: smedjan sft YOUR.jsonl.",
        )
    folder = next(Path(place) / "data" / "english" for place in spec.submodule_search_locations or [])
    alone = [talk for subject in SUBJECTS for talk in _talks(folder / f"{subject}.yml")]
    chance, longer = random.Random(0), []
    for before in BEFORE:
        for talk in alone:
            joined = [message for earlier in chance.sample(alone, before) for message in earlier] + talk
            if sum(map(len, joined)) <= MOST_IN_ALL:
                longer.append(joined)
    return alone + longer


def _talks(path: Path) -> list[list[str]]:
    """The short conversations of a file that end with an answer."""
    import yaml

    read = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    talks = [[" ".join(str(message).split()) for message in talk] for talk in read]
    talks = [talk[: len(talk) // 2 * 2] for talk in talks]
    return [talk for talk in talks if talk and all(talk) and sum(map(len, talk)) <= MOST * len(talk)]
