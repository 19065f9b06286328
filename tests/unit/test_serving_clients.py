"""OpenAI's own client and its own tests, unchanged, against the server over a real socket."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.fakes.runs import ROOT
from tests.fakes.serving import fake

HI = [{"role": "user", "content": "hi"}]
SUITE = ROOT / ".venv" / "openai-tests" / "tests"  # `make test` fetches it
FILES = ("test_completions.py", "chat/test_completions.py", "test_models.py")
# with_all_params sends what is refused by name here (suffix, prediction, logit_bias of "foo"), to a mock that takes everything
CHOSEN = "(create or (Models and (retrieve or list))) and not with_all_params"


@pytest.fixture(scope="module")
def server():
    with fake(names=["mine"], context=64, key="sesame") as running:
        yield running


@pytest.fixture(params=["/v1", ""])
def client(server, request):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    base = f"http://127.0.0.1:{server.port}{request.param}"
    with openai.OpenAI(base_url=base, api_key="sesame", max_retries=0, _strict_response_validation=True) as made:
        yield made


def test_models_and_answers(client):
    assert [model.id for model in client.models.list()] == ["mine"]
    found = client.chat.completions.create(model="mine", messages=HI, max_completion_tokens=5, seed=1, logprobs=True, top_logprobs=2)
    assert found.choices[0].finish_reason in ("stop", "length")
    assert len(found.choices[0].logprobs.content) <= 5
    assert found._request_id.startswith("req_")
    text = client.completions.create(model="mine", prompt="the cat", max_tokens=5, logprobs=2, seed=1)
    assert text.usage.prompt_tokens == 2
    assert len(text.choices[0].logprobs.text_offset) == text.usage.completion_tokens


def test_streams(client):
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="mine", messages=HI, max_tokens=6, seed=3, stream=True, stream_options=options))
    whole = client.chat.completions.create(model="mine", messages=HI, max_tokens=6, seed=3)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    client._strict_response_validation = False  # a finish_reason of null, which OpenAI sends too, is none of its types
    assert [choice.text for chunk in client.completions.create(model="mine", prompt="a", stream=True) for choice in chunk.choices]


def test_errors_are_those_of_the_client_with_code_and_field(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="context_length_exceeded") as error:
        client.completions.create(model="mine", prompt=[5] * 100)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-9", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="mine", messages=HI, response_format={"type": "json_object"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_an_error_in_a_stream_is_raised_by_the_client():
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with fake(fails=3, script="a b ") as running:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="the abacus broke"):
            list(client.completions.create(model="fake", prompt="a", max_tokens=50, temperature=0, stream=True))


def test_a_client_that_waits_for_a_full_queue_gets_its_answer():
    openai = pytest.importorskip("openai", reason="openai is not installed")
    slow = {"rows": 1, "step": 0.02, "script": "a b ", "max_queue": 0}
    with fake(**slow) as running, running.open_stream("/v1/completions", {"prompt": "a", "max_tokens": 30, "temperature": 0}) as first:
        first.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="any")
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=0).completions.create(model="fake", prompt="b", max_tokens=1)
        assert client.completions.create(model="fake", prompt="b", max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.skipif(
    not (SUITE / "conftest.py").is_file(), reason="the sources of the package openai are not there (make test fetches them)"
)
@pytest.mark.skipif(not importlib.util.find_spec("pytest_asyncio"), reason="pytest-asyncio is not installed")
def test_the_tests_of_openais_client_pass_unchanged():
    models = sorted({name for file in FILES for name in re.findall(r'model="([^"]+)"', (SUITE / "api_resources" / file).read_text())})
    chosen = CHOSEN if importlib.util.find_spec("aiohttp") else f"{CHOSEN} and not aiohttp"
    with fake(names=models, script="a b ", max_queue=256) as running:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-k", chosen]
            + [f"tests/api_resources/{file}" for file in FILES],
            cwd=SUITE.parent,
            env=os.environ | {"TEST_API_BASE_URL": f"http://127.0.0.1:{running.port}/v1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 76
