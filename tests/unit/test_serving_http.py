"""The server as clients meet it: every route with and without /v1, shapes, errors, limits, leaving, draining."""

import contextlib
import signal
import socket
import time

import pytest

from tests.fakes.serve import tokenizer
from tests.fakes.serving import fake

HI = [{"role": "user", "content": "hi"}]
ROUTES = ("models", "completions", "chat/completions", "tokenize", "detokenize", "tokenizer_info", "health", "metrics")


@pytest.fixture(scope="module")
def server():
    with fake(names=["mine", "gpt-x"], context=64, body=4096, body_seconds=1.0, origins=["https://app.example"]) as running:
        yield running


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_is_there_with_and_without_v1(server, path):
    post = path in ("completions", "chat/completions", "tokenize", "detokenize")
    bodies = {"detokenize": {"tokens": [5]}, "tokenize": {"prompt": "a"}, "chat/completions": {"messages": HI, "max_tokens": 1}}
    for before in ("/v1/", "/"):
        status, headers, _ = server.ask("POST" if post else "GET", before + path, bodies.get(path, {"prompt": "a"}) if post else None)
        assert status == 200
        assert headers["x-request-id"].startswith("req_")
        status, _, found = server.ask("GET" if post else "POST", before + path)
        assert (status, found["error"]["code"]) == (405, "method_not_allowed")


def test_paths_that_there_are_not(server):
    for path in ("/v1", "/v2/models", "/v1/models/", "/v1/completions/", "/%00", "/" + "a" * 3000):
        status, _, found = server.ask("GET", path)
        assert status == 404
        assert found["error"]["message"]


def test_the_list_of_models(server):
    found = server.ask("GET", "/v1/models")[2]
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["mine", "gpt-x"]
    one = found["data"][0]
    assert (one["object"], one["owned_by"], one["max_model_len"], one["chat_template"]) == ("model", "smedjan", 64, "plain")
    assert server.ask("GET", "/v1/models/gpt-x")[2]["id"] == "gpt-x"
    status, _, error = server.ask("GET", "/v1/models/other")
    assert (status, error["error"]["code"]) == (404, "model_not_found")


def test_a_model_that_is_not_served_is_refused_and_an_alias_is_told_back(server):
    error = server.refused("/v1/completions", {"prompt": "a", "model": "other"}, 404)
    assert error["code"] == "model_not_found"
    assert "mine, gpt-x" in error["message"]
    assert server.post("/v1/completions", {"prompt": "a", "model": "gpt-x", "max_tokens": 1})["model"] == "gpt-x"
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})["model"] == "mine"


