"""Step checkpoints through convert: neutral and Orbax, there and back, every bit of parameters, optimizer state and step."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.cli import main
from convert.formats import source_format
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, read_checkpoint, read_info, verify_checkpoint, write_checkpoint, write_final
from smedjan_common.config import TrainConfig
from tests.conformance import subjects
from tests.conformance.cases import CASES
from tests.conformance.compare import demand_equal_bits
from tests.unit.convert_models import convert, model_config, neutral, parameters, tokenizer

pytest.importorskip("jax", reason="Orbax is JAX's")
ROOT = Path(__file__).parents[2]
DATASET = {"hash": "d" * 64, "path": "data/train.bin", "tokens": 1234}


def step_checkpoint(directory: Path, name: str | None = None) -> Path:
    """A neutral step checkpoint with odd values: NaN, infinities, denormals, signed zeros."""
    config = model_config(tokenizer().vocab_size)
    params = parameters(config)
    params["norm.weight"][:6] = [np.nan, np.inf, -np.inf, 1e-45, -0.0, 3e38]
    scales = {"mu": 0.5, "nu": 0.25, "ema": 0.9}
    slots = {f"{slot}.{key}": np.float32(scale) * value for slot, scale in scales.items() for key, value in params.items()}
    return write_checkpoint(
        directory,
        Snapshot(12, params, slots),
        About(
            model=config,
            train=TrainConfig(steps=20, batch_size=2, seq_len=16, lr=1e-3, seed=7, ema=0.9),
            tokenizer=SavedTokenizer.of(tokenizer()),
            dataset=DATASET,
            framework={"name": "test"},
        ),
        metrics={"loss": 2.5},
        name=name,
    )


def facts(path: Path) -> dict[str, Any]:
    """What checkpoint.json says of the run."""
    info = read_info(path)
    kept = ("step", "model", "train", "optimizer", "tokenizer_hash", "dataset", "framework", "metrics")
    return {name: getattr(info, name) for name in kept}


def content(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json")]


def test_neutral_to_orbax_and_back_keeps_every_bit_and_all_that_a_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smedjan_jax.checkpoint.BATCH_BYTES", 20_000)  # several parts
    source = step_checkpoint(tmp_path)
    orbax, back = tmp_path / "orbax-00000012", tmp_path / "back"
    convert(source, orbax, "--to", "orbax")
    assert source_format(orbax).name == "orbax"
    verify_checkpoint(orbax)
    convert(orbax, back, "--to", "neutral")
    assert content(back) == content(source)
    assert facts(orbax) == facts(back) == facts(source)


def test_what_jax_saved_and_what_convert_wrote_are_the_same_to_jax(tmp_path: Path):
    """JAX -> orbax -> neutral -> orbax -> JAX, and MLX -> neutral -> orbax -> neutral -> MLX: every bit of the state."""
    case = CASES["attention-swiglu-gqa"]
    train = dataclasses.replace(case.train, steps=20)
    rng = np.random.default_rng(0)
    slots = {f"{slot}.{key}": rng.random(value.shape, np.float32) for slot in ("mu", "nu") for key, value in case.start.items()}
    for name in ("jax", "mlx"):
        backend = subjects.backend(name, case.model, train)
        saved = backend.save(backend.restore(Snapshot(3, case.start, slots)))
        demand_equal_bits(saved.optimizer, slots)
        path = write_checkpoint(tmp_path / name, saved, About(model=case.model, train=train, framework={"name": name}))
        convert(path, tmp_path / name / "orbax-00000003", "--to", "orbax")
        if name == "jax":
            restored = backend.save(backend.own.read(tmp_path / name / "orbax-00000003" / "arrays"))
        else:
            convert(tmp_path / name / "orbax-00000003", tmp_path / name / "back", "--to", "neutral")
            restored = backend.save(backend.restore(read_checkpoint(tmp_path / name / "back").snapshot))
        assert restored.step == saved.step == 3
        demand_equal_bits(restored.params, saved.params)
        demand_equal_bits(restored.optimizer, saved.optimizer)


def test_a_run_whose_newest_is_orbax_is_a_source_and_weights_alone_pass_too(tmp_path: Path):
    source = step_checkpoint(tmp_path / "run")
    convert(source, tmp_path / "run" / "orbax-00000012", "--to", "orbax")
    assert source_format(tmp_path / "run").name == "neutral", "of one step the neutral one is newest"
    source.rename(tmp_path / "away")
    assert source_format(tmp_path / "run").name == "orbax"
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    convert(neutral(tmp_path), tmp_path / "weights", "--to", "orbax")
    info = read_info(tmp_path / "weights")
    assert (info.optimizer, info.slots, info.step) == (None, {}, 7)
    convert(tmp_path / "weights", tmp_path / "again", "--to", "neutral")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "final/model.safetensors").read_bytes()


def final(run: Path, step: int) -> Path:
    """final/ of another step than step_checkpoint's, weights only."""
    config = model_config(tokenizer().vocab_size)
    shutil.rmtree(run / "final", ignore_errors=True)
    about = About(model=config, tokenizer=SavedTokenizer.of(tokenizer()), dataset=DATASET, framework={"name": "test"})
    return write_final(run, Snapshot(step, parameters(config), {}), about)


