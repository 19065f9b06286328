"""`smedjan merge`: every method against its closed form in float64, what is refused and why, and that the result is a whole checkpoint."""

import dataclasses
import gc
import tracemalloc

import numpy as np
import pytest

from smedjan_common import cli
from smedjan_common.checkpoint import read_checkpoint, read_info, verify_checkpoint, write_checkpoint
from smedjan_common.checkpoint.averaging import METHODS, Settings, trimmed
from smedjan_common.inference import source
from tests.fakes import models

rng = np.random.default_rng(5)


def reads(*arrays):
    return [lambda a=a: a for a in arrays]


def test_linear_is_the_weighted_mean_in_float64():
    a, b, c = rng.standard_normal((3, 4, 5))
    made = METHODS["linear"].merge(reads(a, b, c), None, Settings((1.0, 2.0, 5.0)))
    np.testing.assert_allclose(made, (a + 2 * b + 5 * c) / 8, rtol=0, atol=1e-15)


def test_slerp_keeps_the_length_between_vectors_of_one_length_and_ends_at_both():
    a = rng.standard_normal((3, 7))
    b = np.roll(a, 1)  # as long, another direction
    for t in (0.0, 0.3, 1.0):
        made = METHODS["slerp"].merge(reads(a, b), None, Settings((1.0, 1.0), t=t))
        assert np.linalg.norm(made) == pytest.approx(np.linalg.norm(a), rel=1e-12)
        angle, whole = (np.arccos(np.vdot(a, x) / np.linalg.norm(a) ** 2) for x in (made, b))
        assert angle == pytest.approx(t * whole, abs=1e-7)


def test_slerp_of_lengths_that_differ_and_of_nearly_parallel_tensors_is_mergekits():
    """The coefficients come from the directions, the tensors keep their lengths; |cosine| over 0.9995: the straight line."""
    x, y = np.array([2.0, 0.0]), np.array([0.0, 3.0])
    half = np.sin(np.pi / 4)
    np.testing.assert_allclose(METHODS["slerp"].merge(reads(x, y), None, Settings((1.0, 1.0))), [2 * half, 3 * half], atol=1e-15)
    near, opposite = np.array([4.0, 0.01]), np.array([-4.0, 0.01])
    np.testing.assert_allclose(METHODS["slerp"].merge(reads(x, near), None, Settings((1.0, 1.0), t=0.25)), [2.5, 0.0025], atol=1e-15)
    np.testing.assert_allclose(METHODS["slerp"].merge(reads(x, opposite), None, Settings((1.0, 1.0), t=0.25)), [0.5, 0.0025], atol=1e-15)
    zeros = METHODS["slerp"].merge(reads(np.zeros(3), np.zeros(3)), None, Settings((1.0, 1.0)))
    assert not zeros.any()


def ties_by_hand(arrays, base, weights, density, scale):
    """Value by value, as mergekit does it."""
    keep = max(1, int(density * base.size))
    deltas = []
    for array in arrays:
        delta = (array - base).ravel()
        largest = sorted(range(delta.size), key=lambda i: (-abs(delta[i]), i))[:keep]
        deltas.append([delta[i] if i in largest else 0.0 for i in range(delta.size)])
    out = []
    for i in range(base.size):
        values = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agree = [(v, w) for v, w in zip(values, weights, strict=True) if v * sign > 0]
        shares = sum(w for _, w in agree) or 1
        out.append(base.ravel()[i] + scale * sum(v for v, _ in agree) / shares)
    return np.reshape(out, base.shape)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -0.25, 2.0)])
def test_ties_equals_its_definition_value_by_value(density, weights):
    base, *arrays = rng.integers(-3, 4, (4, 5, 6)).astype(float)  # whole numbers: many are equal, zero, or opposite
    made = METHODS["ties"].merge(reads(*arrays), reads(base)[0], Settings(weights, density=density, scale=0.7))
    np.testing.assert_allclose(made, ties_by_hand(arrays, base, weights, density, 0.7), atol=1e-14)


