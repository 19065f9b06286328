"""What a talk and a notebook come to as prompts; settings, files, history, and signs for control characters."""

import json
from types import SimpleNamespace

import pytest

from smedjan_common.chat import files
from smedjan_common.chat.answering import Answering
from smedjan_common.chat.notebook import Notebook
from smedjan_common.chat.reader import _set_up, append_history, read_history
from smedjan_common.chat.settings import SETTINGS, Settings
from smedjan_common.chat.talk import Talk
from smedjan_common.errors import ConfigError, DataError
from smedjan_common.inference.request import Piece, TokenInfo, Usage
from smedjan_common.inference.sampling import Sampling
from smedjan_common.streams import harmless
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import ChatML, Plain


@pytest.fixture(scope="module")
def tokenizer():
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return Tokenizer.train_from_texts(["User: a smith\nAssistant: iron " * 30], vocab_size=280, special_tokens=names)


@pytest.mark.parametrize("kind", [Plain, lambda tokenizer: ChatML()])
def test_a_prompt_begins_with_the_prompt_and_the_answer_before_it(tokenizer, kind):
    """So the state of the talk so far is used again."""
    talk = Talk(tokenizer, kind(tokenizer), 500, "Be a smith.")
    talk.say("iron?")
    first = talk.prompt(10).ids
    talk.take("\n iron!")
    talk.say("more?")
    assert talk.prompt(10).ids[: len(first)] == first
    reply = tokenizer.encode(talk.template.spaced("\n iron!"))
    assert talk.prompt(10).ids[len(first) : len(first) + len(reply)] == reply


def test_the_oldest_turns_are_left_out_and_the_system_text_stays(tokenizer):
    talk = Talk(tokenizer, ChatML(), 120, "Be a smith.")
    for number in range(8):
        talk.say(f"question {number}")
        prompt = talk.prompt(20)
        assert len(prompt.ids) + 20 <= 120
        assert "Be a smith." in tokenizer.decode(prompt.ids)
        assert f"question {number}" in tokenizer.decode(prompt.ids)
        talk.take(f"answer {number}")
        assert bool(prompt.note) == (tokenizer.decode(prompt.ids).count("question") <= number), "each time that a turn is left out"
    assert len(talk.values()["messages"]) == 17, "nothing of the talk itself is lost"
    talk.say("long " * 200)
    with pytest.raises(ConfigError, match="The model takes 120"):
        talk.prompt(20)


def test_what_is_taken_back(tokenizer):
    talk = Talk(tokenizer, Plain(tokenizer), 200)
    assert talk.take_back() is None
    for text in ("one", "two"):
        talk.say(text)
        talk.take(f"{text}!")
    before = talk.prompt(1).ids
    assert tokenizer.decode(before).endswith("Assistant: two!"), "with an answer last, it is gone on with"
    assert talk.take_answer_back()
    assert tokenizer.decode(talk.prompt(1).ids).endswith("User: two\nAssistant:")
    assert talk.take_back() == "two"
    assert [each["content"] for each in talk.messages] == ["one", "one!"]
    talk.reset()
    assert (talk.messages, talk.length(), talk.shown()) == ([], 0, "")


def test_turns_that_were_left_out_come_back_when_there_is_room_again(tokenizer):
    talk = Talk(tokenizer, ChatML(), 90)
    for number in range(4):
        talk.say(f"question {number}")
        talk.prompt(20)
        talk.take(f"answer {number}")
    talk.reset()
    talk.say("question 9")
    assert "question 9" in tokenizer.decode(talk.prompt(20).ids)


def test_a_notebook_is_the_text_and_of_a_long_one_its_end(tokenizer):
    book = Notebook(tokenizer, 40)
    assert book.prompt(10).ids == [tokenizer.eot_id]
    book.say("iron and")
    assert book.prompt(10).ids == tokenizer.encode("iron and")
    book.take(" a smith")
    notes, lengths = [], set()
    for _ in range(12):
        book.say("User: a smith\nAssistant: iron ")
        prompt = book.prompt(10)
        whole = tokenizer.encode(book.text)
        assert len(prompt.ids) + 10 <= 40
        assert whole[len(whole) - len(prompt.ids) :] == prompt.ids
        notes += [prompt.note] if prompt.note else []
        lengths.add((len(whole) - len(prompt.ids)) % 10)
    assert (len(notes), lengths) == (1, {0}), "it is told once, and the beginning moves in steps"
    assert book.take_back()
    assert book.take_answer_back()


def test_settings(tokenizer):
    settings = Settings(Sampling())
    assert settings.having("temp", "0.5").sampling.temperature == 0.5
    assert settings.having("top-k", "5").sampling.top_k == 5
    assert settings.having("num_predict", "7").max_tokens == 7
    assert settings.having("stop", "é\\n").stop == ("é\n",)
    assert settings.having("stop", "a").having("stop", "").stop == ()
    assert [name for name, _, _ in settings.shown()] == list(SETTINGS)
    for name, value, why in (
        ("temperature", "-1", "out of range"),
        ("top_k", "1.5", "whole number"),
        ("warmth", "1", "no setting"),
        ("max_tokens", "-1", "0 is as many"),
    ):
        with pytest.raises(ConfigError, match=why):
            settings.having(name, value)


