"""Adapters (LoRA) in the directories of PEFT and of mlx-lm: y = W x + s B (A x) there too, beside a model that `convert … --to hf` writes.

    peft      adapter_model.safetensors: base_model.model.NAME.lora_A.weight [r, in], lora_B.weight [out, r]; s = alpha / r
    mlx-lm    adapters.safetensors: NAME.lora_a [in, r], lora_b [r, out]; s stands in adapter_config.json, as alpha and r do

NAME is what the family of the base calls the linear map (families.py). What its layout joins, such as Phi-3's q, k and v, has no
adapter of its own there, and is refused by name; rows that it reorders are reordered in B. What is read becomes a checkpoint of adapters
beside a base that is smedjan's own (`--base`).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.families import FAMILIES, family_of
from convert.json_file import read_json, write_json
from convert.portable import Lazy, cast, check_equal
from convert.safetensors_file import open_tensors, write_tensors
from convert.ties import Tie
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import (
    ADAPTER,
    FORMAT,
    About,
    AdapterRecord,
    BaseWeights,
    CheckpointInfo,
    SavedTokenizer,
    newest,
    verify_checkpoint,
    weights_hash,
    write_checkpoint,
)
from smedjan_common.checkpoint.load import step_of
from smedjan_common.checkpoint.tensors import stored
from smedjan_common.errors import CheckpointError, ConfigError, some
from smedjan_common.files.atomic_directory import atomic_directory
from smedjan_common.files.names import FINAL, TOKENIZER, WEIGHTS
from smedjan_common.model.adapters import LORA_A, LORA_B, Adapters, adapted_maps, linear_maps
from smedjan_common.model.config import ModelConfig
from smedjan_common.tokenizer import Tokenizer

CONFIG = "adapter_config.json"
_PEFT = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
_MLX = re.compile(r"(.+)\.lora_(a|b)")
# what would change the model, and has no place beside A and B
_REFUSED = ("use_dora", "modules_to_save", "lora_bias", "layer_replication", "trainable_token_indices", "alora_invocation_tokens")


class Pair(NamedTuple):
    """What a linear map has in such a directory: A [r, in], B [out, r], and its scale."""

    low: Lazy
    high: Lazy
    scale: float


class Kind(NamedTuple):
    """A row. weights: the file beside adapter_config.json. read(path, config): the pairs by the names of the linear maps; write(path,
    pairs, base, dtype): all of the directory."""

    name: str
    about: str
    weights: str
    read: Callable[[Path, dict[str, Any]], dict[str, Pair]]
    write: Callable[[Path, Mapping[str, Pair], str, np.dtype, ModelConfig], None]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the files."""
        return CONFIG, self.weights

    def detect(self, path: Path) -> bool:
        """Whether a directory is of this kind."""
        return all((path / name).is_file() for name in self.parts)


def found(path: Path) -> Kind | None:
    """What kind of adapters a directory holds."""
    return next((kind for kind in KINDS.values() if kind.detect(path)), None)


def export(info: CheckpointInfo, kind: Kind, target: Path, dtype: np.dtype) -> None:
    """Write the adapters of a checkpoint. Raises ConfigError for those that such a directory cannot hold, CheckpointError."""
    if not (record := info.adapter):
        what, why = f"{info.path} holds a whole model.", f"--to {kind.name} writes adapters alone, as smedjan sft --lora-rank trains them."
        raise ConfigError(what, why, "Take --to hf.")
    if record.adapters.tokens:
        what = f"{info.path} has rows of {record.adapters.tokens} new tokens, which --to {kind.name} cannot hold."
        raise ConfigError(what, "They are no adapters, but a part of the embedding.", "Take --to hf, which writes the merged model.")
    verify_checkpoint(info.path)
    ties, tensors = _ties(info.model), stored(info.path / WEIGHTS, info.files[WEIGHTS], info.weights)
    pairs = {}
    for path, spec in adapted_maps(info.model, record.adapters).items():
        if not (tie := ties.get(spec.name)):
            why = "The architecture that holds this model joins or changes that matrix, and an adapter of a part of one is not known there."
            raise ConfigError(
                f"The adapter of {path} has no place in --to {kind.name}.", why, "Take --to hf, which writes the merged model."
            )
        name, low, high = tie.theirs[0].removesuffix(".weight"), tensors[f"{path}.{LORA_A}"], tensors[f"{path}.{LORA_B}"]
        pairs[name] = Pair(low, high.then(lambda array, tie=tie: tie.out([array])[0]), record.adapters.scale)
    with atomic_directory(target) as temporary:
        kind.write(temporary, pairs, _name_of(Path(record.base.path)), dtype, info.model)
        again = kind.read(temporary, read_json(temporary / CONFIG))
        check_equal(str(target), _flat(again), {name: cast(name, each, dtype) for name, each in _flat(pairs).items()})


