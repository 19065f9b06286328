"""Speculative decoding: a smaller model writes a few tokens ahead, and the model reads them all at once (Leviathan et al., 2023).

A model that is bound by reading its weights reads several tokens in about the time of one. Both models draw with the same noise: of
seed, position and token (smedjan_common.inference.sampling), so where they see things alike they draw alike (drafter-invariant
decoding; Daliri et al., 2025). A token that was guessed counts if the model draws just that one; the first that it does not is replaced
by the one that it drew. So every token is the model's own draw from its own logits: what is written does not depend on the draft, on how
far it looks ahead, or on the company, but by the rounding of logits that were computed side by side instead of one after the other.

With p and q the two distributions at a place, after temperature, filters and penalties, a guess is right with the probability

    sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)  >=  (1 - d) / (1 + d),  d = sum |p - q| / 2,

where rejection sampling would reach 1 - d, with texts that change with the draft.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from smedjan_common.backend import Decoder, Saved
from smedjan_common.errors import NotFiniteError
from smedjan_common.inference.drawing import Draw
from smedjan_common.inference.prefixes import common
from smedjan_common.inference.ticket import Ticket

AHEAD, MOST = 4, 16  # tokens ahead: without a number, and at most


class Guess(NamedTuple):
    """For whom tokens are guessed: the row of the decoder, its request, and how many are wanted, at least one."""

    row: int
    ticket: Ticket
    most: int


class Kept(NamedTuple):
    """The state of a row of the draft after `ids`."""

    ids: list[int]
    state: Saved


def accepted(draw: Callable[[np.ndarray], int | None], logits: Sequence[np.ndarray], guessed: Sequence[int]) -> int:
    """Draw on from the logits [V] of each place, one more than `guessed` has tokens, as long as what is drawn was guessed: how many were.

    draw: chooses the next token and takes it; None: the text ended before it.
    """
    for number, (here, guess) in enumerate(zip(logits, (*guessed, None), strict=True)):
        if draw(here) != guess:
            return number
    return len(guessed)


class Speculator:
    """Guesses tokens with a decoder of a smaller model, which has a row for each row of the other.

    tokens: how many ahead. vocab_size: tokens of the other model; own_size: those of the draft; unknown: what it reads instead of one that
    it does not know. blocks: it draws on its device where a request allows it.
    """

    def __init__(self, draft: Decoder, tokens: int, vocab_size: int, own_size: int, unknown: int, blocks: bool = False):
        self.decoder, self.tokens = draft, tokens
        self._vocab_size, self._own_size, self._unknown, self._blocks = vocab_size, own_size, unknown, blocks
        self._read: list[list[int]] = [[] for _ in range(draft.rows)]  # what each row has consumed
        self._kept: list[Kept | None] = [None] * draft.rows

    def window(self, decoder: Decoder) -> int:
        """How many tokens `decoder` looks at together. One that cannot go back begins at the last place where all was sure, and has room
        for what is sure since then."""
        return self.tokens + 1 if decoder.can_rewind else 1 << ((2 * self.tokens + 1).bit_length() - 1)

    def guess(self, wanted: Sequence[Guess]) -> dict[int, list[int]]:
        """The next tokens of each row, at most so many as are wanted; none past what the draft's state holds."""
        able = [each for each in wanted if self.decoder.endless or len(each.ticket.ids) + each.most <= self.decoder.max_len]
        by_block = [each for each in able if self._blocks and each.ticket.draws_on_device]
        by_step = [each for each in able if not (self._blocks and each.ticket.draws_on_device)]
        return self._by_block(by_block) | self._by_step(by_step)

    def _by_step(self, able: list[Guess]) -> dict[int, list[int]]:
        """All rows side by side, drawn on the host."""
        drawn: dict[int, list[int]] = {each.row: [] for each in able}
        lacking = {each.row: self._lacking(each.row, each.ticket.ids, 1) for each in able}
        logits = {row: self._feed(row, ids) for row, ids in lacking.items() if len(ids) > 1}
        logits |= self._step({row: ids[0] for row, ids in lacking.items() if len(ids) == 1})
        for each in able:
            self._keep(each)
        while able:
            for each in able:
                drawn[each.row] += self._draw(each.ticket, logits[each.row], drawn[each.row])
            able = [each for each in able if self._goes_on(each, drawn[each.row])]
            logits = self._step({each.row: drawn[each.row][-1] for each in able})
        return drawn

    def _by_block(self, able: list[Guess]) -> dict[int, list[int]]:
        """All rows side by side, drawn by the device."""
        draws = []
        for each in able:
            ids = each.ticket.ids
            if lacking := self._lacking(each.row, ids[:-1], 0):
                self._feed(each.row, lacking)
            self._keep(each)
            last, ends = self._known(ids[-1:])[0], each.ticket.stop_ids
            draws.append(Draw(each.row, last, ids, each.ticket.request.sampling, each.most, ends))
        drawn = {}
        for each, (tokens, logits) in zip(able, self.decoder.block(draws, self.tokens) if draws else (), strict=True):
            self._read[each.row] += [each.ticket.ids[-1], *(tokens if logits is not None else tokens[:-1])]
            known = next((number for number, token in enumerate(tokens) if token >= self._vocab_size), len(tokens))
            drawn[each.row] = tokens[:known]
        return drawn

    def _lacking(self, row: int, ids: list[int], least: int) -> list[int]:
        """What a row must consume to be at the end of `ids`, at least the last so many; it is set back to where it still agrees."""
        read, most = self._read[row], len(ids) - least
        shared = min(common(read, ids), most)
        if shared < len(read) and not (self.decoder.can_rewind and self.decoder.rewind(row, shared)):
            shared, kept = 0, self._kept[row]
            if kept and len(kept.ids) <= most and kept.ids == ids[: len(kept.ids)]:
                self.decoder.load(row, kept.state)
                shared = len(kept.ids)
            else:
                self.decoder.reset(row)
        self._read[row] = ids[:shared]
        return ids[shared:]

    def _keep(self, each: Guess) -> None:
        """The state of a row where all is sure, if it cannot come back to it otherwise."""
        if not self.decoder.can_rewind:
            self._kept[each.row] = Kept(list(self._read[each.row]), self.decoder.save(each.row))

    def _feed(self, row: int, ids: list[int]) -> np.ndarray:
        self._read[row] += ids
        return self.decoder.feed(self._known(ids), row)

    def _step(self, tokens: dict[int, int]) -> dict[int, np.ndarray]:
        """Rows consume a token each; their logits."""
        if not tokens:
            return {}
        given, active = np.zeros(self.decoder.rows, np.int32), np.zeros(self.decoder.rows, bool)
        for row, token in tokens.items():
            given[row], active[row] = self._known([token])[0], True
            self._read[row].append(token)
        logits = self.decoder.step(given, active)
        return {row: logits[row] for row in tokens}

    def _draw(self, ticket: Ticket, logits: np.ndarray, before: list[int]) -> list[int]:
        """The token after `before`; none where the draft's logits are no numbers."""
        scores = np.full(self._vocab_size, -np.inf, np.float32)  # it may know fewer tokens, or more
        shared = min(self._own_size, self._vocab_size)
        scores[:shared] = logits[:shared]
        try:
            return [ticket.foretell(scores, before)]
        except NotFiniteError:
            return []

    def _goes_on(self, each: Guess, drawn: list[int]) -> bool:
        """Whether it guesses one more after those; none came where the last try gave none."""
        whole = len(self._read[each.row]) == len(each.ticket.ids) + len(drawn) - 1
        return whole and len(drawn) < each.most and drawn[-1] not in each.ticket.stop_ids

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The tokens as the draft can read them."""
        return [token if token < self._own_size else self._unknown for token in ids]
