"""`train` as users meet it: real processes, real signals, errors in three sentences. The bigram backend keeps it quick."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smedjan_common.reporting.metrics import read_rows
from tests.fakes.runs import ROOT, arguments, arrays, figures, saved_steps, start, train_here, tree, write_text

MODULE = "tests.fakes.train"


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def wait_for_rows(folder, count, process):
    deadline = time.monotonic() + 60
    while len(read_rows(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on_to_the_same_end(text, tmp_path, number, code):
    words = arguments(text, tmp_path / "run", 60, "--log-every", 2, "--checkpoint-every", 1000, "--eval-every", 0)
    heeded = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # nohup starts what ignores it, and shells too
    process = start(MODULE, *words, fake="seconds=0.03", **heeded)
    wait_for_rows(tmp_path / "run", 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert signal.Signals(number).name in out
    [step] = saved_steps(tmp_path / "run")
    assert 4 <= step < 60
    assert f"Stopped after step {step} of 60" in out
    assert train_here(*words) == 0
    assert train_here(*arguments(text, tmp_path / "whole", 60, "--log-every", 2, "--checkpoint-every", 1000, "--eval-every", 0)) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")


def test_a_closed_terminal_saves_and_ends_though_it_hangs_up_twice(text, tmp_path):
    words = arguments(text, tmp_path / "run", 1000, "--log-every", 2, "--checkpoint-every", 10000, "--eval-every", 0)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ["SMEDJAN_FAKE"] = "seconds=0.05"
        os.execv(sys.executable, [sys.executable, "-m", MODULE, *words])
    deadline = time.monotonic() + 60
    while len(read_rows(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(terminal)  # the kernel hangs up
    os.kill(child, signal.SIGHUP)  # and so does the shell
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    [step] = saved_steps(tmp_path / "run")
    assert step >= 4


def test_under_nohup_a_hang_up_is_nothing(text, tmp_path):
    words = arguments(text, tmp_path / "run", 30, "--log-every", 2)
    process = start(MODULE, *words, fake="seconds=0.03", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_rows(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert saved_steps(tmp_path / "run") == [30]


def test_ctrl_c_is_not_lost_in_an_import_that_swallows_it(text, tmp_path):
    code = """
import sys, time
from smedjan_common.commands import train
def load(deterministic):
    print("importing", flush=True)
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        print("swallowed", flush=True)
    raise SystemExit(5)
