"""`--config FILE`: flags of training from a TOML file, or from the config.json of a run, so that it can be repeated.

    steps = 400                 # flat: the names of flags, - or _ in them
    dataset = ["my.txt"]
    [model]                     # or in tables, by the groups of `smedjan train --help`
    size = "tiny"

What the command line gives wins. A setting becomes the words of its flag, so it is checked as they are; it counts as given.
"""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smedjan_common.command_line import UsageError, flags_of
from smedjan_common.errors import SmedjanError, flag, near, reason
from smedjan_common.files.names import CONFIG
from smedjan_common.model.config import ModelConfig, ffn_width
from smedjan_common.model.options import options
from smedjan_common.run.flags import ALL_GROUPS as GROUPS
from smedjan_common.run.flags import THIS_START, DpoFlags, SftFlags, TrainFlags
from smedjan_common.run.options import unread_of_model, unread_of_training
from smedjan_common.settings import Setting, flat, for_a_file, of_toml, read_text, words_for
from smedjan_common.training.config import TrainConfig

_OTHERS = {"sft": SftFlags, "dpo": DpoFlags}  # commands with flags of their own
_ABOUT = {"sft": "It is about conversations.", "dpo": "It is about pairs of answers."}
NEVER = ("config", "devices", "dry_run", "force", "resume")  # of one start; what a file says is of a run


def words_of(path: str, given: Iterable[str], kind: type[TrainFlags] = TrainFlags) -> list[str]:
    """The words of the settings of a file whose flags are not `given`. Raises UsageError, with the line."""
    known = {each.name: each for each in flags_of(kind)}
    taken = set(given)
    for one in settings(Path(path)):
        if flag(one.name) not in known:
            command = next(command for command, other in _OTHERS.items() if flag(one.name) in {each.name for each in flags_of(other)})
            what, why = f"{one.where}: {one.name} is no flag of this.", _ABOUT[command]
            raise UsageError(what, why, f"Give the file to `smedjan {command}`.")
    return [word for one in settings(Path(path)) if one.name not in taken for word in words_for(known[flag(one.name)], one)]


def settings(path: Path) -> list[Setting]:
    """What the file says. Raises UsageError for one that cannot be read, or for a name that is no flag."""
    text = read_text(path, "Name a .toml file, or the config.json of a run.")
    return _of_a_run(path, text) if path.suffix == ".json" else of_toml(path, text, _field)


def _field(table: str, name: str, where: str) -> str:
    """The field of the flag that a name in a table is."""
    field = name.replace("-", "_")
    group = next((group for group, kind in GROUPS.items() if field in kind.__dataclass_fields__), None)
    if table and table not in GROUPS:
        raise UsageError(
            f"{where}: there is no table [{table}].", near(table, GROUPS), f"The tables are {', '.join(f'[{each}]' for each in GROUPS)}."
        )
    if group is None:
        known = [flag(each) for kind in GROUPS.values() for each in kind.__dataclass_fields__]
        raise UsageError(f"{where}: {name} is no flag of training.", near(flag(field), known), "`smedjan train --help` lists them.")
    if table and group != table:
        raise UsageError(f"{where}: {name} does not belong to [{table}].", f"It is of [{group}].", "Move it there, or above all tables.")
    return for_a_file(field, name, where, NEVER)


def _of_a_run(path: Path, text: str) -> list[Setting]:
    """What config.json of a run says, as flags that begin the same run: values that nothing reads, and defaults, are left out."""
    try:
        values = json.loads(text)
        model, train, flags = ModelConfig.from_dict(values["model"]), TrainConfig.from_dict(values["train"]), values["flags"]
        recorded = {name: flags[name] for kind in GROUPS.values() for name in kind.__dataclass_fields__ if name in flags}
    except SmedjanError as error:
        raise UsageError(f"{path} cannot be used: {error.what}", error.why, error.fix) from None
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UsageError(f"{path} is no {CONFIG} of a run.", reason(error), "Name that of a run, or a .toml file.") from None
    found = {name: value for name, value in recorded.items() if value not in (None, [], _default(name))}
    found |= {name: value for name, value in vars(train).items() if name not in unread_of_training(train, model)}
    found |= _model(path, model, anew=not recorded.get("pretrained"))
    known = {name for kind in GROUPS.values() for name in kind.__dataclass_fields__}
    return [Setting(name, list(value) if isinstance(value, tuple) else value, str(path)) for name, value in found.items() if name in known]


def _model(path: Path, model: ModelConfig, anew: bool) -> dict[str, Any]:
    """The flags of a model; of one that begins with weights, which say the rest, those that may differ from them."""
    read = options(ModelConfig).keys() - unread_of_model(model)
    plain = ModelConfig.build(vocab_size=model.vocab_size, dim=model.dim, layers=model.layers, heads=model.heads)
    differ = {name: getattr(model, name) for name in read if getattr(model, name) != getattr(plain, name)}
    if not anew:
        return {name: value for name, value in differ.items() if options(ModelConfig)[name].shape_free}
    mult = model.ffn_dim / model.dim
    if ffn_width(model.dim, mult) != model.ffn_dim:
        why = f"Its feed-forwards are {model.ffn_dim} wide, which --ffn-mult cannot give."
        raise UsageError(
            f"{path} cannot be repeated by flags.", why, "It began with weights of others: start from those with --pretrained."
        )
    shape = {"size": "custom", "dim": model.dim, "layers": model.layers, "heads": model.heads, "kv_heads": model.kv_heads, "ffn_mult": mult}
    return differ | shape | {"mixer": model.mixer, "ffn": model.ffn}


def _default(name: str) -> Any:
    value = next(kind.__dataclass_fields__[name].default for kind in GROUPS.values() if name in kind.__dataclass_fields__)
    return list(value) if isinstance(value, tuple) else value


def to_toml(given: dict[str, Any], before: str = "", command: str = "train") -> str:
    """The flags of a run that were given, in tables. `before`: the file as it was, whose values stay where nothing else is given."""
    try:
        had = {name.replace("-", "_"): value for _, name, value in flat(tomllib.loads(before))}
    except (ValueError, RecursionError):
        had = {}
    values = had | given
    repeated = f"`smedjan {command} --config THIS --checkpoint-dir NEW` repeats it"
    parts = [f"# What was given to this run; {repeated}. config.json has every value."]
    for group, kind in GROUPS.items():
        lines = [f"{name} = {_toml(values[name])}" for name in kind.__dataclass_fields__ if name in values and _records(kind, name)]
        parts += ["", f"[{group}]", *lines] if lines else []
    return "\n".join(parts) + "\n"


def _records(kind: Any, name: str) -> bool:
    return not kind.__dataclass_fields__[name].metadata.keys() & THIS_START.keys()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def sources(path: str, given: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(flag, value, from where) of every value that is given, by the file or by the command line, which wins."""
    of_file = {one.name: one for one in settings(Path(path))}
    known = {each.name: each for kind in _OTHERS.values() for each in flags_of(kind)}
    rows = []
    for name, value in given.items():
        one = of_file.get(name)
        same = one is not None and words_for(known[flag(name)], one) == words_for(
            known[flag(name)], Setting(name, list(value) if isinstance(value, tuple) else value, "")
        )
        rows.append((flag(name), _toml(value), one.where if one and same else "the command line"))
    return rows
