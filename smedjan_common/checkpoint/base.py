"""The base of a checkpoint of adapters: where it is found, and the whole model that both make."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smedjan_common.checkpoint.adapter import AdapterRecord
from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.checkpoint.load import faults, foreign, load_info
from smedjan_common.checkpoint.manifest import FORMAT, MANIFEST, OPTIMIZER, TOKENIZER, WEIGHTS, CheckpointInfo
from smedjan_common.checkpoint.new_rows import grown_rows, with_new_rows
from smedjan_common.checkpoint.tensors import check_tensors, stored
from smedjan_common.errors import CheckpointError
from smedjan_common.files.atomic_directory import standing
from smedjan_common.files.names import FINAL
from smedjan_common.model.adapters import LORA_A, LORA_B, Adapters, adapted_maps, merged_matrix, row_names
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import parameter_table
from smedjan_common.training.optimizers import EMA

AVERAGED = "averaged"  # in final/'s "extra": the decay of the moving average that its weights are


def weights_hash(info: CheckpointInfo) -> str:
    """SHA-256 of a checkpoint's weights: of their file, or of the hashes of all files that a backend wrote. They are compared with the
    files when these are read."""
    if info.format == FORMAT:
        return info.files[WEIGHTS].sha256
    lines = "".join(f"{name} {record.sha256}\n" for name, record in sorted(info.files.items()) if name != TOKENIZER)
    return hashlib.sha256(lines.encode()).hexdigest()


def find_base(info: CheckpointInfo) -> CheckpointInfo:
    """The checkpoint whose weights the adapters of `info` belong to, which is where it was, or beside the run as it was, or whose final/
    has the same weights. Raises CheckpointError, with the place, where it is missing or another one now."""
    record = info.adapter
    assert record
    others = []
    for path in _places(info, record):
        if not (standing(path) / MANIFEST).is_file():
            continue
        found = load_info(standing(path))
        if weights_hash(found) == record.base.sha256:
            return found
        others.append(found.path)
    if others:
        raise CheckpointError(
            f"{others[0]} has other weights than those that the adapters of {info.path} were trained beside.",
            f"The SHA-256 of its weights was {record.base.sha256[:16]}…; it is {weights_hash(load_info(others[0]))[:16]}… now.",
            "Restore it from a copy: adapters mean nothing without their base.",
        )
    raise CheckpointError(
        f"The base of {info.path} is missing.",
        f"It holds adapters only, and the weights that they belong to were in {record.base.path}.",
        "Put them back there (a link will do), or move them beside the run as they were.",
    )


def _places(info: CheckpointInfo, record: AdapterRecord) -> Iterator[Path]:
    """Where the base may be. Of a run, older steps are removed when it goes on, and final/ may hold the same weights."""
    for path in dict.fromkeys((Path(record.base.path), info.path.absolute().parent / record.base.beside)):
        yield path
        yield path.parent / FINAL


def grown_base(model: ModelConfig, adapters: Adapters, base: dict[str, Any]) -> dict[str, Any]:
    """The frozen weights of a run: those of the base, with rows for the tokens that its tokenizer has gained."""
    return with_new_rows(base, model, *adapters.new_rows) if adapters.tokens else base


def with_bases(info: CheckpointInfo) -> list[CheckpointInfo]:
    """A checkpoint, and where it holds adapters their base, which may hold adapters itself. Raises CheckpointError."""
    found = [info]
    while found[-1].adapter:
        found.append(find_base(found[-1]))
    return found


def lazy_weights(info: CheckpointInfo, averaged: bool = False) -> dict[str, Lazy]:
    """The parameters of the model, none read yet; of adapters those that they make with their base, a matrix when it is asked for.

    averaged: of those that have averages (--ema) these, from the arrays of the optimizer.
    Sizes and headers are checked here, hashes are not. Raises CheckpointError, also for a backend's own checkpoint.
    """
    if info.format != FORMAT:
        raise foreign(info)
    with faults(info.path):
        found: dict[str, Lazy] = stored(info.path / WEIGHTS, info.files[WEIGHTS], info.weights)
        if averaged:
            kept, mark = stored(info.path / OPTIMIZER, info.files[OPTIMIZER], info.slots), f"{EMA}."
            found |= {name.removeprefix(mark): lazy for name, lazy in kept.items() if name.startswith(mark)}
    return _lazily_merged(info.model, info.adapter.adapters, lazy_weights(find_base(info)), found) if info.adapter else found


def keeps_averages(info: CheckpointInfo) -> bool:
    """Whether a step checkpoint keeps averages of its weights (--ema) beside them; False where its weights are the averages, as in final/.

    Raises CheckpointError where there are none, or where only a backend can read them.
    """
    if (info.extra or {}).get(AVERAGED):
        return False
    if not info.optimizer or not info.train or not info.train.ema:
        raise no_averages(info.path)
    if info.format != FORMAT:
        raise foreign(info)
    return True


def no_averages(path: Path) -> CheckpointError:
    """The refusal of weights beside which there are no averages."""
    why = "They are in the step checkpoints of a run that was trained with --ema."
    fix = "Give such a run or checkpoint, or leave --ema out; final/ of such a run is its average."
    return CheckpointError(f"{path} keeps no averages of its weights.", why, fix)


def verify_weights(info: CheckpointInfo, averaged: bool = False) -> None:
    """Compare every byte of the weights with their hash, of adapters those of their base too. averaged: and of the averages. Raises
    CheckpointError."""
    for each in with_bases(info):
        with faults(each.path):
            for name in (WEIGHTS, OPTIMIZER) if averaged and each is info else (WEIGHTS,):
                check_tensors(each.path / name, each.files[name], each.tensors[name])


def read_averages(info: CheckpointInfo) -> dict[str, np.ndarray]:
    """The parameters of the model, those of which a step checkpoint keeps averages as these; hashes are compared first. Raises
    CheckpointError."""
    verify_weights(info, averaged=True)
    return {name: lazy.read() for name, lazy in lazy_weights(info, averaged=True).items()}


def _lazily_merged(model: ModelConfig, adapters: Adapters, base: dict[str, Lazy], small: dict[str, Lazy]) -> dict[str, Lazy]:
    whole = {name: base[name] for name in parameter_table(model)}

    def matrix(path: str, weight: Lazy) -> Lazy:
        parts = small[f"{path}.{LORA_A}"], small[f"{path}.{LORA_B}"]
        return weight.then(lambda array: merged_matrix(adapters, array, *(part.read() for part in parts)), np.float32)

    def table(old: Lazy, rows: Lazy) -> Lazy:
        def grow(array: np.ndarray) -> np.ndarray:
            grown = grown_rows(array, model, *adapters.new_rows)
            grown[slice(*adapters.new_rows)] = rows.read()
            return grown

        return old.then(grow, np.float32, (model.padded_vocab_size, model.dim))

    for path, spec in adapted_maps(model, adapters).items():
        whole[spec.name] = matrix(path, base[spec.name])
    for rows, name in row_names(model).items() if adapters.tokens else ():
        whole[name] = table(base[name], small[rows])
    return whole
