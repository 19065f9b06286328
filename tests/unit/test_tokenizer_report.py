"""The report's figures are those of the tokenizer."""

import re

from smedjan_common.commands import tokenizer as command
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.report import SAMPLES, report


def test_bytes_per_token_longest_and_unused_tokens(tmp_path):
    text = "hammer and iron, " * 50
    (tmp_path / "a.txt").write_text(text)
    tokenizer = Tokenizer.train_from_texts([text, "forge " * 50], 300)
    said = report(tokenizer, [tmp_path])
    expected = len(text) / len(tokenizer.encode(text))
    assert float(re.search(r"your text +([\d.]+)", said)[1]) == round(expected, 2)
    assert all(re.search(rf"{kind} +[\d.]+", said) for kind in SAMPLES)
    assert "longest tokens: ·hammer" in said
    assert re.search(r"unused in your text: \d+ of \d+ .*forge", said)


def test_the_command_prints_it(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hammer and iron, " * 50)
    assert command.main(["--input", str(tmp_path / "a.txt"), "--vocab-size", "280", "--output", str(tmp_path / "t.json"), "--report"]) == 0
    assert "bytes per token" in capsys.readouterr().out
