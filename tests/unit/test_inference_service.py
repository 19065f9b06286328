"""The device thread: many clients at once, a bounded queue, cancels, and a last piece for everybody however it ends."""

import contextlib
import threading
import time

import pytest

from smedjan_common.errors import ConfigError, OutOfMemoryError
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.inference.service import QueueFull, Service, Unavailable
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.rows import FakeDecoder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_texts(["some text"] * 5, vocab_size=257)


@contextlib.contextmanager
def serving(tokenizer, rows=2, max_queue=4, seconds=0.0, **more):
    """A service over a fake decoder whose steps take `seconds`, and the decoder."""
    decoder = FakeDecoder(tokenizer.vocab_size, rows)
    step = decoder.step

    def slow(tokens, active):
        time.sleep(seconds)
        decoder.thread = threading.current_thread().name
        return step(tokens, active)

    decoder.step = slow
    service = Service(lambda: Engine(decoder, tokenizer), max_queue, **more)
    service.start()
    try:
        yield service, decoder
    finally:
        service.close()


class Inbox:
    """A client: collects pieces, waits for the last."""

    def __init__(self):
        self.pieces, self.ended = [], threading.Event()

    def __call__(self, pieces):
        self.pieces += pieces
        if pieces[-1].finish_reason:
            self.ended.set()

    def last(self, timeout=10):
        assert self.ended.wait(timeout), "no last piece came"
        return self.pieces[-1]

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)


ENDLESS = {"max_tokens": None, "ignore_eot": True}


