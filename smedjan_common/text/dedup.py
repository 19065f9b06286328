"""Leaving out repeated documents: the same text, and nearly the same text by MinHash.

Exact: blake2b of the text. Near: each document is the set of its runs of 5 words (lower case), where each character of a script that sets
no spaces between words, such as Chinese, Japanese or Thai, counts as a word; 112 random hash functions keep their least value over the
set, so that two documents agree in each with a probability equal to the Jaccard similarity of their sets (Broder 1997).
14 bands of 8 values find candidates: documents that agree in a whole band. A candidate is a repeat when at least `threshold` of its 112
values agree. Repeats of repeats form one group, of which the first document stays.

Two passes over the input: signatures (448 bytes a document, in processes, of one machine or several), then copying what stays.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smedjan_common.errors import DataError
from smedjan_common.executors import start
from smedjan_common.text.blocks import Block, bundles
from smedjan_common.text.records import Reading, write_records
from smedjan_common.text.sources import Source, find, much, refuse_pipes, total_size

BANDS, ROWS = 14, 8
SHINGLE = 5
SAMPLES = 5
# Thai, Lao, Tibetan, Myanmar, Khmer, New Tai Lue, Tai Tham, Balinese, Javanese, Yi, Kana, Han with its extensions
_NO_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9df\ua9e0-\ua9ff\uaa60-\uaa7f\ua000-\ua4cf"
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_NO_SPACES}]+|[{_NO_SPACES}]")
_AT_ONCE = 4096  # shingles hashed together
_MANY = 1 << 17  # documents from which the cores of a cluster sort the bands


def _multipliers() -> tuple[np.ndarray, np.ndarray]:
    """The odd multipliers and the offsets of the hash functions, fixed for ever, uint64 [112] each."""
    drawn = np.frombuffer(b"".join(hashlib.blake2b(b"smedjan-minhash-%d" % i, digest_size=16).digest() for i in range(BANDS * ROWS)), "<u8")
    return drawn[::2] | np.uint64(1), drawn[1::2].copy()


def minhash(text: str, multipliers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The signature uint32 [112] of a text; all ones for a text without words."""
    words = np.fromiter((zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(text.lower())), np.uint64)
    least = np.full(BANDS * ROWS, 0xFFFFFFFF, np.uint64)
    if not len(words):
        return least.astype(np.uint32)
    width = min(SHINGLE, len(words))
    shingles = np.zeros(len(words) - width + 1, np.uint64)
    for i in range(width):
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[i : len(words) - width + 1 + i]
    shingles = np.unique(shingles)
    shingles ^= shingles >> np.uint64(31)
    for first in range(0, len(shingles), _AT_ONCE):
        hashed = (shingles[first : first + _AT_ONCE, None] * multipliers + offsets) >> np.uint64(32)
        least = np.minimum(least, hashed.min(axis=0))
    return least.astype(np.uint32)


class Sign:
    """What runs in each process: blocks -> (size, exact hashes uint64 [documents, 2], signatures uint32 [documents, 112])."""

    def __init__(self, reading: Reading, near: bool):
        self._reading, self._near = reading, near
        self._functions = _multipliers()

    def __call__(self, blocks: list[Block]) -> tuple[int, np.ndarray, np.ndarray]:
        texts = [text for block in blocks for text in self._reading.texts(block)]
        digests = b"".join(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in texts)
        signatures = [minhash(text, *self._functions) for text in texts] if self._near else []
        exact = np.frombuffer(digests, "<u8").reshape(-1, 2)
        return sum(len(block.data) for block in blocks), exact, np.array(signatures, np.uint32).reshape(-1, BANDS * ROWS)


@dataclass
class DedupReport:
    """What was dropped. `samples`: pairs of (source kept, source dropped, beginning of the dropped text), a few of each kind."""

    documents: int = 0
    kept: int = 0
    exact: int = 0
    near: int = 0
    samples: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"exact": [], "near": []})


