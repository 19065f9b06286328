"""`eval`: figures are those of the model computed by hand, bad input is told before a framework is imported. The bigram backend keeps it
quick."""

import json
import math

import numpy as np
import pytest

from smedjan_common.checkpoint import newest, read_weights
from smedjan_common.commands import eval
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.bigram import load
from tests.fakes.runs import arguments, train_here, write_text

TEXTS = ["the cat é sat on the mat. " * 30, "the dog", "", "\ud800 the end"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    assert train_here(*arguments(write_text(folder), folder / "run", 30)) == 0
    return folder / "run"


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return file


def measure(capsys, *words, code=0):
    assert eval.run("fake", load, list(map(str, words))) == code
    done = capsys.readouterr()
    return done.out if code == 0 else done.err


def logprobs(run):
    """log p(next | last) of the bigram model, [vocab, vocab] float64, and its tokenizer."""
    info = newest(run)
    tokenizer = Tokenizer.load(info.path)
    embed = read_weights(info, None)["embed.weight"].astype(np.float64)[: tokenizer.vocab_size]
    logits = embed @ embed.T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokenizer


def test_every_figure_is_that_of_the_definition(run, texts, capsys):
    table, tokenizer = logprobs(run)
    [row] = json.loads(measure(capsys, run, "--dataset", texts, "--json"))["texts"]
    nats = ends = tokens = 0.0
    mended = [text.replace("\ud800", "\ufffd") for text in TEXTS if text]
    for text in mended:
        ids = [tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id]
        own = -table[ids[:-1], ids[1:]]
        nats, ends, tokens = nats + own[:-1].sum(), ends + own[-1], tokens + len(own) - 1
    num_bytes, words = sum(len(text.encode()) for text in mended), sum(len(text.split()) for text in mended)
    assert (row["documents"], row["tokens"], row["bytes"], row["words"]) == (3, tokens, num_bytes, words)
    assert row["end_of_text_tokens"] == 3
    expected = {
        "nats": nats,
        "end_of_text_nats": ends,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "word_perplexity": math.exp(nats / words),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "loss_with_end_of_text": (nats + ends) / (tokens + 3),
        "bits_per_byte_with_end_of_text": (nats + ends) / math.log(2) / num_bytes,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert row["loss_stderr"] > 0


def test_a_token_file_of_the_same_texts_gives_the_same_figures(run, texts, capsys, tmp_path):
    from smedjan_common.data.prepare import prepare

    prepare([texts], tmp_path / "texts.bin", Tokenizer.load(newest(run).path))
    both = json.loads(measure(capsys, run, "--dataset", texts, tmp_path / "texts.bin", "--json"))["texts"]
    of_text, of_tokens = ({key: value for key, value in row.items() if key != "dataset"} for row in both)
    assert of_tokens == pytest.approx(of_text)
    manifest = json.loads((tmp_path / "texts.bin.json").read_text())
    (tmp_path / "texts.bin.json").write_text(json.dumps(manifest | {"bytes": 5 * manifest["bytes"]}))
    [row] = json.loads(measure(capsys, run, "--dataset", tmp_path / "texts.bin", "--json"))["texts"]
    assert row["bits_per_byte"] == pytest.approx(of_text["bits_per_byte"] / 5), "the bytes are those of the text, as the manifest has them"
    (tmp_path / "texts.bin.offsets").unlink()
    assert json.loads(measure(capsys, run, "--dataset", tmp_path / "texts.bin", "--json"))["texts"][0]["nats"] == of_text["nats"]


def test_windows_and_batches_change_nothing_for_a_model_that_looks_back_one_token(run, texts, capsys):
    rows = [
        json.loads(measure(capsys, run, "--dataset", texts, "--json", *words))["texts"][0]
        for words in ((), ("--stride", 3), ("--context", 7, "--stride", 2), ("--batch-tokens", 1))
    ]
    assert all(row == pytest.approx(rows[0], rel=1e-6, nan_ok=False) for row in rows[1:])


def test_progress_comes_within_a_document_and_ends_with_all_of_it(run, texts):
    from smedjan_common.evaluation.texts import find_texts, score_text
    from smedjan_common.inference.opened import OpenModel
    from smedjan_common.inference.scoring import Scorer

    opened, told = OpenModel(run), []
    opened.use("fake", load)
    scorer = Scorer(opened.backend, opened.params, 16, batch_tokens=16)
    [text] = find_texts([str(texts)], opened.tokenizer)
    score_text(text, scorer, opened.tokenizer, stride=None, field="text", limit=0, show=lambda *row: told.append(row))
    assert len(told) > 10
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == (str(texts), text.size, text.size)


def test_nothing_named_is_what_the_run_validates_on(run, capsys):
    found = json.loads(measure(capsys, run, "--json"))
    assert found["texts"][0]["dataset"].endswith("val.bin")
    assert found["texts"][0]["tokens"] > 0
    assert (found["step"], found["backend"], found["model"]) == (30, "fake", "run")


def test_what_is_printed_can_be_read_and_is_what_json_has(run, texts, capsys, tmp_path):
    out = measure(capsys, run, "--dataset", texts, "--tasks", "recall", "--limit", 8, "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"bits per byte   {found['texts'][0]['bits_per_byte']:.4f} ± {found['texts'][0]['bits_per_byte_stderr']:.4f}" in out
    recalled = found["tasks"][1]
    assert (recalled["task"], recalled["items"], recalled["chance"]) == ("recall 4", 8, 0.25)
    assert f"recall 4   accuracy {recalled['figures']['accuracy']['value']:.4f}" in out
    assert f"recall: mean of 4 tasks, 0 is guessing and 1 all right: {found['groups']['recall']['centred']:.4f}" in out


def test_questions_that_lose_their_beginning_are_told(run, capsys):
    """The context is 16 tokens."""
    out = measure(capsys, run, "--tasks", "sums", "copy", "--limit", 3, "--shots", 1)
    assert "copy 64  accuracy" in out
    assert "(3 items, chance 0.25, 1 example, 3 longer than the context)" in out.split("copy 64")[1]


def test_answers_say_what_was_made_of_each_question(run, capsys, tmp_path):
    table, tokenizer = logprobs(run)
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"query": f"the {n}", "choices": ["cat", "é"], "gold": 0}) for n in "abc"))
    [task] = json.loads(measure(capsys, run, "--tasks", tmp_path / "q.jsonl", "--answers", tmp_path / "answers.jsonl", "--json"))["tasks"]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(row["where"] for row in rows) == [f"{tmp_path}/q.jsonl:{n}" for n in (1, 2, 3)]
    for row in rows:
        for option, value in zip(row["options"], row["logprobs"], strict=True):
            context = tokenizer.encode(row["contexts"][0])
            ids = [*context[-1:], *tokenizer.encode(row["contexts"][0] + " " + option)[len(context) :]]
            assert value == pytest.approx(table[ids[:-1], ids[1:]].sum(), rel=1e-5)
        assert row["chosen"] == int(np.argmax(row["logprobs"]))
    assert task["figures"]["accuracy"]["value"] == sum(row["right"]["accuracy"] for row in rows) / 3


