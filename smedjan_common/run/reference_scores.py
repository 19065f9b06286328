"""What the reference of `smedjan dpo` gives to the answers: the log-probability of each, computed once, before the first step.

    CHECKPOINT_DIR/data/reference-KEY.npy    float32 [documents of the token file]

KEY is a hash of the weights of the reference, the token file and its tokenizer, and of what the forward pass depends on. The figures come
from the forward pass of training itself, rows packed as a step packs them, so that a policy that begins as the reference begins with a
loss of ln 2. They are data from then on: checkpoints and config.json say which file a run has, and a run that goes on reads it and never
computes it from weights that have moved. A pass that was stopped goes on at its next batch.

Of several hosts all compute, each its rows of every batch; host 0 keeps what comes out, the others read it, and all have the same hash.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from smedjan_common.backend import Backend
from smedjan_common.checkpoint import CheckpointInfo, check_readable, newest, read_weights, weights_hash
from smedjan_common.checkpoint.new_rows import with_new_rows
from smedjan_common.checkpoint.pulled import checkpoint_here
from smedjan_common.data.packing import PackedPairs
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import CheckpointError
from smedjan_common.files.atomic_file import atomic_file
from smedjan_common.files.hashing import file_hash
from smedjan_common.files.names import DATA
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.rope import original_length
from smedjan_common.reporting.console import count, say
from smedjan_common.reporting.progress import progress_bar
from smedjan_common.run.decided import Decided
from smedjan_common.run.folder import NO_SCORES, REFERENCE, ReferenceScores
from smedjan_common.run.hosts import ALONE, Hosts
from smedjan_common.run.recorded import NO_REFERENCE
from smedjan_common.run.start import GoOn
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.growing import extends
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.mesh import MeshShape
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.preferences import document_sums

_FORWARD = ("dtype", "seq_len", "batch_size", "grad_accum", "attention", "kernels", "chunk_size", "deterministic")

MakeBackend = Callable[[ModelConfig, TrainConfig, MeshShape | None], Backend]
Record = dict[str, Any]  # {"path", "weights": a hash, "files": {hash of a token file: {"name", "sha256"}}}; path None: no reference


def reference_scores(decided: Decided, make_backend: MakeBackend, hosts: Hosts = ALONE) -> ReferenceScores:
    """Those of a run, read or computed. Raises CheckpointError where the reference is another than the run has had, or is gone,
    ConfigError where hosts have others."""
    if not OBJECTIVES[decided.train.objective].needs_reference:
        return NO_SCORES
    assert decided.data
    assert isinstance(decided.data.train, TokenFile)
    record = _record(decided)
    hosts.check_same({"the weights of the reference": record["weights"]})
    if record["path"] is None:
        return ReferenceScores(record=record)
    files = [decided.data.train, *([decided.data.val] if decided.data.val else [])]
    found = [_of_file(decided, record, file, make_backend, hosts) for file in files]
    hosts.check_same({"the log-probabilities of the reference": [record["files"][file.hash]["sha256"] for file in files]})
    return ReferenceScores(found[0], found[1] if decided.data.val else None, record)


def check_reference(decided: Decided) -> None:
    """Raises CheckpointError for a reference that a run cannot have, before anything is computed."""
    if OBJECTIVES[decided.train.objective].needs_reference and decided.data and decided.data.tokenizer:
        record = _record(decided)
        if record["path"] and not isinstance(decided.begin, GoOn):
            _check_tokenizer(newest(record["path"]), decided.data.tokenizer)


def _record(decided: Decided) -> Record:
    """What the run compares with: by its checkpoint, else by --reference, else the weights that it begins with."""
    asked = decided.asked.pairs.reference if decided.asked.pairs else None
    if not isinstance(begin := decided.begin, GoOn):
        assert decided.pretrained
        if (REFERENCE, asked) == NO_REFERENCE:
            return {"path": None, "weights": None, "files": {}}
        info = newest(checkpoint_here(asked)) if asked else decided.pretrained
        return {"path": str(info.path.resolve()), "weights": _hash(info), "files": {}}
    known = (begin.info.extra or {}).get(REFERENCE) or begin.recorded.get(REFERENCE)
    if not _is_record(known):
        what = f"{begin.info.path} does not say which reference it compares with."
        raise CheckpointError(what, "It is damaged, or was edited.", "Go on from another checkpoint of the run: --resume PATH.")
    record: Record = dict(known)
    if asked and decided.asked.is_given(REFERENCE):
        info = None if (REFERENCE, asked) == NO_REFERENCE else newest(checkpoint_here(asked))
        if (_hash(info) if info else None) != record["weights"]:
            what = f"--reference {asked} is not what the run compares with."
            raise CheckpointError(what, f"It began with {record['path'] or 'none'}, and goes on with it.", "Leave --reference out.")
        record["path"] = str(info.path.resolve()) if info else None  # moved, say
    return {**record, "files": dict(record["files"])}


def _is_record(known: Any) -> TypeGuard[Record]:
    return isinstance(known, dict) and {"path", "weights", "files"} <= known.keys() and isinstance(known["files"], dict)


def _hash(info: CheckpointInfo) -> str:
    """Of the weights of a checkpoint; of adapters, of those and of their base."""
    if not info.adapter:
        return weights_hash(info)
    return hashlib.sha256(f"{weights_hash(info)} {info.adapter.base.sha256}".encode()).hexdigest()


def _of_file(decided: Decided, record: Record, file: TokenFile, make_backend: MakeBackend, hosts: Hosts) -> np.ndarray:
    """The scores of a token file; where they had to be computed, `record` is told."""
    folder = decided.folder / DATA
    known = record["files"].get(file.hash)
    place = folder / f"reference-{_key(decided, record, file)}.npy"
    scores = hosts.in_turn(lambda: _kept(decided, known, file) if known else _read(place, file), folder)
    if not hosts.tell("reference", scores is not None):
        if known:
            say(f"note: {folder / known['name']} is gone or was changed; the reference gives its log-probabilities again.")
        scores = _compute(decided, record, file, place, make_backend, hosts)
    elif scores is None:
        what = f"Host {hosts.index} does not find in {folder} what host 0 does: the log-probabilities of the reference."
        raise CheckpointError(
            what, "It sees another folder, or an older state of it.", "Give all hosts one --checkpoint-dir that they share."
        )
    elif known:
        return scores
    record["files"][file.hash] = {"name": place.name, "sha256": file_hash(place)}
    return scores


def _kept(decided: Decided, known: dict[str, str], file: TokenFile) -> np.ndarray | None:
    """What the run has, also where it goes on in another folder; None where it is not what it was."""
    name, own = Path(known["name"]).name, decided.folder / DATA
    folders = [own, *([decided.begin.folder / DATA] if isinstance(decided.begin, GoOn) else [])]
    for folder in folders:
        place = folder / name
        if place.is_file() and file_hash(place) == known["sha256"]:
            if folder != own and not decided.asked.value("dry_run"):
                own.mkdir(parents=True, exist_ok=True)
                with atomic_file(own / name) as copy, open(place, "rb") as original:
                    shutil.copyfileobj(original, copy)
            return _read(place, file)
    return None


def _key(decided: Decided, record: Record, file: TokenFile) -> str:
    train = decided.train
    known = [record["weights"], file.hash, file.tokenizer_hash, decided.backend, {name: getattr(train, name) for name in _FORWARD}]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _read(place: Path, file: TokenFile) -> np.ndarray | None:
    """The scores in `place`; None where there are none of this file."""
    assert file.documents is not None
    try:
        scores = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = scores.dtype == np.float32 and scores.shape == file.documents.shape and bool(np.isfinite(scores).all())
    return scores if whole else None


def _compute(decided: Decided, record: Record, file: TokenFile, place: Path, make_backend: MakeBackend, hosts: Hosts) -> np.ndarray:
    """The scores by the forward pass of training, written to `place`."""
    losses = _losses(decided, record, make_backend)
    cut, train = PackedPairs(file, decided.train.seq_len), decided.train
    size, begun = train.batch_size // train.grad_accum, np.arange(cut.num_windows)
    with _going_on(place, 2 * cut.num_pairs, hosts) as scores, _bar(hosts) as show:
        done = np.array([bool(np.isfinite(scores[numbers[numbers >= 0]]).all()) for numbers in cut.numbers(begun)])
        missing = begun[~_as_on_first(done, hosts)]
        said = f", {done.sum()} of {len(done)} rows done before" if done.any() else ""
        say(f"The reference, {record['path']}, gives log-probabilities to {count(2 * cut.num_pairs)} answers{said}.")
        for first in range(0, len(missing), size):
            rows = missing[first : first + size]
            full = np.append(rows, np.full(size - len(rows), rows[0]))
            numbers, (inputs, targets), documents = cut.numbers(full), cut.read(full), cut.documents(full)
            sums = -document_sums(np, losses(inputs, targets, documents), documents, numbers.shape[1])
            scores[numbers[numbers >= 0]] = sums[numbers >= 0]
            show("reference", min(first + size, len(missing)), len(missing))
        whole = np.array(scores)
    kept = hosts.in_turn(lambda: _keep(whole, record, place) if hosts.first else _read(place, file), place.parent)
    if kept is None:
        raise CheckpointError(f"{place} cannot be read.", "Host 0 has just written it.", "Look at the file system that the hosts share.")
    return kept


def _keep(whole: np.ndarray, record: Record, place: Path) -> np.ndarray:
    """The scores, whole, written to `place`; what was kept of a pass that is not complete is removed."""
    if not np.isfinite(whole).all():
        what = f"The reference, {record['path']}, gives an answer a log-probability that is no number."
        raise CheckpointError(what, "Its weights are not finite, or its computation overflows.", "Take another, or --dtype float32.")
    with atomic_file(place) as out:
        np.save(out, whole, allow_pickle=False)
    _part(place).unlink(missing_ok=True)
    return whole


def _bar(hosts: Hosts) -> contextlib.AbstractContextManager[Callable[[str, int, int], None]]:
    """What shows how far a pass is: nothing on hosts that do not speak."""
    return progress_bar("steps") if hosts.first else contextlib.nullcontext(lambda stage, done, total: None)


def _as_on_first(done: np.ndarray, hosts: Hosts) -> np.ndarray:
    """The bools of host 0, in few words."""
    told = bytes.fromhex(hosts.tell("rows of the reference", np.packbits(done).tobytes().hex()))
    return np.unpackbits(np.frombuffer(told, np.uint8), count=len(done)).astype(bool)


@contextlib.contextmanager
def _going_on(place: Path, documents: int, hosts: Hosts) -> Iterator[np.ndarray]:
    """float32 [documents] beside `place` that outlives the process; NaN: not known yet. Host 0 alone keeps them."""
    if not hosts.first:
        yield np.full(documents, np.nan, np.float32)
        return
    part = _part(place)
    if not part.is_file() or part.stat().st_size != 4 * documents:
        with atomic_file(part) as file:
            file.write(np.full(documents, np.nan, np.float32).tobytes())
    scores = np.memmap(part, np.float32, "r+", shape=(documents,))
    try:
        yield scores
    finally:
        scores.flush()


def _part(place: Path) -> Path:
    return place.with_suffix(".part")


def _losses(decided: Decided, record: Record, make_backend: MakeBackend) -> Callable[..., np.ndarray]:
    """What gives the losses of tokens by the weights of the reference, which are on the device as long as it is held."""
    assert decided.data
    tokenizer = decided.data.tokenizer
    assert tokenizer
    try:
        info = newest(record["path"])
    except CheckpointError as error:
        raise _gone(record, error.what) from error
    if _hash(info) != record["weights"]:
        raise _gone(record, "It has other weights now.")
    check_readable(info, decided.backend)
    seen = _check_tokenizer(info, tokenizer)
    size = max(info.model.vocab_size, tokenizer.vocab_size)
    model = dataclasses.replace(info.model, context_length=decided.train.seq_len, vocab_size=size)
    if model.rope_scaling != "none":
        model = dataclasses.replace(model, rope_original_len=original_length(info.model))
    backend = make_backend(model, decided.train.of_whole_model(), decided.mesh)
    params = read_weights(info, backend.own, on_host=seen < tokenizer.vocab_size)
    if seen < tokenizer.vocab_size:
        params = with_new_rows(params, model, seen, tokenizer.vocab_size)
    placed = backend.place(params)
    return lambda *batch: backend.token_losses(placed, *batch)


def _gone(record: Record, why: str) -> CheckpointError:
    what = f"The reference, {record['path']}, is needed again: the log-probabilities of some answers are not kept."
    return CheckpointError(what, why, "Bring it back, name it where it is now (--reference PATH), or restore data/ of the run from a copy.")


def _check_tokenizer(info: CheckpointInfo, tokenizer: Tokenizer) -> int:
    """How many tokens of the tokenizer the weights know. Raises CheckpointError for weights of another one."""
    if info.tokenizer_hash == tokenizer.hash:
        return tokenizer.vocab_size
    own = Tokenizer.load(info.path)
    if not extends(tokenizer, own):
        what, why = f"The reference {info.path} has another tokenizer.", "It would give log-probabilities to other texts."
        raise CheckpointError(what, why, "Take one of the same tokenizer: the model that the run begins with, say.")
    return own.vocab_size
