"""What users of other servers complain of does not happen here, over a real socket. A complaint, where it was made, and its test:

half characters in streams (llama.cpp #4036 #4446 #28926, exo #1691, mlx-vlm #1771)          test_no_chunk_has_half_a_character
stop texts leak or must align with tokens (vLLM #3574 #2577 #3672), are ignored (mlxcel #1466)   test_a_stop_text_never_leaks
hold-back makes empty first chunks (vLLM #13087 #45636)                                      test_no_chunk_of_text_is_empty
no usage in streams, or a wrong one (vLLM #8625)                                             test_usage_in_streams
a full context is an error instead of a cut (vLLM #42474 #33418)                             test_a_full_context_cuts_the_answer
`stop` for a text that was cut (llama.cpp #7198 #28711, litellm #25825)                      test_stop_and_length_are_told_apart
a client that left is answered on (llama.cpp #24496 #13262, vLLM #54947, litellm #37140)     test_who_leaves_is_not_answered
cancelling a queued request killed the active one (ik_llama #1929)                           test_who_leaves_the_queue_harms_nobody
one request at a time (mlx-lm #499, mlx-examples #1198)                                      test_requests_share_the_steps
the queue has no end (mlx-vlm #1782)                                                         test_a_full_queue_is_told
answers depend on the company (oMLX #3476), seeds are ignored beside others (vLLM #51226)    test_company_changes_no_answer
state leaks from one request into another (vllm-mlx #784)                                    test_company_changes_no_answer
control tokens in a user's text become control tokens (transformers #29279, llama.cpp #26273)   test_control_tokens_in_a_message_are_text
the beginning of a text twice (vLLM #2012 #55288, llama-cpp-python #1501)               test_a_prompt_has_the_tokens_of_its_text_and_no_more
a base model never ends, or talks to itself (llama.cpp #6638, mlx-knife #14)                 test_a_model_that_never_ends_is_ended
a wrong media type (LitServe #359), the whole text in each chunk (TensorRT-LLM #3280)        test_chunks_are_what_is_new
arrays used in another thread than made them (mlx-lm #1181, mlx #3727)                       test_inference_service.py
a cache without a limit in bytes (mlx-lm #1390 #854)                                         test_inference_engine.py
DNS rebinding and pages of others (ollama #17721, gpt4all #3587)                             test_serving_access.py
fields that are taken and ignored (Rapid-MLX #733)                                           test_serving_requests.py
"""

import concurrent.futures
import json
import time

import pytest

from tests.fakes.serve import tokenizer
from tests.fakes.serving import fake

HI = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def server():
    """Four slots and no end of text."""
    with fake(rows=4, context=64) as running:
        yield running


@pytest.fixture(scope="module")
def slow():
    """One slot, 10 ms a step, texts that end only where they are cut; at most two requests wait."""
    with fake(rows=1, step=0.01, context=4000, max_queue=2, script="a b ") as running:
        yield running


def deltas(events):
    return [choice["delta"]["content"] for event in events[:-1] for choice in event["choices"] if choice["delta"].get("content")]


def test_no_chunk_has_half_a_character():
    text = "été 😀👩‍👩‍👧 日本語 🇸🇪."
    with fake(script=text + "<|endoftext|>") as running:
        events = running.stream("/v1/chat/completions", {"messages": HI, "logprobs": True} | GREEDY)
        assert "".join(deltas(events)) == text
        assert not any("�" in piece for piece in deltas(events))
        entries = [each for event in events[:-1] for c in event["choices"] if c["logprobs"] for each in c["logprobs"]["content"]]
        assert bytes(byte for each in entries for byte in each["bytes"]).decode() == text
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 99} | GREEDY)["choices"][0]["text"] == text