def test_a_talk_is_saved_and_loaded_and_what_is_none_is_refused(tokenizer, tmp_path):
    talk, book = Talk(tokenizer, ChatML(), 200, "Be."), Notebook(tokenizer, 200)
    talk.say("é\ud800")
    talk.take("漢")
    files.save(tmp_path / "talk", talk, "mine")
    again = Talk(tokenizer, ChatML(), 200)
    files.load(tmp_path / "talk", again)
    assert (again.system, again.messages[1]) == ("Be.", {"role": "assistant", "content": "漢"})
    (tmp_path / "list").write_text(json.dumps([{"role": "user", "content": "from the page"}]))
    files.load(tmp_path / "list", again)
    assert (again.system, again.messages) == ("", [{"role": "user", "content": "from the page"}])
    book.say("a text")
    files.save(tmp_path / "book", book, "mine")
    other = Notebook(tokenizer, 200)
    files.load(tmp_path / "book", other)
    assert other.text == "a text"
    (tmp_path / "none").write_text("{")
    for path, into in (("book", again), ("talk", other), ("none", again), ("nowhere", again)):
        with pytest.raises(DataError):
            files.load(tmp_path / path, into)
    assert again.messages == [{"role": "user", "content": "from the page"}], "a file that is refused changes nothing"


def test_the_history_keeps_lines_and_forgives_what_it_cannot_read(tmp_path):
    path = tmp_path / "state" / "history"
    for text in ("one", "two\nlines é", "x\u2028y\x85z", "\ud800"):
        append_history(path, text)
    with open(path, "a") as file:
        file.write("not json\n12\n")
    assert read_history(path)[:3] == ["one", "two\nlines é", "x\u2028y\x85z"]
    assert read_history(tmp_path / "none") == read_history(None) == []
    append_history(tmp_path / "state" / "history" / "below", "a file is in the way")
    path.write_text("".join(f'"{number}"\n' for number in range(3000)))
    assert read_history(path)[0] == "2000"
    assert len(path.read_text().splitlines()) == 1000


def test_control_characters_become_signs():
    controls = "".join(map(chr, [*range(0x20), 0x7F, *range(0x80, 0xA0), 0x202E, 0x2066]))
    shown = harmless(f"a{controls}é漢🙂")
    assert [character for character in shown if ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0] == ["\t", "\n"]
    assert "\u202e" not in shown
    assert shown.startswith("a␀␁")
    assert shown.endswith("é漢🙂")


class Service:
    """Delivers what it is given, at these moments."""

    def __init__(self, clock, *pieces):
        self.clock, self.pieces = clock, pieces

    def submit(self, request, deliver):
        for seconds, text, reason in self.pieces:
            self.clock.now += seconds
            tokens = tuple(TokenInfo(1, b"a") for _ in text)
            deliver([Piece(text, tokens, reason, Usage(3, sum(len(each[1]) for each in self.pieces)) if reason else None)])
        return self

    def cancel(self):
        pass


def test_the_speed_is_that_of_the_model_however_slow_the_terminal_is(tokenizer, monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr("smedjan_common.chat.answering.time.monotonic", lambda: Clock.now)
    talk = Notebook(tokenizer, 100)
    talk.say("a")
    pieces = ((2.0, "x", None), (0.5, "yy", None), (0.5, "zz", "length"))
    answering = Answering(Service(Clock, *pieces), talk, Settings(Sampling(), 5))
    shown = []
    answer = answering.answer(lambda text: (shown.append(text), setattr(Clock, "now", Clock.now + 7)), shown.append)
    assert ("".join(shown), talk.text, answer.tokens, answer.speed) == ("xyyzz", "axyyzz", 5, 4.0)


def test_libedit_is_set_up_in_its_own_words(monkeypatch):
    """macOS has it in the place of readline; it knows no bracketed paste."""
    told = []
    fake = SimpleNamespace(__doc__="", parse_and_bind=told.append, set_auto_history=None, set_completer_delims=None, set_completer=None)
    for name in ("set_auto_history", "set_completer_delims", "set_completer"):
        setattr(fake, name, lambda value: None)
    monkeypatch.setenv("TERM", "xterm")
    for doc, backend, words in (
        ("Importing this module enables command line editing using libedit readline.", "", ["bind ^I rl_complete"]),
        ("", "editline", ["bind ^I rl_complete"]),
        ("", "readline", ["tab: complete", "set enable-bracketed-paste on"]),
    ):
        told.clear()
        fake.__doc__, fake.backend = doc, backend
        _set_up(fake, ["/help"])
        assert told == words
