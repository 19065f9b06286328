"""Byte-pair encoding of single words, exactly: while any adjacent pair is a merge, merge the leftmost pair of the lowest rank.

Four ways to the same answer (tests hold them together):
- `encode_plain`: the definition, a list that shrinks; O(n^2), used for a few short words;
- `encode_many`: many short words at once in NumPy, one pass from the longest length down: at length L every word that still has a
  merge loses exactly one symbol and joins the words of length L-1;
- `encode_long`: one long word with a heap and links, O(n log n);
- `encode_longest`: the same with all pairs of a rank merged in one go, several times faster on a megabyte of one letter. It takes
  merges in order: every merge comes after all that make its two parts, so that no merged pair gives birth to one of a lower rank.

Symbols are internal: 0-255 are the bytes, then one per distinct token in merge order. `Merges.ids` maps them to token ids.
Source: Sennrich et al. 2016 (arXiv:1508.07909); byte level: Radford et al. 2019.
"""

import functools
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from smedjan_common.tokenizer.pair_table import NONE, PairTable

LONGEST_SHORT_WORD = 64  # bytes; longer words go to the heap and are never cached
LONGEST_HEAP_WORD = 256  # bytes; longer ones are merged rank by rank where the merges are in order
_PLAIN_BELOW = 24  # fewer words than this are faster in plain Python


