"""What is refused before a run begins: by the words of its flags, and once it is decided, by all of it.

CHECKS is the one list. It is gone through before texts are tokenised, as far as that is known then, and again with the data.
"""

import os
from collections.abc import Callable

from smedjan_common.checkpoint import find_base
from smedjan_common.data.mixture import Mixture
from smedjan_common.data.order import document_offsets
from smedjan_common.errors import ConfigError, DataError, flag, unknown
from smedjan_common.reporting.trackers import check_trackers
from smedjan_common.run.asked import Asked
from smedjan_common.run.chat_data import check_chat_flags, files_of
from smedjan_common.run.cluster_plan import check_cluster
from smedjan_common.run.data import check_data_flags, trains_tokenizer
from smedjan_common.run.decided import Decided, base_of, objective_of
from smedjan_common.run.folder import COMMANDS
from smedjan_common.run.options import check_options, check_report_options, check_training_options
from smedjan_common.run.recorded import COUNTS
from smedjan_common.run.reference_scores import check_reference
from smedjan_common.run.resume import check_fixed, check_same, check_same_adapters
from smedjan_common.run.start import GoOn, New
from smedjan_common.run.teacher import check_teacher
from smedjan_common.tokenizer.training import check_size
from smedjan_common.training.config import CHECKPOINT_FORMATS
from smedjan_common.training.mesh import check_mesh, check_mesh_of, parse_mesh
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.precision import check_precision
from smedjan_common.training.preferences import LOSSES, PREFERENCES


def check_words(asked: Asked, backend: str) -> None:
    """Raises ConfigError for what no run could have, whatever is in its folder."""
    _check_counts(asked)
    _check_names(asked)
    check_trackers(asked.value("tracker"))
    _check_format(asked.value("checkpoint_format"), backend)
    check_mesh_of(backend, parse_mesh(asked.value("mesh")))
    check_precision(backend, asked.value("dtype"))
    check_cluster(asked, backend)
    if asked.chats:
        check_chat_flags(asked.chats)


def check(decided: Decided) -> None:
    """Goes through CHECKS. Raises ConfigError, DataError, CheckpointError, PermissionError."""
    for row in CHECKS:
        row(decided)


def _check_counts(asked: Asked) -> None:
    """A number of batches, tokens or checkpoints that cannot be, rather than after hours of training."""
    for name, least in COUNTS.items():
        if (value := asked.value(name)) is not None and value < least:
            what = f"{flag(name)} is {value}."
            raise ConfigError(what, f"It must be at least {least}.", "Leave it out for the default.")


def _check_names(asked: Asked) -> None:
    """An empty name, which would stand for the current directory or for nothing, and two beginnings."""
    of_pairs = ("reference",) if asked.pairs else ("teacher_checkpoint",)
    for name in ("dataset", "val_dataset", "tokenizer", "checkpoint_dir", "resume", "pretrained", "ffn", *of_pairs):
        value = asked.value(name)
        if value == "" or (isinstance(value, tuple) and "" in value):
            why = "An unset shell variable has this effect."
            raise ConfigError(f"{flag(name)} is empty.", why, f"Give {flag(name)} a value.")
    if asked.value("pretrained") and asked.value("resume") not in ("auto", "never"):
        why = "One continues a run, the other starts a new one."
        raise ConfigError("--resume PATH and --pretrained are both given.", why, "Give one of them.")


def _check_format(kind: str, backend: str) -> None:
    """A --checkpoint-format that is unknown or not of this backend."""
    if kind not in CHECKPOINT_FORMATS:
        raise unknown("--checkpoint-format", kind, CHECKPOINT_FORMATS)
    if (owner := CHECKPOINT_FORMATS[kind]) not in {None, backend}:
        raise ConfigError(
            f"--checkpoint-format {kind} is of the backend {owner}, not {backend}.",
            "Neutral checkpoints work with every backend.",
            f"Leave it out; `convert CHECKPOINT DST --to {kind}` makes one from a neutral checkpoint.",
        )


