"""Learning the merges of byte-pair encoding from counted words, exactly, many merges per NumPy call.

The rule, that of `tokenizers` and rustbpe: merge the pair with the highest count; ties go to the smallest (left id, right id). "aaa"
counts the pair (a, a) twice and merges from the left without overlap. The new id is the number of ids so far.

Every word stands once in one flat array `symbols`, at the byte positions it has, separated by -1. A token writes its id at its first
and at its last byte and -1 between, so that its neighbours are found from token lengths alone, without links. Each pair keeps the list
of positions where it was born. A pair's list is complete at birth, since a new pair always contains the newest id, and only shrinks
later; so its stored count is an upper bound, recounted only when it reaches the top.

A batch takes the best pairs in order and stops before the first one whose turn an earlier one might change:
- it shares a token with an occurrence of an earlier one, so that its own count would fall; or
- a pair that an earlier one gives birth to might come before it. Births are counted on the text before the batch, which is
  never less than their count when their turn comes.
So a batch commits exactly the merges, in exactly the order, that one by one would.

No two merges make the same token. Suppose (u, v) and (u', v') did. Where a string ends as one token, no merge crossed its ends, so
what happened inside is what happens to the string alone, and the second occurrence would have been merged together with the first.
"""

from collections.abc import Callable

import numpy as np

from smedjan_common.tokenizer.pair_store import PairStore
from smedjan_common.tokenizer.words import WordCounts

_BATCH = (8, 4096)  # how many pairs are looked at together, at least and at most
_LEFT_BITS = np.int64(22)  # ids are below 2^22, counts below 2^41
_FAR = np.int32((1 << 31) - 1)