@pytest.mark.parametrize("stop", ["mat", "t on", "the cat sat on the mat", ["zzz", "😀", "sat on t"], "."])
def test_a_stop_text_never_leaks(stop):
    text = "the cat sat on the mat. the end"
    first = min(at for each in ([stop] if isinstance(stop, str) else stop) if (at := text.find(each)) >= 0)
    with fake(script=text + "<|endoftext|>") as running:
        asked = {"messages": HI, "stop": stop} | GREEDY
        assert "".join(deltas(running.stream("/v1/chat/completions", asked))) == text[:first]
        choice = running.post("/v1/chat/completions", asked)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text[:first], "stop")


def test_no_chunk_of_text_is_empty():
    with fake(script="sat sat sat<|endoftext|>") as running:
        events = running.stream("/v1/completions", {"prompt": "a", "stop": ["sat sat sat sat"], "max_tokens": 50} | GREEDY)
        texts = [choice["text"] for event in events[:-1] for choice in event["choices"] if choice["finish_reason"] is None]
        assert all(texts)
        assert "".join(texts) == "sat sat sat"


def test_usage_in_streams(server):
    asked = {"prompt": "the cat", "max_tokens": 7, "seed": 1, "ignore_eos": True}
    whole = server.post("/v1/completions", asked)["usage"]
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["total_tokens"]) == (len(tokenizer().encode("the cat")), 7, 9)
    *events, last, done = server.stream("/v1/completions", asked | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert last["choices"] == []
    assert {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens")} == {"prompt_tokens": 2, "completion_tokens": 7}
    assert all(not event.get("usage") for event in events)
    assert all(not event.get("usage") for event in server.stream("/v1/completions", asked)[:-1])
    many = server.post("/v1/completions", asked | {"prompt": ["the cat", "a smith"], "n": 2})["usage"]
    assert many["prompt_tokens"] == 2 + len(tokenizer().encode("a smith")), "a prompt counts once"
    assert many["completion_tokens"] == 28


def test_a_full_context_cuts_the_answer(server):
    found = server.post("/v1/completions", {"prompt": [5] * 60, "max_tokens": 65535, "ignore_eos": True})
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == 64
    assert server.refused("/v1/completions", {"prompt": [5] * 65})["code"] == "context_length_exceeded"


def test_stop_and_length_are_told_apart():
    with fake(script="the cat<|endoftext|>") as running:
        for tokens, reason, text in ((1, "length", "the"), (2, "length", "the cat"), (3, "stop", "the cat"), (9, "stop", "the cat")):
            asked = {"messages": HI, "max_tokens": tokens} | GREEDY
            found = running.post("/v1/chat/completions", asked)
            assert (found["choices"][0]["finish_reason"], found["choices"][0]["message"]["content"]) == (reason, text)
            assert found["usage"]["completion_tokens"] == min(tokens, 3), "the end that was drawn is one that was generated"
            assert running.stream("/v1/chat/completions", asked)[-2]["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_is_not_answered(slow, streamed):
    before = slow.metrics()
    if streamed:
        with slow.open_stream("/v1/completions", {"prompt": "a", "max_tokens": 3000} | GREEDY) as answer:
            assert answer.readline().startswith(b"data: {")
    else:
        with pytest.raises(TimeoutError):
            slow.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3000} | GREEDY, timeout=0.3)
    slow.wait_for(5, requests_running=0, requests_cancelled_total=before["requests_cancelled_total"] + 1)
    assert slow.metrics()["generation_tokens_total"] < before["generation_tokens_total"] + 1000


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_the_queue_harms_nobody(slow, streamed):
    before = slow.metrics()["requests_cancelled_total"]
    with slow.open_stream("/v1/completions", {"prompt": "a", "max_tokens": 60} | GREEDY) as active:
        active.readline()
        if streamed:
            with slow.open_stream("/v1/completions", {"prompt": "b", "max_tokens": 2000} | GREEDY):
                slow.wait_for(requests_waiting=1)
        else:
            with pytest.raises(TimeoutError):
                slow.ask("POST", "/v1/completions", {"prompt": "b", "max_tokens": 2000} | GREEDY, timeout=0.2)
        slow.wait_for(2, requests_waiting=0, requests_cancelled_total=before + 1)
        assert slow.metrics()["requests_running"] == 1
        assert active.read().endswith(b"data: [DONE]\n\n")


def test_requests_share_the_steps():
    with fake(rows=8, step=0.02, script="a b ") as running:

        def ask(tokens):
            begun = time.monotonic()
            running.post("/v1/completions", {"prompt": "a", "max_tokens": tokens} | GREEDY)
            return time.monotonic() - begun

        alone = ask(25)
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            assert max(clients.map(ask, [25] * 8)) < 4 * alone


def test_a_full_queue_is_told(slow):
    long = {"prompt": "a", "max_tokens": 3000} | GREEDY
    with slow.open_stream("/v1/completions", long) as first, slow.open_stream("/v1/completions", long):
        first.readline()
        slow.wait_for(requests_running=1, requests_waiting=1)
        with slow.open_stream("/v1/completions", long):
            slow.wait_for(requests_waiting=2)
            status, headers, found = slow.ask("POST", "/v1/completions", long)
    assert (status, found["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (headers["retry-after"], headers["x-should-retry"]) == ("1", "true")
    slow.wait_for(5, requests_running=0, requests_waiting=0)
    slow.post("/v1/completions", {"prompt": "a", "max_tokens": 1})


def test_company_changes_no_answer(server):
    asked = [
        {"prompt": prompt, "max_tokens": 12, "temperature": warm, "seed": seed, "frequency_penalty": 0.5, "logprobs": 1}
        for prompt in ("the cat", "a smith at", "été")
        for warm, seed in ((0, None), (1, 7), (1, 8))
    ]

    def text(values):
        return json.dumps(server.post("/v1/completions", values)["choices"])

    alone = [text(values) for values in asked]
    with concurrent.futures.ThreadPoolExecutor(9) as clients:
        assert list(clients.map(text, asked)) == alone
        assert list(clients.map(text, [values for values in asked for _ in range(3)]))[::3] == alone
    assert [text(values) for values in asked] == alone
    assert len(set(alone)) == len(alone)


def test_control_tokens_in_a_message_are_text(server):
    name = "<|endoftext|>"
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": name}]})["tokens"]
    assert tokenizer().eot_id not in tokens
    assert name in server.post("/detokenize", {"tokens": tokens})["prompt"]
    assert tokenizer().eot_id not in server.post("/tokenize", {"prompt": f"a {name}"})["tokens"]
    echoed = server.post("/v1/completions", {"prompt": name, "max_tokens": 0, "echo": True, "logprobs": 0})["choices"][0]
    assert echoed["text"] == name
    assert len(echoed["logprobs"]["tokens"]) > 1


def test_a_prompt_has_the_tokens_of_its_text_and_no_more(server):
    expected = tokenizer().encode("the cat")
    assert server.post("/tokenize", {"prompt": "the cat", "add_special_tokens": True})["tokens"] == expected
    assert server.post("/v1/completions", {"prompt": "the cat", "max_tokens": 1})["usage"]["prompt_tokens"] == len(expected)
    tokens = server.post("/tokenize", {"messages": HI})["tokens"]
    assert server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 1})["usage"]["prompt_tokens"] == len(tokens)


def test_a_model_that_never_ends_is_ended():
    with fake(script="the cat\nUser: again", context=64) as running:
        found = running.post("/v1/chat/completions", {"messages": HI} | GREEDY)["choices"][0]
        assert (found["message"]["content"], found["finish_reason"]) == ("the cat", "stop")
        found = running.post("/v1/completions", {"prompt": "a"} | GREEDY)["choices"][0]
        assert found["finish_reason"] == "length"


def test_chunks_are_what_is_new(server):
    asked = {"messages": HI, "seed": 3, "max_tokens": 9, "ignore_eos": True}
    whole = server.post("/v1/chat/completions", asked)["choices"][0]["message"]["content"]
    pieces = deltas(server.stream("/v1/chat/completions", asked))
    assert "".join(pieces) == whole
    assert len(pieces) > 1