def _check_objective(decided: Decided) -> None:
    """Conversations or pairs for a model that can say nothing yet, or for a run that learns something else."""
    asked = decided.asked
    if not asked.chats:
        return
    if isinstance(decided.begin, New):
        what, why = "--pretrained is not given.", f"Answers are taught to a trained model, and {decided.folder} has no run to go on with."
        file, folders = ("pairs.jsonl", ("chat", "better")) if asked.pairs else ("chats.jsonl", ("mine", "chat"))
        example = f"smedjan {asked.command} {file} --pretrained runs/{folders[0]} --checkpoint-dir runs/{folders[1]}"
        raise ConfigError(what, why, f"Name one: {example}.")
    objective = objective_of(asked, decided.begin)
    wrong = asked.pairs and asked.is_given("loss") and LOSSES[asked.pairs.loss].name != objective
    if isinstance(decided.begin, GoOn) and (COMMANDS[objective] != asked.command or wrong):
        learns = {
            "train": "learns texts",
            "sft": "learns to answer",
            "dpo": f"learns from pairs of answers, by --loss {_flag_of(objective)}",
        }
        what = f"The run in {decided.folder} {learns[COMMANDS[objective]]}."
        why = "A run goes on with what it began with."
        raise ConfigError(what, why, f"Begin another with its weights: --pretrained {decided.folder} --checkpoint-dir NEW.")


def _flag_of(objective: str) -> str:
    return PREFERENCES[objective].flag if objective in PREFERENCES else ""


def _check_pairs(decided: Decided) -> None:
    """Pairs of answers for a run that learns something else, other data for one that learns from pairs, and how pairs are not packed."""
    train, learns_pairs = decided.train, decided.train.objective in PREFERENCES
    if learns_pairs and (train.packing != "documents" or not train.mask_documents):
        given = "--packing windows" if train.packing != "documents" else "--no-mask-documents"
        raise ConfigError(f"{given} does not work with pairs of answers.", "Both are read whole, each by itself.", "Leave it out.")
    if decided.asked.is_given("reference") and learns_pairs and not PREFERENCES[train.objective].needs_reference:
        what, why = "--reference would do nothing.", f"--loss {_flag_of(train.objective)} compares with none."
        raise ConfigError(what, why, "Leave it out, or take --loss sigmoid or ipo.")
    if decided.data:
        for file in files_of(decided.data):
            if file.pairs != learns_pairs and (file.pairs or learns_pairs):
                what = f"The token file {str(file.path)!r} holds {'' if file.pairs else 'no '}pairs of answers."
                why = "Pairs say which of two answers is better, and are learned from as such."
                raise DataError(what, why, "Learn from pairs with smedjan dpo, and from other data with smedjan sft or train.")
        check_reference(decided)


def _check_adapters(decided: Decided) -> None:
    """Adapters beside no weights, other adapters than the run has, or what they have no use for."""
    info, train, given = decided.start, decided.train, decided.asked.given
    if info and info.train:
        check_same_adapters(info, train)
    if info and info.adapter and not decided.done:
        find_base(info)
    if not train.lora_rank:
        return
    if isinstance(decided.begin, New):
        what, why = "--lora-rank needs --pretrained.", "Adapters change a trained model, whose weights stay as they are."
        raise ConfigError(what, why, "Name one: --pretrained runs/mine, or leave --lora-rank out.")
    if decided.asked.value("checkpoint_format") != "neutral":
        kind = decided.asked.value("checkpoint_format")
        why = "A checkpoint of adapters holds them and not the model; it is small, and neutral."
        raise ConfigError(f"--checkpoint-format {kind} does not go with --lora-rank.", why, "Leave it out.")
    if "router_bias_rate" in given and train.router_bias_rate:
        raise ConfigError("--router-bias-rate would do nothing.", "Beside adapters routers are frozen.", "Leave it out.")


def _check_teacher(decided: Decided) -> None:
    """A teacher where nothing would be learned from it, or one that cannot read what the run reads."""
    train, teacher = decided.train, decided.teacher
    if decided.asked.teacher and OBJECTIVES[train.objective].formula:
        what, why = "--teacher-checkpoint does not work here.", "A teacher speaks of tokens, and this run learns from something else."
        raise ConfigError(what, why, "Leave it out.")
    if teacher is None:
        if decided.asked.is_given("distill_alpha") and decided.asked.value("distill_alpha") and not train.distill_alpha:
            what, why = "--distill-alpha would do nothing.", "It is read with --teacher-checkpoint PATH only."
            raise ConfigError(what, why, "Leave it out, or add --teacher-checkpoint PATH.")
        return
    check_teacher(teacher, train, decided.backend, decided.mesh)


def _check_run(decided: Decided) -> None:
    """Another run than the one that goes on."""
    if not (info := decided.start):
        return
    check_fixed(info, decided.train)
    check_same(info, decided.model, decided.train)
    given = next((name for name in ("steps", "epochs") if decided.asked.is_given(name)), None)
    if given and decided.known_steps and decided.train.steps < info.step:
        asked = f"--{given} {decided.asked.value(given):g}"
        steps = "" if given == "steps" else f", {decided.train.steps} steps,"
        raise ConfigError(
            f"{asked}{steps} is less than the {info.step} steps that the run has done.",
            "A run does not go back.",
            "Give more, or go on from an older checkpoint: --resume CHECKPOINT_DIR/step-… --checkpoint-dir NEW.",
        )


