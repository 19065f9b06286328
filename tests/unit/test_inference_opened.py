"""Opening a model to infer: a run, a checkpoint, a directory of Hugging Face's; an engine over it, within the memory that is there."""

import shutil

import numpy as np
import pytest

from convert.cli import main as convert
from smedjan_common.backend import Device
from smedjan_common.checkpoint import newest
from smedjan_common.errors import CheckpointError, OutOfMemoryError
from smedjan_common.inference.logprobs import log_softmax
from smedjan_common.inference.memory import state_bytes
from smedjan_common.inference.opened import OpenModel
from smedjan_common.inference.request import Request
from smedjan_common.inference.room import check_room, rows_that_fit
from tests.fakes.bigram import load
from tests.fakes.runs import arguments, train_here, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opened")
    assert train_here(*arguments(write_text(folder), folder / "mine", 5)) == 0
    return folder / "mine"


def opened(path):
    model = OpenModel(path)
    model.use("fake", load)
    return model


def text_of(model, **more):
    engine = model.engine(2, 16, 8)
    return "".join(piece.text for _, piece in engine.run([Request(model.tokenizer.encode("the cat"), 8, **more)]))


def test_a_run_its_final_and_a_hugging_face_directory_give_the_same_text(run, tmp_path):
    assert convert([str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    assert text_of(opened(run)) == text_of(opened(run / "final")) == text_of(opened(tmp_path / "hf"))
    assert {file: file.read_bytes() for file in (tmp_path / "hf").iterdir()} == before, "nothing is written there"


def test_a_model_has_the_name_of_its_folder(run, tmp_path):
    assert OpenModel(run).name == OpenModel(run / "final").name == OpenModel(run / "step-00000005").name == "mine"


def test_a_directory_without_a_tokenizer_is_refused(run, tmp_path):
    shutil.copytree(run / "final", tmp_path / "final")
    (tmp_path / "final" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        OpenModel(tmp_path / "final")


def test_an_echoed_prompt_has_the_log_probabilities_of_the_model(run):
    model = opened(run)
    ids = model.tokenizer.encode("the cat sat on the mat and the dog ran off with it; what a day!")
    assert len(ids) > model.model.context_length, "more than one window"
    engine = model.engine(1, 16, 8)
    tokens = [token for _, piece in engine.run([Request(ids, 0, echo=True, logprobs=2)]) for token in piece.tokens]
    embed, vocab = model.params["embed.weight"], model.model.vocab_size
    expected = log_softmax((embed[ids] @ embed.T)[:, :vocab])
    assert [token.id for token in tokens] == ids
    assert tokens[0].logprob is None
    np.testing.assert_allclose([token.logprob for token in tokens[1:]], expected[np.arange(len(ids) - 1), ids[1:]], rtol=1e-5)
    for at, token in enumerate(tokens[1:]):
        np.testing.assert_allclose([logprob for _, logprob in token.top], np.sort(expected[at])[::-1][:2], rtol=1e-5)


def test_rows_are_as_many_as_memory_holds_and_more_are_refused_with_how_many_fit(run, monkeypatch):
    info, cpu = newest(run), Device("fake", "cpu", "abacus")
    weights = sum(tensor.nbytes for tensor in info.weights.values())
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 2 * weights + state_bytes(info.model, 5, 16, "float32"))
    assert [rows_that_fit(info, cpu, "float32", 16, most) for most in (3, 5, 64)] == [3, 5, 5]
    check_room(info, cpu, "float32", 10, 6, rows=5)
    with pytest.raises(OutOfMemoryError, match="5 fit"):
        check_room(info, cpu, "float32", 10, 6, rows=6)
    half = lambda scores: rows_that_fit(info, cpu, "bfloat16", 16, 64, scores)  # noqa: E731
    assert half(False) == 10
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 2.5 * weights + state_bytes(info.model, 5, 16, "float32"))
    assert half(True) == 10, "half the weights again, to decode with"
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 2 * weights + state_bytes(info.model, 5, 16, "float32"))
    assert opened(run).rows(64, 16) == 5
    with pytest.raises(OutOfMemoryError):
        opened(run).engine(4, 10, 6, keep_rows=2)
    assert opened(run).rows(64, 16, keep_rows=2) == 3
    opened(run).engine(3, 10, 6, keep_rows=2)
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: weights)
    assert opened(run).rows(64, 16) == 1, "that even one does not fit is for the engine to say"


def test_a_draft_takes_its_part_of_the_memory(run, monkeypatch):
    info, ahead = newest(run), 3
    weights, state = sum(tensor.nbytes for tensor in info.weights.values()), state_bytes(info.model, 1, 8 + 2 * ahead, "float32")
    model = OpenModel(run, run, ahead)
    model.use("fake", load)
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 3 * weights + 4 * state)
    assert model.rows(64, 8) == 2, "each has a state in both models"
    model.engine(2, 4, 4)
    with pytest.raises(OutOfMemoryError, match="Answer fewer at once: 2 fit"):
        model.engine(3, 4, 4)
    assert opened(run).rows(64, 8 + 2 * ahead) > 4


def test_a_decoder_in_bfloat16_alone_holds_the_weights_until_scores_are_asked_for(run, monkeypatch):
    model = opened(run)
    model.dtype = "bfloat16"
    made = model.backend.decoder
    given = []
    monkeypatch.setattr(model.backend, "decoder", lambda params, *rest: (given.append(params), made(params, *rest))[1])
    model.engine(1, 8, 8)
    assert "params" not in model.__dict__
    model.engine(1, 8, 8, scores=True)
    model.engine(1, 8, 8)
    assert given[0] is not model.params
    assert given[1] is given[2] is model.params