def wait(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


def test_64_clients_at_once_get_the_texts_that_they_would_get_alone(tokenizer):
    requests = [Request(tokenizer.encode(f"client {n}"), 5 + n % 20, Sampling(seed=n)) for n in range(64)]
    inboxes = [Inbox() for _ in requests]
    with serving(tokenizer, rows=4, max_queue=64) as (service, decoder):
        threads = [threading.Thread(target=service.submit, args=pair) for pair in zip(requests, inboxes, strict=True)]
        for thread in threads:
            thread.start()
        for one, inbox in zip(requests, inboxes, strict=True):
            inbox.last()
            alone = Engine(FakeDecoder(tokenizer.vocab_size), tokenizer)
            assert inbox.text == "".join(piece.text for _, piece in alone.run([one]))
        assert decoder.thread == "smedjan-device"
        report = service.stats()
        assert (report.running, report.waiting, report.alive, report.seconds_since_step) == (0, 0, True, None)
        assert report.engine.finished.total() == 64


def test_a_full_queue_is_told_at_once_and_takes_all_or_none(tokenizer):
    with serving(tokenizer, rows=1, max_queue=2, seconds=0.01) as (service, _):
        handles = [service.submit(Request([1], **ENDLESS), Inbox())]
        wait(lambda: service.stats().running == 1)
        with pytest.raises(QueueFull, match="at most 2"):
            service.submit_all([(Request([1], **ENDLESS), Inbox())] * 3)
        assert service.waiting == 0
        handles += service.submit_all([(Request([1], **ENDLESS), Inbox())] * 2)
        with pytest.raises(QueueFull):
            service.submit(Request([1], **ENDLESS), Inbox())
        handles[1].cancel()
        wait(lambda: service.waiting == 1)
        service.submit(Request([1], **ENDLESS), Inbox())


def test_half_of_many_go_away_and_their_rows_are_free_within_two_iterations(tokenizer):
    with serving(tokenizer, rows=8, max_queue=16) as (service, decoder):
        inboxes = [Inbox() for _ in range(8)]
        handles = [service.submit(Request([n], **ENDLESS), inbox) for n, inbox in enumerate(inboxes)]
        wait(lambda: all(inbox.pieces for inbox in inboxes))
        counts = service.call(lambda engine: ([handle.cancel() for handle in handles[::2]], decoder.count("step"))[1])
        for inbox in inboxes[::2]:
            assert inbox.last().finish_reason == "cancelled"
        wait(lambda: decoder.count("step") >= counts + 3)
        active = [event[1] for event in decoder.events if event[0] == "step"][counts:]
        assert max(active[2:]) == 4
        assert not any(inbox.ended.is_set() for inbox in inboxes[1::2])


def test_a_client_that_cannot_take_its_pieces_is_as_one_that_went_away(tokenizer):
    def broken(_):
        raise ConnectionError

    with serving(tokenizer, rows=1) as (service, _):
        service.submit(Request([1], **ENDLESS), broken)
        good = Inbox()
        service.submit(Request([1], 3, ignore_eot=True), good)
        assert good.last().finish_reason == "length"


def test_deliveries_can_be_handed_on_once_an_iteration(tokenizer):
    order = []
    with serving(tokenizer, rows=3, flush=lambda: order.append("flush")) as (service, _):
        inboxes = [Inbox() for _ in range(3)]
        for inbox in inboxes:
            service.submit(Request([1], 4, ignore_eot=True), lambda pieces, inbox=inbox: (order.append("piece"), inbox(pieces)))
        for inbox in inboxes:
            inbox.last()
        wait(lambda: order[-1] == "flush")
    assert "flush" in order[order.index("piece") :]
    assert order.count("piece") > 3


def test_when_the_thread_dies_everybody_is_told_and_nobody_new_is_taken(tokenizer):
    with serving(tokenizer, rows=1, seconds=0.002) as (service, decoder):
        inboxes = [Inbox() for _ in range(3)]
        for inbox in inboxes:
            service.submit(Request([1], **ENDLESS), inbox)
        wait(lambda: inboxes[0].pieces)

        def lost(*_):
            raise OutOfMemoryError("The device ran out of memory.", "It was full.", "Take less.")

        decoder.step = lost
        for inbox in inboxes:
            assert inbox.last().finish_reason == "error"
            assert "ran out of memory" in inbox.last().error
        wait(lambda: not service.alive)
        with pytest.raises(Unavailable, match="ran out of memory"):
            service.submit(Request([1]), Inbox())
        with pytest.raises(Unavailable):
            service.call(lambda engine: None)


def test_what_opening_raises_is_raised(tokenizer):
    def open():
        raise OutOfMemoryError("Too large.", "", "")

    service = Service(open)
    with pytest.raises(OutOfMemoryError):
        service.start()
    assert not service.alive


def test_a_request_that_cannot_be_answered_is_refused_before_it_is_queued(tokenizer):
    with serving(tokenizer) as (service, _):
        with pytest.raises(ConfigError, match="no token"):
            service.submit(Request([]), Inbox())
        assert service.alive


def test_draining_waits_for_what_runs_and_takes_nothing_new(tokenizer):
    with serving(tokenizer, rows=1, seconds=0.005) as (service, _):
        inbox = Inbox()
        service.submit(Request([1], 20, ignore_eot=True), inbox)
        assert service.drain(10)
        assert inbox.last().finish_reason == "length"
        with pytest.raises(Unavailable):
            service.submit(Request([1]), Inbox())


def test_draining_cancels_what_does_not_end_in_time(tokenizer):
    with serving(tokenizer, rows=1, seconds=0.005) as (service, _):
        inboxes = [Inbox(), Inbox()]
        for inbox in inboxes:
            service.submit(Request([1], **ENDLESS), inbox)
        assert not service.drain(0.1)
        assert {inbox.last().finish_reason for inbox in inboxes} == {"cancelled"}


def test_closing_gives_everybody_a_last_piece(tokenizer):
    with serving(tokenizer, rows=1, seconds=0.005) as (service, _):
        inboxes = [Inbox(), Inbox()]
        for inbox in inboxes:
            service.submit(Request([1], **ENDLESS), inbox)
        wait(lambda: inboxes[0].pieces)
        service.close()
        assert {inbox.last().finish_reason for inbox in inboxes} == {"cancelled"}
        assert not service.alive


def test_functions_run_in_the_device_thread_and_their_errors_come_back(tokenizer):
    with serving(tokenizer) as (service, _):
        assert service.call(lambda engine: (threading.current_thread().name, engine.rows)) == ("smedjan-device", 2)
        with pytest.raises(ZeroDivisionError):
            service.call(lambda engine: 1 / 0)
        assert service.alive