class Merges:
    """The merge list of a tokenizer: `pairs` [(left symbol, right symbol)] by rank, `results` the symbol each makes.

    `ids` int32 [symbols]: the token id of every symbol. `whole`: bytes -> symbol of tokens that are taken whole when a word equals
    them (`ignore_merges` of tokenizer.json), empty otherwise.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], results: Sequence[int], ids: np.ndarray, whole: dict[bytes, int] | None = None):
        self.pairs, self.results, self.ids, self.whole = pairs, results, ids, whole or {}
        self.rank = {left << 32 | right: rank for rank, (left, right) in reversed(list(enumerate(pairs)))}
        self._table: PairTable | None = None
        self._result_array = np.array([*results, 0], dtype=np.int32)

    def encode_word(self, word: bytes) -> list[int]:
        """Symbols of one word."""
        if word in self.whole:
            return [self.whole[word]]
        if len(word) <= LONGEST_SHORT_WORD:
            return self.encode_plain(word)
        return self.encode_longest(word) if len(word) > LONGEST_HEAP_WORD and self.in_order else self.encode_long(word)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether every merge comes after all that make its two parts, as learned merges do."""
        made = {result: rank for rank, result in enumerate(self.results)}
        return all(made.get(left, -1) < rank > made.get(right, -1) for rank, (left, right) in enumerate(self.pairs))

    def encode_packed(self, data: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of many words given as their bytes uint8 [total] and lengths [words]: (ids int32 [total], lengths int32 [words])."""
        together = lengths <= LONGEST_SHORT_WORD
        if self.whole or len(lengths) < _PLAIN_BELOW:
            together = np.zeros(len(lengths), bool)
        if together.all():
            flat, out_lengths = self.encode_many(data, lengths)
            return self.ids[flat], out_lengths
        ends, groups = np.cumsum(lengths, dtype=np.int64), []
        for number in np.flatnonzero(~together).tolist():
            word = data[ends[number] - lengths[number] : ends[number]].tobytes()
            groups.append((np.array([number]), np.array(self.encode_word(word), np.int32)[:, None]))
        rest = np.flatnonzero(together)
        if len(rest):
            flat, rest_lengths = self.encode_many(data[np.repeat(together, lengths)], lengths[rest])
            starts = np.cumsum(rest_lengths, dtype=np.int64) - rest_lengths
            for length in np.unique(rest_lengths).tolist():
                rows = np.flatnonzero(rest_lengths == length)
                groups.append((rest[rows], flat[starts[rows] + np.arange(length)[:, None]]))
        flat, out_lengths = _gather(groups, len(lengths))
        return self.ids[flat], out_lengths

    def encode_plain(self, word: bytes) -> list[int]:
        """The definition: `list[int]` of symbols."""
        parts, get, results = list(word), self.rank.get, self.results
        ranks = [get(left << 32 | right, NONE) for left, right in itertools.pairwise(parts)]
        while ranks:
            best = min(ranks)
            if best == NONE:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [results[best]]
            del ranks[at]
            if at < len(ranks):
                ranks[at] = get(parts[at] << 32 | parts[at + 1], NONE)
            if at > 0:
                ranks[at - 1] = get(parts[at - 1] << 32 | parts[at], NONE)
        return parts

    def encode_long(self, word: bytes) -> list[int]:
        """The definition in O(n log n): a heap of (rank, position) whose stale entries are skipped, symbols linked both ways."""
        n, rank, results = len(word), self.rank, self.results
        parts, after, before = list(word), list(range(1, n + 1)), list(range(-1, n - 1))
        heap = [(r, i) for i in range(n - 1) if (r := rank.get(word[i] << 32 | word[i + 1])) is not None]
        heapq.heapify(heap)
        while heap:
            r, i = heapq.heappop(heap)
            j = after[i]
            if parts[i] < 0 or j >= n or rank.get(parts[i] << 32 | parts[j]) != r:
                continue
            parts[i], parts[j] = results[r], -1
            k = after[i] = after[j]
            if k < n:
                before[k] = i
                if (right := rank.get(parts[i] << 32 | parts[k])) is not None:
                    heapq.heappush(heap, (right, i))
            h = before[i]
            if h >= 0 and (left := rank.get(parts[h] << 32 | parts[i])) is not None:
                heapq.heappush(heap, (left, h))
        return [part for part in parts if part >= 0]

    def encode_longest(self, word: bytes) -> list[int]:
        """The definition for merges in order: rank by rank, the places of each from the left; those that no longer have it are skipped."""
        n, get = len(word), self.rank.get
        parts, after, before = [*word, -1], list(range(1, n + 1)), list(range(-1, n))  # -1 at the end, which is before 0 too, makes no pair
        places: dict[int, list[int]] = {}
        for i, (left, right) in enumerate(itertools.pairwise(word)):
            if (r := get(left << 32 | right)) is not None:
                places.setdefault(r, []).append(i)
        ranks = sorted(places)
        while ranks:
            now = heapq.heappop(ranks)
            (left, right), result = self.pairs[now], self.results[now]
            for i in sorted(places.pop(now)):
                j = after[i]
                if parts[i] != left or parts[j] != right:
                    continue
                parts[i], parts[j] = result, -1
                k, h = after[j], before[i]
                after[i], before[k] = k, i
                for start, r in ((i, get(result << 32 | parts[k])), (h, get(parts[h] << 32 | result))):
                    if r is None:
                        continue
                    if r in places:
                        places[r].append(start)
                    else:
                        places[r] = [start]
                        heapq.heappush(ranks, r)
        return [part for part in parts if part >= 0]

    def encode_many(self, data: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The definition for many words of 1 to 64 bytes, packed: (symbols int32 [total], lengths int32 [words])."""
        if self._table is None:
            self._table = PairTable(self.pairs)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        by_length = np.argsort(lengths, kind="stable")
        bounds = np.searchsorted(lengths[by_length], np.arange(int(lengths.max(initial=0)) + 2))
        done: list[tuple[np.ndarray, np.ndarray]] = []  # (word numbers [n], symbols [L, n])
        words_L, parts_LN, ranks_LN = np.empty(0, np.int64), None, None
        for length in range(len(bounds) - 2, 0, -1):
            fresh = by_length[bounds[length] : bounds[length + 1]]
            fresh_parts = data[starts[fresh] + np.arange(length)[:, None]].astype(np.int32)
            fresh_ranks = self._table.ranks(fresh_parts[:-1], fresh_parts[1:])
            if parts_LN is None or ranks_LN is None:
                words_L, parts_LN, ranks_LN = fresh, fresh_parts, fresh_ranks
            else:
                words_L = np.concatenate([words_L, fresh])
                parts_LN = np.concatenate([parts_LN, fresh_parts], axis=1)
                ranks_LN = np.concatenate([ranks_LN, fresh_ranks], axis=1)
            if not len(words_L):
                parts_LN = None
                continue
            merging = ranks_LN.min(axis=0, initial=NONE) < NONE
            if not merging.all():
                done.append((words_L[~merging], parts_LN[:, ~merging]))
                words_L, parts_LN, ranks_LN = words_L[merging], parts_LN[:, merging], ranks_LN[:, merging]
            parts_LN, ranks_LN = self._merge_one(parts_LN, ranks_LN)
        return _gather(done, len(lengths))

    def _merge_one(self, parts_LN: np.ndarray, ranks_LN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Merge the leftmost lowest pair of every column: parts [L, N] -> [L-1, N], ranks [L-1, N] -> [L-2, N]."""
        length, count = parts_LN.shape
        if count == 0 or length == 1:
            return parts_LN[:-1], ranks_LN[:-1]
        assert self._table is not None
        column = np.arange(count)
        at = (ranks_LN.astype(np.int64) << 8 | np.arange(length - 1)[:, None]).min(axis=0) & 255
        results = self._result_array[ranks_LN[at, column]]
        kept = np.arange(length - 1)[:, None] <= at
        parts = np.where(kept, parts_LN[:-1], parts_LN[1:])
        parts[at, column] = results
        ranks = np.where(kept[:-1], ranks_LN[:-1], ranks_LN[1:])
        has_right, has_left = np.flatnonzero(at < length - 2), np.flatnonzero(at > 0)
        ranks[at[has_right], has_right] = self._table.ranks(results[has_right], parts[at[has_right] + 1, has_right])
        ranks[at[has_left] - 1, has_left] = self._table.ranks(parts[at[has_left] - 1, has_left], results[has_left])
        return parts, ranks


def _gather(done: list[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Put the finished groups into the order of the words."""
    lengths = np.zeros(count, np.int32)
    for numbers, parts in done:
        lengths[numbers] = parts.shape[0]
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    flat = np.empty(int(lengths.sum()), np.int32)
    for numbers, parts in done:
        flat[starts[numbers] + np.arange(parts.shape[0])[:, None]] = parts
    return flat, lengths
