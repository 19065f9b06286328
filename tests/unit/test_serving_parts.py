"""The parts of the server by themselves: log-probabilities of half characters, events, bodies, clients that leave or do not read."""

import asyncio
import json

import pytest

from smedjan_common.inference.request import TokenInfo
from smedjan_common.serving import sse
from smedjan_common.serving.api_error import STATUSES, ApiError
from smedjan_common.serving.bodies import Bodies
from smedjan_common.serving.departures import Gone, unless_gone
from smedjan_common.serving.logprobs import LEAST, LegacyLogprobs, chat_logprobs
from smedjan_common.serving.served import Served
from tests.fakes.serve import tokenizer

OURS = tokenizer()
SERVED = Served(("mine",), 1, OURS, OURS.vocab_size, 64)
BYTE = {OURS.decode_bytes([token]): token for token in range(OURS.vocab_size) if token not in SERVED.control}


def token(raw: bytes, logprob: float | None = -1.0, top: tuple = ()) -> TokenInfo:
    return TokenInfo(BYTE.get(raw, 5), raw, logprob, top)


def halves() -> list[TokenInfo]:
    """An emoji byte by byte between two letters."""
    return [token(b"a"), *(token(bytes([byte])) for byte in "😀".encode()), token(b"b")]


def test_offsets_count_characters_and_half_ones_have_names_of_their_own():
    told = LegacyLogprobs(7, SERVED)(halves())
    assert told["text_offset"] == [7, 8, 8, 8, 8, 9]
    assert told["tokens"] == ["a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "b"]


def test_offsets_go_on_from_piece_to_piece():
    legacy = LegacyLogprobs(0, SERVED)
    parts = [legacy([each])["text_offset"][0] for each in halves()]
    assert parts == LegacyLogprobs(0, SERVED)(halves())["text_offset"]


def test_bytes_of_a_chat_are_exact():
    entries = chat_logprobs(halves(), SERVED)["content"]
    assert bytes(byte for each in entries for byte in each["bytes"]).decode() == "a😀b"
    assert [each["token"] for each in entries][:2] == ["a", "�"]


def test_the_chosen_token_is_among_the_most_probable_and_the_larger_of_one_name_counts():
    other = BYTE[b"b"]
    [top] = LegacyLogprobs(0, SERVED)([token(b"a", -3.0, ((other, -0.5),))])["top_logprobs"]
    assert top == {"b": -0.5, "a": -3.0}
    [top] = LegacyLogprobs(0, SERVED)([TokenInfo(other, b"b", -2.0, ((other, -0.5),))])["top_logprobs"]
    assert top == {"b": -0.5}


def test_a_control_token_has_its_name_and_adds_no_text():
    end = TokenInfo(OURS.eot_id, b"", -0.1, ())
    told = LegacyLogprobs(3, SERVED)([end, token(b"a")])
    assert (told["tokens"], told["text_offset"]) == (["<|endoftext|>", "a"], [3, 3])
    assert chat_logprobs([end], SERVED)["content"] == []


def test_minus_infinity_is_a_number_that_json_has():
    assert LegacyLogprobs(0, SERVED)([token(b"a", float("-inf"))])["token_logprobs"] == [LEAST]


def test_an_event_is_one_line_to_every_reader():
    text = "a\u2028b\u2029c\x85d\x0be\x0c\x1cf\r\n😀"
    raw = sse.events([{"text": text}])
    assert raw.endswith(b"\n\n")
    assert len(raw.decode().strip().splitlines()) == 1
    assert json.loads(raw.removeprefix(b"data: ")) == {"text": text}
    assert json.loads(sse.to_json("\ud800")) == "?"
    with pytest.raises(ValueError, match="JSON"):
        sse.to_json(float("nan"))


def receiver(*messages, seconds=0.0):
    waiting = list(messages)

    async def receive():
        await asyncio.sleep(seconds)
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    return receive


def part(raw, more=True):
    return {"type": "http.request", "body": raw, "more_body": more}


def read(bodies, receive, length=None):
    async def whole():
        async with bodies.read(receive, length) as raw:
            assert bodies.held == len(raw)
            return raw

    try:
        return asyncio.run(whole())
    except ApiError as error:
        assert bodies.held == 0
        return error.status


def test_bodies_are_read_whole_up_to_their_limits():
    bodies = Bodies(most=10, together=15, seconds=0.2)
    assert read(bodies, receiver(part(b"ab"), part(b"cd", False))) == b"abcd"
    assert bodies.held == 0
    assert read(bodies, receiver(part(b"a" * 6), part(b"a" * 6))) == 413
    assert read(bodies, receiver(), length="11") == 413
    assert read(bodies, receiver(), length="9" * 5000) == 413
    assert read(bodies, receiver(part(b"a"))) == 408
    with pytest.raises(Gone):
        read(bodies, receiver(part(b"a"), {"type": "http.disconnect"}))


def test_bodies_that_come_at_once_share_a_limit():
    bodies = Bodies(most=10, together=15, seconds=5)

    async def both():
        async with bodies.read(receiver(part(b"a" * 9, False)), None):  # until it is understood
            with pytest.raises(ApiError) as error:
                async with bodies.read(receiver(part(b"a" * 9)), None):
                    pass
        return error.value

    error = asyncio.run(both())
    assert (error.status, error.retry_after) == (429, 1)
    assert bodies.held == 0


def test_work_ends_when_the_client_leaves_and_not_before():
    ended = []

    async def work():
        try:
            await asyncio.sleep(0.1)
            return "whole"
        finally:
            ended.append(1)

    assert asyncio.run(unless_gone(receiver(), work())) == "whole"
    with pytest.raises(Gone):
        asyncio.run(unless_gone(receiver(part(b""), {"type": "http.disconnect"}), work()))
    assert len(ended) == 2


def test_a_client_that_does_not_read_is_one_that_left(monkeypatch):
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.05)
    closed = []

    async def events():
        for _ in range(3):
            yield b"data: 1\n\n"

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    with pytest.raises(Gone):
        asyncio.run(sse.EventStream(events(), lambda: closed.append(1))({}, receiver(), send))
    assert closed == [1]


def test_every_error_tells_clients_whether_to_try_again():
    for status, about in STATUSES.items():
        error = ApiError(status, "No.", retry_after=1)
        assert error.headers().get("x-should-retry") == (None if about.retry is None else str(about.retry).lower())
        assert error.body()["error"]["type"]
    assert ApiError(500, "No.").headers() == {"x-should-retry": "false"}
