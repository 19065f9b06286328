"""`chat` as people use it: in a real terminal with real Ctrl-C, and in a pipe. The bigram backend keeps it quick."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, write_final
from smedjan_common.commands import chat
from smedjan_common.commands.chat import ChatFlags
from smedjan_common.commands.generate import GenerateFlags
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.runs import ROOT, arguments, start, train_here, write_text
from tests.fakes.typist import CTRL_C, CTRL_D, Typist
from tests.unit.convert_models import TEXT, model_config, parameters

PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    assert train_here(*arguments(write_text(folder), folder / "run", 30, "--seq-len", 256)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def escaping(tmp_path_factory):
    """A model that says nothing but ESC and BEL, the letters with which a terminal is told what to do, in turns of ChatML."""
    tokenizer = Tokenizer.train_from_texts([TEXT] * 3, 300, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = model_config(tokenizer.vocab_size)
    embed = np.full((config.padded_vocab_size, config.dim), 0.1, np.float32)
    embed[tokenizer.encode("\x1b")[0]] = 1
    params = parameters(config) | {"embed.weight": embed}
    about = About(model=config, tokenizer=SavedTokenizer.of(tokenizer), framework={"name": "test"})
    return write_final(tmp_path_factory.mktemp("escaping"), Snapshot(1, params, {}), about)


@pytest.fixture
def terminal(run, tmp_path):
    """Opens a talk in a terminal without colours."""
    opened = []

    def open_one(*words, fake="", path=run, **more):
        environment = {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "NO_COLOR": "1", "SMEDJAN_FAKE": fake} | more
        opened.append(Typist("tests.fakes.chat", path, *words, **environment))
        opened[-1].wait(">>> ")
        return opened[-1]

    yield open_one
    for one in opened:
        one.__exit__()


def piped(*words, said, path):
    process = start("tests.fakes.chat", path, *words, stdin=-1)
    out, err = process.communicate(said, timeout=60)
    return process.returncode, out, err


def test_a_base_model_opens_a_notebook_and_says_why(terminal):
    talk = terminal("--max-tokens", 5)
    assert "base model" in talk.shown
    assert "--template plain" in talk.shown
    talk.type("the cat")
    assert "[5 tokens" in talk.wait("of 256]")
    talk.type("")  # the model goes on
    talk.wait("of 256]")
    talk.type("/context")
    shown = talk.wait("of 256 tokens")
    assert "the cat" in shown
    talk.type("/undo")
    talk.type("/undo")
    talk.wait("taken back: the cat")
    talk.type("", CTRL_D)
    assert talk.end() == 0


def test_a_text_longer_than_the_context_is_told_as_such(terminal):
    talk = terminal("--max-tokens", 3)
    talk.type("iron " * 400)
    talk.wait("[3 tokens")
    talk.type("/context")
    talk.wait("tokens, of which the model sees the last 256 at most.")


def test_ctrl_c_ends_the_answer_and_keeps_it_and_twice_at_the_prompt_leaves(terminal):
    talk = terminal("--template", "plain", fake="decode_seconds=0.05")
    talk.type("the cat")
    talk.wait("\r\n")
    time.sleep(0.6)
    began = time.monotonic()
    talk.type("", CTRL_C)
    assert "stopped; what came is kept" in talk.wait("of 256]")
    assert time.monotonic() - began < 6  # all of it takes 12
    talk.type("/context")
    kept = talk.wait("of 256 tokens")
    assert "Assistant: " in kept
    talk.wait(">>> ")
    talk.type("half a li", "")
    talk.wait("half a li")  # the line is being edited
    talk.type("", CTRL_C)
    talk.wait("Ctrl-C once more")
    talk.wait(">>> ")
    talk.type("", CTRL_C)
    assert talk.end() == 0


def test_sigint_from_another_program_ends_the_answer_alone(terminal):
    talk = terminal("--template", "plain", fake="decode_seconds=0.05")
    talk.type("the cat")
    time.sleep(0.5)
    os.kill(talk.pid, signal.SIGINT)
    talk.wait("stopped; what came is kept")
    talk.wait(">>> ")
    talk.type("/bye")
    assert talk.end() == 0


def test_a_signal_gives_the_terminal_back_as_it_was(terminal):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        talk = terminal()
        assert not talk.echoes, "readline shows what is typed"
        os.kill(talk.pid, number)
        talk.wait("\x1b[?2004l")
        assert talk.end() == code
        assert talk.echoes


def test_several_lines_in_quotes_and_pasted(terminal, tmp_path):
    talk = terminal("--template", "plain", "--max-tokens", 2)
    talk.type('"""one')
    talk.wait("... ")
    talk.type('two"""')
    talk.wait("of 256]")
    talk.type(PASTE.format("three\nfour"))
    talk.wait("of 256]")
    talk.type(f"/save {tmp_path / 'talk.json'}")
    talk.wait("saved in")
    said = [each["content"] for each in json.loads((tmp_path / "talk.json").read_text())["messages"] if each["role"] == "user"]
    assert said == ["one\ntwo", "three\nfour"]
    history = (tmp_path / "smedjan" / "chat_history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in history[:2]] == said
    assert os.stat(tmp_path / "smedjan" / "chat_history.jsonl").st_mode & 0o077 == 0


def test_what_was_typed_is_there_the_next_day(terminal):
    first = terminal("--max-tokens", 2)
    first.type("remember me")
    first.wait("of 256]")
    first.type("/bye")
    first.end()
    second = terminal("--max-tokens", 2)
    second.type("\x1b[A\x1b[A", "")  # twice up, past /bye
    second.wait("remember me")


def test_the_commands_of_a_talk(terminal, tmp_path):
    talk = terminal("--template", "plain", "--max-tokens", 4)
    for typed, shown in (
        ("/?", "/system [TEXT]"),
        ("/system Be a cat.", "the system text is set"),
        ("/system", "Be a cat."),
        ("/retry", "nothing to answer yet"),
        ("hello", "[4 tokens"),
        ("/retry", "[4 tokens"),
        ("/continue", "[4 tokens"),
        ("/set temperature warm", "It is a number."),
        ("/set num_predict 3", ">>> "),
        ("/set parameter temperature 0", ">>> "),
        ("//etc is a folder", "[3 tokens"),
        ("/retry", "the answer is always the same"),
        (f"/save {tmp_path / 'talk.json'}", "saved in"),
        ("/reset", "a new talk begins"),
        (f"/load {tmp_path / 'talk.json'}", "goes on: "),
        ("/context", "User: /etc is a folder"),
        ("/load /no/such/talk", "No such file"),
        ("/rety", "Did you mean /retry"),
        ("/show temperature", "temperature"),
    ):
        talk.type(typed)
        talk.wait(shown)
    values = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert values[0] == {"role": "system", "content": "Be a cat."}
    assert [each["role"] for each in values[1:]] == ["user", "assistant"] * 2


def test_a_file_is_read_into_a_message(terminal, tmp_path):
    (tmp_path / "notes.txt").write_text("the dog")
    talk = terminal("--template", "plain", "--max-tokens", 2)
    talk.type(f"/read {tmp_path / 'notes.txt'} Read this:")
    talk.wait("of 256]")
    talk.type("/context")
    assert "User: Read this:" in talk.wait("the dog")


def test_control_characters_of_a_model_never_reach_a_terminal(terminal, escaping):
    talk = terminal("--max-tokens", 6, "--temperature", 0, path=escaping, TERM="dumb")
    assert "chat template chatml of the model" in talk.shown
    talk.type("hello")
    assert "␛" * 6 in talk.wait("of 128]")
    talk.type("/context")
    talk.wait("of 128 tokens")
    assert "\x1b" not in talk.shown
    code, out, _ = piped("--max-tokens", 6, "--temperature", 0, said="hello\n", path=escaping)
    assert (code, out) == (0, "\x1b" * 6 + "\n"), "a pipe gets the text as it is"


def test_in_a_pipe_each_line_is_a_message_and_each_answer_a_line(run):
    code, out, err = piped("--max-tokens", 6, "--template", "plain", said="the cat\n\n/help\nthe dog", path=run)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 3
    assert ">>>" not in out
    assert "\x1b" not in out
    code, told, _ = piped("--max-tokens", 6, "--template", "plain", "--json", said="the cat\n/help\nthe dog\n", path=run)
    answers = [json.loads(line) for line in told.splitlines()]
    assert [" ".join(answer["content"].split("\n")) for answer in answers] == out.splitlines()
    assert answers[0]["role"] == "assistant"
    assert answers[0]["finish_reason"] == "length"
    assert answers[0]["completion_tokens"] == 6
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]


