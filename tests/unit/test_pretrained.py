"""A new run from weights: whose tokenizer it may have, at which context it trains, what of the model may change."""

import dataclasses
import shutil

import pytest

from smedjan_common.checkpoint import read_info
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.model.rope import original_length
from smedjan_common.run.asked import Asked
from smedjan_common.run.given import parse
from smedjan_common.run.options import check_options
from smedjan_common.run.resume import check_tokenizer
from smedjan_common.run.settings import pretrained_length, pretrained_model
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.runs import arguments, train_here, tree, write_text
from tests.unit.test_checkpoint_faults import value

BASE = ModelConfig.build(vocab_size=300, dim=16, layers=1, heads=2, context_length=32)
LONG = ModelConfig.build(
    vocab_size=300, dim=16, layers=1, heads=2, context_length=128, rope_scaling="yarn", rope_factor=4.0, rope_original_len=32
)
SPARSE = ModelConfig.build(vocab_size=300, dim=16, layers=1, heads=2, context_length=128, mixer=("block-sparse",))


def model_of(base, tmp_path, words):
    asked = Asked(*parse(words.split()))
    model = pretrained_model(base, tmp_path, asked.having(seq_len=pretrained_length(base, asked)))
    check_options(model, asked.given)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A text, a tokenizer of more tokens than the model's, and a run."""
    folder = tmp_path_factory.mktemp("weights")
    text = write_text(folder)
    Tokenizer.train([text], vocab_size=320).save(folder / "larger.json")
    assert train_here(*arguments(text, folder / "run", 2)) == 0
    return folder


def test_the_tokenizer_of_other_weights_is_refused_before_the_text_is_tokenised(weights, tmp_path, capsys):
    new = tmp_path / "new"
    words = ["--pretrained", weights / "run", "--dataset", weights / "text.txt", "--tokenizer", weights / "larger.json"]
    assert train_here(*words, "--checkpoint-dir", new, "--steps", 2) == 2
    err = capsys.readouterr().err
    assert "another tokenizer" in err
    assert read_info(weights / "run").tokenizer_hash[:16] in err
    assert Tokenizer.load(weights / "larger.json").hash[:16] in err
    assert not (new / "data").exists()


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
def test_more_tokens_than_weights_of_an_unknown_tokenizer_is_refused(weights, tmp_path, capsys, flag):
    step = shutil.copytree(weights / "run" / "step-00000002", tmp_path / "step-00000002")
    value("tokenizer_hash", None)(step)
    words = [flag, step, "--dataset", weights / "text.txt", "--tokenizer", weights / "larger.json"]
    assert train_here(*words, "--checkpoint-dir", tmp_path / "new", "--steps", 4) == 2
    assert "The tokenizer has 320 tokens" in capsys.readouterr().err


def test_the_own_tokenizer_is_taken_and_another_of_fewer_tokens_refused(weights):
    info = read_info(weights / "run")
    check_tokenizer(info, Tokenizer.load(info.path / "tokenizer.json"))
    smaller = Tokenizer.train([weights / "text.txt"], vocab_size=280)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        check_tokenizer(info, smaller)
    check_tokenizer(dataclasses.replace(info, tokenizer_hash=None), smaller)


@pytest.mark.parametrize(
    ("base", "words", "original"),
    [
        (BASE, "--rope-scaling yarn --rope-factor 4 --seq-len 256", 32),
        (BASE, "--rope-scaling yarn --rope-factor 4", 32),
        (LONG, "--seq-len 32", 32),
        (ModelConfig(**{**vars(LONG), "rope_original_len": 0}), "--seq-len 32", 32),
        (LONG, "--rope-original-len 16", 16),
    ],
)
def test_scaled_weights_keep_the_context_they_were_trained_at(base, words, original, tmp_path):
    model = model_of(base, tmp_path, words)
    assert model.rope_original_len == original_length(model) == original


@pytest.mark.parametrize(
    ("base", "words", "length"),
    [
        (BASE, "", 32),
        (BASE, "--seq-len 64", 64),
        (BASE, "--rope-scaling ntk --rope-factor 4", 128),
        (LONG, "", 128),
        (LONG, "--rope-scaling none", 128),
        (LONG, "--rope-factor 8", 256),
        (LONG, "--rope-factor 8 --seq-len 64", 64),
    ],
)
def test_the_context_is_that_of_the_weights_unless_it_is_given(base, words, length):
    assert pretrained_length(base, Asked(*parse(words.split()))) == length


def test_a_run_without_seq_len_trains_at_the_context_of_the_weights_and_tells(weights, tmp_path, capsys):
    words = ["--pretrained", weights / "run", "--dataset", weights / "text.txt", "--batch-size", 4, "--steps", 1]
    assert train_here(*words, "--checkpoint-dir", tmp_path / "new") == 0
    info = read_info(tmp_path / "new")
    assert (info.model.context_length, info.train.seq_len) == (16, 16)
    assert "note: --seq-len is 16, the context of" in capsys.readouterr().out