train.run("fake", load, sys.argv[1:])
"""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler){code}",
            *arguments(text, tmp_path / "run", 3),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout
    while "importing" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, "a shell shows 130"
    assert "swallowed" not in rest


def test_sigkill_leaves_a_run_that_goes_on_to_the_same_end(text, tmp_path):
    flags = ("--log-every", 2, "--checkpoint-every", 5, "--eval-every", 0)
    words = arguments(text, tmp_path / "run", 40, *flags)
    for rows in (5, 12):
        process = start(MODULE, *words, fake="seconds=0.03")
        wait_for_rows(tmp_path / "run", rows, process)
        process.kill()
        process.communicate()
    assert train_here(*words) == 0
    assert train_here(*arguments(text, tmp_path / "whole", 40, *flags)) == 0
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")


def test_a_pipe_sees_each_line_at_once(text, tmp_path):
    process = start(MODULE, *arguments(text, tmp_path / "run", 1000), fake="seconds=0.2")
    line = ""
    while not line.startswith("step "):
        line = process.stdout.readline()
        assert line, process.communicate()
    process.kill()
    process.communicate()


NO_STEPS = ("--batch-size", "3", "--grad-accum", "2")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "smedjan train my.txt"),
        (("--dataset", "missing.txt"), "missing.txt"),
        (("--dataset", "missing.bin"), "missing.bin"),
        (("--dataset", "empty.txt"), "no text"),
        (("--dataset", "a.bin", "text.txt"), "token file"),
        (("--dataset", "text.txt", "--size", "tinny"), "Did you mean tiny?"),
        (("--dataset", "text.txt", "--size", "custom"), "--dim, --layers, --heads"),
        (("--dataset", "text.txt", "--size", "custom", "--dim", "64", "--layers", "1", "--heads", "5"), "does not divide"),
        (("--dataset", "text.txt", "--mixer", "attenton"), "Did you mean attention?"),
        (("--dataset", "text.txt", "--steps", "0"), "--steps is 0"),
        (("--dataset", "text.txt", *NO_STEPS), "does not divide"),
        (("--dataset", "text.txt", "--keep", "-1"), "--keep is -1"),
        (("--dataset", "text.txt", "--log-every", "-5"), "--log-every is -5"),
        (("--dataset", "text.txt", "--eval-batches", "0"), "--eval-batches is 0"),
        (("--dataset", "text.txt", "--lr-schedule", "cosin"), "Did you mean cosine?"),
        (("--dataset", "text.txt", "--dtype", "float7"), "--dtype"),
        (("--dataset", "text.txt", "--seq-len", "99999999", "--force"), "too short"),
        (("--dataset", "text.txt", "--resume", "nowhere"), "nowhere"),
        (("--dataset", "text.txt", "--pretrained", "nowhere"), "nowhere"),
        (("--dataset", "text.txt", "--tokenizer", "nowhere.json"), "nowhere.json"),
        (("--dataset", "text.txt", "--resume", "a/step-00000001", "--pretrained", "b"), "both given"),
        (("--dataset", "text.txt", "--checkpoint-dir", "text.txt/run"), "text.txt"),
        (("--dataset", "text.txt", "--backend", "mxl"), "mlx"),
        (("--dataset", "text.txt", "--sample-every", "5", "--sample-prompt", "word " * 600), "--sample-prompt"),
    ],
)
def test_wrong_use_is_exit_2_with_what_why_and_what_to_do(text, tmp_path, monkeypatch, capsys, words, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert train_here("--vocab-size", 300, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert what in error
    assert "Traceback" not in error


def test_a_text_without_a_flag_is_the_dataset(text, tmp_path):
    words = arguments(text, tmp_path / "named", 3)
    assert train_here(*words) == 0
    at = words.index("--dataset")
    assert train_here(text, *words[:at], *words[at + 2 :], "--checkpoint-dir", tmp_path / "bare") == 0
    assert figures(tmp_path / "bare") == figures(tmp_path / "named")


def test_a_run_as_the_dataset_is_answered_with_how_to_go_on_with_it(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_here(*arguments(text, "run", 2)) == 0
    assert train_here("run") == 2
    assert "To go on with it: smedjan train --checkpoint-dir run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--heads", "3"), ("--lr", "-1"), ("--warmup", "9"), ("--mixer", "attenton"), ("--keep", "-1")])
def test_wrong_flags_are_refused_before_the_text_is_tokenised(text, tmp_path, capsys, words):
    assert train_here(*arguments(text, tmp_path / "run", 3, *words)) == 2
    assert words[0] in capsys.readouterr().err or words[0] == "--mixer"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--dataset", "--val-dataset"])
def test_a_text_that_is_refused_while_it_is_tokenised_leaves_no_folder(text, tmp_path, capsys, flag):
    assert train_here(*arguments(text, tmp_path / "first", 2)) == 0
    (made,) = (tmp_path / "first" / "data").iterdir()
    (tmp_path / "bad.txt").write_bytes(b"the cat \xff sat")
    given = (
        {"--dataset": tmp_path / "bad.txt"}
        if flag == "--dataset"
        else {"--dataset": made / "train.bin", "--val-dataset": tmp_path / "bad.txt"}
    )
    words = [str(word) for pair in given.items() for word in pair] + ["--tokenizer", str(made / "tokenizer.json"), "--val-fraction", "0"]
    capsys.readouterr()
    assert train_here(*words, "--checkpoint-dir", tmp_path / "run", "--size", "tiny", "--seq-len", "16", "--steps", "2") == 2
    assert "bad.txt" in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_a_second_process_in_the_run_folder_is_refused_and_the_first_loses_nothing(text, tmp_path, capsys):
    words = arguments(text, tmp_path / "run", 40, "--log-every", 2, "--checkpoint-every", 5)
    process = start(MODULE, *words, fake="seconds=0.1")
    wait_for_rows(tmp_path / "run", 3, process)
    assert train_here(*words) == 2
    assert "Another process is training" in capsys.readouterr().err
    assert train_here(*words, "--dry-run") == 0, "a dry run writes nothing"
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert [row["step"] for row in read_rows(tmp_path / "run") if "loss" in row] == [1, *range(2, 41, 2)]
    assert train_here(*words) == 0, "the lock went with its process"


def test_a_pipe_that_nobody_reads_any_more_does_not_cost_the_run(text, tmp_path):
    process = start(MODULE, *arguments(text, tmp_path / "run", 30, "--log-every", 2), fake="seconds=0.02")
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0, error
    assert saved_steps(tmp_path / "run") == [30]
    assert "nobody reads the output" in error
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_a_folder_that_cannot_be_written_is_refused(text, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # root may write anywhere but there
        locked = Path("/proc")
    assert train_here(*arguments(text, locked / "run", 3)) == 2
    assert str(locked) in capsys.readouterr().err


def test_a_foreign_file_is_never_written_over(text, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "final" / "thesis.txt").write_text("years of work")
    assert train_here(*arguments(text, run, 3)) == 2
    assert (run / "final" / "thesis.txt").read_text() == "years of work"


def test_a_token_file_with_its_tokenizer_beside_it(text, tmp_path, capsys):
    assert train_here(*arguments(text, tmp_path / "first", 2)) == 0
    [data] = (tmp_path / "first" / "data").iterdir()
    before = tree(data)
    words = (
        "--dataset",
        data / "train.bin",
        "--val-dataset",
        data / "val.bin",
        "--size",
        "custom",
        "--dim",
        16,
        "--layers",
        1,
        "--heads",
        2,
    )
    assert train_here(*words, "--seq-len", 16, "--batch-size", 4, "--steps", 2, "--checkpoint-dir", tmp_path / "second") == 0
    assert tree(data) == before
    assert not (tmp_path / "second" / "data").exists()
    (data / "tokenizer.json").unlink()
    assert train_here(*words, "--checkpoint-dir", tmp_path / "third") == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_steps_default_to_one_pass_over_the_data(text, tmp_path, capsys):
    words = [word for word in arguments(text, tmp_path / "run", 987) if word not in ("--steps", "987")]
    assert train_here(*words, "--batch-size", 16) == 0
    from smedjan_common.checkpoint import read_info

    info = read_info(tmp_path / "run")
    windows = (info.dataset["tokens"] - 1) // 16
    assert info.step == -(-windows // 16)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_errors_come_before_the_framework_is_imported(backend, tmp_path):
    code = f"""
import sys
from smedjan_{backend} import train
code = train.main(["--dataset", "missing.txt"])
assert not {{"jax", "mlx"}} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2, done.stderr
    assert "missing.txt" in done.stderr
