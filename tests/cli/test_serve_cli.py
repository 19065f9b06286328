"""`smedjan serve`: what it says, what it refuses before a model is loaded, what its flags do. The bigram backend keeps it quick."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from smedjan_common.commands import serve
from tests.fakes.bigram import BigramBackend, load
from tests.fakes.runs import ROOT, arguments, train_here, write_text
from tests.fakes.serving import Running


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    assert train_here(*arguments(write_text(folder), folder / "mine", 30)) == 0
    return folder / "mine"


@contextlib.contextmanager
def serving(run, *words, **environment):
    running = Running("tests.fakes.serve_run", run, "--port", 0, *words, **environment)
    try:
        running.wait_until(lambda: any("Ctrl-C" in line for line in running.said))
        yield running
    finally:
        running.stop()


def refused(capsys, *words):
    code = serve.run("fake", load, [str(word) for word in words])
    return code, capsys.readouterr().err


def test_it_says_where_it_answers_with_what_and_how_to_ask(run):
    with serving(run, "--max-batch", 3, "--alias", "gpt-x", "other") as running:
        said = "".join(running.said)
        assert f"mine answers at http://127.0.0.1:{running.port}/v1" in said
        assert "context 16 tokens; 3 texts at once" in said
        assert f"in a browser: http://127.0.0.1:{running.port}/\n" in said
        assert f"curl http://127.0.0.1:{running.port}/v1/completions" in said
        assert "chats: plain" in said
        assert "the model has no chat template" in "".join(running.log)
        assert [model["id"] for model in running.ask("GET", "/v1/models")[2]["data"]] == ["mine", "gpt-x", "other"]
        assert running.metrics()["batch_rows"] == 3
        assert running.metrics()["generation_tokens_total"] == 0, "what warms it up does not count"
        found = running.post("/v1/completions", {"prompt": "the", "max_tokens": 4, "temperature": 0})
        assert found["usage"]["completion_tokens"] <= 4
        assert found["system_fingerprint"].startswith("fp_")
        assert running.stop(signal.SIGINT) == 130


def test_the_text_is_that_of_generate(run, capsys):
    from smedjan_common.commands import generate

    assert generate.run("fake", load, [str(run), "--prompt", "the cat", "--max-tokens", "8", "--seed", "3", "--no-echo"]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    with serving(run) as running:
        found = running.post("/v1/completions", {"prompt": "the cat", "max_tokens": 8, "seed": 3})["choices"][0]["text"]
    assert found == expected


def test_a_draft_is_told_changes_no_text_and_has_its_metrics(run):
    asked = {"prompt": "the cat", "max_tokens": 12, "seed": 3}
    with serving(run, "--draft", run, "--draft-tokens", 2) as running:
        assert "draft: mine, 2 tokens ahead" in "".join(running.said)
        found = running.post("/v1/completions", asked)["choices"][0]["text"]
        figures = running.metrics()
    assert figures["spec_decode_num_draft_tokens_total"] == figures["spec_decode_num_accepted_tokens_total"] > 0, "its own draft"
    with serving(run) as running:
        assert running.post("/v1/completions", asked)["choices"][0]["text"] == found


def test_limits_and_the_key_come_from_flags_and_the_key_from_the_environment_too(run):
    words = ("--max-tokens", 2, "--context", 8, "--chat-template", "none", "--cors-origin", "https://app.example", "--no-log")
    with serving(run, *words, SMEDJAN_API_KEY="sesame") as running:
        key = {"Authorization": "Bearer sesame"}
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 99}, **key)["usage"]["completion_tokens"] <= 2
        assert running.refused("/v1/completions", {"prompt": [5] * 9}, **key)["code"] == "context_length_exceeded"
        assert running.refused("/v1/completions", {"prompt": "a"}, 401)
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        assert running.refused("/v1/chat/completions", chat, **key)["code"] == "no_chat_template"
        assert running.ask("OPTIONS", "/v1/models", headers={"Origin": "https://app.example"})[0] == 204
        assert "sesame" not in "".join(running.said + running.log)
        assert not [line for line in running.log if line.startswith("POST")]


def test_everywhere_without_a_key_is_warned_of(run):
    with serving(run, "--host", "0.0.0.0") as running:
        assert "warning: everybody who reaches 0.0.0.0" in "".join(running.log)
        assert f"mine answers at http://127.0.0.1:{running.port}/v1" in "".join(running.said)
        assert running.ask("GET", "/health")[0] == 200
    with serving(run, "--host", "0.0.0.0", "--api-key", "sesame\n") as running:  # as out of a file
        assert "warning" not in "".join(running.log)
        assert running.ask("GET", "/v1/models", headers={"Authorization": "Bearer sesame"})[0] == 200


def test_a_port_in_use_is_told_before_the_model_is_loaded(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = refused(capsys, run, "--port", port)
    assert code == 2
    assert f"Port {port} of 127.0.0.1 is in use." in err
    assert "--port" in err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--max-batch", 0), "--max-batch is 0"),
        (("--max-queue", -1), "--max-queue is -1"),
        (("--max-tokens", 0), "--max-tokens is 0"),
        (("--context", 17), "context of 16"),
        (("--queue-timeout", "-1"), "--queue-timeout is -1"),
        (("--api-key", ""), "--api-key is empty"),
        (("--api-key", " "), "--api-key is empty"),
        (("--api-key", "nyckel-å"), "letters that no header carries"),
        (("--cors-origin", "app.example"), "is no origin"),
        (("--cors-origin", "https://app.example/"), "is no origin"),
        (("--port", 70000), "--port is 70000"),
        (("--host", "192.0.2.1", "--port", 0), "is no address of this machine"),
        (("--host", "a" * 70, "--port", 0), "is no address of this machine"),
        (("--host", ".x", "--port", 0), "is no address of this machine"),
        (("--chat-template", "chatml"), "<|im_"),
        (("--chat-template", "no-such"), "no-such"),
        (("--model-alias", "x"), "--alias"),
    ],
)
def test_flags_that_cannot_be_are_refused(run, capsys, words, what):
    with contextlib.suppress(SystemExit):
        code, err = refused(capsys, run, *words)
        assert code == 2
        assert what in err
        return
    assert what in capsys.readouterr().err


def test_a_path_without_a_model_is_refused(tmp_path, capsys):
    assert refused(capsys, tmp_path)[0] == 2
    assert refused(capsys, tmp_path / "none")[0] == 2


def test_a_missing_package_is_named_with_what_installs_it(run, capsys, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, real=serve.importlib.util.find_spec: None if name == "uvicorn" else real(name)
    )
    code, err = refused(capsys, run)
    assert code == 2
    assert "Missing: uvicorn." in err
    assert "pip install 'smedjan[serve]'" in err


def test_only_a_server_that_starts_imports_its_packages():
    code = "import sys, smedjan_common.cli, smedjan_common.commands.serve; print({'starlette', 'uvicorn', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(run, tmp_path, capsys):
    shutil.copytree(run / "final", tmp_path / "mine")
    for weights in (tmp_path / "mine").rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100] + b"x" * 100)  # noticed when they are read, which is after the port was taken
    code, err = refused(capsys, tmp_path / "mine", "--port", 0)
    assert code == 2
    assert "error: " in err
    assert "Traceback" not in err


def test_slots_that_do_not_fit_are_refused_with_exit_code_3(run, capsys, monkeypatch):
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 1)
    code, err = refused(capsys, run, "--max-batch", 64, "--port", 0)
    assert code == 3
    assert "--max-batch" in err


def test_as_many_texts_at_once_as_fit(run, monkeypatch):
    from smedjan_common.inference.opened import OpenModel

    opened = OpenModel(run)
    flags = serve.ServeFlags(str(run))
    monkeypatch.setattr(OpenModel, "rows", lambda self, wanted, length, keep_rows=0, scores=False: min(wanted, 5))
    assert serve._engine(opened, "fake", lambda: (BigramBackend, "float32"), flags, 16).rows == 5