def test_scaling_is_taken_away_with_its_factor(tmp_path):
    model = model_of(LONG, tmp_path, "--rope-scaling none --seq-len 32")
    assert (model.rope_scaling, model.rope_factor, model.rope_original_len) == ("none", 1.0, 0)
    with pytest.raises(ConfigError, match="--rope-factor 2 would do nothing"):
        model_of(LONG, tmp_path, "--rope-scaling none --rope-factor 2")


LISTS = {"rope_short_factors": (1.0, 1.1, 1.3, 1.7), "rope_long_factors": (1.0, 2.0, 4.0, 9.0)}


def test_longrope_comes_with_its_weights_and_goes_with_another_scaling(tmp_path):
    stretched = {"rope_scaling": "longrope", "rope_factor": 4.0, "rope_original_len": 32, "rope_attention_factor": 1.2, **LISTS}
    base = ModelConfig.build(vocab_size=300, dim=16, layers=1, heads=2, context_length=128, **stretched)
    kept = model_of(base, tmp_path, "--seq-len 16")
    assert kept == dataclasses.replace(base, context_length=16)
    other = model_of(base, tmp_path, "--rope-scaling yarn")
    assert (other.rope_short_factors, other.rope_long_factors, other.rope_attention_factor) == ((), (), 0.0)
    assert (other.rope_scaling, other.rope_original_len) == ("yarn", 32)


def test_what_changes_no_shape_may_change(tmp_path):
    assert model_of(BASE, tmp_path, "--window 8").window == 8
    sparse = model_of(SPARSE, tmp_path, "--block-size 16 --block-topk 2")
    assert (sparse.block_size, sparse.block_topk) == (16, 2)
    with pytest.raises(ConfigError, match="--window would do nothing"):
        model_of(SPARSE, tmp_path, "--window 8")


def test_the_number_of_experts_alone_leaves_their_pattern(tmp_path):
    routed = dataclasses.replace(BASE, layers=2, ffn=("swiglu", "experts"), experts=4)
    assert model_of(routed, tmp_path, "--experts 4") == routed
    for words in ("--experts 0", "--experts 8", "--ffn experts --experts 4"):
        with pytest.raises(ConfigError, match="of another model"):
            model_of(routed, tmp_path, words)
    with pytest.raises(ConfigError, match="ffn: swiglu in the checkpoint, experts now"):
        model_of(BASE, tmp_path, "--experts 4")


def test_another_model_is_shown_in_plain_words(tmp_path):
    with pytest.raises(ConfigError, match="mixer: attention in the checkpoint, ssm now") as refused:
        model_of(BASE, tmp_path, "--mixer ssm")
    assert "(" not in str(refused.value)


def test_a_run_that_began_otherwise_takes_no_weights_and_stays_as_it_is(weights, tmp_path, capsys):
    run = shutil.copytree(weights / "run", tmp_path / "run")
    new = ["--pretrained", weights / "run", "--checkpoint-dir", tmp_path / "new"]
    assert train_here(*new, "--dataset", weights / "text.txt", "--batch-size", 4, "--steps", 1) == 0
    before, told = tree(tmp_path), "--pretrained starts a new run"
    for words in (["--pretrained", weights / "run", "--checkpoint-dir", run], ["--pretrained", run, *new[2:]]):
        capsys.readouterr()
        assert train_here(*words, "--dataset", weights / "text.txt", "--steps", 9) == 2
        assert told in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert train_here(*new, "--steps", 1) == 0  # its own, where it was
    (moved := tmp_path / "moved").symlink_to(weights / "run")
    assert train_here("--pretrained", moved, *new[2:], "--steps", 1) == 0


def test_a_run_goes_on_when_its_weights_were_moved(weights, tmp_path, capsys):
    base, new = shutil.copytree(weights / "run", tmp_path / "base"), ["--checkpoint-dir", tmp_path / "new"]
    assert train_here("--pretrained", base, *new, "--dataset", weights / "text.txt", "--batch-size", 4, "--steps", 1) == 0
    base.rename(tmp_path / "moved")
    assert train_here("--pretrained", tmp_path / "moved", *new, "--steps", 1) == 0
    assert "note: --pretrained is not read: the run goes on from" in capsys.readouterr().out


def test_the_spread_of_initial_weights_is_refused_where_there_are_weights(weights, tmp_path, capsys):
    words = ["--dataset", weights / "text.txt", "--pretrained", weights / "run", "--checkpoint-dir", tmp_path / "new", "--steps", 1]
    assert train_here(*words, "--init-std", 0.02, "--dry-run") == 2
    assert "--init-std would do nothing" in capsys.readouterr().err
    assert train_here(*words, "--dry-run") == 0
