"""`generate`: prompts from everywhere, the same seed the same text, clear limits. The bigram backend keeps it quick."""

import dataclasses

import pytest

from smedjan_common.backend import Device
from smedjan_common.checkpoint import newest
from smedjan_common.commands import generate
from smedjan_common.errors import DataError, OutOfMemoryError
from smedjan_common.inference.memory import state_bytes
from smedjan_common.inference.room import check_room
from tests.fakes.bigram import load
from tests.fakes.runs import arguments, start, train_here, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    assert train_here(*arguments(write_text(folder), folder / "run", 30)) == 0
    return folder / "run"


def make(capsys, run, *words):
    code = generate.run("fake", load, ["--checkpoint", str(run), *map(str, words)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_same_seed_is_the_same_text_and_another_seed_another(run, capsys):
    texts = [make(capsys, run, "--prompt", "the cat", "--max-tokens", 8, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the cat")


def test_the_run_needs_no_flag(run, capsys):
    named = make(capsys, run, "--prompt", "the cat", "--max-tokens", 4)[1]
    assert generate.run("fake", load, [str(run), "--prompt", "the cat", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == named


def test_the_prompt_can_be_left_out_of_the_output(run, capsys):
    with_prompt = make(capsys, run, "--prompt", "the", "--max-tokens", 5, "--temperature", 0)[1]
    without = make(capsys, run, "--prompt", "the", "--max-tokens", 5, "--temperature", 0, "--no-echo")[1]
    assert with_prompt == "the" + without


def test_a_run_folder_a_step_and_final_give_the_same_greedy_text(run, capsys):
    texts = {
        make(capsys, path, "--prompt", "the", "--max-tokens", 6, "--temperature", 0)[1]
        for path in (run, run / "final", run / "step-00000030")
    }
    assert len(texts) == 1


def test_prompts_from_a_file_and_from_standard_input(run, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("the dog é")
    from_flag = make(capsys, run, "--prompt", "the dog é", "--max-tokens", 4)[1]
    assert make(capsys, run, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 4)[1] == from_flag
    process = start("tests.fakes.generate", "--checkpoint", run, "--prompt", "-", "--max-tokens", 4, stdin=-1)
    out, err = process.communicate("the dog é")
    assert process.returncode == 0, err
    assert out == from_flag


def test_the_context_length_is_a_limit_and_is_told(run, capsys):
    code, _, err = make(capsys, run, "--prompt", "the", "--max-tokens", 100, "--temperature", 0)
    assert code == 0
    assert "context of 16 tokens" in err


def test_no_prompt_begins_a_document(run, capsys):
    assert make(capsys, run, "--max-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--prompt", "long " * 50), "context of 16"),
        (("--temperature", "-1"), "--temperature"),
        (("--top-p", "0"), "--top-p"),
        (("--max-tokens=-5",), "--max-tokens is -5"),
        (("--prompt", "a", "--prompt-file", "b"), "--prompt-file"),
        (("--prompt-file", "missing.txt"), "missing.txt"),
        (("--dtype", "float8"), "--dtype"),
        (("--backend", "jax"), "--backend"),
    ],
)
def test_wrong_use_is_exit_2(run, capsys, words, what):
    code, _, err = make(capsys, run, *words)
    assert code == 2
    assert what in err


def weights_of(run):
    return sum(tensor.nbytes for tensor in newest(run).weights.values())


def test_what_does_not_fit_into_memory_is_exit_3_before_any_weight_is_read(run, capsys, monkeypatch):
    need = 2 * weights_of(run) + state_bytes(newest(run).model, 1, 10, "float32")
    words = "--prompt", "the", "--max-tokens", 8
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: need)
    assert make(capsys, run, *words)[0] == 0
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 2 * weights_of(run) - 1)
    monkeypatch.setattr("smedjan_common.checkpoint.read_weights", None)
    code, out, err = make(capsys, run, *words)
    assert (code, out) == (3, "")
    assert "KiB are there" in err
    assert "a smaller model" in err


def test_fewer_tokens_that_fit_are_named_and_they_do(run, capsys, monkeypatch):
    info = newest(run)
    info = dataclasses.replace(info, model=dataclasses.replace(info.model, context_length=1000))
    state = lambda length: state_bytes(info.model, 1, length, "float32")  # noqa: E731
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: 2 * weights_of(run) + state(10 + 77))
    cpu = Device("fake", "cpu", "abacus")
    with pytest.raises(OutOfMemoryError, match="--max-tokens 77, which fits"):
        check_room(info, cpu, "float32", 10, 500)
    check_room(info, cpu, "float32", 10, 77)
    with pytest.raises(OutOfMemoryError):
        check_room(info, cpu, "float32", 10, 78)


def test_a_gpu_holds_the_weights_once_and_the_machine_while_they_are_read(run, monkeypatch):
    info, weights = newest(run), weights_of(run)
    state = state_bytes(info.model, 1, 10, "float32")
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: weights)
    gpu = Device("jax", "gpu", "NVIDIA H100", memory_bytes=weights + state)
    check_room(info, gpu, "float32", 5, 5)
    with pytest.raises(OutOfMemoryError, match="of the memory of NVIDIA H100"):
        check_room(info, dataclasses.replace(gpu, memory_bytes=weights + state - 1), "float32", 5, 5)
    with pytest.raises(OutOfMemoryError, match="of memory, and"):
        check_room(info, dataclasses.replace(gpu, shares_memory=True), "float32", 5, 5)
    monkeypatch.setattr("smedjan_common.inference.room.available_memory", lambda: weights - 1)
    with pytest.raises(OutOfMemoryError, match="of memory, and"):
        check_room(info, gpu, "float32", 5, 5)


def test_a_path_without_a_model_is_refused(tmp_path, capsys):
    assert make(capsys, tmp_path)[0] == 2


def test_weights_with_a_foreign_tokenizer_are_refused(run, tmp_path, capsys):
    import shutil

    from smedjan_common.tokenizer import Tokenizer

    shutil.copytree(run / "final", tmp_path / "final")
    Tokenizer.train_from_texts(["quite other text " * 20], vocab_size=270).save(tmp_path / "final" / "tokenizer.json")
    code, _, err = make(capsys, tmp_path / "final")
    assert code == 2
    assert "tokenizer" in err


def test_a_prompt_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    (tmp_path / "long").write_text("a" * 11)
    monkeypatch.setattr(generate, "MAX_PROMPT_BYTES", 10)
    for source in (str(tmp_path / "long"), "/dev/zero"):
        with pytest.raises(DataError, match="is too long"):
            generate._prompt(generate.GenerateFlags("run", prompt_file=source))