def test_trimming_keeps_exactly_as_many_and_the_first_of_equals():
    assert trimmed(np.array([1.0, -1.0, 1.0, 0.5]), 0.5).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert np.count_nonzero(trimmed(rng.standard_normal(1000), 0.123)) == 123


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs a (three step checkpoints and final/), b and the model that both began with."""
    folder = tmp_path_factory.mktemp("merging")
    for step in (10, 20, 30):
        models.save_initial(folder / f"a/step-{step:08d}", step, step=step)
    models.save_initial(folder / "a/final", 30, step=30)
    models.save_initial(folder / "b/final", 2)
    models.save_initial(folder / "start", 3)
    return folder


def merge(place, *words):
    return cli.main(["merge", *map(str, words), "--output", str(place)])


def test_the_mean_of_two_runs_is_a_whole_checkpoint_cast_once(place, tmp_path, capsys):
    assert merge(tmp_path / "out", place / "a", place / "b", "--weights", 1, 3) == 0
    assert "weighted mean (linear) of 2 models" in capsys.readouterr().out
    made = read_checkpoint(tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    a, b = (read_checkpoint(place / name / "final").snapshot.params for name in "ab")
    for name, value in made.snapshot.params.items():
        exact = ((a[name].astype(np.float64) + 3 * b[name].astype(np.float64)) / 4).astype(np.float32)
        np.testing.assert_array_equal(value, exact, err_msg=name)
    assert made.tokenizer_hash == read_info(place / "a").tokenizer_hash
    assert (made.train, made.info.optimizer) == (models.TRAIN, None)
    how = made.info.extra["merge"]
    assert (how["method"], how["weights"]) == ("linear", [1.0, 3.0])
    assert [model["path"] for model in how["models"]] == [str(place / "a/final"), str(place / "b/final")]


def test_the_last_checkpoints_of_a_run_without_its_final(place, tmp_path):
    assert merge(tmp_path / "out", place / "a", "--last", 2) == 0
    assert [model["step"] for model in read_info(tmp_path / "out").extra["merge"]["models"]] == [20, 30]


def test_slerp_and_ties_run_over_every_tensor(place, tmp_path):
    assert merge(tmp_path / "arc", place / "a", place / "b", "--method", "slerp", "--t", 0) == 0
    arc, a = (read_checkpoint(path).snapshot.params for path in (tmp_path / "arc", place / "a/final"))
    for name, value in a.items():
        np.testing.assert_allclose(arc[name], value, atol=1e-7, err_msg=name)
    words = ("--method", "ties", "--base", place / "start", "--density", 1)
    assert merge(tmp_path / "ties", place / "a", *words) == 0
    ties = read_checkpoint(tmp_path / "ties").snapshot.params
    for name, value in a.items():  # of one model, all of it
        np.testing.assert_allclose(ties[name], value, atol=1e-7, err_msg=name)


def test_a_hugging_face_directory_is_a_model_too(place, tmp_path):
    assert cli.main(["convert", str(place / "b"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert merge(tmp_path / "out", place / "a", tmp_path / "hf") == 0
    assert merge(tmp_path / "same", place / "a", place / "b") == 0
    one, other = (read_checkpoint(tmp_path / name).snapshot.params for name in ("out", "same"))
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{a}", "1 model is given"),
        ("{a} --last 9", "has 3 step checkpoints, not 9"),
        ("{a} {b} --last 2", "--last 2 is given with 2 paths"),
        ("{a} {b} --t 0.5", "--t would do nothing"),
        ("{a} {b} --base {b}", "--base would do nothing"),
        ("{a} {b} --method ties", "needs --base"),
        ("{a} {b} {b} --method slerp", "is given 3 models"),
        ("{a} {b} --method slerp --t 1.5", "from 0 to 1"),
        ("{a} {b} --weights 1", "1 values for 2 models"),
        ("{a} {b} --weights 1 -1", "add up to 0"),
        ("{a} {b} --method soup", "'soup' is unknown"),
        ("{a} {wide}", "--ffn-dim is 24 in the first, 32 in the other"),
        ("{a} {base}", "--rope-base is 10000.0 in the first, 5000.0 in the other"),
        ("{a} {words}", "have different tokenizers"),
        ("{a} {inf}", "embed.weight of the merged model is not finite"),
        ("{a} {b}x", "There is no checkpoint"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name_and_nothing_is_written(place, tmp_path, capsys, words, said):
    models.save_initial(tmp_path / "wide", 1, models.model(ffn_dim=32))
    models.save_initial(tmp_path / "base", 1, models.model(rope_base=5000.0))
    models.save_initial(tmp_path / "words", 1, words=models.tokenizer(299))
    bad = dict(models.save_initial(tmp_path / "inf", 1))
    bad["embed.weight"] = np.full_like(bad["embed.weight"], np.inf)
    models.save(tmp_path / "inf", models.model(), bad)
    names = {name: place / name for name in "ab"} | {name: tmp_path / name for name in ("wide", "base", "words", "inf")}
    assert merge(tmp_path / "out", *words.format(**names).split()) in (2, 4)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_models_of_one_table_and_another_mixer_are_different_models(tmp_path, capsys):
    models.save_initial(tmp_path / "a", 1)
    models.save_initial(tmp_path / "b", 1, models.model(mixer=("block-sparse",), block_size=8))
    assert merge(tmp_path / "out", tmp_path / "a", tmp_path / "b") == 2
    assert "--mixer is attention in the first, block-sparse in the other" in capsys.readouterr().err


def test_a_context_that_differs_changes_no_tensor_and_is_merged(tmp_path):
    models.save_initial(tmp_path / "a", 1)
    models.save_initial(tmp_path / "b", 2, dataclasses.replace(models.model(), context_length=32))
    assert merge(tmp_path / "out", tmp_path / "a", tmp_path / "b") == 0


def test_a_damaged_input_is_named_before_anything_is_written(tmp_path, capsys):
    models.save_initial(tmp_path / "a", 1)
    models.save_initial(tmp_path / "b", 2)
    file = tmp_path / "b/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert merge(tmp_path / "out", tmp_path / "a", tmp_path / "b") == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_stands_is_replaced_with_force_alone_and_an_input_never(tmp_path, capsys):
    for seed, name in enumerate("abc"):
        models.save_initial(tmp_path / name, seed)
    assert merge(tmp_path / "c", tmp_path / "a", tmp_path / "b") == 2
    assert "already exists" in capsys.readouterr().err
    assert merge(tmp_path / "c", tmp_path / "a", tmp_path / "b", "--force") == 0
    assert merge(tmp_path / "a", tmp_path / "a", tmp_path / "b", "--force") == 2
    assert "is, or contains, the input" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    assert merge(tmp_path / "mine", tmp_path / "a", tmp_path / "b", "--force") == 2
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"


def test_no_model_is_ever_held_whole(tmp_path, monkeypatch):
    """Twelve models of thirteen times their largest tensor: what is held is some float64 copies of that one."""
    config, peaks = models.model(dim=64, layers=6, ffn_dim=128), []
    for seed in range(12):
        params = models.save_initial(tmp_path / f"m{seed}", seed, config)

    def measured(*args, **kwargs):
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        path = write_checkpoint(*args, **kwargs)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        return path

    monkeypatch.setattr(source, "write_checkpoint", measured)
    for method in (("linear",), ("ties", "--base", tmp_path / "m0")):
        tracemalloc.start()
        try:
            assert merge(tmp_path / f"out-{method[0]}", *(tmp_path / f"m{seed}" for seed in range(12)), "--method", *method) == 0
        finally:
            tracemalloc.stop()
    largest = max(value.nbytes for value in params.values())
    assert sum(value.nbytes for value in params.values()) > 13 * largest
    assert max(peaks) < 10 * 2 * largest + (100 << 10), (peaks, largest)
