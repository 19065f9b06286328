"""JSON of strangers becomes requests: every field may be null, each is of its type and in its range, and what cannot be done is refused."""

import copy
import json

import pytest

from smedjan_common.serving import tokens
from smedjan_common.serving.api_error import ApiError
from smedjan_common.serving.fields import read_object
from smedjan_common.serving.openai_requests import ONLY_COMPLETIONS, REFUSED, read_chat, read_completion
from smedjan_common.serving.served import Served
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.ends import Ends
from tests.fakes.serve import PLAIN, tokenizer

OURS = tokenizer()
EOT = OURS.eot_id
SERVED = Served(("mine", "alias"), 1, OURS, OURS.vocab_size, 64, at_once=20, template=PLAIN)
HELLO = [{"role": "user", "content": "hi"}]


def completion(served=SERVED, **values):
    return read_completion({"prompt": "the cat"} | values, served)


def chat(served=SERVED, **values):
    return read_chat({"messages": HELLO} | values, served)


def refusal(read, **values):
    with pytest.raises(ApiError) as error:
        read(**values)
    assert error.value.status == 400
    return error.value


# every field that is read -> values that are right
GOOD = {
    "model": ["mine", "alias", ""],
    "max_tokens": [0, 1, 7.0, 1 << 40],
    "max_completion_tokens": [0, 9],
    "temperature": [0, 2, 0.5],
    "top_p": [0, 1, 0.3],
    "top_k": [-1, 0, 5],
    "min_p": [0, 0.5, 1],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [1, 1.3],
    "repeat_penalty": [1.1],
    "logit_bias": [{}, {"5": -100, "6": 100}],
    "seed": [0, -9007199254740991, -(1 << 63), (1 << 64) - 1],
    "n": [1, 3],
    "stop": ["a", ["a", "b"], [], ""],
    "stop_token_ids": [[], [3, 4]],
    "ignore_eos": [True, False],
    "stream": [True, False],
    "stream_options": [{}, {"include_usage": True}, {"include_usage": None}],
    "user": ["me"],
    "metadata": [{"a": "b"}],
    "store": [True],
    "service_tier": ["auto"],
    "no_such_field": [{"any": "thing"}],
}
BAD = {
    "model": [5, ["mine"]],
    "max_tokens": [-1, 1.5, "16", True, [], 10**400],
    "max_completion_tokens": [-1, {}],
    "temperature": [-0.1, 2.1, "1", True],
    "top_p": [-0.1, 1.1, "x"],
    "top_k": [-2, 1.5],
    "min_p": [-1, 2],
    "presence_penalty": [-3, "1"],
    "frequency_penalty": [3],
    "repetition_penalty": [0, 1000, []],
    "logit_bias": [[], {"foo": 0}, {"5": 101}, {"5": "x"}, {"999999": 1}, {"-1": 1}, {"²": 1}],
    "seed": [1.5, "7", 1 << 64, -(1 << 63) - 1],
    "n": [0, 129, "2"],
    "stop": [5, [5], ["a"] * 33, "a" * 1001],
    "stop_token_ids": [["a"], [-1], [10**9], 5],
    "ignore_eos": ["yes", 1],
    "stream": ["true", 1],
    "stream_options": [[], "x", {"include_usage": 1}],
}


@pytest.mark.parametrize("read", [completion, chat])
@pytest.mark.parametrize("name", GOOD)
def test_right_values_and_null_are_taken(read, name):
    for value in [*GOOD[name], None]:
        read(**{name: value})


@pytest.mark.parametrize("read", [completion, chat])
@pytest.mark.parametrize("name", BAD)
def test_wrong_values_are_refused_by_name(read, name):
    for value in BAD[name]:
        error = refusal(read, **{name: value})
        assert error.param.split(".")[0] == name
        assert name in error.message


@pytest.mark.parametrize("name", [*REFUSED, *ONLY_COMPLETIONS])
def test_what_cannot_be_done_is_refused_by_name_and_what_does_not_ask_for_it_is_taken(name):
    values = REFUSED | ONLY_COMPLETIONS
    for harmless in (None, *values[name]):
        chat(**{name: harmless})
    for asking in ([{"type": "function"}], {"type": "json_object"}, "x", True, 3):
        error = refusal(chat, **{name: asking})
        assert (error.param, error.code) == (name, "unsupported_parameter")


def test_null_everywhere_is_nothing_everywhere():
    assert completion(**dict.fromkeys([*GOOD, *REFUSED, "best_of", "logprobs", "echo"])).requests[0].max_tokens == 16


