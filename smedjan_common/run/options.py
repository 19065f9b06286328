"""Options that nothing would read are refused, as whoever gives one expects that it counts. What reads which stands in the tables: the
rows of mixers and feed-forwards, optimizers, schedules.

A value that says that there shall be none of it (--experts 0, --no-qk-norm, --attention auto) is what a run without it does.
Only new runs are checked: a run goes on with the command that started it.
"""

from collections.abc import Iterator

from smedjan_common.errors import ConfigError, flag
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.ffns.experts import ROUTERS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.options import options
from smedjan_common.run.flags import ReportFlags
from smedjan_common.training.adaptation import Adaptation
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.distillation import Distillation
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.preferences import PREFERENCES
from smedjan_common.training.schedule import SCHEDULES

_ROWS = (*MIXERS.values(), *FFNS.values())
_NONE_OF_IT = {"attention": "auto", "kernels": "auto", "balance_loss": 0.0, "router_z_loss": 0.0, "router_bias_rate": 0.0}


def check_options(model: ModelConfig, given: frozenset[str]) -> None:
    """Raises ConfigError for a given option of a mixer or feed-forward that the model does not have."""
    if "rope_base" in given and not model.turns:
        why = f"The model has {', '.join(dict.fromkeys(model.mixer))}; no layer uses RoPE."
        raise ConfigError("--rope-base would do nothing.", why, "Leave it out, or add --mixer attention.")
    for name in sorted(given & unread_of_model(model)):
        if not getattr(model, name) and options(ModelConfig)[name].default is not True:
            continue
        owners = [row.name for row in _ROWS if name in row.own]
        raise ConfigError(
            f"{flag(name)} would do nothing.",
            f"The model has {', '.join(dict.fromkeys((*model.mixer, *model.ffn)))}; the option belongs to {' and '.join(owners)}.",
            "Leave it out" + (f", or add --mixer {owners[0]}." if owners[0] in MIXERS else ", or add --experts 8."),
        )


def check_training_options(train: TrainConfig, model: ModelConfig, given: frozenset[str]) -> None:
    """Raises ConfigError for a given option of an optimizer, schedule, router or mixer that the run does not have."""
    for name in sorted(given & unread_of_training(train, model)):
        if getattr(train, name) == _NONE_OF_IT.get(name):
            continue
        owners = [row for row, names, _ in _readers(train, model) if name in names]
        raise ConfigError(
            f"{flag(name)} would do nothing.",
            f"It is read with {' or '.join(owners)}" + (", and the run has none of these." if owners[1:] else " only."),
            f"Leave it out, or add {owners[0]}.",
        )


def unread_of_model(model: ModelConfig) -> set[str]:
    """The options of mixers and feed-forwards that no layer of the model has."""
    read = {name for row in _ROWS if row.name in (*model.mixer, *model.ffn) for name in row.own}
    return {name for row in _ROWS for name in row.own} - read


def unread_of_training(train: TrainConfig, model: ModelConfig) -> set[str]:
    """The options of optimizers, schedules, routers and mixers that the run does not have."""
    rows = list(_readers(train, model))
    return {name for _, names, _ in rows for name in names} - {name for _, names, chosen in rows if chosen for name in names}


def _readers(train: TrainConfig, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """What can be chosen, the fields of TrainConfig that it reads, and whether this run has it."""
    for row in MIXERS.values():
        yield f"--mixer {row.name}", tuple(options(row.training)), row.name in model.mixer
    for row in PREFERENCES.values():
        yield f"--loss {row.flag}", tuple(options(row.options)), row.name == train.objective
    for name, reads in ROUTERS.items():
        yield f"--experts 8 --router {name}", tuple(options(reads)), "experts" in model.ffn and model.router == name
    for row in OPTIMIZERS.values():
        yield f"--optimizer {row.name}", tuple(options(row.options)), row.name == train.optimizer
    yield "--teacher-checkpoint PATH", tuple(options(Distillation)), train.distill_alpha > 0
    for row in SCHEDULES.values():
        yield f"--lr-schedule {row.name}", tuple(options(row.options)), row.name == train.lr_schedule
    yield "--lora-rank 16", tuple(name for name in options(Adaptation) if name != "lora_rank"), train.lora_rank > 0


def check_report_options(flags: ReportFlags, given: frozenset[str]) -> None:
    """Raises ConfigError for an option of samples or validation that are never made."""
    for switch, names in (("sample_every", ("sample_prompt", "sample_tokens")), ("eval_every", ("eval_batches",))):
        for name in names:
            if name in given and getattr(flags, switch) == 0:
                raise ConfigError(f"{flag(name)} would do nothing.", f"{flag(switch)} is 0.", f"Add {flag(switch)} 100, say.")
