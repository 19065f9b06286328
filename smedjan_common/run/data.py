"""From --dataset, --val-dataset and --tokenizer to token files and a tokenizer that belong together.

A .bin is a token file. Anything else is text or JSONL: it is tokenised once into CHECKPOINT_DIR/data/KEY/, where KEY is a hash of the
texts and of what was done with them, so the same command finds it again and other texts never mix with it.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan_common.data.mixture import BLOCK, Mixture, shares
from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError, SmedjanError, notice, some
from smedjan_common.files.hashing import file_hash
from smedjan_common.files.names import DATA, TOKENIZER, TRAIN_TOKENS, VAL_TOKENS
from smedjan_common.nearby import beside, with_suffix
from smedjan_common.reporting.console import count, say, size
from smedjan_common.run.claim import is_run
from smedjan_common.run.flags import DataFlags
from smedjan_common.text.sources import Source, find, refuse_addresses, refuse_pipes
from smedjan_common.tokenizer import Tokenizer

_TOKEN_FILE = re.compile(r"(.+\.bin)(?::(\d*\.?\d+(?:e[+-]?\d+)?))?")  # PATH.bin or PATH.bin:WEIGHT
_MOST_JSON, _MOST_JSON_BYTES = 16, 64 << 20  # that are looked at for a tokenizer
_FIXES = {  # case of an error -> what to do in `train`, which has other flags than the commands before it
    "field": "Tokenise it first, with --field in 'smedjan tokenizer' and 'smedjan prepare', and give the token file.",
    "bytes": "Convert the file, or tokenise it first, with --errors replace in 'smedjan tokenizer' and 'smedjan prepare'.",
}


@dataclass(frozen=True)
class RunData:
    """What a run trains and validates on. `train` is None only in a dry run over text that is not tokenised yet. gained: how many tokens
    the tokenizer has more than that of the weights."""

    train: TokenFile | Mixture | None
    val: TokenFile | None
    tokenizer: Tokenizer | None
    text_bytes: int = 0
    gained: int = 0


@contextlib.contextmanager
def _fixes_of_train() -> Iterator[None]:
    """Errors of texts name no flag that only the commands before training have."""
    try:
        yield
    except DataError as error:
        if error.case not in _FIXES:
            raise
        raise DataError(error.what, error.why, _FIXES[error.case]) from error


@_fixes_of_train()
def run_data(
    flags: DataFlags,
    given: frozenset[str],
    folder: Path,
    own: Tokenizer | None,
    dry_run: bool = False,
    check: Callable[[Tokenizer], None] = lambda tokenizer: None,
    before: Callable[[RunData], None] = lambda known: None,
) -> RunData:
    """Open or make the data of a run. `own`: the tokenizer of the checkpoint that the run starts from. Raises DataError.

    `check` raises for a tokenizer that the run cannot have; `before`, each time that texts are to be tokenised, for what is known of the
    data then (without a tokenizer, --vocab-size is the most that there will be). A dry run writes nothing: texts that are not tokenised
    yet are only measured.
    """
    if not flags.dataset:
        why = f"--dataset is not given, and {folder} has no run to go on with."
        fix = f"{beside(folder, there=True)} Give a text, JSONL or a token file: smedjan train FILE.".lstrip()
        raise DataError("There is nothing to train on.", why, fix)
    chosen = _chosen_tokenizer(flags, given)
    if known := chosen or own:
        check(known)  # before texts are tokenised, which may take hours
    _check_validation(flags, known)
    if shards := _token_files(flags.dataset, "--dataset"):
        files, weights = tuple(TokenFile.open(path) for path, _ in shards), tuple(weight for _, weight in shards)
        train = files[0] if len(files) == 1 else Mixture(files, weights)
        tokenizer = chosen or own or _tokenizer_beside(files[0])
        check_vocab_size(flags, given, tokenizer, f"the tokenizer of {str(files[0].path)!r}")
        val = None
    else:
        data = _from_text(flags, folder, chosen, own, dry_run, before)
        if data.train is None:
            return data
        train, val, tokenizer = data.train, data.val, data.tokenizer
    assert tokenizer is not None
    check(tokenizer)
    train.check_tokenizer(tokenizer.hash)
    if flags.val_dataset:
        known = RunData(train, None, tokenizer)
        val = _validation(flags, folder, tokenizer, dry_run, lambda: before(known))
    return RunData(train, val if val and val.num_tokens > 1 else None, tokenizer)


def check_data_flags(flags: DataFlags, given: frozenset[str]) -> None:
    """Raises DataError for a part of the texts to hold out that cannot be, or that nothing is held out of."""
    if not 0 <= flags.val_fraction < 1:
        raise DataError(f"--val-fraction is {flags.val_fraction}.", "It must be at least 0 and under 1.", "Take 0.02, say.")
    if not flags.val_fraction:
        return
    if "val_fraction" in given and flags.val_dataset:
        why = "Validation uses --val-dataset, so nothing is held out of --dataset."
        raise DataError("--val-fraction would do nothing.", why, "Give only one of the two.")
    if "val_fraction" in given and _token_files(flags.dataset, "--dataset"):
        why = "--dataset is already tokenised; a part is held out only when texts are tokenised."
        raise DataError("--val-fraction would do nothing.", why, "Leave it out, and give --val-dataset FILE.bin.")


def trains_tokenizer(flags: DataFlags) -> bool:
    """Whether a new run has no tokenizer yet, so that --vocab-size says how many tokens there will be."""
    return flags.tokenizer is None and not _token_files(flags.dataset, "--dataset")


def check_same_share(flags: DataFlags, given: frozenset[str], recorded: dict[str, Any]) -> None:
    """Raises DataError for another part to hold out in a run that goes on with the token files it has."""
    if "val_fraction" in given and flags.val_fraction != recorded.get("val_fraction"):
        why = "The run goes on with its token files, of which a part was held out when they were made."
        raise DataError("--val-fraction would do nothing.", why, "Leave it out, or give --val-dataset FILE.")


def check_vocab_size(flags: DataFlags, given: frozenset[str], tokenizer: Tokenizer, owner: str) -> None:
    """Raises DataError for a --vocab-size that is not that of the tokenizer that is there already."""
    if "vocab_size" in given and flags.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"--vocab-size {flags.vocab_size} does not fit {owner}, which has {tokenizer.vocab_size} tokens.",
            "--vocab-size is for a tokenizer that is trained.",
            "Leave it out." if owner != "--tokenizer" else "Give only one of the two.",
        )


def recorded_datasets(folder: Path, recorded: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The token files that config.json of a run names, as flags; nothing when the first is no longer there."""
    flags = {}
    for name in ("dataset", "val_dataset"):
        data = recorded.get(name) or {}
        files = data.get("files") or ([data] if data.get("path") else [])
        if files and all((folder / file["path"]).is_file() for file in files):
            flags[name] = tuple(str(folder / file["path"]) + (f":{file['weight']}" if "weight" in file else "") for file in files)
    return flags if "dataset" in flags else {}