def test_the_defaults_are_those_of_openai():
    [request] = completion().requests
    assert (request.max_tokens, request.stop, request.stop_ids, request.logprobs) == (16, (), {EOT}, None)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert chat().requests[0].max_tokens == 64 - len(chat().requests[0].prompt)


def test_max_completion_tokens_wins():
    assert completion(max_tokens=3, max_completion_tokens=5).requests[0].max_tokens == 5


def test_more_tokens_than_the_context_has_room_for_are_cut_not_refused():
    for read in (completion, chat):
        [request] = read(max_tokens=65535).requests
        assert len(request.prompt) + request.max_tokens == 64


def test_the_most_tokens_of_the_server_is_a_limit():
    served = Served(("mine",), 1, OURS, OURS.vocab_size, 64, max_tokens=5, template=PLAIN)
    assert completion(served, max_tokens=50).requests[0].max_tokens == 5
    assert chat(served).requests[0].max_tokens == 5


def test_a_prompt_of_the_whole_context_still_has_a_next_token():
    assert completion(prompt=[1] * 64, max_tokens=9).requests[0].max_tokens == 1
    assert completion(prompt=[1] * 64, max_tokens=0, echo=True, logprobs=1).requests[0].max_tokens == 0


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (completion, {"prompt": [1] * 65}),
        (completion, {"prompt": "x " * 60}),
        (completion, {"prompt": "x" * 1_000_000}),
        (chat, {"messages": [{"role": "user", "content": "x " * 60}]}),
    ],
)
def test_a_prompt_over_the_context_is_refused_with_the_word_that_clients_look_for(read, values):
    error = refusal(read, **values)
    assert error.code == "context_length_exceeded"
    assert "context_length_exceeded" in error.message
    assert "64 tokens" in error.message


@pytest.mark.parametrize(("read", "values"), [(completion, {"prompt": "x" * 9000}), (chat, {"messages": HELLO * 3000})])
def test_a_text_that_is_too_long_whatever_its_tokens_are_is_not_tokenised(read, values, monkeypatch):
    monkeypatch.setattr(type(OURS), "encode", lambda *_: pytest.fail("it was tokenised"))
    assert refusal(read, **values).code == "context_length_exceeded"


def test_prompts_in_all_four_forms():
    one, two = OURS.encode("the cat"), OURS.encode("a smith")
    assert [request.prompt for request in completion(prompt="the cat").requests] == [tuple(one)]
    assert [request.prompt for request in completion(prompt=["the cat", "a smith"]).requests] == [tuple(one), tuple(two)]
    assert [request.prompt for request in completion(prompt=one).requests] == [tuple(one)]
    assert [request.prompt for request in completion(prompt=[one, two], n=2).requests] == [tuple(one)] * 2 + [tuple(two)] * 2


@pytest.mark.parametrize("prompt", ["", None])
def test_no_prompt_begins_a_document(prompt):
    assert completion(prompt=prompt).requests[0].prompt == (EOT,)


@pytest.mark.parametrize("prompt", [[], [[]], 5, {}, [1, "a"], ["a", 1], [[1], "a", [None]], [1.5], [-1], [10**9], [[10**30]], [True]])
def test_prompts_that_are_none_are_refused(prompt):
    assert refusal(completion, prompt=prompt).param.startswith("prompt")


def test_what_stands_before_every_text_stands_there_once_and_what_ends_one_is_what_the_model_says():
    spoken = copy.copy(OURS)
    spoken.ends = Ends(eos_ids=(7,), bos_id=EOT)
    served = Served(("mine",), 1, spoken, OURS.vocab_size, 64, template=PLAIN)
    text = OURS.encode("the cat")
    assert completion(served).requests[0].prompt == (EOT, *text)
    assert completion(served, prompt="").requests[0].prompt == (EOT,)
    assert completion(served, prompt=text).requests[0].prompt == tuple(text), "ids are what they are"
    assert completion(served).requests[0].stop_ids == {EOT, 7}
    assert tokens.tokenize({"prompt": "the cat"}, served)["tokens"] == [EOT, *text]
    assert tokens.tokenize({"prompt": "the cat", "add_special_tokens": False}, served)["tokens"] == text
    assert tokens.tokenizer_info(served)["bos_token"] == "<|endoftext|>"


