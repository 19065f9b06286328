"""States of decoding that were kept because their text may come again: after a prompt, and after an answer.

What is kept is bounded in bytes; what was not used for longest goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHORTEST = 32  # tokens: to compute fewer anew takes no longer than to keep their state


@dataclass(frozen=True)
class Kept:
    """The state after `length` tokens, and the logits after the last of them where they are known."""

    length: int
    state: Any
    logits: np.ndarray | None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (self.logits.nbytes if self.logits is not None else 0)


class Prefixes:
    """Kept states by their tokens, at most `limit` bytes of them."""

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[tuple[int, ...], Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def wants(self, ids: Sequence[int]) -> bool:
        """Whether the state after `ids` is worth keeping, as far as that is known before it is taken."""
        return self.limit > 0 and len(ids) >= SHORTEST

    def keep(self, ids: Sequence[int], state: Any, logits: np.ndarray | None = None) -> None:
        """Keep the state after `ids`; one that is larger than all that may be kept is not."""
        kept = Kept(len(ids), state, logits)
        if kept.nbytes > self.limit:
            return
        self._drop(tuple(ids))
        self._kept[tuple(ids)] = kept
        self.nbytes += kept.nbytes
        while self.nbytes > self.limit:
            self._drop(next(iter(self._kept)))

    def longest(self, ids: Sequence[int]) -> Kept | None:
        """The kept state of the longest beginning of `ids`; of `ids` themselves only with logits, since something must give those."""
        whole = tuple(ids)
        for length in sorted({kept.length for kept in self._kept.values() if kept.length <= len(whole)}, reverse=True):
            kept = self._kept.get(whole[:length])
            if kept is not None and (length < len(whole) or kept.logits is not None):
                self._kept.move_to_end(whole[:length])
                return kept
        return None

    def _drop(self, ids: tuple[int, ...]) -> None:
        if kept := self._kept.pop(ids, None):
            self.nbytes -= kept.nbytes


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning."""
    most = min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    low, high = 0, most  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle)
    return low