def _chosen_tokenizer(flags: DataFlags, given: frozenset[str]) -> Tokenizer | None:
    if flags.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(flags.tokenizer)
    check_vocab_size(flags, given, tokenizer, "--tokenizer")
    return tokenizer


def _token_files(paths: tuple[str, ...], flag: str) -> list[tuple[str, float]]:
    """Token files with their weights, 1 where none is given; nothing when the paths are texts. Raises DataError for both at once and for
    weights that cannot be."""
    found = [match for path in paths if (match := _TOKEN_FILE.fullmatch(path))]
    if found and len(found) < len(paths):
        raise DataError(f"{flag} mixes token files with texts.", "Texts are tokenised first.", "Give only .bin files, or only texts.")
    files = [(match[1], float(match[2] or 1)) for match in found]
    if files:
        shares([weight for _, weight in files], BLOCK)
    if len(files) == 1 and found[0][2]:
        notice(f"the weight of {files[0][0]} does nothing: {flag} names no other file.")
    return files


def _tokenizer_beside(token_file: TokenFile) -> Tokenizer:
    """The tokenizer that the token file was made with. Raises DataError where it is not beside it."""
    if found := _find_tokenizer(token_file):
        return found[1]
    others = [str(other) for other in _other_json(token_file.path)]
    why = f"No tokenizer.json beside it{f', nor another file there ({some(others)}),' if others else ''} has its hash."
    raise DataError(f"The tokenizer of {str(token_file.path)!r} was not found.", why, "Name it with --tokenizer FILE.")


