"""`smedjan sft`: a run of conversations from weights: its defaults, the tokens it adds, what it shows and leaves, how it goes on."""

import json
import math
import shutil

import numpy as np
import pytest

from smedjan_common.checkpoint import read_checkpoint, read_info
from smedjan_common.checkpoint.new_rows import with_new_rows
from smedjan_common.commands import sft
from smedjan_common.config import ModelConfig
from smedjan_common.data.packing import Packed
from smedjan_common.data.token_file import TokenFile
from smedjan_common.run.flags import ChatFlags, flag_names
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import ChatML, template_of
from smedjan_common.tokenizer.growing import extends, grown
from smedjan_common.training.config import default_lr
from tests.fakes import bigram
from tests.fakes.runs import ROOT, arguments, arrays, figures, train_here, tree, write_text

SFT = ("--seq-len", 96, "--batch-size", 2, "--checkpoint-every", 3, "--keep", 0, "--sample-every", 0, "--val-fraction", 0)


def sft_here(*words: object) -> int:
    """Teach in this process; returns the exit code."""
    return sft.run("fake", lambda deterministic: (bigram.BigramBackend, "float32"), [str(word) for word in words])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a run on a text, without tokens for turns, and conversations."""
    folder = tmp_path_factory.mktemp("base")
    assert train_here(*arguments(write_text(folder), folder / "run", 2)) == 0
    rows = [
        {"messages": [{"role": "user", "content": f"cat no. {n}?"}, {"role": "assistant", "content": f"It sat on mat {n}."}]}
        for n in range(24)
    ]
    rows.insert(5, {"messages": [{"role": "user", "content": "the dog"}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def taught(base):
    """A finished run."""
    assert sft_here(base / "chats.jsonl", "--pretrained", base / "run", "--checkpoint-dir", base / "chat", *SFT) == 0
    return base / "chat"


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_its_flags_are_those_of_train_and_a_few_more():
    more = ["--epochs", "--train-on", "--too-long", "--max-dropped", "--template"]
    assert [f"--{name.replace('_', '-')}" for name in ChatFlags.__dataclass_fields__] == more
    assert not set(more) & set(flag_names())
    assert (ROOT / "tests" / "fixtures" / "sft_flags.txt").read_text().split() == more


def test_the_defaults_are_those_of_teaching(base, taught):
    values = config(taught)
    data = TokenFile.open(taught / values["dataset"]["path"])
    assert values["objective"] == "sft"
    train = values["train"]
    assert (train["packing"], train["mask_documents"], train["weight_decay"]) == ("documents", True, 0.0)
    assert train["lr"] == float(f"{default_lr(16) / 5:.1e}")
    assert train["steps"] == math.ceil(2 * Packed(data, 96).num_windows / 2)
    assert train["warmup"] == train["steps"] // 10
    assert config(base / "run")["objective"] == "lm"


def test_the_model_has_tokens_for_turns_and_says_how_it_talks(base, taught):
    old, new = Tokenizer.load(base / "run" / "final"), Tokenizer.load(taught / "final")
    assert new.vocab_size == old.vocab_size + 2
    assert extends(new, old)
    assert isinstance(template_of(taught / "final", new), ChatML)
    assert {new.special_tokens["<|im_end|>"], new.eot_id} <= set(new.ends.eos_ids)
    for path in (taught / "final", sorted(taught.glob("step-*"))[-1]):
        info = read_info(path)
        assert info.extra["extends"] == old.hash
        assert info.model.vocab_size == new.vocab_size
        assert info.tokenizer_hash == new.hash


def test_what_is_trained_and_what_was_dropped_is_shown(base, tmp_path, capsys):
    words = [base / "chats.jsonl", "--pretrained", base / "run", "--checkpoint-dir", tmp_path / "run", "--steps", 1, *SFT]
    assert sft_here(*words) == 0
    out = capsys.readouterr().out
    assert "1 of 25 rows dropped: no answer of an assistant." in out
    assert "chats.jsonl:6: " in out
    shown = out[out.index("what is trained stands in brackets") :].splitlines()[1:6]
    assert [line[4:] for line in shown[:3]] == ["<|im_start|>user", shown[1][4:], "<|im_start|>assistant"]
    assert shown[1].endswith("?<|im_end|>")
    assert shown[3].startswith("  | \u27e6It sat on mat ")
    assert shown[3].endswith(".<|im_end|>\u27e7")
    assert "The tokenizer has 2 tokens more" in out


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(base, taught, tmp_path, capsys):
    shutil.copytree(taught, tmp_path / "chat")
    steps = config(taught)["train"]["steps"]
    for path in (tmp_path / "chat").glob("step-*"):
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "chat" / "final")
    assert sft_here(base / "chats.jsonl", "--pretrained", base / "run", "--checkpoint-dir", tmp_path / "chat", *SFT) == 0
    assert arrays(tmp_path / "chat") == arrays(taught)
    assert figures(tmp_path / "chat") == figures(taught)
    assert len(list((tmp_path / "chat" / "data").iterdir())) == 1
    assert sft_here("--checkpoint-dir", tmp_path / "chat", "--epochs", 3) == 0
    longer = config(tmp_path / "chat")
    assert longer["train"]["steps"] == math.ceil(steps * 1.5)
    assert longer["objective"] == "sft"
    assert sft_here("--checkpoint-dir", tmp_path / "chat", "--epochs", 1) == 2
    assert "is less than the" in capsys.readouterr().err
    assert sft_here("--checkpoint-dir", tmp_path / "chat", "--epochs", 3) == 0
    assert "Done already" in capsys.readouterr().out


def test_train_goes_on_with_such_a_run(taught, tmp_path):
    shutil.copytree(taught, tmp_path / "chat")
    steps = config(taught)["train"]["steps"] + 2
    assert train_here("--checkpoint-dir", tmp_path / "chat", "--steps", steps) == 0
    assert config(tmp_path / "chat")["objective"] == "sft"
    final = tmp_path / "chat" / "final"
    assert read_info(final).extra["extends"]
    assert isinstance(template_of(final, Tokenizer.load(final)), ChatML)
    assert config(tmp_path / "chat")["dataset"]["hash"] == config(taught)["dataset"]["hash"]


def test_config_toml_repeats_it_and_train_refuses_what_it_says_of_conversations(base, tmp_path, capsys):
    words = (base / "chats.jsonl", "--pretrained", base / "run", "--epochs", 1, "--train-on", "all", *SFT)
    assert sft_here(*words, "--checkpoint-dir", tmp_path / "one") == 0
    for file in ("config.toml", "config.json"):
        assert sft_here("--config", tmp_path / "one" / file, "--checkpoint-dir", tmp_path / file) == 0
        assert arrays(tmp_path / file) == arrays(tmp_path / "one")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_here("--config", tmp_path / "one" / "config.toml", "--checkpoint-dir", tmp_path / "three")
    assert "Give the file to `smedjan sft`" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(base, tmp_path, capsys):
    words = (base / "chats.jsonl", "--pretrained", base / "run", "--checkpoint-dir", tmp_path / "run", "--dry-run", *SFT)
    assert sft_here(*words) == 0
    assert "Dry run: nothing was written." in capsys.readouterr().out
    assert tree(tmp_path) == {}


def test_a_part_is_held_out_and_validated_on(base, tmp_path):
    words = ("--pretrained", base / "run", "--checkpoint-dir", tmp_path / "run", *SFT[:-1], 0.4, "--eval-every", 2)
    assert sft_here(base / "chats.jsonl", *words) == 0
    rows = [row for row in figures(tmp_path / "run") if "val_loss" in row]
    assert rows
    assert all(row["val_loss"] > 0 and row["val_bits_per_byte"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("CHATS", "--checkpoint-dir", "NEW"), "--pretrained is not given"),
        (("CHATS", "--checkpoint-dir", "RUN"), "learns texts"),
        (("--pretrained", "RUN", "--checkpoint-dir", "NEW"), "nothing to learn from"),
        (("TEXT", "--pretrained", "RUN", "--checkpoint-dir", "NEW"), "no file of conversations"),
        (("TOKENS", "--pretrained", "RUN", "--checkpoint-dir", "NEW"), "a token file already"),
        (("CHATS", "--pretrained", "RUN", "--checkpoint-dir", "NEW", "--template", "plain"), "No token ends its answers"),
        (("CHATS", "--pretrained", "RUN", "--checkpoint-dir", "NEW", "--train-on", "reply"), "--train-on"),
        (("CHATS", "--pretrained", "RUN", "--checkpoint-dir", "NEW", "--epochs", "0"), "--epochs is 0"),
        (("CHATS", "--pretrained", "RUN", "--checkpoint-dir", "NEW", "--max-dropped", "0.01"), "1 of 25 rows would be dropped"),
        (("CHATS", "--pretrained", "RUN", "--checkpoint-dir", "NEW", "--dim", "32"), "another model"),
    ],
)
def test_what_cannot_be_taught_is_refused(base, tmp_path, words, why, capsys):
    run = tmp_path / "run"
    shutil.copytree(base / "run", run)
    before = tree(run)
    names = {"CHATS": base / "chats.jsonl", "TEXT": base / "text.txt", "RUN": run, "NEW": tmp_path / "new"}
    names["TOKENS"] = next(run.glob("data/*/train.bin"))
    assert sft_here(*(names.get(word, word) for word in words), *SFT) == 2
    assert why in capsys.readouterr().err
    assert tree(run) == before
    assert not list((tmp_path / "new").rglob("*"))


def test_a_grown_tokenizer_extends_the_old_one_alone(base):
    old = Tokenizer.load(base / "run" / "final")
    new, other = grown(old, ("<|im_start|>", "<|im_end|>")), Tokenizer.train_from_texts(["another text " * 50], 270)
    assert grown(new, ("<|im_start|>", "<|im_end|>")).hash == new.hash
    assert extends(new, old)
    assert not extends(old, new)
    assert not extends(grown(other, ("<|im_start|>",)), old)
    text = "the cat <|im_end|> sat"
    assert new.encode(text) == old.encode(text)


def test_a_template_of_jinja_needs_no_new_tokens_and_goes_with_the_model(base, tmp_path, capsys):
    pytest.importorskip("jinja2")
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + ('<|endoftext|>' if m.role == 'assistant' else ' ') }}{% endfor %}"
    text += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "t.jinja").write_text(text)
    words = ("--pretrained", base / "run", "--checkpoint-dir", tmp_path / "run", "--template", tmp_path / "t.jinja", "--steps", 4, *SFT)
    assert sft_here(base / "chats.jsonl", *words) == 0
    out = capsys.readouterr().out
    assert "assistant: \u27e6It sat on mat" in out
    assert "<|endoftext|>\u27e7" in out
    assert "tokens more" not in out
    final = tmp_path / "run" / "final"
    assert (final / "chat_template.jinja").read_text() == text
    assert read_info(final).tokenizer_hash == read_info(base / "run").tokenizer_hash
    (tmp_path / "t.jinja").unlink()  # the run has it
    assert sft_here(base / "chats.jsonl", "--checkpoint-dir", tmp_path / "run", "--steps", 5) == 0
    assert len(list((tmp_path / "run" / "data").iterdir())) == 1
    assert (final / "chat_template.jinja").read_text() == text


def test_weights_go_with_a_larger_tokenizer_in_sft_alone(base, taught, tmp_path, capsys):
    larger = taught / "final" / "tokenizer.json"
    words = ("--pretrained", base / "run", "--tokenizer", larger, "--checkpoint-dir", tmp_path / "run")
    assert train_here("--dataset", base / "text.txt", *words, "--steps", 1) == 2
    assert "trained with another tokenizer" in capsys.readouterr().err
    assert sft_here(base / "chats.jsonl", *words, "--steps", 1, *SFT) == 0
    assert "The tokenizer has 2 tokens more" in capsys.readouterr().out
    assert sft_here(base / "chats.jsonl", "--pretrained", taught, "--checkpoint-dir", tmp_path / "again", "--steps", 1, *SFT) == 0
    assert "tokens more" not in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("before", "after"), [(62, 64), (64, 66), (70, 75)])
def test_new_rows_are_the_mean_of_those_that_were_trained(tied, before, after):
    old = ModelConfig.build(vocab_size=before, dim=8, layers=1, heads=2, tied_head=tied)
    new = ModelConfig.build(vocab_size=after, dim=8, layers=1, heads=2, tied_head=tied)
    rng = np.random.default_rng(0)
    names = ["embed.weight"] + ([] if tied else ["head.weight"])
    params = {name: rng.normal(size=(old.padded_vocab_size, 8)).astype(np.float32) for name in names} | {"norm.weight": np.ones(8)}
    grew = with_new_rows(params, new, before, after)
    assert grew["norm.weight"] is params["norm.weight"]
    for name in names:
        assert grew[name].shape == (new.padded_vocab_size, 8)
        assert np.array_equal(grew[name][:before], params[name][:before])
        assert np.array_equal(
            grew[name][before:after], [params[name][:before].astype(np.float64).mean(0).astype(np.float32)] * (after - before)
        )


def test_the_first_step_begins_with_the_rows_of_the_base(base, tmp_path):
    words = (base / "chats.jsonl", "--pretrained", base / "run", "--checkpoint-dir", tmp_path / "run", "--steps", 1, "--lr", 1e-12, *SFT)
    assert sft_here(*words) == 0
    was, now = (read_checkpoint(path / "final").snapshot.params["embed.weight"] for path in (base / "run", tmp_path / "run"))
    size = read_info(base / "run").model.vocab_size
    assert np.allclose(now[:size], was[:size], atol=1e-9)
    assert np.allclose(now[size : size + 2], was[:size].mean(0), atol=1e-7)
