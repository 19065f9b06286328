"""The measuring programs at toy size: every one runs, its rows are kept, and the pages show what the result files say."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench import corpus, estimates, inference_tables, learning, memory, mixers, pictures, recall, render, rope_extension, rows, tables
from smedjan_common.data.prepare import prepare
from smedjan_common.model.mixers import MIXERS
from smedjan_common.tokenizer import Tokenizer

COUNTS = np.array([2, 4, 8, 16, 24])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of token files as `corpus.make` leaves it, of a small text."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(f"The smith of village {i % 97} struck {i % 13} times.\n\n" for i in range(900)))
    tokenizer = Tokenizer.train([str(folder / "text.txt")], vocab_size=300)
    tokenizer.save(folder / "tokenizer.json")
    prepare([str(folder / "text.txt")], folder / "train.bin", tokenizer, val_output=folder / "val.bin", val_fraction=0.1)
    return folder


def test_associative_recall_asks_for_the_values_of_keys_that_stood_before():
    inputs, targets = recall.associative(np.random.default_rng(0), COUNTS, 64)
    for count, row, wanted in zip(COUNTS, inputs, targets, strict=True):
        pairs = dict(zip(row[0 : 2 * count : 2], row[1 : 2 * count : 2], strict=True))
        assert len(pairs) == count
        assert np.all(wanted[: 2 * count] == -1)
        assert [pairs[key] for key in row[2 * count :]] == list(wanted[2 * count :])
    assert inputs.max() < recall.VOCAB_SIZE


def test_copying_asks_for_the_data_in_its_order():
    inputs, targets = recall.copying(np.random.default_rng(0), COUNTS, 64)
    for count, row, wanted in zip(COUNTS, inputs, targets, strict=True):
        assert np.all(row[-count:] == recall.MARK)
        data = row[:-count]
        assert list(data[data != recall.BLANK]) == list(wanted[-count:])
        assert np.all(wanted[:-count] == -1)


def test_rows_are_kept_and_not_measured_twice_unless_the_settings_changed(tmp_path):
    output = tmp_path / "results.json"
    first = rows.Results(output, ("mixer", "seq_len"), layers=2)
    first.add({"mixer": "ssm", "seq_len": 64, "value": 3})
    first.add({"mixer": "ssm", "seq_len": 128, "error": "the time limit"})
    again = rows.Results(output, ("mixer", "seq_len"), layers=2)
    assert again.has({"mixer": "ssm", "seq_len": 64})
    assert not again.has({"mixer": "ssm", "seq_len": 128}), "a failed row is measured again"
    assert not rows.Results(output, ("mixer", "seq_len"), layers=3).rows


def test_a_result_file_says_where_it_was_made_and_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rows.sys, "argv", ["/some/place/bench/mixers.py", "--output", "/another/place/out.json"])
    rows.Results(tmp_path / "r.json", ("a",)).add({"a": 1})
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["command"] == "python -m bench.mixers --output out.json"
    assert set(found) == {"command", "date", "python", "device", "versions", "sources", "rows"}


def test_a_process_that_dies_keeps_its_rows_and_says_why():
    found = {}
    tasks = [{"name": name, "end": name} for name in ("well", "error", "never")]
    rows.in_processes("tests.fakes.measuring", tasks, lambda task, got: found.update({task["name"]: got}), jobs=3, seconds=8)
    assert [row.get("value", row.get("error")) for row in found["well"]] == [1]
    assert [row.get("value", row.get("error")) for row in found["error"]] == [1, "RuntimeError: no such device in file.py"]
    assert [row.get("value", row.get("error")) for row in found["never"]] == [1, "the time limit"]


def test_no_process_starts_when_the_time_is_over(capsys):
    rows.in_processes("tests.fakes.measuring", [{"name": "late", "end": "well"}], pytest.fail, seconds=0)
    assert "no time left" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "expected"), [("cpu", "cpu"), ("NVIDIA H100 80GB HBM3", "h100"), ("Apple M4 Max", "apple-m4-max")])
def test_result_files_are_named_by_device(device, expected):
    assert rows.slug(device) == expected


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_mixers_measures_time_and_memory_per_token(backend, capsys):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    wanted = mixers.shapes("attention", backend, mixers.FORMS["test"])
    mixers.measure({"mixer": "attention", "backend": backend, "form": "test", "rows": wanted})
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seq_len"] for row in found] == [64, 128]
    assert all(row["tokens_per_second"] > 0 and row["bytes_per_token"] > 0 for row in found), found


def test_mixers_tells_what_a_row_failed_of(capsys):
    row = mixers.shapes("no-such-mixer", "jax", mixers.FORMS["test"])[0]
    mixers.measure({"mixer": "no-such-mixer", "backend": "jax", "form": "test", "rows": [row]})
    assert "no-such-mixer" in json.loads(capsys.readouterr().out)["error"]


@pytest.fixture
def quick(monkeypatch):
    """A backend that compiles nothing where there is one, and a model of one layer."""
    monkeypatch.setattr(learning, "RECALL_MODEL", {**learning.RECALL_MODEL, "layers": 1})
    monkeypatch.setattr(learning, "HELD_OUT", 16)
    return "mlx" if importlib.util.find_spec("mlx") else "jax"


def test_learning_trains_on_the_corpus(data, quick):
    row = learning.train({"task": "corpus", "backend": quick, "mixer": "attention", "seed": 0, "form": "test", "data": str(data)})
    assert 4 < row["val_loss"] < 8, "two steps teach little: the logarithm of 300 ids is 5.7"


@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize("task", recall.TASKS)
def test_learning_counts_the_right_answers_of_each_count(task, backend, quick, monkeypatch):
    """Predictions are replaced: all right up to 8 things to recall, from 16 on the first answer of every sequence is wrong."""
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    if backend != quick and task == "copying":
        pytest.skip("a compilation more would show nothing new")
    asked = []

    def answers(side, state, inputs):
        logits = predictions(side, state, inputs)
        assert logits.shape == inputs.shape
        asked.append(inputs)
        right = given[len(asked) - 1].copy()
        if learning.RECALL_COUNTS[len(asked) - 1] >= 16:
            rows = np.arange(len(right))
            right[rows, (right >= 0).argmax(axis=1)] += 1
        return right

    held_out = np.random.default_rng(1_000_000)
    make = recall.TASKS[task]
    given = [make(held_out, np.full(learning.HELD_OUT, count), learning.RECALL_LENGTH)[1] for count in learning.RECALL_COUNTS]
    predictions = learning._predictions
    monkeypatch.setattr(learning, "_predictions", answers)
    row = learning.train({"task": task, "backend": backend, "mixer": "attention", "seed": 0, "form": "test", "data": ""})
    answered = {str(count): int((targets[0] >= 0).sum()) for count, targets in zip(learning.RECALL_COUNTS, given, strict=True)}
    assert row["accuracy"] == {name: round(1 - (int(name) >= 16) / number, 4) for name, number in answered.items()}
    assert np.isfinite(row["loss"])


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_fits_the_model_of_recall(name):
    """Four layers of 64, and a state that does not grow is small against a cache of the whole sequence."""
    from smedjan_common.config import ModelConfig
    from smedjan_common.inference.memory import state_bytes

    options = {**learning.RECALL_MODEL, **learning.RECALL_OPTIONS, "context_length": learning.RECALL_LENGTH}
    model = ModelConfig.build(vocab_size=recall.VOCAB_SIZE, mixer=(name,), **options)
    assert (model.mixer, model.layers, model.dim, model.head_dim) == ((name,), 4, 64, 32)
    state, longer = (state_bytes(model, 1, length, "float32") for length in (learning.RECALL_LENGTH, 2 * learning.RECALL_LENGTH))
    cache = 4 * 2 * model.layers * learning.RECALL_LENGTH * model.dim  # keys and values in float32
    assert state != longer or 0 < 2 * state < cache


def test_rope_extension_evaluates_every_scaling_at_every_length(data, quick, capsys):
    rope_extension.measure({**rope_extension.FORMS["test"], "backend": quick, "mixer": "attention", "seed": 0, "data": str(data)})
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [("trained", "none"), ("trained", "ntk"), ("trained", "yarn"), ("trained on", "yarn")]
    assert [(r["weights"], r["rope_scaling"], r["seq_len"]) for r in found] == [(*kind, n) for kind in kinds for n in (8, 16, 32)]
    for row in found:
        assert np.isclose(np.mean(row["by_position"]), row["val_loss"], atol=0.1), row


def test_memory_measures_a_row_and_a_row_that_fails_says_so():
    pytest.importorskip("jax")
    shape = {**memory.SHAPES["test"][0], "mixer": "attention", "compile_only": False}
    options = {"gradient_checkpointing": "full", "grad_accum": 2, "logits": "16 chunks"}
    row = memory.measure({**shape, **options})
    assert row["tokens_per_second"] > 0
    assert row["planned_step_bytes"] > 0
    assert row["loss_chunks"] == 16
    assert "no-such-size" in memory.measure({**shape, **options, "size": "no-such-size"})["error"]


def test_decoding_is_measured_by_blocks_and_by_steps(tmp_path):
    pytest.importorskip("mlx.core")
    output = tmp_path / "decode.json"
    words = "-m bench.decode --backend mlx --size tiny --dtype float32 --rows 2 --prompt 8 --tokens 16 --max-len 64 --output".split()
    for more in ([], ["--by-step", "--temperature", "0.8"]):
        subprocess.run([sys.executable, *words, str(output), *more], cwd=render.ROOT, check=True, capture_output=True)
    blocks, steps = json.loads(output.read_text())
    assert (blocks["by_step"], steps["by_step"]) == (False, True)
    assert blocks["tokens_per_second"] > 0 < steps["tokens_per_second"]
    assert blocks["estimated_bytes"] > 4 * blocks["parameters"]


def test_a_draft_is_measured_beside_the_model_alone(tmp_path):
    pytest.importorskip("mlx.core")
    words = "-m bench.speculation --backend mlx --size tiny --vocab-size 300 --rows 2 --tokens 12 --repeats 1 --off 0 --output".split()
    subprocess.run([sys.executable, *words, str(tmp_path / "found.json")], cwd=render.ROOT, check=True, capture_output=True)
    [row] = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["right"] > 0.9, "the layers that the draft lacks add nothing"
    assert min(row["cpu_ms"], row["cpu_ms_alone"], row["tokens_per_second"]) > 0


@pytest.mark.skipif(os.environ.get("SMEDJAN_TEST_FULL") != "1", reason="trains two models, a process each: SMEDJAN_TEST_FULL=1")
def test_a_trained_pair_is_measured_and_shown(tmp_path, monkeypatch):
    words = "-m bench.trained_pair --form test --rows 2 --temperature 1 --repeats 1 --folder".split()
    output = tmp_path / "trained_pair-cpu.json"
    subprocess.run([sys.executable, *words, str(tmp_path / "pair"), "--output", str(output)], cwd=render.ROOT, check=True)
    [row] = json.loads(output.read_text())["rows"]
    assert 0 < row["right"] <= 1
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert f"| {row['tokens_per_second']:,.0f} |" in str(inference_tables.trained_pair())


def test_a_path_of_the_project_stays_in_a_command_and_one_of_the_machine_does_not():
    assert (
        rows.scrubbed("bench.quantized runs/pair/target --data runs/pair/val.bin")
        == "bench.quantized runs/pair/target --data runs/pair/val.bin"
    )
    assert rows.scrubbed("no file /home/someone/runs/x.json") == "no file x.json"


@pytest.mark.parametrize("page", render.PAGES)
def test_pages_show_what_the_result_files_and_the_tables_say(page):
    text = (render.DOCS / page).read_text()
    assert render.rendered(text) == text, "python -m bench.render makes the page anew"


def test_a_generated_part_replaces_the_old_one_and_keeps_the_prose():
    page = "before\n<!-- bench:menu -->\nold\n<!-- /bench:menu -->\nafter\n"
    made = render.rendered(page)
    assert made.startswith("before\n<!-- bench:menu -->\n| `--mixer`")
    assert made.endswith("<!-- /bench:menu -->\nafter\n")
    assert "old" not in made
    assert all(f"`{name}`" in made for name in MIXERS)


def test_pictures_are_drawn_of_rows_with_gaps(tmp_path):
    common = {"device": "cpu", "layers": 2, "dim": 64, "dtype": "float32"}
    lengths = [{"table": "length", "mixer": "ssm", "seq_len": n, "microseconds_per_token": 1.0, "bytes_per_token": 9} for n in (64, 128)]
    failed = {"table": "length", "mixer": "mla", "seq_len": 64, "error": "out of memory"}
    pictures.mixers({**common, "rows": [*lengths, failed]}, tmp_path / "mixers.png")
    losses = [{"task": "corpus", "mixer": name, "seed": 0, "val_loss": 4.0} for name in ("attention", "ssm,ssm,ssm,attention")]
    recalled = {"task": "copying", "mixer": "attention", "seed": 0, "accuracy": {"4": 1.0, "8": 0.5}}
    pictures.learning({**common, "rows": [*losses, recalled]}, tmp_path / "learning.png")
    figures = {"jax forward": {"value": 0.0, "gate": 1e-5}, "mlx-jax 20 steps loss": {"value": 1e-7, "gate": 5e-5}}
    pictures.equivalence({"cpu": [{"combination": "attention", "dtype": "float32", "figures": figures}]}, tmp_path / "equivalence.png")
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("mixers", "learning", "equivalence"))


def test_the_corpus_is_made_by_the_commands_of_quickstart(data, monkeypatch):
    monkeypatch.setattr(corpus.quickstart, "write_corpus", lambda folder: None)
    (data / "val.bin.json").touch()
    corpus.make(data)  # everything is there, so no command runs
    assert corpus.Corpus(data).train.num_tokens > 1000


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_row_of_the_estimates_has_its_peak_and_how_the_process_grew(backend: str):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    row = estimates.measure(estimates.task(backend, "test", {"layers": 1, "fewer_rows": 4}))
    assert row["train"]["batch_size"] * row["train"]["seq_len"] == 1024
    assert "error" not in row
    assert row["planned_bytes" if backend == "jax" else "peak_bytes"] > 1024 * 32 * 4


def test_a_case_of_the_mesh_bench_tells_speed_memory_and_messages(monkeypatch):
    pytest.importorskip("jax", reason="jax is not installed here")
    from bench import mesh

    monkeypatch.setitem(mesh.SHAPES, "tiny", {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 64})
    row = mesh.Case({**mesh.TINY, "seq_len": 16, "mesh": "data=1", "mask_documents": True}).timed(groups=1)
    assert row["batch_size"] == mesh.TINY["rows"]
    assert row["tokens_per_second"] == row["tokens_per_second_per_device"] > 0
    assert row["bytes"] > row["temp_bytes"] > 0
    assert row["messages"] == dict.fromkeys(mesh.MESSAGES, 0)


def test_curves_are_held_against_each_other_by_means_over_windows():
    from bench import learning_peer

    one = [5.0 - step / 200 for step in range(400)]
    other = [loss * (1.5 if step < 20 else 1.001) for step, loss in enumerate(one)]  # the first tenth does not count
    found = learning_peer.between(one, other)
    assert found["largest"] == pytest.approx(0.001)
    assert found["last"] == pytest.approx(0.001)
    task = learning_peer.PAIRS["float8 medium"]
    rows = [{**curve, "losses": losses} for curve, losses in zip(task, (one, other), strict=True)]
    assert [row["pair"] for row in learning_peer.compared(rows)] == ["float8 medium"]
    assert learning_peer.compared(rows[:1]) == []


def test_a_curve_has_the_loss_of_every_step_from_the_initial_values_of_a_run(data):
    pytest.importorskip("jax", reason="jax is not installed here")
    from bench import learning_peer

    task = {**learning_peer.PAIRS["torch"][1], **learning_peer.TEST, "dtype": "float32"}
    row = learning_peer.curve(task, data)
    assert len(row["losses"]) == task["steps"]
    assert row["losses"][0] == pytest.approx(np.log(320), rel=0.05)


def test_the_noise_of_a_curve_is_what_initial_values_moved_by_a_rounding_come_to():
    from bench import learning_peer

    params = {"w": np.linspace(-2, 2, 100, dtype=np.float32), "norm": np.ones(4, np.float32)}
    same, one, other = (learning_peer.moved(params, draw) for draw in (0, 1, 2))
    assert all((same[name] == params[name]).all() for name in params)
    assert all(0 < np.abs(one[name] - params[name]).max() <= 2 / 256 for name in params)
    assert (one["w"] != other["w"]).any()
    a, b = learning_peer.PAIRS["noise medium"]
    assert a == learning_peer.PAIRS["float8 medium"][0]
    assert {key for key in a if a[key] != b[key]} == {"moved"}


def test_the_torch_peer_gives_the_loss_of_our_model(data):
    """Both in bfloat16: the peer's attention, rope, norms and joined matrices are the definition's, up to rounding."""
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    from bench.torch_peer import Net
    from smedjan_common.config import ModelConfig
    from smedjan_common.model.params import initial_params
    from smedjan_common.reference import model as reference

    model = ModelConfig.preset("tiny", vocab_size=320, context_length=32, init_std=0.05)
    params = initial_params(model, 0)
    net, tokens = Net(model, 32), np.random.default_rng(0).integers(0, 320, (2, 33))
    net.take(params)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = float(net(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])))
    assert loss == pytest.approx(float(reference.loss(model, params, tokens[:, :-1], tokens[:, 1:])), rel=2e-3)