def _find_tokenizer(token_file: TokenFile) -> tuple[Path, Tokenizer] | None:
    """The tokenizer of the token file's hash: from where `prepare` leaves it, else under another name beside it."""
    path = token_file.path
    recorded = token_file.manifest.get("tokenizer")
    places = [path.parent / TOKENIZER, path.with_name(path.name + ".tokenizer.json"), path.with_suffix(".tokenizer.json")]
    places += [path.parent / recorded] if isinstance(recorded, str) else []
    for place in places:
        if place.is_file() and (tokenizer := Tokenizer.load(place)).hash == token_file.tokenizer_hash:
            return place, tokenizer
    for place in _other_json(path):
        with contextlib.suppress(SmedjanError, OSError):  # most are no tokenizers
            if (tokenizer := Tokenizer.load(place)).hash == token_file.tokenizer_hash:
                return place, tokenizer
    return None


def _other_json(path: Path) -> list[Path]:
    """Files beside a token file that may be its tokenizer under another name, a few; no manifests."""
    found = [file for file in with_suffix(path.parent, ".json") if file.name != TOKENIZER and not file.name.endswith(".bin.json")]
    return [file for file in found[:_MOST_JSON] if file.is_file() and file.stat().st_size <= _MOST_JSON_BYTES]


def _from_text(
    flags: DataFlags, folder: Path, chosen: Tokenizer | None, own: Tokenizer | None, dry_run: bool, before: Callable[[RunData], None]
) -> RunData:
    """Token files of the texts of --dataset: those made before, or new ones."""
    found = _texts(flags.dataset, "--dataset")
    sources, num_bytes = [str(source.path) for source in found], sum(source.size for source in found)
    if not num_bytes:
        raise DataError(f"{', '.join(flags.dataset)}: there is no text.", "Every file is empty.", "Give a file with some text.")
    share = 0.0 if flags.val_dataset else flags.val_fraction
    digest = _content(sources)
    makers = [chosen] if chosen else [None, own] if own else [None]  # the run's own tokenizer may have been trained on these very texts
    places = [folder / DATA / _key(digest, share, _made_by(tokenizer) if tokenizer else flags.vocab_size) for tokenizer in makers]
    for tokenizer, place in zip(makers, places, strict=True):
        if (place / TOKENIZER).is_file() and (place / f"{TRAIN_TOKENS}.json").is_file():
            val = TokenFile.open(place / VAL_TOKENS) if share and (place / VAL_TOKENS).is_file() else None
            return RunData(TokenFile.open(place / TRAIN_TOKENS), val, tokenizer or Tokenizer.load(place / TOKENIZER))
    if not (chosen or own):
        _refuse_tokenised_validation(flags)
    known = RunData(None, None, chosen or own, num_bytes)
    if dry_run:
        return known
    before(known)
    return _tokenise(sources, num_bytes, places[-1], chosen or own, flags.vocab_size, share)


def _texts(paths: tuple[str, ...], flag: str) -> list[Source]:
    """The files of text that the paths name. Raises DataError."""
    if runs := [path for path in paths if is_run(Path(path))]:
        why = "What a run writes is nothing to train on."
        raise DataError(f"{flag} {runs[0]} is a run.", why, f"To go on with it: smedjan train --checkpoint-dir {runs[0]}")
    found = find(paths, flag)
    if rows := [str(source.path) for source in found if source.kind == "dataset"]:
        fix = f"Tokenise it first ('smedjan prepare --input {rows[0]}'), and give the token file."
        raise DataError(f"{flag} takes no {rows[0]}.", "A run knows its texts by the hashes of their files.", fix)
    refuse_addresses(found, flag, "Tokenise it first with 'smedjan tokenizer' and 'smedjan prepare', and give the token file.")
    refuse_pipes(found, "A run reads its texts several times: to know them again, for the tokenizer and for the token files.")
    return found


