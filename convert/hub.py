"""Models on the Hugging Face Hub: `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION` as a source of `convert`, and what `smedjan push` sends.

Only what a model needs is fetched: configuration, safetensors, tokenizer, chat template, licence; never a pickle, never code. The
revision is looked up first and everything is taken from that commit, which checkpoint.json records. The package `huggingface_hub`
(extra `hub`) talks to the Hub and keeps its own cache; HF_ENDPOINT, HF_HOME and HF_TOKEN are its.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from smedjan_common.errors import CheckpointError, ConfigError

SCHEME = "hf://"
FETCHED = (
    *("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "*.jinja", "LICENSE*"),
)
_LEFT = ("*/*", "consolidated*")  # of subfolders nothing is read, and of Mistral's weights the other copy is
_TRANSPORTS = ("huggingface_hub", "httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Repository(NamedTuple):
    """A model on the Hub. revision: a branch, tag or commit; None: the main branch."""

    name: str
    revision: str | None = None


def is_address(src: str) -> bool:
    """Whether a source is on the Hub."""
    return src.startswith(SCHEME)


def parse(src: str) -> Repository:
    """`hf://OWNER/NAME@REVISION`. Raises ConfigError."""
    name, _, revision = src.removeprefix(SCHEME).partition("@")
    if not _NAME.fullmatch(name) or ".." in name or (revision and not re.fullmatch(r"[\w./-]{1,200}", revision)):
        raise ConfigError(
            f"{src!r} is no model on the Hub.", "It has an owner and a name.", "Write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION."
        )
    return Repository(name, revision or None)


def fetch(repository: Repository) -> tuple[Path, str]:
    """(folder with its files, the commit they are of). Raises CheckpointError, ConfigError where the package is not installed."""
    hub = package()
    with explained(repository):
        commit = hub.HfApi().model_info(repository.name, revision=repository.revision).sha
        if not commit:
            raise CheckpointError(f"{repository.name} names no commit.", "The Hub's answer lacks it.", "Try again.")
        return Path(hub.snapshot_download(repository.name, revision=commit, allow_patterns=[*FETCHED], ignore_patterns=[*_LEFT])), commit


def package() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        what = "The package huggingface_hub is not installed."
        raise ConfigError(what, "It talks to the Hub.", "Install it: pip install 'smedjan[hub]'.") from None
    return huggingface_hub


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Errors of the package as ours. What was fetched stays in its cache, so another try goes on from there."""
    from huggingface_hub import errors

    where = repository.name + (f" at {repository.revision}" if repository.revision else "")
    try:
        yield
    except errors.GatedRepoError:
        why = "Its owner wants users to agree first."
        raise CheckpointError(f"{where} asks for consent.", why, "Agree on its page, then set HF_TOKEN.") from None
    except errors.RevisionNotFoundError:
        why = "The model has no such revision."
        raise CheckpointError(f"There is no {where}.", why, "Leave @REVISION out for the newest.") from None
    except errors.RepositoryNotFoundError:
        why = "The Hub knows no such model, or it is private."
        raise CheckpointError(f"There is no {where}.", why, "Check the name; for a private one set HF_TOKEN.") from None
    except ValueError as error:  # of the package: a name that would lead out of its cache, an answer that is no JSON
        raise CheckpointError(f"{where} cannot be fetched.", _first(error), "Choose another model, or tell its owner.") from None
    except Exception as error:  # the package's transport raises errors of its own
        known = isinstance(error, (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError))
        if not known and type(error).__module__.partition(".")[0] not in _TRANSPORTS:
            raise
        raise CheckpointError(f"{where} could not be reached.", _first(error), "Try again: what is here already is kept.") from None


def _first(error: Exception) -> str:
    """The first line of what the package says, without addresses that carry a query or a token."""
    line = (str(error) or type(error).__name__).strip().splitlines()[0]
    return re.sub(r"\?\S+", "", line)[:200].rstrip(".:") + "."
