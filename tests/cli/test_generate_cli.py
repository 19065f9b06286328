"""`generate`: prompts from everywhere, the same seed the same text, clear limits. The bigram backend keeps it quick."""

import dataclasses
import json
import re

import pytest

from smedjan_common.backend import Device
from smedjan_common.checkpoint import newest
from smedjan_common.commands import generate, prompts
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


def test_more_tokens_than_the_context_are_written_and_what_the_model_saw_is_told(run, capsys):
    code, out, err = make(capsys, run, "--prompt", "the", "--max-tokens", 100, "--temperature", 0, "--json")
    assert code == 0
    assert json.loads(out)["completion_tokens"] == 100
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
        (("--prompt", "a", "--prompts", "b"), "--prompts"),
        (("--num-samples", "0"), "--num-samples is 0"),
        (("--num-samples", "100001"), "100,001 texts"),
        (("--presence-penalty", "3"), "--presence-penalty"),
        (("--prompt-file", "missing.txt"), "missing.txt"),
        (("--dtype", "float7"), "--dtype"),
        (("--backend", "jax"), "--backend"),
        (("--draft", "missing"), "missing"),
        (("--draft-tokens", "3"), "--draft"),
    ],
)
def test_wrong_use_is_exit_2(run, capsys, words, what):
    code, _, err = make(capsys, run, *words)
    assert code == 2
    assert what in err


@pytest.fixture(scope="module")
def draft(run, tmp_path_factory):
    """Another model of the run's tokenizer."""
    folder = tmp_path_factory.mktemp("draft")
    words = arguments(write_text(folder), folder / "small", 20, "--tokenizer", run / "final" / "tokenizer.json", "--seed", 7, "--lr", 0.05)
    assert train_here(*words) == 0
    return folder / "small"


def test_a_draft_changes_no_text_and_how_often_it_was_right_is_told(run, draft, capsys):
    words = "--prompt", "the cat", "--prompt", "a dog", "--max-tokens", 20, "--top-k", 20, "--num-samples", 2
    code, alone, _ = make(capsys, run, *words)
    assert code == 0
    for more in ((), ("--draft-tokens", 1), ("--draft-tokens", 16)):
        code, out, err = make(capsys, run, *words, "--stats", "--draft", draft, *more)
        assert (code, out) == (0, alone)
        assert re.search(r"tokens/s; [1-9]\d*% of \d+ guessed tokens were right", err)
    for count in (0, 17):
        code, _, err = make(capsys, run, *words, "--draft", draft, "--draft-tokens", count)
        assert (code, f"--draft-tokens is {count}." in err) == (2, True)


def test_a_draft_of_another_tokenizer_is_refused(run, tmp_path, capsys):
    text = tmp_path / "other.txt"
    text.write_text("quite other words of 雪 and café " * 400)
    assert train_here(*arguments(text, tmp_path / "other", 1)) == 0
    capsys.readouterr()
    code, out, err = make(capsys, run, "--prompt", "the", "--draft", tmp_path / "other")
    assert (code, out) == (2, "")
    assert "has another tokenizer than" in err


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
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 10)
    for source in (str(tmp_path / "long"), "/dev/zero"):
        with pytest.raises(DataError, match="is too long"):
            prompts.read_prompts((), source, None)


def test_several_prompts_and_samples_are_written_in_their_order_each_as_it_would_be_alone(run, capsys):
    words = "--max-tokens", 6, "--no-echo", "--prompt"
    alone = [make(capsys, run, *words, text, "--seed", seed)[1] for text in ("the cat", "a dog") for seed in (3, 4)]
    out = make(capsys, run, "--seed", 3, "--num-samples", 2, *words, "the cat", "--prompt", "a dog")[1]
    assert out == "---\n".join(alone)
    assert len(set(alone)) > 1