def test_a_draft_changes_no_answer(run):
    words = "--max-tokens", 9, "--template", "plain"
    said = "the cat\nthe dog\n"
    assert piped(*words, "--draft", run, "--draft-tokens", 2, said=said, path=run)[:2] == piped(*words, said=said, path=run)[:2]


def test_a_line_that_is_no_text_is_refused_by_its_number(run):
    process = start("tests.fakes.chat", run, "--max-tokens", 2, stdin=-1, text=False, encoding=None)
    out, err = process.communicate(b"the cat\n\xff\xfe\n", timeout=60)
    assert process.returncode == 2
    assert len(out.splitlines()) == 1
    assert b"Line 2 of standard input is not UTF-8." in err


def test_a_talk_that_outgrows_the_context_loses_its_oldest_turns_and_says_so(run):
    said = "".join(f"question {i}: {'the dog ran off ' * 8}\n" for i in range(6))
    code, out, err = piped("--max-tokens", 4, "--template", "plain", said=said, path=run)
    assert (code, len(out.splitlines())) == (0, 6)
    assert "no longer fit into the context of 256 tokens" in err
    assert err.count("note: ") == 1, "as of the second time on every message pushes others out"
    code, _, err = piped("--max-tokens", 4, "--template", "plain", said="the dog " * 400, path=run)
    assert code == 2
    assert "Shorten it" in err


def test_what_cannot_be_is_refused_before_anything_is_loaded(run, capsys):
    def never():
        raise AssertionError("a framework was loaded")

    for words, why in (
        (("--system", "Be."), "no chat template"),
        (("--template", "chatml"), "<|im_end|>"),
        (("--temperature", "-1"), "--temperature"),
        (("--max-tokens", "-1"), "--max-tokens"),
        (("--load", "/no/talk"), "Cannot read"),
        (("--draft-tokens", "2"), "--draft"),
    ):
        code = chat.run("fake", never, [str(run), *words])
        done = capsys.readouterr()
        assert (code, done.out) == (2, "")
        assert why in done.err


def test_the_commands_of_the_page_work_as_they_stand(run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    commands = re.findall(r"^(?:smedjan|printf) .*", (ROOT / "docs" / "chat.md").read_text(), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        here = command.replace("smedjan chat", f"{sys.executable} -m tests.fakes.chat")
        done = subprocess.run(["bash", "-c", here], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, command
    assert json.loads((tmp_path / "answers.jsonl").read_text())["completion_tokens"] == 20


def test_flags_are_those_of_generate_where_they_mean_the_same():
    own = {"system", "template", "load", "json"}
    assert {field.name for field in dataclasses.fields(ChatFlags)} - own <= {field.name for field in dataclasses.fields(GenerateFlags)}
