"""A decoder of several rows without a framework. Its logits depend on every token so far and on their order, so a state that is wrong by
one token gives another text. It records what it was asked; faults can be asked for.
"""

from dataclasses import dataclass

import numpy as np

from smedjan_common.inference.drawing import Drawn
from smedjan_common.inference.sampling import sample

PRIME = 1_000_003


@dataclass(frozen=True)
class Saved:
    states: tuple[int, ...]

    @property
    def nbytes(self):
        return 100

    @property
    def position(self):
        return len(self.states) - 1


class FakeDecoder:
    """`states[row]`: the state after each token so far. script: the ids of a text, prompt first, that it wants to write."""

    def __init__(self, vocab_size, rows=1, max_len=1 << 30, rewinds=True, script=None):
        self.vocab_size, self.rows, self.max_len, self.can_rewind, self.script = vocab_size, rows, max_len, rewinds, script
        self.endless = max_len >= 1 << 30
        self.states = [[7] for _ in range(rows)]
        self.events, self.broken = [], set()  # tokens whose logits are not finite

    def position(self, row=0):
        return len(self.states[row]) - 1

    def feed(self, ids, row=0):
        assert len(ids), "nothing was fed"
        self.events.append(("feed", row, len(ids)))
        for token in ids:
            self._consume(row, token)
        return self._logits(row, ids[-1])

    def step(self, tokens, active):
        assert tokens.shape == active.shape == (self.rows,)
        self.events.append(("step", int(active.sum())))
        logits = np.zeros((self.rows, self.vocab_size + 5), np.float32)
        for row in np.flatnonzero(active):
            self._consume(row, int(tokens[row]))
            logits[row] = self._logits(row, int(tokens[row]))
        return logits

    def look(self, tokens, active):
        assert len(tokens) == len(active) == self.rows
        self.events.append(("look", int(active.sum()), tokens.shape[1]))
        logits = np.zeros((*tokens.shape, self.vocab_size + 5), np.float32)
        self.looked = tokens
        for row in np.flatnonzero(active):
            before = list(self.states[row])
            assert self.position(row) + tokens.shape[1] <= self.max_len
            logits[row] = [self._after(row, int(token)) for token in tokens[row]]
            self.states[row] = before
        return logits

    def keep(self, counts):
        assert self.can_rewind or set(counts.tolist()) <= {0, self.looked.shape[1]}
        for row, count in enumerate(counts):
            for token in self.looked[row, :count]:
                self._consume(row, int(token))

    def block(self, draws, steps):
        """What a device would draw; now and then it leaves the choice to the host."""
        self.events.append(("block", len(draws), steps))
        drawn = []
        for draw in draws:
            assert draw.token == draw.history[-1]
            assert draw.most > 0
            ids, new, logits = list(draw.history), [], self._after(draw.row, draw.token)
            while True:
                if self.states[draw.row][-1] % 7 == 0 or not np.isfinite(logits).all():
                    drawn.append(Drawn(new, logits[: self.vocab_size]))
                    break
                new.append(sample(logits[: self.vocab_size], ids, draw.sampling, len(ids)))
                ids.append(new[-1])
                if new[-1] in draw.stop_ids or len(new) == min(steps, draw.most):
                    drawn.append(Drawn(new, None))
                    break
                logits = self._after(draw.row, new[-1])
        return drawn

    def reset(self, row=None):
        for each in range(self.rows) if row is None else [row]:
            self.states[each] = [7]

    def rewind(self, row, position):
        assert self.can_rewind
        assert position <= self.position(row)
        if self.position(row) > self.max_len:
            return False
        self.events.append(("rewind", row, position))
        del self.states[row][position + 1 :]
        return True

    def save(self, row):
        self.events.append(("save", row, self.position(row)))
        return Saved(tuple(self.states[row]))

    def load(self, row, saved):
        self.events.append(("load", row, saved.position))
        self.states[row] = list(saved.states)

    def count(self, name):
        return sum(event[0] == name for event in self.events)

    def _after(self, row, token):
        self._consume(row, token)
        return self._logits(row, token)

    def _consume(self, row, token):
        self.states[row].append((self.states[row][-1] * 31 + int(token) + 1) % PRIME)

    def _logits(self, row, last):
        logits = np.full(self.vocab_size + 5, 99, np.float32)  # what pads the embedding is no token
        if self.script is not None:
            logits[: self.vocab_size] = 0
            logits[self.script[min(self.position(row), len(self.script) - 1)]] = 9
        else:
            logits[: self.vocab_size] = np.random.default_rng(self.states[row][-1]).normal(size=self.vocab_size) * 2
        if last in self.broken:
            logits[: self.vocab_size] = np.nan
        return logits