def dedup(
    inputs: Iterable[str],
    output: str,
    *,
    threshold: float | None = 0.8,
    reading: Reading | None = None,
    processes: int | None = None,
    executor: str = "local",
    progress: Callable[[str, int, int], None] | None = None,
) -> DedupReport:
    """Copy the documents of `inputs` to `output` (JSONL) without repeats. `threshold` None: exact repeats only.

    Raises DataError, OSError; nothing half-written is left.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise DataError(f"A threshold of {threshold} finds nothing.", "It is the least similarity, above 0 and at most 1.", "Use 0.8.")
    reading = reading or Reading()
    found = find(inputs, field=reading.field)
    refuse_pipes(found, "dedup reads its input twice: first to compare, then to copy what stays.")
    total = total_size(found)
    exact, signatures, done = [np.empty((0, 2), np.uint64)], [np.empty((0, BANDS * ROWS), np.uint32)], 0
    with start(executor, "smedjan_common.text.dedup:Sign", (reading, threshold is not None), processes, much(found)) as pool:
        for size, some_exact, some_signatures in pool.map(bundles(reading.blocks(found))):
            exact.append(some_exact)
            signatures.append(some_signatures)
            done += size
            if progress:
                progress("compare", min(done, total), total)
    kept_by, is_near = repeats(np.concatenate(exact), np.concatenate(signatures), threshold, executor)
    report = DedupReport(documents=len(kept_by), exact=int((~is_near & (kept_by >= 0)).sum()), near=int(is_near.sum()))
    report.kept = report.documents - report.exact - report.near
    write_records(output, _keep(found, reading, kept_by, is_near, report))
    return report


def repeats(exact: np.ndarray, signatures: np.ndarray, threshold: float | None, executor: str = "local") -> tuple[np.ndarray, np.ndarray]:
    """(for each document the earlier one that it repeats or -1, int64; whether it is a near repeat, bool)."""
    _, first, which = np.unique(exact, axis=0, return_index=True, return_inverse=True)
    earliest = first[which.reshape(-1)]
    kept_by = np.where(earliest < np.arange(len(exact)), earliest, -1)
    is_near = np.zeros(len(exact), bool)
    if threshold is None or not len(exact):
        return kept_by, is_near
    rest = np.flatnonzero(kept_by < 0)
    rest = rest[(signatures[rest] != 0xFFFFFFFF).any(axis=1)]  # texts without words are not alike
    leaders = _groups(signatures[rest], threshold, executor)
    near = leaders < np.arange(len(rest))
    kept_by[rest[near]] = rest[leaders[near]]
    is_near[rest[near]] = True
    return kept_by, is_near


class Band:
    """What runs in each process: the values of one band, uint32 [documents, 8] -> neighbours among the documents that agree in all of
    them, int64 [2, pairs]."""

    def __call__(self, part: np.ndarray) -> np.ndarray:
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * ROWS))).reshape(-1)
        order = np.argsort(keys, kind="stable")
        together = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        return np.stack((order[together], order[together + 1]))


def _groups(signatures: np.ndarray, threshold: float, executor: str) -> np.ndarray:
    """The first document of each document's group, int64 [documents]. On this machine one band is sorted at a time, for its memory."""
    leader = list(range(len(signatures)))

    def find(document: int) -> int:
        while leader[document] != document:
            leader[document] = leader[leader[document]]
            document = leader[document]
        return document

    bands = (np.ascontiguousarray(signatures[:, first : first + ROWS]) for first in range(0, BANDS * ROWS, ROWS))
    place = executor if len(signatures) >= _MANY else "local"
    with start(place, "smedjan_common.text.dedup:Band", (), 1 if place == "local" else None, 0) as pool:
        for first, second in pool.map(bands):  # neighbours suffice: likeness within a band's group is nearly transitive
            alike = (signatures[first] == signatures[second]).mean(axis=1) >= threshold
            for one, other in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
                a, b = find(one), find(other)
                leader[max(a, b)] = min(a, b)
    return np.array([find(document) for document in range(len(leader))], np.int64)


def _keep(found: list[Source], reading: Reading, kept_by: np.ndarray, is_near: np.ndarray, report: DedupReport):
    """The records that stay; fills the report's samples."""
    number, wanted = 0, {}
    for kind, mask in (("exact", (kept_by >= 0) & ~is_near), ("near", is_near)):
        wanted |= {int(document): kind for document in np.flatnonzero(mask)[:SAMPLES]}
    places = dict.fromkeys(int(kept_by[document]) for document in wanted)
    for block in reading.blocks(found):
        for record in reading.records(block):
            if number in places:
                places[number] = str(record["source"])
            if number in wanted:
                sample: dict[str, Any] = {"kept": places[int(kept_by[number])], "dropped": str(record["source"])}
                report.samples[wanted[number]].append(sample | {"text": record[reading.field][:120]})
            if kept_by[number] < 0:
                yield record
            number += 1
