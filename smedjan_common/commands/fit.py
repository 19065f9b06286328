"""Training from Python: `smedjan_jax.fit(dataset="my.txt", …)` is `smedjan train my.txt …`, and gives the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smedjan_common.command_line import check, flags_of
from smedjan_common.commands.train import Load, checkpoint_dir, train
from smedjan_common.errors import SmedjanError


def fit(name: str, load: Load, values: Mapping[str, Any]) -> Path:
    """Train as `smedjan train` does with these flags, by the names of their fields; gives the folder of the run.

    Raises TypeError for an unknown one, SmedjanError for what the command would refuse, KeyboardInterrupt where a signal ended it.
    """
    from smedjan_common.inference.keywords import check_keywords
    from smedjan_common.run.asked import Asked
    from smedjan_common.run.flags import TrainFlags
    from smedjan_common.run.given import parse

    known = list(flags_of(TrainFlags))
    check_keywords("fit", values, known=[each.name[2:].replace("-", "_") for each in known])
    argv = words(values)
    check(known, "fit", argv)
    asked = Asked(*parse(argv))
    if code := train(name, load, asked):
        raise (
            KeyboardInterrupt if code >= 128 else SmedjanError("The training ended early.", f"Its exit code is {code}.", "Read its lines.")
        )
    return checkpoint_dir(asked)


def words(values: Mapping[str, Any]) -> list[str]:
    """{"batch_size": 8, "mask_documents": True, "mixer": ["ssm", "attention"]} as a command line; None: left out."""
    line: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            line += [f"--{flag}", *map(str, value)] if value else []
        elif value is not None:
            line.append(f"--{flag}={value}")
    return line