def learn_merges(
    counts: WordCounts, byte_order: list[int], num_merges: int, min_count: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[tuple[int, int]]:
    """The merges as (left id, right id); merge k makes id 256 + k.

    `counts`: the words and how often each occurs. `byte_order` [256]: the byte of each base id. Stops early when the best pair
    occurs less than `min_count` times. `progress(done, num_merges)` is called now and then.
    """
    return _Learner(counts, byte_order, num_merges, min_count).run(progress)


class _Learner:
    def __init__(self, counts: WordCounts, byte_order: list[int], num_merges: int, min_count: int):
        self.num_merges, self.min_count = num_merges, max(1, min_count)
        self.pairs: list[tuple[int, int]] = []
        self.lengths = np.ones(256 + num_merges + 1, np.int32)
        self.lengths[-1] = 0  # of the separator: id -1
        self.symbols, self.weights = _lay_out(counts, byte_order)
        self.marks = np.full(len(self.symbols), _FAR, np.int32)
        self.store = PairStore(self.min_count)
        self._first_pairs()

    def run(self, progress: Callable[[int, int], None] | None) -> list[tuple[int, int]]:
        look = _BATCH[0]
        while len(self.pairs) < self.num_merges:
            chosen, cutoff = self.store.top(look)
            if not len(chosen):
                break
            group, where, exact = self._recount(chosen)
            self.store.bound[chosen] = exact
            left, right = self.store.left[chosen], self.store.right[chosen]
            order = np.lexsort((right, left, -exact))
            certain = _ahead(exact, left, right, cutoff)[order] & (exact[order] >= self.min_count)
            order = order[: int(np.argmin(certain)) if not certain.all() else len(order)][: self.num_merges - len(self.pairs)]
            if not len(order):
                continue
            done = self._commit(chosen[order], order, exact[order], group, where)
            look = int(np.clip(2 * done if done < len(order) else 2 * look, *_BATCH))
            if progress:
                progress(len(self.pairs), self.num_merges)
        return self.pairs

    def _first_pairs(self) -> None:
        """All adjacent pairs of bytes."""
        left, right = self.symbols[:-1], self.symbols[1:]
        where = np.flatnonzero((left >= 0) & (right >= 0)).astype(np.int32)
        key = (left[where] << 8 | right[where]).astype(np.uint16)
        order = np.argsort(key, kind="stable")
        self._add(key[order].astype(np.int64) >> 8, key[order].astype(np.int64) & 255, where[order])

    def _add(self, left: np.ndarray, right: np.ndarray, where: np.ndarray) -> None:
        """Store pairs given one row per occurrence, equal pairs together, positions ascending."""
        if not len(where):
            return
        first = np.flatnonzero(np.concatenate([[True], (left[1:] != left[:-1]) | (right[1:] != right[:-1])]))
        counts = np.add.reduceat(self.weights[where], first, dtype=np.int64)
        self.store.add(left[first], right[first], counts, first, where)

    def _recount(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Occurrences that still stand: (number in `chosen` [n], position [n]) and the exact counts int64 [chosen]; drops the others."""
        group, where = self.store.occurrences(chosen)
        left, right = self.store.left[chosen][group], self.store.right[chosen][group]
        stands = (self.symbols[where] == left) & (self.symbols[where + self.lengths[left]] == right)
        group, where = group[stands], where[stands]
        self.store.shrink(chosen, group, where)
        return group, where, _sums(self.weights[where], group, len(chosen))

    def _commit(self, pairs: np.ndarray, order: np.ndarray, exact: np.ndarray, group: np.ndarray, where: np.ndarray) -> int:
        """Merge the pairs, given in their order of merging, up to the first that an earlier one might change; how many were merged."""
        left, right = self.store.left[pairs], self.store.right[pairs]
        turn, where = _by_turn(order, group, where)
        merged = _without_overlap(turn, where, left, right, self.lengths)
        count = self._clear_run(turn, where, merged, left, right, exact) if len(pairs) > 1 else 1
        merged &= turn < count
        turn, where = turn[merged], where[merged]
        new = 256 + len(self.pairs) + np.arange(count, dtype=np.int32)
        self.lengths[new] = self.lengths[left[:count]] + self.lengths[right[:count]]
        self._write(where, left[turn], right[turn], new[turn])
        self.store.bound[pairs[:count]] = 0
        self.pairs.extend(zip(left[:count].tolist(), right[:count].tolist(), strict=True))
        self._births(where, new[turn], int(new[0]))
        return count

    def _clear_run(self, turn, where, merged, left, right, exact) -> int:
        """How many pairs, from the first, cannot be changed by those before them; at least 1."""
        second = where + self.lengths[left[turn]]
        back = np.flatnonzero(merged)[::-1]  # assigned backwards, so that the earliest turn is what stays
        self.marks[where[back]] = turn[back]
        self.marks[second[back]] = np.minimum(turn[back], self.marks[second[back]])
        touched = np.minimum(self.marks[where], self.marks[second]) < turn
        self.marks[where], self.marks[second] = _FAR, _FAR
        clear = int(turn[touched].min(initial=len(left)))
        rows = np.flatnonzero(merged & (turn < clear))
        best_birth = self._best_births(turn[rows], where[rows], second[rows] + self.lengths[right[turn[rows]]], clear)
        score = exact[:clear] << _LEFT_BITS | ((1 << _LEFT_BITS) - 1 - left[:clear])
        beaten = np.flatnonzero(np.maximum.accumulate(best_birth)[:-1] > score[1:])
        return int(beaten[0]) + 1 if len(beaten) else clear

    def _best_births(self, turn, where, end, count: int) -> np.ndarray:
        """For each turn the best score of the pairs it would give birth to, int64 [count]: (count, then smallest left id)."""
        best = np.zeros(count, np.int64)
        for neighbour, is_left in ((self.symbols[where - 1], True), (self.symbols[end], False)):
            inside = np.flatnonzero(neighbour >= 0)
            if not len(inside):
                continue
            key = turn[inside].astype(np.int64) << 32 | neighbour[inside]
            order = np.argsort(key)
            key = key[order]
            first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
            score = np.add.reduceat(self.weights[where[inside[order]]], first, dtype=np.int64) << _LEFT_BITS
            if is_left:
                score |= (1 << _LEFT_BITS) - 1 - (key[first] & 0xFFFFFFFF)
            np.maximum.at(best, key[first] >> 32, score)
        return best

    def _write(self, where, left, right, new) -> None:
        """Put the new tokens in the place of their two parts."""
        second = where + self.lengths[left]
        self.symbols[second - 1] = -1
        self.symbols[second] = -1
        self.symbols[where] = new
        self.symbols[second + self.lengths[right] - 1] = new

    def _births(self, where: np.ndarray, new: np.ndarray, first_new: int) -> None:
        """Add the pairs that the new tokens form with their neighbours."""
        before, after = self.symbols[where - 1], self.symbols[where + self.lengths[new]]
        has_after = after >= 0
        has_before = (before >= 0) & (before < first_new)  # two new tokens side by side: the left one adds the pair
        left = np.concatenate([new[has_after], before[has_before]]).astype(np.int64)
        right = np.concatenate([after[has_after], new[has_before]]).astype(np.int64)
        start = np.concatenate([where[has_after], where[has_before] - self.lengths[before[has_before]]])
        order = np.argsort(left << 32 | right, kind="stable")
        self._add(left[order], right[order], start[order])


def _lay_out(counts: WordCounts, byte_order: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(symbols int32 [P], weights [P]): the words with separators; how often the word at each position occurs."""
    long = counts.lengths > 1
    rank = np.empty(256, np.int32)
    rank[np.array(byte_order)] = np.arange(256)
    lengths = counts.lengths[long]
    symbols = np.full(int(lengths.sum()) + len(lengths) + 1, -1, np.int32)
    assert len(symbols) < 1 << 31, "positions are int32"
    inside = np.ones(len(symbols), bool)
    inside[0] = False
    inside[np.cumsum(lengths + 1)] = False
    symbols[inside] = rank[counts.data[np.repeat(long, counts.lengths)]]
    dtype = np.int32 if counts.counts.max(initial=0) < 1 << 31 else np.int64
    weights = np.zeros(len(symbols), dtype)
    weights[inside] = np.repeat(counts.counts[long], lengths)
    return symbols, weights


def _ahead(exact, left, right, cutoff: tuple[int, int, int]) -> np.ndarray:
    """Which pairs come before every pair that was not looked at."""
    count, cut_left, cut_right = cutoff
    return (exact > count) | ((exact == count) & ((left < cut_left) | ((left == cut_left) & (right < cut_right))))


def _by_turn(order: np.ndarray, group: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Occurrences sorted by the turn of their pair, those of pairs without one left out: (turn int32 [n], position [n])."""
    turn_of = np.full(max(int(group[-1]), int(order.max())) + 1, -1, np.int32)
    turn_of[order] = np.arange(len(order))
    turn = turn_of[group]
    kept = turn >= 0
    turn, where = turn[kept], where[kept]
    if len(order) > 1:
        by_turn = np.argsort(turn, kind="stable")
        turn, where = turn[by_turn], where[by_turn]
    return turn, where


def _without_overlap(turn, where, left, right, lengths) -> np.ndarray:
    """Which occurrences are merged, bool [n]: of a run of (a, a) that overlap every second one, from the left; all of other pairs."""
    merged = np.ones(len(where), bool)
    twin = np.flatnonzero(left == right)
    rows = np.flatnonzero(np.isin(turn, twin)) if len(twin) else twin
    if len(rows):
        place, step = where[rows], lengths[left[turn[rows]]]
        goes_on = np.concatenate([[False], (np.diff(place) == step[1:]) & (np.diff(turn[rows]) == 0)])
        run_start = np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(rows))))
        merged[rows] = (np.arange(len(rows)) - run_start) % 2 == 0
    return merged


def _sums(values: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """Sum of the values of each group (groups in order), int64 [count]."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.searchsorted(group, np.arange(count), side="right")
    return np.diff(total[np.concatenate([[0], ends])])