def _check_weights(decided: Decided) -> None:
    """Weights to start a new run from, where there is a run that began with others: they would not be read."""
    if not isinstance(decided.begin, GoOn) or not decided.asked.is_given("pretrained"):
        return
    given, flags = decided.asked.value("pretrained"), decided.begin.recorded.get("flags") or {}
    began = flags.get("pretrained", given)
    if began is None or (os.path.exists(began) and os.path.realpath(began) != os.path.realpath(given)):  # moved ones are in the notes
        raise ConfigError(
            f"--pretrained starts a new run, and {decided.folder} has one that began {f'from {began}' if began else 'without weights'}.",
            f"That run would go on from {decided.begin.info.path.name}, and {given} would not be read.",
            "Give another --checkpoint-dir to start from these weights, or leave --pretrained out to go on.",
        )


def _check_initial(decided: Decided) -> None:
    """Initial weights of another spread, where the weights are there already; a run that goes on may repeat its own."""
    info = decided.start or decided.pretrained
    if info is None or not decided.asked.is_given("init_std"):
        return
    if decided.pretrained or decided.asked.value("init_std") != info.model.init_std:
        why = f"It is of the initial weights, and these come from {info.path}."
        raise ConfigError("--init-std would do nothing.", why, "Leave it out.")


def _check_model(decided: Decided) -> None:
    """A model that cannot be trained in this way."""
    decided.train.check_model(decided.model)


def _check_options(decided: Decided) -> None:
    """Options that nothing would read. A run that goes on has those of the command that started it."""
    flags, asked_for = decided.asked.flags, _asked_for(decided)
    check_data_flags(flags.data, asked_for)
    check_report_options(flags.report, asked_for)
    if not isinstance(decided.begin, GoOn):  # whose model is the same
        check_options(decided.model, asked_for)
    check_training_options(decided.train, decided.model, asked_for)


def _asked_for(decided: Decided) -> frozenset[str]:
    """The flags that are given and not what the run has already."""
    if not isinstance(begin := decided.begin, GoOn):
        return decided.asked.given
    base = base_of(begin)
    has = (begin.recorded.get("flags") or {}) | (vars(base) if base else {})
    now = vars(decided.train)
    return frozenset(name for name in decided.asked.given if name not in has or has[name] != now.get(name, decided.asked.value(name)))


def _check_vocabulary(decided: Decided) -> None:
    """A vocabulary that no tokenizer can have."""
    if isinstance(decided.begin, New) and trains_tokenizer(decided.asked.flags.data):
        check_size(decided.asked.value("vocab_size"))


def _check_mesh(decided: Decided) -> None:
    """A mesh that cannot share out the model or the batch."""
    if decided.mesh:
        check_mesh(decided.mesh, decided.model, decided.train.batch_size, decided.train.grad_accum)


def _check_documents(decided: Decided) -> None:
    """A token file that does not say where its documents start, where they are kept apart."""
    if not decided.data or not decided.train.mask_documents:
        return
    train, val = decided.data.train, decided.data.val
    for file in (*(train.files if isinstance(train, Mixture) else (train,)), val):
        if file:
            document_offsets(file)


def _check_sample_prompt(decided: Decided) -> None:
    """A prompt that nothing could be added to."""
    tokenizer = decided.data.tokenizer if decided.data else None
    if tokenizer is None or not decided.every("sample_every"):
        return
    if (length := len(tokenizer.encode(decided.asked.value("sample_prompt")))) >= decided.model.context_length:
        what = f"--sample-prompt has {length} tokens."
        raise ConfigError(what, f"The context has {decided.model.context_length}, so nothing could follow.", "Shorten it.")


def _check_writable(decided: Decided) -> None:
    """A folder that cannot be written; the lock has made it."""
    if not decided.asked.value("dry_run") and not os.access(decided.folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(decided.folder))


CHECKS: tuple[Callable[[Decided], None], ...] = (
    _check_objective,
    _check_adapters,
    _check_pairs,
    _check_teacher,
    _check_run,
    _check_weights,
    _check_initial,
    _check_model,
    _check_options,
    _check_vocabulary,
    _check_mesh,
    _check_documents,
    _check_sample_prompt,
    _check_writable,
)