def test_answers_in_words_are_the_greedy_continuation_of_the_line(run, capsys, tmp_path):
    table, tokenizer = logprobs(run)
    at, greedy = tokenizer.encode("the")[-1], []
    while len(greedy) < 40:
        at = int(table[at].argmax())
        greedy.append(at)
    line = tokenizer.decode(greedy).split("\n")[0]
    (tmp_path / "q.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "the", "answer": [answer, "no" * 30]}) for answer in (line, line + "!"))
    )
    [task] = json.loads(measure(capsys, run, "--tasks", tmp_path / "q.jsonl", "--answers", tmp_path / "answers.jsonl", "--json"))["tasks"]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert line.strip()
    if "\n" in tokenizer.decode(greedy):
        assert [row["text"] for row in rows] == [line, line]
        assert task["figures"]["exact match"]["value"] == 0.5
    else:
        assert all(row["text"].startswith(line[:20]) for row in rows)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--stride", "9999"), "--stride is 9999"),
        (("--limit", "-1"), "--limit is -1"),
        (("--shots", "-1"), "--shots is -1"),
        (("--dataset", "gone.txt"), "no input 'gone.txt'"),
        (("--dataset", "gone.bin"), "no token file 'gone.bin'"),
        (("--tasks", "gone.jsonl"), "no task, file or folder 'gone.jsonl'"),
        (("--tasks", "sum"), "Did you mean sums"),
        (("--tasks", "sums", "--limit", "2", "--shots", "2"), "Take --shots 1"),
        (("--num-fewshot", "2"), "--shots"),
    ],
)
def test_what_cannot_be_done_is_told(run, capsys, words, what):
    if words[0] == "--num-fewshot":
        with pytest.raises(SystemExit):
            measure(capsys, run, *words)
        assert what in capsys.readouterr().err
        return
    assert what in measure(capsys, run, *words, code=2)


def test_a_token_file_of_another_tokenizer_and_texts_without_text_are_refused(run, capsys, tmp_path):
    from smedjan_common.data.prepare import prepare

    (tmp_path / "my.txt").write_text("the cat\n")
    prepare([tmp_path / "my.txt"], tmp_path / "other.bin", Tokenizer.train_from_texts(["other words"], vocab_size=270))
    assert "another tokenizer" in measure(capsys, run, "--dataset", tmp_path / "other.bin", code=2)
    (tmp_path / "empty.txt").write_text("")
    assert "There is no text in" in measure(capsys, run, "--dataset", tmp_path / "empty.txt", code=2)


def test_a_run_that_validates_on_nothing_asks_for_a_text(run, capsys, tmp_path):
    import shutil

    shutil.copytree(run / "final", tmp_path / "final")
    assert "Name texts with --dataset" in measure(capsys, tmp_path / "final", code=2)


def test_weights_that_are_no_numbers_are_told(run, texts, capsys, monkeypatch):
    monkeypatch.setenv("SMEDJAN_FAKE", "nan_logits=1")
    assert "no number" in measure(capsys, run, "--dataset", texts, code=4)
