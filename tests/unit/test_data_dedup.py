"""Repeats are left out and nothing else: planted exact and near repeats are found, different documents stay, fields are kept."""

import json
import random
import re

import numpy as np
import pytest

from smedjan_common.commands import dedup as command
from smedjan_common.errors import DataError
from smedjan_common.text.dedup import _multipliers, dedup, minhash
from smedjan_common.text.records import Reading

WORDS = [
    f"{a}{b}{c}" for a in ("ir", "ham", "fo", "sm", "an", "co") for b in ("on", "mer", "rge", "ith", "vil", "al") for c in ("", "s", "ed")
]


def document(draw: random.Random, length: int = 200) -> str:
    return " ".join(draw.choices(WORDS, k=length))


def nearly(draw: random.Random, text: str, changes: int) -> str:
    words = text.split()
    for _ in range(changes):
        words[draw.randrange(len(words))] = draw.choice(WORDS)
    return " ".join(words)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text, "url": f"u{number}"}) + "\n" for number, text in enumerate(texts)))
    return str(path)


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_planted_repeats_are_found_and_others_stay(tmp_path):
    draw = random.Random(0)
    originals = [document(draw) for _ in range(300)]
    exact = originals[:40]
    near = [nearly(draw, text, 2) for text in originals[40:140]]  # about 10 of 196 runs of five change: similarity 0.9
    report = dedup([write(tmp_path / "a.jsonl", originals + exact + near)], str(tmp_path / "out.jsonl"))
    kept = read(tmp_path / "out.jsonl")
    assert (report.documents, report.exact) == (440, 40)
    assert report.near >= 95
    assert report.kept == len(kept) == 440 - report.exact - report.near
    assert [record["text"] for record in kept[:300]] == originals
    assert kept[7]["url"] == "u7"
    assert kept[7]["source"].endswith("a.jsonl:8")
    assert report.samples["exact"][0]["kept"].endswith(":1")
    assert report.samples["exact"][0]["dropped"].endswith(":301")


def test_only_exact_repeats_on_request(tmp_path):
    draw = random.Random(1)
    texts = [document(draw) for _ in range(20)]
    file = write(tmp_path / "a.jsonl", [*texts, texts[3], nearly(draw, texts[4], 1), "", "!!", "??"])
    report = dedup([file], str(tmp_path / "out.jsonl"), threshold=None)
    assert (report.exact, report.near, report.kept) == (1, 0, 24)
    report = dedup([file], str(tmp_path / "out.jsonl"))
    assert (report.exact, report.near, report.kept) == (1, 1, 23)  # texts without words are no repeats of each other


def test_signatures_estimate_jaccard_similarity():
    draw, functions = random.Random(2), _multipliers()
    errors = []
    for changes in (1, 3, 6, 12, 25, 50):
        for _ in range(6):
            one = document(draw, 300)
            other = nearly(draw, one, changes)
            left, right = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), other.split()))
            truth = len(left & right) / len(left | right)
            errors.append((minhash(one, *functions) == minhash(other, *functions)).mean() - truth)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06  # sqrt(p (1 - p) / 112) <= 0.047


SCRIPTS = {  # first and last character of scripts that set no spaces between words
    "chinese": ("\u4e00", "\u9fff"),
    "japanese": ("\u3041", "\u30f6"),
    "thai": ("\u0e01", "\u0e30"),
    "khmer": ("\u1780", "\u17b3"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_repeats_are_found_where_no_spaces_part_the_words(tmp_path, script):
    draw = random.Random(4)
    first, last = map(ord, SCRIPTS[script])
    originals = ["".join(chr(draw.randint(first, last)) for _ in range(300)) for _ in range(30)]
    near = [f"{text[:99]}{chr(first)}{text[100:200]}{chr(last)}{text[201:]}" for text in originals[:10]]  # 10 of 296 runs of five change
    report = dedup([write(tmp_path / "a.jsonl", originals + near)], str(tmp_path / "out.jsonl"))
    assert (report.near, report.exact, report.kept) == (10, 0, 30)
    assert [record["text"] for record in read(tmp_path / "out.jsonl")] == originals


SPACED = ["Iron and fire, naïve café; déjà-vu 42!", "слово за словом", "다듬은 쇠와 불", "def f(x_1):\n  return x_1**2", "بيت"]


@pytest.mark.parametrize("text", SPACED)
def test_text_with_spaces_has_the_signature_it_always_had(text, monkeypatch):
    now = minhash(text * 9, *_multipliers())
    monkeypatch.setattr("smedjan_common.text.dedup._WORD", re.compile(r"\w+"))
    assert np.array_equal(now, minhash(text * 9, *_multipliers()))


def test_processes_and_separators_give_the_same(tmp_path):
    draw = random.Random(3)
    texts = [document(draw, 400) for _ in range(200)]
    texts += [nearly(draw, text, 2) for text in texts[:50]]
    (tmp_path / "a.txt").write_text("<|sep|>\n".join(texts))
    reading = Reading(separator="<|sep|>\n")
    reports = [dedup([str(tmp_path / "a.txt")], str(tmp_path / f"{count}.jsonl"), reading=reading, processes=count) for count in (1, 2)]
    assert reports[0] == reports[1]
    assert reports[0].documents == 250
    assert reports[0].near >= 48
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_the_command_reports_and_refuses(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", ["iron and fire"] * 3 + ["a hammer"])
    arguments = ["--input", file, "--output", str(tmp_path / "o.jsonl"), "--report", str(tmp_path / "r.json")]
    assert command.main(arguments) == 0
    assert "2 of 4 documents; dropped 2 exact, 0 near" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["exact"] == 2
    assert command.main(arguments) == 2
    assert command.main([*arguments, "--force", "--threshold", "2"]) == 2
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(DataError, match="Line 2"):
        dedup([str(tmp_path / "b.jsonl")], str(tmp_path / "never.jsonl"))
    assert not (tmp_path / "never.jsonl").exists()
