"""What is refused before a run begins."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smedjan_common.run.data import RunData
    from smedjan_common.run.flags import TrainFlags


def check_sample_prompt(prompt: str, tokenizer, context_length: int) -> None:
    """Raises ConfigError when nothing could be added to it."""
    from smedjan_common.errors import ConfigError

    if (length := len(tokenizer.encode(prompt))) >= context_length:
        what = f"--sample-prompt has {length} tokens."
        raise ConfigError(what, f"The context has {context_length}, so nothing could follow.", "Shorten it.")


def check_counts(flags: "TrainFlags") -> None:
    """Raises ConfigError for a number of steps, batches, tokens or checkpoints that cannot be, rather than after hours of training."""
    from smedjan_common.errors import ConfigError

    counts = {**vars(flags.run), **vars(flags.report)}
    for names, least in (
        (("checkpoint_every", "keep", "keep_every", "log_every", "eval_every", "sample_every"), 0),
        (("eval_batches", "sample_tokens"), 1),
    ):
        for name in names:
            if counts[name] < least:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is {counts[name]}.", f"It must be at least {least}.", "Leave it out for the default.")


def check_names(flags: "TrainFlags") -> None:
    """Raises ConfigError for an empty name, which would stand for the current directory or for nothing, and for two beginnings."""
    from smedjan_common.errors import ConfigError

    given = {**vars(flags.data), **vars(flags.run), "ffn": flags.model.ffn}
    for name in ("dataset", "val_dataset", "tokenizer", "checkpoint_dir", "resume", "pretrained", "ffn"):
        if given[name] == "" or (isinstance(given[name], tuple) and "" in given[name]):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is empty.", "A variable of the shell that is not set gives that.", f"Give {flag} a value.")
    if flags.run.pretrained and flags.run.resume not in ("auto", "never"):
        why = "The one goes on with a run, the other starts a new one."
        raise ConfigError("--resume PATH and --pretrained are both given.", why, "Give one of them.")


def check_documents(data: "RunData") -> None:
    """Raises DataError for a token file that does not say where its documents start."""
    from smedjan_common.data.mixture import Mixture
    from smedjan_common.data.order import document_offsets

    files = data.train.files if isinstance(data.train, Mixture) else (data.train,)
    for file in (*files, data.val):
        if file:
            document_offsets(file)


def check_format(kind: str, backend: str) -> None:
    """Raises ConfigError for a --checkpoint-format that is unknown or not of this backend."""
    from smedjan_common.errors import ConfigError, unknown
    from smedjan_common.training.config import CHECKPOINT_FORMATS

    if kind not in CHECKPOINT_FORMATS:
        raise unknown("--checkpoint-format", kind, CHECKPOINT_FORMATS)
    if (owner := CHECKPOINT_FORMATS[kind]) not in {None, backend}:
        raise ConfigError(
            f"--checkpoint-format {kind} is of the backend {owner}, not {backend}.",
            "Neutral checkpoints are for all.",
            f"Leave it out; `convert CHECKPOINT DST --to {kind}` makes one of a neutral checkpoint.",
        )