def import_into(path: Path, kind: Kind, base: Path, target: Path) -> int:
    """Write a checkpoint of adapters beside `base`, which is smedjan's own; how many linear maps have some.

    Raises CheckpointError for adapters that are not of this model or are more than A and B.
    """
    info = newest(base)
    if info.format != FORMAT:
        raise CheckpointError(f"{info.path} is not neutral.", "Adapters belong to weights that every backend reads.", "Convert it first.")
    pairs, ties = (
        kind.read(path, read_json(path / CONFIG)),
        {tie.theirs[0].removesuffix(".weight"): tie for tie in _ties(info.model).values()},
    )
    if odd := sorted(pairs.keys() - ties.keys()):
        what = f"{path} adapts {some(odd)}, which {info.path} has not, or not as a linear map by itself."
        raise CheckpointError(what, "They are adapters of another model.", "Give the model that they were trained beside: --base PATH.")
    if not pairs:
        raise CheckpointError(f"{path} has no adapters.", "Its file holds no pair of A and B.", "Download it again.")
    ours = {ties[name].ours[0].removesuffix(".weight"): (ties[name], pair) for name, pair in pairs.items()}
    rank, scale = max(pair.low.shape[0] for _, pair in ours.values()), next(iter(ours.values()))[1].scale
    adapters = Adapters(rank, scale * rank, _targets(info.model, ours))
    tensors = {}
    for name, (tie, pair) in ours.items():
        shape = linear_maps(info.model)[name].shape
        if (pair.high.shape[0], pair.low.shape[1]) != shape:
            what = f"The adapter of {name} is of a map [{pair.high.shape[0]}, {pair.low.shape[1]}]; that of {info.path} is {list(shape)}."
            raise CheckpointError(what, "They are adapters of another model.", "Give the model that they were trained beside: --base PATH.")
        tensors[f"{name}.{LORA_A}"] = _padded(pair.low.read(), (rank, shape[1]))
        high = np.asarray(tie.back([pair.high.read().astype(np.float32)])[0]) * np.float32(pair.scale / scale)
        tensors[f"{name}.{LORA_B}"] = _padded(high, (shape[0], rank))
    place = target.parent.resolve() / target.name
    record = AdapterRecord(adapters, BaseWeights.at(info.path, place.parent, weights_hash(info)))
    extra = {ADAPTER: record.to_json(), "converted_from": {"format": kind.name}}
    tokenizer = SavedTokenizer.of(Tokenizer.load(info.path / TOKENIZER)) if TOKENIZER in info.files else None
    about = About(model=info.model, tokenizer=tokenizer, framework={"name": "convert"}, extra=extra)
    verify_checkpoint(write_checkpoint(target.parent, Snapshot(0, tensors, {}), about, name=target.name))
    return len(ours)


def _name_of(base: Path) -> str:
    """Of the run that the base is of; where it is as a directory of others, who loads the adapters says."""
    return base.parent.name if base.name == FINAL or step_of(base.name) is not None else base.name


def _ties(model: ModelConfig) -> dict[str, Tie]:
    """The layout of the family that holds a model: of matrices that are one tensor there, whose rows move whole, by our names."""
    family = FAMILIES[family_of(model, "adapters of others")]
    return {tie.ours[0]: tie for tie in family.layout(model) if tie.by_rows and len(tie.ours) == len(tie.theirs) == 1}


