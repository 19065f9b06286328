"""`smedjan info PATH`: what a checkpoint, run folder, folder of runs, Hugging Face directory, token file or tokenizer is."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import arg

from smedjan_common.command_line import parse
from smedjan_common.commands.info_lines import lines
from smedjan_common.errors import CheckpointError, DataError, TemplateError, run_command
from smedjan_common.files.names import CONFIG, FINAL, MANIFEST, METRICS, TOKENIZER
from smedjan_common.nearby import beside

if TYPE_CHECKING:
    from smedjan_common.checkpoint import Found

Facts = dict[str, Any]
RUNS = "folder of runs"


@dataclass(frozen=True)
class InfoFlags:
    """Say what a file or folder is: a run folder, a folder of runs, a checkpoint, a Hugging Face directory, a token file, a tokenizer."""

    path: Annotated[str, tyro.conf.Positional, arg(metavar="PATH")]
    """The file or folder to look at."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare the hashes of everything in it; of a run folder, of all its checkpoints."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(InfoFlags, "smedjan info", argv, "smedjan info runs/mine", "smedjan info runs/mine/final --verify --json")
    return run_command(lambda: _info(flags))


def _info(flags: InfoFlags) -> int:
    path = Path(flags.path)
    facts = describe(path, flags.verify)
    if flags.json:
        print(json.dumps(facts, indent=1))
    elif facts["kind"] == RUNS:
        from smedjan_common.run.summary import table

        print(table(facts["runs"]))
    else:
        print("\n".join(lines(facts, shutil.get_terminal_size().columns if sys.stdout.isatty() else 0)))
    if facts.get("verified") is False:
        broken = facts["broken"]
        what = f"{len(broken)} of the checkpoints in {path} {'is' if len(broken) == 1 else 'are'} broken."
        raise CheckpointError(what, broken[0], "Restore from a copy, or remove what is broken.")
    return 0


def describe(path: Path, verify: bool = False) -> Facts:
    """Facts about `path`, the first of them its kind. Raises DataError, CheckpointError."""
    if not path.exists():
        raise DataError(f"There is no {str(path)!r}.", beside(path), "Check the path.")
    for test, look in KINDS:
        if test(path):
            return look(path, verify)
    raise DataError(
        f"{str(path)!r} is not something that smedjan makes.",
        "It is not a run folder, a folder of runs, a checkpoint, a token file (.bin) or a tokenizer.json.",
        "Give one of those.",
    )


def _checkpoint(path: Path, verify: bool) -> Facts:
    from smedjan_common.checkpoint import KINDS, read_info, verify_checkpoint

    info = read_info(path)
    if verify:
        verify_checkpoint(info.path)
    return {
        "kind": "checkpoint" if info.optimizer else "checkpoint, weights only",
        "path": str(info.path),
        "format": KINDS[info.format].name,
        "step": info.step,
        **_model(info.model, info.train),
        **(_adapters(info.model, info.adapter) if info.adapter else {}),
        "training": info.train.to_dict() if info.train else None,
        "optimizer": info.optimizer,
        "dataset": info.dataset,
        "tokenizer_hash": info.tokenizer_hash,
        "chat_template": _chat_template(info.path),
        "made_of": _made_of(info.extra or {}),
        "metrics": info.metrics,
        "written_by": {"smedjan": info.smedjan_version, **info.framework},
        "bytes": info.nbytes,
        "verified": True if verify else None,
    }


def _run(path: Path, verify: bool) -> Facts:
    from smedjan_common.checkpoint.load import load_info
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.reporting.metrics import eval_rows, read_rows, train_rows
    from smedjan_common.run.folder import read_config
    from smedjan_common.training.config import TrainConfig

    found, broken = _checkpoints(path, verify)
    config = read_config(path) or (_as_config(found[-1].path) if found else {})
    rows = read_rows(path)
    trained, checks = train_rows(rows), eval_rows(rows)
    train = TrainConfig.from_dict(config["train"]) if "train" in config else None
    steps = train.steps if train else None
    step = max([found[-1].step if found else 0, rows[-1]["step"] if rows else 0])
    return {
        "kind": "run folder",
        "path": str(path),
        "step": step,
        "steps": steps,
        "finished": (path / FINAL).is_dir() and steps is not None and step >= steps,
        **(_model(ModelConfig.from_dict(config["model"]), train) if "model" in config else {}),
        **_adapters_of(found, path),
        "training": config.get("train"),
        "dataset": config.get("dataset"),
        "tokenizer_hash": config.get("tokenizer_hash"),
        "chat_template": _chat_template(found[-1].path if found else path / FINAL),
        "made_of": _made_of(load_info(found[-1].path).extra or {}) if found else None,
        "initial_values": config.get("initial_values"),
        "first": trained[0] if trained else None,
        "last": trained[-1] if trained else None,
        "validation": checks[-1] if checks else None,
        "checkpoints": [checkpoint.path.name for checkpoint in found],
        "broken": broken or None,
        "written_by": config.get("framework"),
        "verified": not broken if verify else None,
    }


