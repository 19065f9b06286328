"""Continuous batching: many requests share one decoder, each in a row of its own, and come and go while others go on.

One `step` is: cancels -> admit the oldest into free rows -> one chunk of the prompt of the oldest that is not filled yet -> one decode
step of all that are -> choose tokens -> give out text. A long prompt so delays the others by one chunk a step. A row's logits do not
depend on the other rows, prompts are cut at the same places whoever else is there, and each request draws with a seed of its own: a text
does not depend on its company.

A prompt that begins as an earlier text did is not computed again. A decoder that can rewind keeps the state in the freed row and goes
back to the common beginning; of others, states are kept after the prompt and after the answer (smedjan_common.inference.prefixes).

With a draft (smedjan_common.inference.speculation) a step gives several tokens: those that a smaller model guessed right, and one more.

Everything here happens in the thread that calls it; smedjan_common.inference.service is a thread around it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smedjan_common.backend import Decoder
from smedjan_common.inference.drawing import Draw, Drawn
from smedjan_common.inference.prefixes import Prefixes, common
from smedjan_common.inference.request import Piece, Request
from smedjan_common.inference.speculation import Guess, Speculator, accepted
from smedjan_common.inference.stats import Stats
from smedjan_common.inference.ticket import Scored, Ticket

CHUNK = 256  # tokens of a prompt that are fed at once
BLOCKS = (4, 16)  # tokens that a device draws by itself; two lengths, since each is compiled
LONGEST = 0.1  # seconds that a long block may take

# (ids, k) -> of each token its log-probability given those before it (None for the first) and the k most probable there
Score = Callable[[Sequence[int], int], Scored]


@dataclass
class Row:
    """A row of the decoder. ids: what it consumed."""

    number: int
    ids: list[int] = field(default_factory=list)
    ticket: Ticket | None = None
    used: int = 0  # when: larger is later

    @property
    def behind(self) -> int:
        """Tokens of its text that it has not consumed: the last one, and those that were sure only after it had looked at them."""
        assert self.ticket
        return len(self.ticket.ids) - len(self.ids)


class Engine:
    """Answers requests with one decoder and the tokenizer of its model.

    reuse: begin from the state of an earlier text where that is the beginning of a prompt. keep_bytes: the most that kept states may take.
    keep_answers: keep states after answers too, for prompts that go on from there. blocks: let the device draw several tokens at a time
    where a request allows it; the decoder's vocabulary is then the tokenizer's. score: gives the log-probabilities of a prompt, for
    requests that echo theirs. speculator: guesses tokens ahead; of as many rows as the decoder.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        *,
        reuse: bool = True,
        keep_bytes: int = 0,
        keep_answers: bool = True,
        blocks: bool = False,
        chunk: int = CHUNK,
        score: Score | None = None,
        speculator: Speculator | None = None,
    ):
        self.decoder, self.tokenizer, self.stats = decoder, tokenizer, Stats()
        self.vocab_size = tokenizer.vocab_size
        self._reuse, self._chunk, self._score = reuse, chunk, score
        self._blocks, self._block_seconds = blocks, 0.0  # of a token in the last block
        self._speculator = speculator
        self._keep_answers = keep_answers and reuse and not decoder.can_rewind
        self._rows = [Row(number) for number in range(decoder.rows)]
        self._waiting: deque[Ticket] = deque()
        self._prefixes = Prefixes(keep_bytes if reuse else 0)
        self._number = 0

    @property
    def rows(self) -> int:
        """How many requests are answered at once."""
        return len(self._rows)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return sum(row.ticket is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered."""
        return bool(self._waiting) or self.running > 0

    def submit(self, request: Request, arrived: float | None = None) -> Ticket:
        """Take a request, which came at this time of time.monotonic (None: now). Raises ConfigError for one that cannot be answered."""
        request.validate(self.vocab_size)
        self._number += 1
        ticket = Ticket(request, self.tokenizer, self._number, arrived)
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request with the next step; one that ended already stays as it is."""
        ticket.cancelled = True

    def step(self) -> list[tuple[Ticket, Piece]]:
        """Go on by one step; gives what is new of each request. What the decoder raises is raised: then no request can go on."""
        live = [row.ticket for row in self._rows if row.ticket] + list(self._waiting)
        for ticket in live:
            if ticket.cancelled:
                ticket.reason = "cancelled"
        self._release()
        self._admit()
        decoding = [(row, row.ticket) for row in self._rows if row.ticket and row.ticket.filled and not row.ticket.reason]
        self._prefill()
        self._decode(decoding)
        pieces = [(ticket, piece) for ticket in live if (piece := self._piece(ticket))]
        self._release()
        return pieces

    def warm_up(self, length: int) -> None:
        """Compile what nearly every request needs, before the first one waits for it: steps, looks, and the chunks of `length` tokens.

        Nothing of it is counted.
        """
        ahead = self._speculator.tokens + 1 if self._speculator else 0
        for _ in self.run([Request((0,) * length, max_tokens=2 + ahead, stop_ids=frozenset())]):
            pass
        self.stats = Stats()

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Piece]]:
        """Answer these requests side by side: (number of the request, its next piece) as they come. Closing it cancels them."""
        yield from self.answer([self.submit(request) for request in requests])

    def answer(self, tickets: Sequence[Ticket]) -> Iterator[tuple[int, Piece]]:
        """The same for requests that were submitted."""
        numbers = {ticket: number for number, ticket in enumerate(tickets)}
        try:
            while any(ticket.reason is None for ticket in numbers):
                for ticket, piece in self.step():
                    yield numbers[ticket], piece
        except GeneratorExit:
            for ticket in numbers:
                self.cancel(ticket)
            self.step()
            raise

    def close(self) -> None:
        """Let go of the decoder and of everything that was kept. No request is answered any more."""
        self._waiting.clear()
        self._rows, self._prefixes, self._speculator = [], Prefixes(0), None
        del self.decoder

    def _piece(self, ticket: Ticket) -> Piece | None:
        """What is new of a request, and how long it took."""
        piece = ticket.piece()
        now, new = time.monotonic(), ticket.generated - ticket.counted
        if new and not ticket.counted:
            self.stats.first_token_seconds.add(now - ticket.arrived)
        elif new:
            self.stats.token_seconds.add((now - ticket.last_time) / new, new)
        if new:
            self.stats.generation_tokens += new
            ticket.counted, ticket.last_time = ticket.generated, now
        if ticket.reason:
            self.stats.finished[ticket.reason] += 1
            self.stats.request_seconds.add(now - ticket.arrived)
        return piece

    def _release(self) -> None:
        """Rows of requests that ended are free, and what their texts came to is kept."""
        self._waiting = deque(ticket for ticket in self._waiting if ticket.reason is None)
        for row in self._rows:
            if row.ticket and row.ticket.reason:
                if self._keep_answers and row.ticket.filled and self._prefixes.wants(row.ids):
                    self._prefixes.keep(row.ids, self.decoder.save(row.number))
                self._number += 1
                row.ticket, row.used = None, self._number

    def _admit(self) -> None:
        """The oldest requests get the free rows, each the one whose text has most in common with its prompt, or the one unused longest."""
        while self._waiting and (free := [row for row in self._rows if row.ticket is None]):
            ticket = self._waiting.popleft()
            row = max(free, key=lambda row: (self._common(row, ticket), -row.used))
            row.ticket = ticket
            self.stats.queue_seconds.add(time.monotonic() - ticket.arrived)
            self._guarded(ticket, self._begin, ticket)

    def _begin(self, ticket: Ticket) -> None:
        if ticket.request.echo:
            scored = None
            if ticket.needs_prompt_scores:
                assert self._score is not None, "the engine was made without scores"
                scored = self._score(ticket.request.prompt, ticket.request.logprobs or 0)
            ticket.echo(scored)
        if ticket.request.max_tokens == 0:
            ticket.reason = "length"

    def _prefill(self) -> None:
        """Feed the next chunk of the oldest prompt, and those of further ones while all are no longer than a chunk."""
        unfilled = [
            (row.ticket.number, row.ticket, row) for row in self._rows if row.ticket and not row.ticket.reason and not row.ticket.filled
        ]
        room = self._chunk
        for _, ticket, row in sorted(unfilled, key=lambda each: each[0]):
            logits = None if ticket.begun else self._resume(row, ticket)
            chunk = ticket.ids[ticket.fed : ticket.fed + self._chunk]  # cut where it would be cut alone
            if len(chunk) > room:
                return
            room -= len(chunk)
            if chunk:
                logits = self.decoder.feed(chunk, row.number)
                row.ids += chunk
                ticket.fed += len(chunk)
            if ticket.filled:
                self._filled(row, ticket, logits)

    def _resume(self, row: Row, ticket: Ticket) -> np.ndarray | None:
        """Bring the row to the state of the longest beginning of the prompt that is known; its logits if that is the whole prompt."""
        shared, kept = self._common(row, ticket), self._prefixes.longest(ticket.request.prompt)
        if kept and kept.length > shared:
            self.decoder.load(row.number, kept.state)
            shared = kept.length
        elif not shared or not self.decoder.rewind(row.number, shared):
            self.decoder.reset(row.number)
            shared = 0
        row.ids = ticket.ids[:shared]
        ticket.begun, ticket.fed, ticket.cached = True, shared, shared
        self.stats.prompt_tokens += ticket.prompt_length
        self.stats.cached_tokens += shared
        return kept.logits if kept and kept.length == ticket.prompt_length else None

    def _common(self, row: Row, ticket: Ticket) -> int:
        """How many tokens of the prompt the row need not be fed; the last one always is, since its logits are wanted."""
        if not self._reuse or not self.decoder.can_rewind or len(row.ids) > self.decoder.max_len:
            return 0
        return min(common(row.ids, ticket.ids), ticket.prompt_length - 1)

    def _filled(self, row: Row, ticket: Ticket, logits: np.ndarray | None) -> None:
        """The prompt was consumed: its state is kept where it may be of use again, and the first token is chosen."""
        assert logits is not None
        wanted = not self.decoder.can_rewind or any(other.request.prompt == ticket.request.prompt for other in self._to_begin())
        if wanted and ticket.cached < ticket.prompt_length and self._prefixes.wants(row.ids):
            self._prefixes.keep(row.ids, self.decoder.save(row.number), logits)
        self._guarded(ticket, self._draw, ticket, logits)

    def _to_fill(self) -> Iterator[Ticket]:
        return (row.ticket for row in self._rows if row.ticket and not row.ticket.reason and not row.ticket.filled)

    def _to_begin(self) -> Iterator[Ticket]:
        yield from (row.ticket for row in self._rows if row.ticket and not row.ticket.begun)
        yield from self._waiting

    def _decode(self, rows: list[tuple[Row, Ticket]]) -> None:
        """The rows whose requests have chosen a token go on from it: over what the draft guesses, by blocks that are drawn on the device
        where that can be, else by one step, drawn here."""
        if self._speculator and rows:
            rows = self._speculate(self._speculator, rows)
        blocks = [(row, ticket) for row, ticket in rows if self._blocks and ticket.draws_on_device]
        steps = [(row, ticket) for row, ticket in rows if not (self._blocks and ticket.draws_on_device)]
        if blocks:
            self._block(blocks)
        if steps:
            self._step(steps)

    def _speculate(self, speculator: Speculator, rows: list[tuple[Row, Ticket]]) -> list[tuple[Row, Ticket]]:
        """Let rows look at what the draft guesses, and take what they would have drawn themselves. Gives those that must go on otherwise,
        all of whose tokens but the last are consumed: nothing was guessed, or what they hold would be overwritten."""
        window = speculator.window(self.decoder)
        fit = [(row, ticket) for row, ticket in rows if self.decoder.endless or len(row.ids) + window <= self.decoder.max_len]
        most = {row.number: min(speculator.tokens, window - row.behind, ticket.most(window) - 1) for row, ticket in fit}
        guessed = speculator.guess([Guess(row.number, ticket, most[row.number]) for row, ticket in fit if most[row.number] > 0])
        if not any(guessed.get(row.number) or row.behind > 1 for row, _ in fit):
            fit = []
        if fit:
            self._look(fit, guessed, window)
        looked = {row.number for row, _ in fit}
        rest = [(row, ticket) for row, ticket in rows if row.number not in looked]
        for row, ticket in rest:
            if row.behind > 1:
                late = ticket.ids[len(row.ids) : -1]
                self.decoder.feed(late, row.number)
                row.ids += late
        return rest

    def _look(self, rows: list[tuple[Row, Ticket]], guessed: dict[int, list[int]], window: int) -> None:
        """The rows read, all at once, what they have not consumed yet and what was guessed, and keep of it what is sure."""
        tokens, active, counts = np.zeros((self.rows, window), np.int32), np.zeros(self.rows, bool), np.zeros(self.rows, np.int32)
        for row, ticket in rows:
            ahead = [*ticket.ids[len(row.ids) :], *guessed.get(row.number, ())]
            tokens[row.number, : len(ahead)], active[row.number] = ahead, True
        logits = self.decoder.look(tokens, active)
        for row, ticket in rows:
            self._guarded(ticket, self._accept, row, ticket, logits[row.number], guessed.get(row.number, []), counts)
        self.decoder.keep(counts)

    def _accept(self, row: Row, ticket: Ticket, logits: np.ndarray, guessed: list[int], counts: np.ndarray) -> None:
        """Draw as long as the guesses were right. What was looked at is consumed as far as it is the text."""
        behind, window = row.behind, len(logits)
        places = logits[behind - 1 : behind + len(guessed), : self.vocab_size]
        right = accepted(lambda here: None if ticket.reason else ticket.draw(here), list(places), guessed)
        self.stats.drafted_tokens += len(guessed)
        self.stats.accepted_tokens += right
        text = ticket.ids[len(row.ids) : len(row.ids) + behind + right]
        if self.decoder.can_rewind or len(text) == window:
            counts[row.number] = len(text)
            row.ids += text

    def _block(self, rows: list[tuple[Row, Ticket]]) -> None:
        """Some tokens of each row. Few while prompts are to be fed, and where many would take long: text is to flow."""
        began, short, long = time.monotonic(), *BLOCKS
        length = long if self._block_seconds * long < LONGEST and not any(self._to_fill()) else short
        draws = [
            Draw(row.number, ticket.ids[-1], ticket.ids, ticket.request.sampling, ticket.most(length), ticket.stop_ids)
            for row, ticket in rows
        ]
        for (row, ticket), drawn in zip(rows, self.decoder.block(draws, length), strict=True):
            row.ids += [ticket.ids[-1], *(drawn.tokens if drawn.logits is not None else drawn.tokens[:-1])]
            self._guarded(ticket, self._take, ticket, drawn)
        self._block_seconds = (time.monotonic() - began) / length

    def _take(self, ticket: Ticket, drawn: Drawn) -> None:
        for token in drawn.tokens:
            ticket.take(token)
            if ticket.reason:  # by a stop text; what came after it in the block is not wanted
                return
        if drawn.logits is not None:
            self._draw(ticket, drawn.logits)

    def _step(self, rows: list[tuple[Row, Ticket]]) -> None:
        """One token of each row."""
        tokens, active = np.zeros(self.rows, np.int32), np.zeros(self.rows, bool)
        for row, ticket in rows:
            tokens[row.number], active[row.number] = ticket.ids[-1], True
        logits = self.decoder.step(tokens, active)
        for row, ticket in rows:
            row.ids.append(ticket.ids[-1])
            self._guarded(ticket, self._draw, ticket, logits[row.number])

    def _draw(self, ticket: Ticket, logits: np.ndarray) -> None:
        ticket.draw(logits[: self.vocab_size])

    def _guarded(self, ticket: Ticket, function: Callable, *args: Any) -> None:
        """Do it; what it raises ends this request alone."""
        try:
            function(*args)
        except Exception as error:
            ticket.fail(error)