def _tokenise(sources: list[str], num_bytes: int, place: Path, tokenizer: Tokenizer | None, vocab_size: int, share: float) -> RunData:
    if tokenizer is None:
        say(f"Training a tokenizer of {vocab_size} tokens on {size(num_bytes)} of text.")
        tokenizer = Tokenizer.train(sources, vocab_size=vocab_size)
    with _folder(place):
        prepare(sources, place / TRAIN_TOKENS, tokenizer, val_output=place / VAL_TOKENS if share else None, val_fraction=share)
        tokenizer.save(place / TOKENIZER)
    train = TokenFile.open(place / TRAIN_TOKENS)
    val = TokenFile.open(place / VAL_TOKENS) if share else None
    held_out = f", {count(val.num_tokens)} held out" if val else ""
    say(f"Tokenised {size(num_bytes)} into {count(train.num_tokens)} tokens to train on{held_out}: {place}")
    return RunData(train, val, tokenizer)


@contextlib.contextmanager
def _folder(place: Path) -> Iterator[None]:
    """A folder for tokens, which is not left behind empty when a text is refused."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except SmedjanError:
        with contextlib.suppress(OSError):  # others' tokens are there, or what a tokenising that goes on begins with
            place.rmdir()
            place.parent.rmdir()
        raise


def _validation(flags: DataFlags, folder: Path, tokenizer: Tokenizer, dry_run: bool, before: Callable[[], None]) -> TokenFile | None:
    """The token file of --val-dataset; None in a dry run over texts that are not tokenised yet."""
    if val := _validation_tokens(flags):
        val.check_tokenizer(tokenizer.hash)
        return val
    sources = [str(source.path) for source in _texts(flags.val_dataset, "--val-dataset")]
    place = folder / DATA / _key(_content(sources), 0.0, _made_by(tokenizer)) / VAL_TOKENS
    if not place.with_name(f"{VAL_TOKENS}.json").is_file():
        if dry_run:
            return None
        before()
        with _folder(place.parent):
            prepare(sources, place, tokenizer)
    return TokenFile.open(place)


def _validation_tokens(flags: DataFlags) -> TokenFile | None:
    """The token file that --val-dataset names, None where it names texts or nothing."""
    shards = _token_files(flags.val_dataset, "--val-dataset")
    if len(shards) > 1:
        raise DataError("--val-dataset names several token files.", "Validation reads one, from its beginning.", "Give one of them.")
    return TokenFile.open(shards[0][0]) if shards else None


def _check_validation(flags: DataFlags, known: Tokenizer | None) -> None:
    """Raises DataError for a --val-dataset that is not there or not of the run's tokenizer, before --dataset is tokenised."""
    val = _validation_tokens(flags)
    if val and known:
        val.check_tokenizer(known.hash)
    if flags.val_dataset and not val:
        _texts(flags.val_dataset, "--val-dataset")


def _refuse_tokenised_validation(flags: DataFlags) -> None:
    """Raises DataError for a token file to validate on where the tokenizer is yet to be trained on the texts of --dataset."""
    if val := _validation_tokens(flags):
        found = _find_tokenizer(val)
        what = f"--val-dataset {val.path} has a tokenizer already, and that of --dataset would be trained anew."
        fix = f"Give --dataset the same: --tokenizer {found[0] if found else 'FILE'}."
        raise DataError(what, "One run has one tokenizer.", fix)


def _content(paths: list[str]) -> str:
    return json.dumps([file_hash(path) for path in paths])


def note_other_beginnings(data: RunData) -> None:
    """A notice where documents begin otherwise than the tokenizer says: that is in a file beside it, and not in its hash."""
    assert data.train
    assert data.tokenizer
    names = {number: name for name, number in data.tokenizer.special_tokens.items()}
    for file in [*(data.train.files if isinstance(data.train, Mixture) else [data.train]), *([data.val] if data.val else [])]:
        begins = file.manifest.get("bos_id", data.tokenizer.bos_id)  # older files do not say it
        if begins != data.tokenizer.bos_id:
            there, here = (
                f"with {names.get(number, number)}" if number is not None else "with none" for number in (begins, data.tokenizer.bos_id)
            )
            notice(f"{file.path} was prepared {there} before each document, and the tokenizer begins texts {here}: prepare it again.")


def _made_by(tokenizer: Tokenizer) -> str:
    """What ids depend on: its hash, and what it puts before a document, which stands beside its file."""
    return tokenizer.hash if tokenizer.bos_id is None else f"{tokenizer.hash}:{tokenizer.bos_id}"


def _key(content: str, share: float, tokenizer: str | int) -> str:
    return hashlib.sha256(f"{content}:{share}:{tokenizer}".encode()).hexdigest()[:16]
