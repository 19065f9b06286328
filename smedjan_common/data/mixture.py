"""Several token files mixed by weight, on the fly or into one file.

On the fly the sample r of a run is a pure function of (files, weights, seed, r), like the order of one file. Samples come in blocks of
K = 1024. Each block holds the same whole number of samples of each file, c_i, nearest to the weights (largest remainder); their places
in block b follow a permutation keyed by (seed, b). The j-th sample of file i in block b is that file's sample b c_i + j, which order.py
turns into a window: every file goes through all its windows once in each of its own epochs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smedjan_common.data.order import Rows, Windows, permute
from smedjan_common.data.packing import Packed
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError

BLOCK = 1024


def parse_shards(text: str) -> list[tuple[str, float]]:
    """ "a.bin:0.7,b.bin:0.3" as [(path, weight)]; a path without weight has weight 1. Raises DataError."""
    shards = []
    for part in filter(None, text.split(",")):
        path, colon, weight = part.rpartition(":")
        try:
            shards.append((path, float(weight)) if colon else (part, 1.0))
        except ValueError:
            raise DataError(
                f"The shard {part!r} has no weight.", f"{weight!r} is not a number.", "Write PATH:WEIGHT, such as a.bin:0.7."
            ) from None
    if not shards:
        raise DataError("There are no shards.", "", "Write PATH:WEIGHT,PATH:WEIGHT, such as a.bin:0.7,b.bin:0.3.")
    return shards


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """`total` divided into whole numbers nearest to the weights (largest remainder), int64. Raises DataError for weights that cannot be."""
    given = np.array(weights, np.float64)
    if not np.isfinite(given).all() or (given <= 0).any():
        wrong = next(weight for weight in weights if not 0 < weight < np.inf)
        fix = "Give each file a weight over 0, or leave the file out."
        raise DataError(f"A file has the weight {wrong:g}.", "Weights are shares of tokens, finite and over 0.", fix)
    exact = given / given.sum() * total
    counts = np.floor(exact).astype(np.int64)
    order = np.lexsort((np.arange(len(given)), counts - exact))
    counts[order[: total - int(counts.sum())]] += 1
    if (counts == 0).any():
        number = int(np.argmin(counts))
        why = f"Weight {weights[number]} of {sum(weights)} is less than one sample in {total}."
        raise DataError("A weight is too small.", why, "Raise it, or leave the file out.")
    return counts


def check_same_tokenizer(files: Sequence[TokenFile]) -> None:
    """Raises DataError when the files were made with different tokenizers, or say that their documents begin with different tokens."""
    for file in files[1:]:
        if file.tokenizer_hash != files[0].tokenizer_hash:
            why = f"{str(files[0].path)!r} has tokenizer {files[0].tokenizer_hash[:16]}…, {str(file.path)!r} {file.tokenizer_hash[:16]}…."
            raise DataError("The token files were made with different tokenizers.", why, "Prepare them with one tokenizer.")
    begins = [(file, file.manifest["bos_id"]) for file in files if "bos_id" in file.manifest]  # older files do not say it
    for file, token in begins:
        if token != begins[0][1]:
            tokens = " and ".join("no token" if number is None else f"token {number}" for number in (begins[0][1], token))
            why = f"In {str(begins[0][0].path)!r} and {str(file.path)!r} they begin with {tokens}: the files beside the tokenizer differed."
            raise DataError("The documents of the token files do not begin alike.", why, "Prepare them with one folder of the tokenizer.")


@dataclass(frozen=True)
class Mixture:
    """Token files with weights as one dataset: what a run asks of a TokenFile. Raises DataError for different tokenizers."""

    files: tuple[TokenFile, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check_same_tokenizer(self.files)
        shares(self.weights, BLOCK)

    @property
    def num_tokens(self) -> int:
        """Tokens of all files."""
        return sum(file.num_tokens for file in self.files)

    @property
    def hash(self) -> str:
        """SHA-256 of the files' hashes and weights in their order."""
        return hashlib.sha256(
            repr([(file.hash, weight) for file, weight in zip(self.files, self.weights, strict=True)]).encode()
        ).hexdigest()

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Raises DataError when the files were made with another tokenizer."""
        self.files[0].check_tokenizer(tokenizer_hash)


class MixedOrder:
    """Which file and which of its windows make the batch of each step."""

    def __init__(self, num_windows: Sequence[int], weights: Sequence[float], batch_size: int, seed: int):
        self.counts = shares(weights, BLOCK)
        self.num_windows = list(num_windows)
        self.batch_size, self.seed = batch_size, seed
        self._ends = np.cumsum(self.counts)

    def windows(self, step: int, rows: Rows = None) -> tuple[np.ndarray, np.ndarray]:
        """(file int64 [batch_size], window int64 [batch_size]) of a step, or of its rows `rows`."""
        row = np.arange(self.batch_size, dtype=np.int64)[rows if rows is not None else slice(None)]
        block, place = np.divmod(step * self.batch_size + row, BLOCK)
        file, sample = np.empty_like(place), np.empty_like(place)
        for number in np.unique(block).tolist():
            inside = block == number
            files, ranks = self._block(number)
            file[inside] = files[place[inside]]
            sample[inside] = number * self.counts[file[inside]] + ranks[place[inside]]
        window = np.empty_like(sample)
        for number in np.unique(file).tolist():
            n = self.num_windows[number]
            epoch, inside_epoch = np.divmod(sample, n)
            for one in np.unique(epoch[file == number]).tolist():
                here = (file == number) & (epoch == one)
                window[here] = permute(inside_epoch[here], n, self.seed + number, int(one))
        return file, window

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a block (its file, how many earlier places have the same file), int64 [BLOCK] each."""
        moved = permute(np.arange(BLOCK), BLOCK, self.seed, -1 - number)  # epochs count up, blocks down: no key twice
        files = np.searchsorted(self._ends, moved, side="right")
        order = np.argsort(files, kind="stable")
        ranks = np.empty(BLOCK, np.int64)
        ranks[order] = np.arange(BLOCK) - np.repeat(self._ends - self.counts, self.counts)
        return files, ranks


class Mixed:
    """The windows of several files, each cut as it is. An epoch is as many samples as all of them have windows."""

    def __init__(self, cuts: Sequence[Windows | Packed]):
        self._cuts, self.seq_len = cuts, cuts[0].seq_len
        self.num_windows = sum(cut.num_windows for cut in cuts)

    def read(self, pieces: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(inputs int32 [B, T], targets int32 [B, T]) of (file int64 [B], window int64 [B])."""
        file, window = pieces
        inputs, targets = np.empty((2, len(file), self.seq_len), np.int32)
        for number in np.unique(file).tolist():
            here = file == number
            inputs[here], targets[here] = self._cuts[number].read(window[here])
        return inputs, targets

    def documents(self, pieces: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The document of each input token, int32 [B, T] from 0 in each row. Raises DataError without offsets."""
        file, window = pieces
        out = np.empty((len(file), self.seq_len), np.int32)
        for number in np.unique(file).tolist():
            out[file == number] = self._cuts[number].documents(window[file == number])
        return out