def _made_of(extra: Facts) -> str | None:
    """The models that a checkpoint, or the run that wrote it, was made of; None of one that began from initial values."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # whatever a file says
        began, averaged = extra.get("pretrained"), extra.get("averaged")
        merge, grow = extra.get("merge"), extra.get("grow")
        parts = [f"{merge['method']} merge of {', '.join(_place(model) for model in merge['models'])}"] if merge else []
        parts += [f"grown from {_place(grow['of'])}"] if grow else []
        parts += [f"the moving average of its weights, --ema {averaged:g}"] if averaged else []
        parts += [f"began with {_place(began)}" + (f", {before}" if (before := _made_of(began)) else "")] if began else []
        return "; ".join(parts) or None
    return None


def _place(model: Facts) -> str:
    return f"{model['path']} (step {model['step']:,})" if model.get("step") else str(model["path"])


def _as_config(checkpoint: Path) -> Facts:
    """What config.json of a run would say, from one of its checkpoints: it may have been removed."""
    from smedjan_common.checkpoint.load import load_info

    info = load_info(checkpoint)
    facts = {"dataset": info.dataset, "tokenizer_hash": info.tokenizer_hash, "framework": info.framework, "model": info.model.to_dict()}
    return facts | ({"train": info.train.to_dict()} if info.train else {})


def _checkpoints(path: Path, verify: bool) -> "tuple[list[Found], list[str]]":
    """The step checkpoints of a run that are good, and a sentence for each that is broken, final/ among them."""
    from smedjan_common.checkpoint import find_checkpoints, verify_checkpoint
    from smedjan_common.checkpoint.load import load_info
    from smedjan_common.files.atomic_directory import standing

    broken: list[str] = []

    def good(place: Path) -> bool:
        try:
            verify_checkpoint(place) if verify else load_info(place)
        except CheckpointError as error:
            broken.append(f"{error.what} {error.why}".strip())
            return False
        return True

    found = [checkpoint for checkpoint in find_checkpoints(path, on_skip=broken.append) if good(checkpoint.path)]
    final = standing(path / FINAL)
    if final.is_dir():
        good(final)
    return found, broken


def _runs(path: Path, verify: bool) -> Facts:
    from smedjan_common.run.summary import runs_in, summary

    if verify:
        raise DataError(
            f"{path} is a folder of runs.", "--verify is for one run or checkpoint.", f"Try smedjan info {runs_in(path)[0]} --verify."
        )
    return {"kind": RUNS, "path": str(path), "runs": [summary(run) for run in runs_in(path)]}


def _holds_runs(path: Path) -> bool:
    from smedjan_common.run.summary import runs_in

    return path.is_dir() and bool(runs_in(path))


def _token_file(path: Path, verify: bool) -> Facts:
    from smedjan_common.data.token_file import TokenFile

    file = TokenFile.open(path)
    if verify:
        file.verify()
    manifest = file.manifest
    return {
        "kind": "token file",
        "path": str(path),
        "tokens": file.num_tokens,
        "documents": manifest.get("documents"),
        "text_bytes": file.num_bytes,
        "bytes_per_token": round(file.num_bytes / file.num_tokens, 3) if file.num_bytes and file.num_tokens else None,
        "vocab_size": file.vocab_size,
        "dtype": manifest.get("dtype"),
        "tokenizer_hash": file.tokenizer_hash,
        "sha256": file.hash,
        "sources": len(manifest.get("sources") or []) or None,
        "verified": True if verify else None,
    }


def _tokenizer(path: Path, verify: bool) -> Facts:
    from smedjan_common.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    return {
        "kind": "tokenizer",
        "path": str(path),
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": tokenizer.special_tokens,
        "pattern": tokenizer.pattern,
        "tokenizer_hash": tokenizer.hash,
    }


def _chat_template(folder: Path) -> str | None:
    """chatml, jinja (a template of its own), none: a base model; or why it cannot be read. None where there is no tokenizer."""
    from smedjan_common.tokenizer.chat import template_name

    try:
        return template_name(folder)
    except TemplateError as error:
        return f"cannot be used: {error.why}"


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file() or path.name == MANIFEST


def _is_run(path: Path) -> bool:
    files = (METRICS, f"step-*/{MANIFEST}", f"orbax-*/{MANIFEST}", f"{FINAL}/{MANIFEST}")
    if not path.is_dir() or any(any(path.glob(file)) for file in files):
        return path.is_dir()
    from smedjan_common.run.folder import read_config

    return {"model", "train"} <= (read_config(path) or {}).keys()


def _is_quantized(path: Path) -> bool:
    from smedjan_common.checkpoint.read import is_quantized

    return is_quantized(path)


def _quantized(path: Path, verify: bool) -> Facts:
    """verify: every array is read, which tells those that are not finite; there are no hashes."""
    from smedjan_common.inference.open import Foreign, open_model
    from smedjan_common.model.quantization import GROUP, bits_of, names, quantized_names

    info, tokenizer = open_model(path)
    assert isinstance(info, Foreign)
    if verify:
        info.read()
    shapes = {name: info.weights[name].shape for name in info.weights}
    weights = quantized_names(info.weights)
    widths = {bits_of(shapes[name], shapes[names(name).scales]) for name in weights}
    return {
        "kind": "quantised model, to infer with",
        "path": str(path),
        "format": info.format,
        "bits": " and ".join(map(str, sorted(widths))),
        "group": GROUP,
        "quantised": f"{len(weights)} weights",
        **_model(info.model),
        "tokenizer_hash": tokenizer.hash,
        "chat_template": _chat_template(path),
        "bytes": sum(tensor.nbytes for tensor in info.weights.values()),
        "verified": True if verify else None,
    }


def _foreign(path: Path, verify: bool) -> Facts:
    """A model of Hugging Face's form. No weight is read."""
    from smedjan_common.inference.open import Foreign, open_model

    if not any(path.glob("*.safetensors")):
        raise DataError(
            f"{path} has a config.json that does not describe a run.",
            "That of a run has model and train, and a Hugging Face directory has *.safetensors beside it.",
            "Give a run, a checkpoint, or a directory with its weights.",
        )
    if verify:
        what = "A Hugging Face directory keeps no hashes of its files."
        raise DataError(f"{path} cannot be verified.", what, "Leave --verify out.")
    info, tokenizer = open_model(path)
    return {
        "kind": "Hugging Face directory, quantised" if isinstance(info, Foreign) and info.format != "hf" else "Hugging Face directory",
        "path": str(path),
        **_model(info.model),
        "tokenizer_hash": tokenizer.hash,
        "chat_template": _chat_template(path),
        "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
    }


KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path, bool], Facts]], ...] = (
    (_is_checkpoint, lambda path, verify: _checkpoint(path if path.is_dir() else path.parent, verify)),
    (_is_run, _run),
    (_holds_runs, _runs),
    (_is_quantized, _quantized),
    (lambda path: (path / CONFIG).is_file(), _foreign),
    (lambda path: path.suffix == ".bin", _token_file),
    (lambda path: path.suffix == ".json" or (path / TOKENIZER).is_file(), _tokenizer),
)


def _adapters_of(found: "list[Found]", run: Path) -> Facts:
    """Of a run: what its newest checkpoint says."""
    from smedjan_common.checkpoint import read_info

    try:
        info = read_info(found[-1].path if found else run)
    except CheckpointError:
        return {}
    return _adapters(info.model, info.adapter) if info.adapter else {}


def _adapters(model: Any, record: Any) -> Facts:
    """What a checkpoint of adapters holds, and where the weights are that they belong to."""
    from smedjan_common.model.adapters import adapter_table

    adapters = record.adapters
    trained = sum(spec.size for spec in adapter_table(model, adapters).values())
    facts = {"parameters": trained, "rank": adapters.rank, "alpha": adapters.alpha, "targets": " ".join(adapters.targets)}
    if adapters.tokens:
        facts["new_tokens"] = adapters.tokens
    return {"adapters": facts, "base": {"path": record.base.path, "sha256": record.base.sha256}}


def _model(model: Any, train: Any = None) -> Facts:
    """FLOPs (training: forward and backward) and decode state (one sequence) at the model's context; train None: not known, float32."""
    from smedjan_common.inference.memory import state_bytes
    from smedjan_common.model.flops import active_params, train_flops_per_token
    from smedjan_common.training.precision import compute_dtype

    active, context, dtype = active_params(model), model.context_length, compute_dtype(train.dtype if train else "float32")
    routed = {"active_parameters": active} if active != model.num_params() else {}
    return {
        "parameters": model.num_params(),
        **routed,
        "train_flops_per_token": train_flops_per_token(model, context, adapters=train.adapters if train else None),
        "decode_state_bytes": state_bytes(model, 1, context, dtype),
        "decode_state_dtype": dtype,
        "model": model.to_dict(),
    }
