"""The commands of docs/server.md as they stand; real models in both backends; one text in both, and from `generate`."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.inference.opened import OpenModel
from tests.e2e.test_readme import commands
from tests.fakes.serving import Running
from tests.unit import convert_models

ROOT = Path(__file__).parents[2]
PAGE = "docs/server.md"
ENVIRONMENT = {"SMEDJAN_NO_OPENBLAS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of random weights in runs/mine."""
    folder = tmp_path_factory.mktemp("serve")
    convert_models.neutral(folder / "runs" / "mine")
    return folder


@pytest.fixture(scope="module", params=["jax", "mlx"])
def server(request, folder):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    running = Running(f"smedjan_{request.param}.serve", folder / "runs" / "mine", "--port", 0, "--max-batch", 4, **ENVIRONMENT)
    running.wait_until(lambda: any("Ctrl-C" in line for line in running.said), seconds=120)
    running.backend = request.param
    yield running
    assert running.stop() == 143


def test_the_text_is_that_of_generate_streamed_and_not_alone_and_among_others(server, folder):
    words = ["--prompt", "Once the smith", "--max-tokens", "12", "--seed", "5", "--no-echo", "--backend", server.backend]
    done = subprocess.run(
        [sys.executable, "-m", "smedjan_common.cli", "generate", str(folder / "runs" / "mine"), *words],
        capture_output=True,
        env=os.environ | ENVIRONMENT,
        check=True,
        timeout=120,
    )
    expected = done.stdout.decode().removesuffix("\n")
    asked = {"prompt": "Once the smith", "max_tokens": 12, "seed": 5}
    assert server.post("/v1/completions", asked)["choices"][0]["text"] == expected
    many = server.post("/v1/completions", asked | {"prompt": ["Once the smith", "a", "b", "c d e"]})["choices"]
    assert many[0]["text"] == expected
    assert "".join(choice["text"] for event in server.stream("/v1/completions", asked)[:-1] for choice in event["choices"]) == expected


def test_scores_by_echo_are_those_of_our_own_evaluation(server, folder):
    """As lm-evaluation-harness asks: ids, echo, one token, the sum of token_logprobs[context:-1], greedy by the largest of top_logprobs."""
    opened = OpenModel(folder / "runs" / "mine")
    opened.use(server.backend, importlib.import_module(f"smedjan_{server.backend}.serve").load)
    texts = (
        ("The smith ", "heats the iron"),
        ("Sparks", " fly; the anvil rings."),
        ("def forge", "(iron, heat=1200):"),
        ("\n", "naïve 🔥"),
    )
    pairs = [(opened.tokenizer.encode(context), opened.tokenizer.encode(continuation)) for context, continuation in texts]
    logits = opened.backend.logits(opened.params, np.array(pairs[0][:1], np.int32))
    pairs.append((pairs[0][0], [int(logits[0, -1].argmax())]))  # what the model would say itself
    asked = {"prompt": [[*context, *rest] for context, rest in pairs], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    ours = opened.scorer.continuations(pairs)
    assert {each.greedy for each in ours} == {True, False}
    for expected, (context, rest), choice in zip(ours, pairs, server.post("/v1/completions", asked)["choices"], strict=True):
        told = choice["logprobs"]
        scores, tops = (told[name][len(context) : -1] for name in ("token_logprobs", "top_logprobs"))
        assert len(scores) == len(rest)
        assert sum(scores) == pytest.approx(expected.logprob, abs=1e-5)
        assert all(score == max(top.values()) for score, top in zip(scores, tops, strict=True)) == expected.greedy


def test_openais_client_chats(server):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any")
    asked = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_every_command_of_the_page_runs(folder):
    """Servers are started in the background on free ports, and asked there."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SMEDJAN_API_KEY": ""} | ENVIRONMENT
    ports: dict[str, int] = {}
    running: list[Running] = []
    python = re.findall(r"```python\n(.*?)```", (ROOT / PAGE).read_text(), re.DOTALL)
    try:
        for line in commands(PAGE):
            if line.startswith("pip install"):
                continue
            if line.startswith("export"):
                env["SMEDJAN_API_KEY"] = "sesame"
            elif line.startswith("smedjan serve"):
                port = (re.search(r"--port (\d+)", line) or ["", "8080"])[1]
                words = re.sub(r"--port \d+", "", line).replace("runs/mine", str(folder / "runs" / "mine")).split()[1:]
                running.append(Running("smedjan_common.cli", *words, "--port", 0, "--backend", "mlx", **env))
                running[-1].wait_until(lambda: any("Ctrl-C" in each for each in running[-1].said))
                ports[port] = running[-1].port
            else:
                _ask(["bash", "-c", f"{line} --fail-with-body --no-progress-meter"], ports, env)
        assert len(running) == 2
        for block in python:
            _ask([sys.executable, "-c", block], ports, env)
    finally:
        for each in running:
            each.stop()


def _ask(command, ports, env):
    command[-1] = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[found[1]]}", command[-1])
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    assert done.stdout