def test_the_chunks_of_a_chat(server):
    first, *rest, done = server.stream("/v1/chat/completions", {"messages": HI, "max_tokens": 5, "ignore_eos": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert done == "[DONE]"
    for name in ("id", "created", "model", "object"):
        assert {event[name] for event in rest} == {first[name]}
    assert first["object"] == "chat.completion.chunk"
    assert [event["choices"][0]["finish_reason"] for event in rest] == [None] * (len(rest) - 1) + ["length"]
    assert rest[-1]["choices"][0]["delta"] == {}
    assert all(event["choices"][0]["delta"].keys() == {"content"} for event in rest[:-1])


def test_prompts_and_samples_are_told_apart_by_index(server):
    asked = {"prompt": ["the cat", "a smith"], "n": 2, "max_tokens": 6, "seed": 4, "ignore_eos": True}
    found = server.post("/v1/completions", asked)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    texts = ["", "", "", ""]
    for event in server.stream("/v1/completions", asked)[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in found["choices"]]
    alone = server.post("/v1/completions", asked | {"prompt": "a smith", "n": 1})["choices"][0]["text"]
    assert texts[2] == alone
    assert len(set(texts)) == 4


def test_log_probabilities_of_completions(server):
    asked = {"prompt": "the cat", "max_tokens": 4, "logprobs": 3, "seed": 1, "ignore_eos": True}
    choice = server.post("/v1/completions", asked)["choices"][0]
    told = choice["logprobs"]
    assert [len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4
    assert told["text_offset"][0] == len("the cat")
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) in (3, 4)
        assert logprob <= max(top.values()) <= 0
    assert [len(top) for top in server.post("/v1/completions", asked | {"logprobs": 0})["choices"][0]["logprobs"]["top_logprobs"]] == [
        1
    ] * 4
    streamed = [c["logprobs"] for event in server.stream("/v1/completions", asked)[:-1] for c in event["choices"] if c["logprobs"]]
    assert {name: [each for part in streamed for each in part[name]] for name in told} == told


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_prompt_is_scored_by_its_echo(server, tokens):
    prompt = tokenizer().encode("the cat sat on the mat")
    asked = {"prompt": [prompt], "max_tokens": tokens, "echo": True, "logprobs": 1, "temperature": 0}
    found = server.post("/v1/completions", asked)
    told = found["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(prompt) + tokens
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert all(logprob < 0 for logprob in told["token_logprobs"][1:])
    assert told["text_offset"][:3] == [0, 3, 7]
    assert found["choices"][0]["text"].startswith("the cat sat on the mat")
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == tokens
    assert "".join(told["tokens"][: len(prompt)]) == "the cat sat on the mat"


def test_a_prompt_is_echoed_without_its_scores_too(server):
    asked = {"prompt": ["the cat", ""], "max_tokens": 3, "echo": True, "seed": 1, "ignore_eos": True}
    texts = [choice["text"] for choice in server.post("/v1/completions", asked)["choices"]]
    rest = [choice["text"] for choice in server.post("/v1/completions", asked | {"echo": False})["choices"]]
    assert texts == ["the cat" + rest[0], rest[1]]
    streamed = ["", ""]
    for event in server.stream("/v1/completions", asked)[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_the_token_that_ends_a_text_has_an_entry_so_that_echo_scores_every_token():
    with fake(script="<|endoftext|>") as running:
        asked = {"prompt": "the cat", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        choice = running.post("/v1/completions", asked)["choices"][0]
        assert choice["logprobs"]["tokens"] == ["the", " cat", "<|endoftext|>"]
        assert (choice["text"], choice["finish_reason"]) == ("the cat", "stop")
        chat = running.post("/v1/chat/completions", {"messages": HI, "logprobs": True, "temperature": 0})["choices"][0]
        assert (chat["message"]["content"], chat["logprobs"]["content"]) == ("", [])


def test_log_probabilities_of_chats(server):
    asked = {"messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 2, "seed": 2, "ignore_eos": True}
    choice = server.post("/v1/chat/completions", asked)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 6
    assert (
        bytes(byte for each in entries for byte in each["bytes"]).decode("utf-8", "replace").removeprefix(" ")
        == (choice["message"]["content"])
    )
    for each in entries:
        assert each.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert [top.keys() for top in each["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
        assert each["logprob"] <= each["top_logprobs"][0]["logprob"]
    streamed = [
        each
        for event in server.stream("/v1/chat/completions", asked)[:-1]
        for c in event["choices"]
        if c["logprobs"]
        for each in c["logprobs"]["content"]
    ]
    assert streamed == entries


def test_tokens_there_and_back(server):
    tokens = server.post("/tokenize", {"content": "été 😀"})["tokens"]
    assert tokens == server.post("/tokenize", {"prompt": "été 😀", "add_special_tokens": False})["tokens"]
    assert server.post("/detokenize", {"tokens": tokens})["content"] == "été 😀"
    info = server.ask("GET", "/tokenizer_info")[2]
    assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", None)
    assert server.post("/tokenize", {"prompt": info["eos_token"]})["tokens"] == [info["eos_token_id"]], "lm-eval asks so for its id"
    assert server.refused("/tokenize", {"prompt": 5})["param"] == "prompt"
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/detokenize", {}), ("/detokenize", {"tokens": ["a"]})):
        server.refused(path, body)


def test_bodies_that_are_too_long_or_too_slow(server):
    assert server.refused("/v1/completions", b'{"prompt": "' + b"a" * 5000 + b'"}', 413)["code"] == "body_too_large"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"a" * 4096 + b"\r\n"
        )
        client.sendall(b"1000\r\n" + b"a" * 4096 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})


def test_who_leaves_while_sending_harms_nobody(server):
    for sent in (b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(sent)
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})


def test_a_page_of_an_allowed_origin_may_ask_and_others_may_not(server):
    headers = {
        "Origin": "https://app.example",
        "Access-Control-Request-Headers": "x-stainless-lang",
        "Access-Control-Request-Method": "POST",
    }
    status, told, _ = server.ask("OPTIONS", "/v1/chat/completions", headers=headers)
    assert (status, told["access-control-allow-headers"]) == (204, "x-stainless-lang")
    status, told, _ = server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, {"Origin": "https://app.example"})
    assert (status, told["access-control-allow-origin"]) == (200, "https://app.example")
    assert server.refused("/v1/completions", {"prompt": "a"}, 403, Origin="https://evil.example")["code"] == "origin_not_allowed"
    assert server.refused("/v1/completions", {"prompt": "a"}, 403, Host="evil.example")["code"] == "host_not_allowed"


def test_a_key_is_asked_for_and_in_no_log():
    with fake(key="sesame-9", log=True) as running:
        assert running.refused("/v1/completions", {"prompt": "quietly"}, 401)["type"] == "authentication_error"
        running.post("/v1/completions", {"prompt": "quietly", "max_tokens": 1}, Authorization="Bearer sesame-9")
        assert running.ask("GET", "/health")[0] == 200
        running.wait_until(lambda: len(running.log) >= 3)
        assert "sesame" not in "".join(running.log)
        assert "quietly" not in "".join(running.log)
        assert running.log[1].split()[:3] == ["POST", "/v1/completions", "200"]


def test_metrics_are_what_prometheus_reads(server):
    prometheus = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    server.post("/v1/completions", {"prompt": "the cat", "max_tokens": 5, "ignore_eos": True})
    families = {family.name: family for family in prometheus.text_string_to_metric_families(server.ask("GET", "/metrics")[2])}
    assert families["smedjan_generation_tokens"].samples[0].value >= 5
    buckets = families["smedjan_time_to_first_token_seconds"].samples
    assert buckets[-3].labels == {"le": "+Inf"}
    assert buckets[-3].value == buckets[-1].value > 0
    assert families["smedjan_http_requests"].type == "counter"


def test_while_it_loads_it_says_so_and_answers_afterwards():
    with fake(loading=1.5, wait=False) as running:
        running.wait_until(lambda: running.said)
        status, headers, found = running.ask("GET", "/health")
        assert (status, found, headers["retry-after"]) == (503, {"status": "loading"}, "1")
        assert running.refused("/v1/completions", {"prompt": "a"}, 503)["code"] == "unavailable"
        assert running.ask("GET", "/v1/models")[0] == 200
        running.wait_until(lambda: "ready\n" in running.said)
        assert running.ask("GET", "/health")[0] == 200


def test_a_signal_while_it_loads_ends_it():
    with fake(loading=30, wait=False) as running:
        running.wait_until(lambda: running.said)
        running.ask("GET", "/health")
        assert running.stop(signal.SIGINT, timeout=5) == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_nobody_in(number):
    with fake(step=0.02, script="a b ", drain_seconds=5, rows=1) as running:
        asked = {"prompt": "a", "max_tokens": 40, "temperature": 0}
        with running.open_stream("/v1/completions", asked) as active, running.open_stream("/v1/completions", asked) as queued:
            active.readline()
            running.process.send_signal(number)
            running.wait_until(lambda: running.log)
            time.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                running.ask("GET", "/health")
            for answer in (active, queued):
                assert answer.read().endswith(b"data: [DONE]\n\n")
        assert running.stop(number) == 128 + number


def test_what_has_not_ended_when_the_server_must_is_told_so():
    with fake(step=0.02, script="a b ", drain_seconds=0.3, context=4000) as running:
        with running.open_stream("/v1/completions", {"prompt": "a", "max_tokens": 3000, "temperature": 0}) as answer:
            answer.readline()
            running.process.send_signal(signal.SIGTERM)
            end = answer.read()
        assert b'"code":"unavailable"' in end
        assert b"[DONE]" not in end
        assert running.stop() == 143


def test_a_second_signal_ends_at_once():
    asked = {"prompt": "a", "max_tokens": 3000, "temperature": 0}
    with fake(step=0.02, script="a b ", drain_seconds=60, context=4000) as running, running.open_stream("/v1/completions", asked) as answer:
        answer.readline()
        for _ in range(2):  # one that comes twice, to the process and to its group, is one
            running.process.send_signal(signal.SIGINT)
        running.wait_until(lambda: running.log)
        time.sleep(0.4)
        assert running.process.poll() is None
        assert running.stop(signal.SIGINT, timeout=5) == 130


def test_a_device_that_fails_is_told_to_all_and_to_health():
    with fake(fails=5, script="a b ", rows=2) as running:
        error = running.refused("/v1/completions", {"prompt": "a", "max_tokens": 50, "temperature": 0}, 500)
        assert "the abacus broke" in error["message"]
        running.wait_until(lambda: running.log)
        assert "the abacus broke" in "".join(running.log)
        assert running.ask("GET", "/health")[2] == {"status": "dead"}
        status, headers, found = running.ask("POST", "/v1/completions", {"prompt": "a"})
        assert (status, headers["x-should-retry"]) == (500, "false")
        assert "ended" in found["error"]["message"]
        assert running.stop() == 143


def test_an_error_in_a_stream_is_an_event_and_no_done_follows():
    with fake(fails=5, script="a b ") as running:
        with running.open_stream("/v1/completions", {"prompt": "a", "max_tokens": 50, "temperature": 0}) as answer:
            text = answer.read()
        assert answer.status == 200
        assert text.count(b'"error":{') == 1
        assert b"[DONE]" not in text


def test_a_request_waits_for_its_turn_no_longer_than_it_may():
    asked, slow = {"prompt": "a", "max_tokens": 3000, "temperature": 0}, {"rows": 1, "step": 0.02, "script": "a b ", "context": 4000}
    with fake(queue_seconds=0.4, **slow) as running, running.open_stream("/v1/completions", asked) as active:
        active.readline()
        error = running.refused("/v1/completions", {"prompt": "b"}, 503)
        assert error["code"] == "queue_timeout"
        running.wait_for(requests_waiting=0, requests_running=1)


def test_a_stream_without_news_says_that_it_lives_and_clients_skip_it():
    with fake(step=0.3, script="a b ", ping=0.05) as running:
        asked = {"prompt": "a", "max_tokens": 3, "temperature": 0}
        with running.open_stream("/v1/completions", asked) as answer:
            lines = answer.read().split(b"\n\n")
        assert lines.count(b": ping") >= 2
        texts = [choice["text"] for event in running.stream("/v1/completions", asked)[:-1] for choice in event["choices"]]
        assert "".join(texts) == "a b "[:3]


def test_a_connection_that_never_asks_is_closed_and_one_that_works_is_not():
    with fake(idle=0.5, step=0.05, script="a b ") as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as client:
            for byte in b"GET /heal":  # a byte now and then is no request
                with contextlib.suppress(OSError):
                    client.sendall(bytes([byte]))
                time.sleep(0.08)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(10) == b""
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 20, "temperature": 0})["usage"]["completion_tokens"] == 20


def test_both_loopbacks_are_listened_on(server):
    try:
        with socket.create_connection(("::1", server.port), timeout=5) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n")
            assert client.recv(20).startswith(b"HTTP/1.1 200")
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