@pytest.mark.parametrize(("form", "other"), [("neutral", "orbax"), ("orbax", "neutral")])
def test_of_a_run_the_checkpoint_that_training_goes_on_from_is_taken(tmp_path: Path, form: str, other: str, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    source = step_checkpoint(run)
    if form == "orbax":
        convert(source, run / "orbax-00000012", "--to", "orbax")
        source.rename(tmp_path / "away")
        source = run / "orbax-00000012"
    for step in (7, 12):  # final/ is older, or as new
        final(run, step)
        capsys.readouterr()
        convert(run, tmp_path / f"out{step}", "--to", other)
        said = capsys.readouterr().out
        assert f"of {source}," in said
        assert "and optimizer state" in said
        assert facts(tmp_path / f"out{step}") == facts(source)
        assert f"{form} already" in refused(capsys, run, tmp_path / "x", "--to", form)
    assert "would be lost" in refused(capsys, run, source, "--to", other, "--force")
    last = final(run, 13)
    convert(run, tmp_path / "out13", "--to", "orbax")
    assert f"of {last}," in capsys.readouterr().out
    assert read_info(tmp_path / "out13").optimizer is None


def test_hf_takes_the_weights_of_final_as_before(tmp_path: Path, capsys: pytest.CaptureFixture):
    step_checkpoint(tmp_path / "run")
    last = final(tmp_path / "run", 12)
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    assert f"of {last}," in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    return capsys.readouterr().err


def test_what_is_wrong_is_refused_and_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture):
    source, orbax = step_checkpoint(tmp_path), tmp_path / "o"
    convert(source, orbax, "--to", "orbax")
    assert "already exists" in refused(capsys, source, orbax, "--to", "orbax")
    assert "orbax already" in refused(capsys, orbax, tmp_path / "x", "--to", "orbax")
    assert "cannot name step 12" in refused(capsys, orbax, tmp_path / "orbax-00000012", "--to", "neutral")
    assert "cannot name step 12" in refused(capsys, source, tmp_path / "orbax-00000013", "--to", "orbax")
    assert "in the way" in refused(capsys, orbax, source, "--to", "hf", "--force"), "a neutral one is not what hf writes"
    convert(source, orbax, "--to", "orbax", "--force")
    victim = next(file for file in (orbax / "arrays").rglob("*") if file.is_file() and file.stat().st_size > 5000)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert f"{victim} is damaged" in refused(capsys, orbax, tmp_path / "x", "--to", "neutral")
    (orbax / "checkpoint.json").write_text("{}")
    for form in ("neutral", "orbax"):
        assert "checkpoint.json does not belong to a smedjan checkpoint" in refused(capsys, orbax, tmp_path / "x", "--to", form)
    assert not (tmp_path / "x").exists()


def test_without_jax_it_says_what_to_install(tmp_path: Path):
    source = step_checkpoint(tmp_path)
    code = f"import sys; sys.modules['jax'] = None; from convert.cli import main; sys.exit(main([{str(source)!r}, 'x', '--to', 'orbax']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'smedjan[cpu]'" in done.stderr
    assert not (tmp_path / "x").exists()