def test_prompts_of_a_file_a_line_each_plain_or_json(run, capsys, tmp_path):
    (tmp_path / "plain.txt").write_text("the cat\n\na dog\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog", "id": 7}\n')
    expected = make(capsys, run, "--max-tokens", 4, "--prompt", "the cat", "--prompt", "a dog")[1]
    for name in ("plain.txt", "rows.jsonl"):
        assert make(capsys, run, "--max-tokens", 4, "--prompts", tmp_path / name)[1] == expected
    for text in ("\ufeffthe cat\r\na dog\n", '{"prompt": "the cat"}\n{"prompt": "a dog", "also": "\u2028"}\n'):
        (tmp_path / "odd").write_text(text, newline="")
        assert make(capsys, run, "--max-tokens", 4, "--prompts", tmp_path / "odd")[1] == expected
    for text, what in (("\n", "no prompts"), ('{"prompt": "a"}\n{"text": 1}', "Line 2"), ('{"prompt": "a"}\nx', "no JSON")):
        (tmp_path / "bad").write_text(text)
        code, _, err = make(capsys, run, "--prompts", tmp_path / "bad")
        assert (code, what in err) == (2, True), err


def test_json_has_a_row_for_each_text(run, capsys):
    code, out, _ = make(capsys, run, "--json", "--max-tokens", 5, "--num-samples", 2, "--prompt", "the é", "--seed", 8, "--stop", "zzz")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["prompt"], row["sample"], row["seed"]) for row in rows] == [("the é", 0, 8), ("the é", 1, 9)]
    plain = make(capsys, run, "--max-tokens", 5, "--no-echo", "--prompt", "the é", "--seed", 8)[1]
    assert rows[0]["text"] + "\n" == plain
    assert {row["finish_reason"] for row in rows} <= {"length", "stop"}
    assert [row["completion_tokens"] for row in rows if row["finish_reason"] == "length"] == [5] * sum(
        row["finish_reason"] == "length" for row in rows
    )


def test_a_text_is_piped_in_without_a_flag(run, capsys):
    from_flag = make(capsys, run, "--prompt", "the dog é", "--max-tokens", 4)[1]
    process = start("tests.fakes.generate", run, "--max-tokens", 4, stdin=-1)
    out, err = process.communicate("the dog é\n")
    assert (process.returncode, out, err) == (0, from_flag, "")


def test_who_pipes_nothing_in_is_told_what_is_waited_for(run):
    process = start("tests.fakes.generate", run, "--max-tokens", 4, stdin=-1)
    assert "read from standard input" in process.stderr.readline()
    assert process.communicate("the")[0].startswith("the")


def test_the_speed_is_told_on_standard_error_where_asked_for(run, capsys):
    code, _, err = make(capsys, run, "--prompt", "the", "--max-tokens", 5, "--stats", "--temperature", 0)
    assert code == 0
    assert "5 tokens in 1 text, " in err
    assert "tokens/s" in err
    assert make(capsys, run, "--prompt", "the", "--max-tokens", 5)[2] == ""


def test_a_text_ends_before_a_stop_text(run, capsys):
    whole = make(capsys, run, "--prompt", "the", "--max-tokens", 12, "--temperature", 0, "--no-echo")[1]
    stop = whole[4:6]
    cut = make(capsys, run, "--prompt", "the", "--max-tokens", 12, "--temperature", 0, "--no-echo", "--stop", stop)[1]
    assert cut == whole[: whole.find(stop)] + "\n"


def test_nothing_that_a_model_writes_steers_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert make(capsys, run, "--prompt", "a\x1b[2J\x07\x9bb\tc", "--max-tokens", 0)[1] == "a␛[2J␇\ufffdb\tc\n"


def test_a_reader_that_goes_away_ends_it_quietly(run):
    process = start("tests.fakes.generate", run, "--prompt", "the", "--max-tokens", 20000, "--temperature", 2)
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_weights_that_are_not_finite_are_exit_4_and_told_in_the_row_of_json(run, capsys, monkeypatch):
    monkeypatch.setenv("SMEDJAN_FAKE", "nan_logits=1")
    code, out, err = make(capsys, run, "--prompt", "the", "--json")
    assert (code, json.loads(out)["finish_reason"]) == (4, "error")
    assert "largest logit" in err
