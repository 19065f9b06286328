"""From --dataset, --val-dataset and --template of `smedjan sft` and `smedjan dpo` to token files with masks, and to the tokenizer of the
new model.

Conversations, and pairs of answers, are tokenised once into CHECKPOINT_DIR/data/KEY/, where KEY is a hash of the files and of all that was
done with them.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smedjan_common.data.chats import TOO_LONG, TRAIN_ON, ChatCut, prepare_chats
from smedjan_common.data.mixture import Mixture
from smedjan_common.data.order import IGNORED
from smedjan_common.data.packing import Packed, PackedPairs
from smedjan_common.data.pairs import prepare_pairs
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import ConfigError, DataError, SmedjanError, TemplateError, flag, unknown
from smedjan_common.files.hashing import file_hash
from smedjan_common.files.names import DATA, TOKENIZER, TRAIN_TOKENS, VAL_TOKENS
from smedjan_common.reporting.console import count, printable, say, size
from smedjan_common.run.asked import Asked
from smedjan_common.run.claim import is_run
from smedjan_common.run.data import RunData
from smedjan_common.run.flags import ChatFlags, PairFlags
from smedjan_common.text.conversations import Dropped
from smedjan_common.text.sources import Source, find, refuse_addresses, refuse_pipes
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import IM_END, IM_START, named_template, template_of
from smedjan_common.tokenizer.chat_template import ChatTemplate
from smedjan_common.tokenizer.growing import grown
from smedjan_common.training.preferences import LOSSES

_MARKS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"  # around what is trained
_SHOWN = 600  # characters of the row that is shown


class Kind(NamedTuple):
    """What is tokenised: its name, what writes the token file, and what the key of its folder has beside."""

    name: str
    prepare: Callable[..., Dropped]
    key: tuple[str, ...] = ()


CHATS, PAIRS = Kind("conversations", prepare_chats), Kind("pairs of answers", prepare_pairs, ("pairs",))


class Speaker(NamedTuple):
    """A tokenizer with all tokens of its template. gained: how many of them are new."""

    tokenizer: Tokenizer
    template: ChatTemplate
    gained: int


def check_chat_flags(chats: ChatFlags | PairFlags) -> None:
    """Raises ConfigError for values that cannot be."""
    named = {"loss": LOSSES, "train_on": TRAIN_ON, "too_long": TOO_LONG}
    for name, value, known in ((flag(name), getattr(chats, name), known) for name, known in named.items() if hasattr(chats, name)):
        if value not in known:
            raise unknown(name, value, known)
    if not 0 < chats.epochs < 1e6:
        raise ConfigError(f"--epochs is {chats.epochs:g}.", "It must be over 0.", "Take 2, say.")
    if not 0 <= chats.max_dropped <= 1:
        raise ConfigError(f"--max-dropped is {chats.max_dropped:g}.", "It is a part, from 0 to 1.", "Take 0.05, say.")


def speaker(name: str, own: Tokenizer, may_grow: bool) -> Speaker:
    """The template `name`, and the tokenizer of the weights with the tokens that it needs. Raises TemplateError, DataError.

    may_grow: whether tokens may be added; not where a run goes on.
    """
    template, tokenizer = (template_of(None, own) if name == "auto" else None), own
    if template is None and name in ("auto", "chatml"):
        if may_grow:
            tokenizer = grown(own, (IM_START, IM_END))
        name = "chatml"
    template = template or named_template(name, None, tokenizer)
    if template is None or not template.end_names():
        what, why = f"The template {name} is not for training.", "No token ends its answers, so that a model would not learn to stop."
        raise TemplateError(what, why, "Take --template chatml, or leave it out.")
    ends = dict.fromkeys([*tokenizer.ends.eos_ids, *sorted(template.stop_ids(tokenizer))])
    tokenizer.chat, tokenizer.ends = template.source(), dataclasses.replace(own.ends, eos_ids=tuple(ends))
    return Speaker(tokenizer, template, tokenizer.vocab_size - own.vocab_size)


def chat_data(
    asked: Asked,
    seq_len: int,
    folder: Path,
    speaks: Speaker,
    dry_run: bool,
    before: Callable[[RunData], None],
) -> RunData:
    """Open or make the token files of conversations, or of pairs of answers. Raises DataError, TemplateError.

    before: called with what is known, each time that conversations are to be tokenised. A dry run writes nothing.
    """
    flags, kind = asked.flags.data, PAIRS if asked.pairs else CHATS
    cut = _cut(asked, seq_len)
    share = 0.0 if flags.val_dataset else flags.val_fraction
    sources = _conversations(flags.dataset, "--dataset")
    held_out = _conversations(flags.val_dataset, "--val-dataset") if flags.val_dataset else []
    known = RunData(None, None, speaks.tokenizer, sum(source.size for source in sources), speaks.gained)
    place, val_place = _place(folder, sources, kind, cut, share, speaks), _place(folder, held_out, kind, cut, 0.0, speaks)
    for found, where, part in ((sources, place, share), (held_out, val_place, 0.0)):
        if not found or (where / f"{TRAIN_TOKENS}.json").is_file():
            continue
        if dry_run:
            return known
        before(known)
        _tokenise(found, where, kind, speaks, cut, part)
    train = TokenFile.open(place / TRAIN_TOKENS)
    val = TokenFile.open(val_place / TRAIN_TOKENS) if held_out else TokenFile.open(place / VAL_TOKENS) if share else None
    return dataclasses.replace(known, train=train, val=val if val and val.num_tokens > 1 else None)


def _cut(asked: Asked, seq_len: int) -> ChatCut:
    """What of a row becomes tokens: of n tokens n - 1 are read, and of a pair both its documents are in one sequence."""
    chats = asked.chats
    assert chats
    if isinstance(chats, PairFlags):
        return ChatCut(seq_len + 2, max_dropped=chats.max_dropped)
    return ChatCut(seq_len + 1, chats.too_long, chats.train_on, chats.max_dropped)


def check_masked(data: RunData, pairs: bool) -> None:
    """Raises DataError for token files of texts, which do not say what of them is an answer, and for conversations where pairs are learned,
    or pairs where conversations are."""
    for file in files_of(data):
        if file.mask is None:
            why = "It does not say which of its tokens an assistant says."
            raise DataError(f"The token file {str(file.path)!r} holds no conversations.", why, "Give the conversations themselves.")
        if file.pairs != pairs:
            what = f"The token file {str(file.path)!r} holds {'pairs of answers' if file.pairs else 'conversations'}."
            why = "The run learns from " + ("pairs of answers." if pairs else "conversations.")
            raise DataError(what, why, "Leave --dataset out to go on with its own.")


def files_of(data: RunData) -> list[TokenFile]:
    """Every token file of a run."""
    train = data.train.files if isinstance(data.train, Mixture) else (data.train,)
    return [file for file in (*train, data.val) if file is not None]


def shown_rows(data: TokenFile, seq_len: int, tokenizer: Tokenizer) -> list[str]:
    """The beginning of a training row as text, of pairs that of both answers, with what is trained between brackets, read back from what a
    step sees."""
    cut, first = PackedPairs(data, seq_len) if data.pairs else Packed(data, seq_len), np.zeros(1, np.int64)
    (inputs, targets), documents = cut.read(first), cut.documents(first)[0]
    return [_shown(inputs[0][documents == number], targets[0][documents == number], tokenizer) for number in range(1 + data.pairs)]


def _shown(inputs: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> str:
    """A document as a step sees it."""
    stream, text, inside = tokenizer.stream(), "", False
    for token, before in zip(inputs.tolist(), [IGNORED, *targets.tolist()], strict=False):
        if (trained := before != IGNORED) != inside:
            text, inside = text + _MARKS[inside], trained
        text += stream.push(token)
    last = targets[-1]
    if (trained := last != IGNORED) != inside:
        text += _MARKS[inside]
    text += tokenizer.decode([last]) + _MARKS[1] if trained else ""
    return printable(text if len(text) <= _SHOWN else text[:_SHOWN] + " \N{HORIZONTAL ELLIPSIS}")


def _conversations(paths: tuple[str, ...], name: str) -> list[Source]:
    if runs := [path for path in paths if is_run(Path(path))]:
        raise DataError(f"{name} {runs[0]} is a run.", "It holds no conversations.", "Weights to begin with are named by --pretrained.")
    found = find(paths, name, field="")
    if rows := [str(source.path) for source in found if source.kind == "dataset"]:
        why = "A run knows its conversations by the hashes of their files."
        raise DataError(f"{name} takes no {rows[0]}.", why, "Save it as JSON lines or Parquet, and give the file.")
    refuse_addresses(found, name, "Copy it to this machine, and give the file.")
    refuse_pipes(found, "A run knows its conversations by the hashes of their files.")
    return found


def _place(folder: Path, sources: list[Source], kind: Kind, cut: ChatCut, share: float, speaks: Speaker) -> Path:
    source = speaks.template.source()
    template = source.sha256 if source else speaks.template.name
    done = [[file_hash(str(one.path)) for one in sources], list(cut), share, speaks.tokenizer.hash, template, *kind.key]
    return folder / DATA / hashlib.sha256(json.dumps(done).encode()).hexdigest()[:16]


def _tokenise(sources: list[Source], place: Path, kind: Kind, speaks: Speaker, cut: ChatCut, share: float) -> None:
    place.mkdir(parents=True, exist_ok=True)
    speaks.tokenizer.save(place / TOKENIZER)
    val = place / VAL_TOKENS if share else None
    try:
        dropped = kind.prepare(sources, place / TRAIN_TOKENS, speaks.tokenizer, speaks.template, cut, val, share)
    except SmedjanError:  # a row was refused: nothing of it stays behind
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # others' tokens are there
            place.parent.rmdir()
        raise
    for line in dropped.lines():
        say(f"note: {printable(line)}" if not line.startswith(" ") else printable(line))
    made = TokenFile.open(place / TRAIN_TOKENS)
    assert made.mask is not None
    trained, held = int(made.mask.sum()), f", {count(TokenFile.open(val).num_tokens)} tokens held out" if val else ""
    whole = f"{dropped.rows - dropped.counts.total()} {kind.name} ({size(sum(source.size for source in sources))})"
    say(f"Tokenised {whole}: {count(made.num_tokens)} tokens, {count(trained)} of them trained{held}: {place}")