def test_a_text_that_nothing_begins_is_refused():
    bare = Tokenizer.train_from_texts(["the cat sat. " * 20], vocab_size=270, special_tokens=())
    served = Served(("mine",), 1, bare, bare.vocab_size, 64)
    assert refusal(completion, served=served, prompt="").param == "prompt"
    assert completion(served).requests[0].stop_ids == frozenset()
    assert tokens.tokenizer_info(served)["eos_token"] is None


def test_control_tokens_in_a_text_are_text():
    name = "<|endoftext|>"
    assert EOT not in completion(prompt=f"a{name}b").requests[0].prompt
    assert EOT not in chat(messages=[{"role": "user", "content": name}]).requests[0].prompt
    assert completion(prompt=[5, EOT, 6]).requests[0].prompt == (5, EOT, 6)


def test_half_a_surrogate_pair_is_no_error():
    completion(**json.loads('{"prompt": "a\\ud800b", "stop": "\\udc00"}'))


def test_the_first_sample_has_the_seed_and_the_others_have_seeds_of_their_own():
    seeds = [[request.sampling.seed for request in completion(seed=5, n=n).requests] for n in (1, 3)]
    assert seeds[0] == [5]
    assert seeds[1][0] == 5
    assert len(set(seeds[1])) == 3
    assert completion(seed=-1).requests[0].sampling.seed == (1 << 64) - 1
    assert completion().requests[0].sampling.seed != completion().requests[0].sampling.seed


def test_every_request_can_be_answered_by_the_engine():
    for name, values in GOOD.items():
        for value in values:
            for request in completion(**{name: value}).requests:
                request.validate(OURS.vocab_size)


def test_ignore_eos_leaves_the_tokens_that_were_named():
    assert completion(ignore_eos=True, stop_token_ids=[3]).requests[0].stop_ids == {3}
    assert completion(stop_token_ids=[3]).requests[0].stop_ids == {EOT, 3}
    assert completion(ignore_eos=True).requests[0].stop_ids == frozenset()


def test_best_of_is_n_or_refused():
    completion(n=3, best_of=3)
    for values in ({"best_of": 2}, {"n": 2, "best_of": 1}, {"best_of": 0}):
        assert refusal(completion, **values).param == "best_of"


def test_log_probabilities_are_a_number_in_completions_and_a_switch_in_chats():
    assert [completion(logprobs=k).requests[0].logprobs for k in (None, 0, 5, 20)] == [None, 0, 5, 20]
    assert refusal(completion, logprobs=True).param == refusal(completion, logprobs=21).param == "logprobs"
    assert chat(logprobs=True).requests[0].logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).requests[0].logprobs == 20
    assert chat(logprobs=False, top_logprobs=None).requests[0].logprobs is None
    assert refusal(chat, logprobs=5).param == "logprobs"
    assert refusal(chat, top_logprobs=2).param == refusal(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"


def test_more_texts_than_can_wait_are_refused():
    completion(n=20)
    assert refusal(completion, n=21).param == refusal(completion, prompt=["a"] * 11, n=2).param == "n"


def test_content_comes_in_parts_or_not_at_all():
    whole = chat(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "the cat"}])
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}]
    assert chat(messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]).requests[0].prompt == (
        whole.requests[0].prompt
    )
    chat(messages=[{"role": "user", "content": None}, {"role": "assistant"}, {"role": "user", "content": []}])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ("hi", "messages[0]"),
    ],
)
def test_messages_that_are_none_are_refused_by_place(message, param):
    assert refusal(chat, messages=[message]).param == param
    assert refusal(chat, messages=[]).param == refusal(chat, messages=None).param == "messages"


def test_without_a_template_there_is_no_chat():
    served = Served(("mine",), 1, OURS, OURS.vocab_size, 64)
    assert refusal(chat, served=served).code == "no_chat_template"


def test_the_last_answer_can_be_gone_on_with():
    talk = [*HELLO, {"role": "assistant", "content": "the c"}]
    asked = chat(messages=talk, continue_final_message=True)
    assert OURS.decode(asked.requests[0].prompt).endswith("the c")
    assert chat(messages=talk).strips
    assert not asked.strips


NO_OBJECTS = (b"", b"{", b"[]", b"5", b"null", b'"a"', b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b"\x80")
HUGE = (b"[" * 100_000, b'{"a":' * 50_000, b'{"a": ' + b"1" * 5000 + b"}")


@pytest.mark.parametrize("raw", [*NO_OBJECTS, *HUGE])
def test_bodies_that_are_no_object_are_refused(raw):
    with pytest.raises(ApiError) as error:
        read_object(raw)
    assert (error.value.status, error.value.code) == (400, "invalid_json")