def _targets(model: ModelConfig, paths: Iterable[str]) -> tuple[str, ...]:
    """Targets that name these linear maps and no other: parts of paths where that is enough, else whole paths."""
    kinds = tuple(dict.fromkeys(path.split(".", 2)[2] for path in paths))
    return kinds if adapted_maps(model, Adapters(1, 1.0, kinds)).keys() == set(paths) else tuple(paths)


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A smaller rank is a larger one with zeros."""
    whole = np.zeros(shape, np.float32)
    whole[: array.shape[0], : array.shape[1]] = array
    return whole


def _flat(pairs: Mapping[str, Pair]) -> dict[str, Lazy]:
    return {f"{name} {part}": getattr(pair, part) for name, pair in pairs.items() for part in ("low", "high")}


def _pairs(path: Path, file: str, pattern: re.Pattern[str], scale: Callable[[str, int], float], turned: bool) -> dict[str, Pair]:
    """The pairs of a file. turned: both are [in, r] and [r, out] there. Raises CheckpointError for anything else in it."""
    halves: dict[str, dict[str, Lazy]] = {}
    for name, tensor in open_tensors(path / file).items():
        if not (match := pattern.fullmatch(name)) or len(tensor.shape) != 2:
            what, why = f"{path / file} has the tensor {name!r}.", "It is neither the A nor the B of a linear map."
            raise CheckpointError(what, why, "Merge such an adapter with its own program, and convert the whole model.")
        halves.setdefault(match[1], {})[match[2].lower()] = tensor.then(np.transpose, shape=tensor.shape[::-1]) if turned else tensor
    for name, both in halves.items():
        if both.keys() != {"a", "b"} or both["a"].shape[0] != both["b"].shape[1]:
            raise CheckpointError(
                f"{path / file} has no whole adapter of {name}.", "A or B is missing, or their ranks differ.", "Download it again."
            )
    return {name: Pair(both["a"], both["b"], scale(name, both["a"].shape[0])) for name, both in halves.items()}


def _read_peft(path: Path, config: dict[str, Any]) -> dict[str, Pair]:
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise CheckpointError(
            f"{path} holds adapters of the kind {config.get('peft_type')}.", "Only LORA can be read.", "Merge it with PEFT."
        )
    if odd := [name for name in _REFUSED if config.get(name)] + (["bias"] if config.get("bias", "none") != "none" else []):
        what, why = f"{path / CONFIG} has {some(odd)}.", "What is trained there is more than A and B."
        raise CheckpointError(what, why, "Merge it with PEFT, and convert the whole model.")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}

    def scale(name: str, rank: int) -> float:
        alpha, said = _of(alphas, name, config.get("lora_alpha", 8)), _of(ranks, name, config.get("r", 8))
        if said != rank:
            raise CheckpointError(f"{path} has an adapter of rank {rank} at {name}.", f"{CONFIG} says {said}.", "Download it again.")
        return _positive(path, alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    for key in {*ranks, *alphas}:
        if not re.fullmatch(r"[\w.]+", key):
            what, why = f"{path / CONFIG} has the pattern {key!r}.", "Only parts of names can be read there."
            raise CheckpointError(what, why, "Merge it with PEFT, and convert the whole model.")
    return _pairs(path, KINDS["peft"].weights, _PEFT, scale, turned=False)


def _of(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of a name."""
    return next((value for key, value in patterns.items() if f".{name}".endswith(f".{key}")), otherwise)


def _positive(path: Path, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{path / CONFIG} says a scale of {str(value)[:40]}.", "It is a positive number.", "Download it again.")
    return float(value)


def _write_peft(target: Path, pairs: Mapping[str, Pair], base: str, dtype: np.dtype, model: ModelConfig) -> None:
    rank, scale = _one(pairs)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _whole(scale * rank),
        "target_modules": _modules(pairs, [tie.theirs[0].removesuffix(".weight") for tie in _ties(model).values()]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_json(target / CONFIG, values)
    parts = {
        f"base_model.model.{name}.lora_{part}.weight": each
        for name, pair in pairs.items()
        for part, each in zip("AB", pair[:2], strict=True)
    }
    write_tensors(target / KINDS["peft"].weights, {name: cast(name, each, dtype) for name, each in parts.items()})


def _modules(pairs: Mapping[str, Pair], every: list[str]) -> list[str]:
    """What PEFT finds them by: last parts of names where these mean the same, as people write them, else whole names."""
    last = sorted({name.rsplit(".", 1)[1] for name in pairs})
    same = {name for name in every if name.rsplit(".", 1)[-1] in last} == set(pairs)
    return last if same else sorted(pairs)


def _read_mlx(path: Path, config: dict[str, Any]) -> dict[str, Pair]:
    kind, known = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind != "lora":
        raise CheckpointError(
            f"{path} is of the kind {kind}.", "Only lora can be read.", "Fuse it with mlx_lm.fuse, and convert the whole."
        )
    if "scale" not in known:
        raise CheckpointError(
            f"{path / CONFIG} has no scale.", "Without it nobody knows what the adapters add.", "Add lora_parameters.scale."
        )
    scale = _positive(path, known["scale"])
    return _pairs(path, KINDS["mlx-lm"].weights, _MLX, lambda name, rank: scale, turned=True)


def _write_mlx(target: Path, pairs: Mapping[str, Pair], base: str, dtype: np.dtype, model: ModelConfig) -> None:
    rank, scale = _one(pairs)
    keys = sorted({re.sub(r".*?\.layers\.\d+\.", "", name) for name in pairs})
    known = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    write_json(target / CONFIG, {"fine_tune_type": "lora", "model": base, "num_layers": model.layers, "lora_parameters": known})
    parts = {f"{name}.lora_{part}": each for name, pair in pairs.items() for part, each in zip("ab", pair[:2], strict=True)}
    turned = {name: cast(name, each.then(np.transpose, shape=each.shape[::-1]), dtype) for name, each in parts.items()}
    write_tensors(target / KINDS["mlx-lm"].weights, turned)


def _one(pairs: Mapping[str, Pair]) -> tuple[int, float]:
    """Rank and scale, which are the same of all that smedjan writes."""
    first = next(iter(pairs.values()))
    return first.low.shape[0], first.scale


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


KINDS: dict[str, Kind] = {
    row.name: row
    for row in (
        Kind("peft", "adapters for PEFT", "adapter_model.safetensors", _read_peft, _write_peft),
        Kind("mlx-lm", "adapters for mlx-lm", "adapters.safetensors", _read_mlx, _write_mlx),
    )
}
