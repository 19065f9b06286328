"""The neutral checkpoint: what is written is read back bit for bit, the newest is found, old ones go, other runs are refused."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import (
    About,
    Checkpoint,
    SavedTokenizer,
    read_checkpoint,
    read_info,
    tensors,
    verify_checkpoint,
    write_checkpoint,
    write_final,
)
from smedjan_common.checkpoint.tensors import write_tensors
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.model.params import parameter_table
from smedjan_common.run.resume import changes, check_same, difference

MODEL = ModelConfig(vocab_size=64, dim=8, layers=1, heads=2, kv_heads=1, ffn_dim=16)
TRAIN = TrainConfig(steps=10, batch_size=4, seq_len=8, lr=1e-3)
TOKENIZER_JSON = '{"model": {"vocab": {"é": 0}}}'


def sample_snapshot(step: int = 3, model: ModelConfig = MODEL, dtype: Any = np.float32) -> Snapshot:
    """Values that a formula gives, exact in every dtype: a file that is read by a later smedjan is compared with them."""
    params = {}
    for name, spec in parameter_table(model).items():
        values = (np.arange(spec.size, dtype=np.int64) * 37 + len(name) + step) % 101 - 50
        params[name] = (values.reshape(spec.shape) / 64).astype(dtype)
    slots = {"mu": 0.5, "nu": 0.25}
    return Snapshot(
        step, params, {f"{slot}.{name}": array * array.dtype.type(c) for slot, c in slots.items() for name, array in params.items()}
    )


def facts(**changes: Any) -> dict[str, Any]:
    """The keyword arguments of write_checkpoint. changes: of them, or of About."""
    about = About(
        model=MODEL,
        train=TRAIN,
        tokenizer=SavedTokenizer(TOKENIZER_JSON, "tokenizer-hash"),
        dataset={"hash": "dataset-hash", "path": "text.tokens", "tokens": 12345},
        framework={"name": "numpy", "versions": {"numpy": "2.0"}},
    )
    others = {name: changes.pop(name) for name in vars(about).keys() & changes.keys()}
    return {"about": dataclasses.replace(about, **others), "metrics": {"loss": 2.5}} | changes


def write(directory: Path, step: int = 3, **changes: Any) -> Path:
    """A small checkpoint of step `step`."""
    return write_checkpoint(directory, sample_snapshot(step), **facts(**changes))


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_same(checkpoint: Checkpoint, snapshot: Snapshot) -> None:
    """The checkpoint holds exactly this snapshot and the facts."""
    assert checkpoint.step == checkpoint.snapshot.step == snapshot.step
    assert_same_arrays(checkpoint.snapshot.params, snapshot.params)
    assert_same_arrays(checkpoint.snapshot.optimizer, snapshot.optimizer)
    assert (checkpoint.model, checkpoint.train, checkpoint.tokenizer_json) == (MODEL, TRAIN, TOKENIZER_JSON)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    path = write(tmp_path / "a" / "run", extra={"note": [1, "two"]})
    assert path == tmp_path / "a" / "run" / "step-00000003"
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint, sample_snapshot())
    assert list(checkpoint.snapshot.params) == list(parameter_table(MODEL))
    assert (checkpoint.tokenizer_hash, checkpoint.dataset) == ("tokenizer-hash", facts()["about"].dataset)
    info = checkpoint.info
    assert (info.optimizer, info.framework, info.metrics, info.extra) == (
        "adamw",
        facts()["about"].framework,
        {"loss": 2.5},
        {"note": [1, "two"]},
    )
    assert read_info(path) == verify_checkpoint(path) == info


def test_the_same_state_gives_the_same_bytes(tmp_path):
    assert tree(write(tmp_path / "a")) == tree(write(tmp_path / "b"))


def test_arrays_read_are_writable_and_own_their_memory(tmp_path):
    path = write(tmp_path)
    before = tree(path)
    arrays = list(read_checkpoint(path).snapshot.params.values())
    for number, array in enumerate(arrays):
        array[...] = number
    for number, array in enumerate(arrays):
        assert (array == number).all(), "another array shares its memory"
        assert array.flags.owndata or array.base.flags.owndata
    assert tree(path) == before, "nothing that is done to them reaches the disk"
    assert_same(read_checkpoint(path), sample_snapshot())


@pytest.mark.parametrize("length", range(1, 17))
def test_data_starts_at_a_multiple_of_8_bytes_whatever_the_header(tmp_path, length):
    path = tmp_path / "x"
    write_tensors(path, {"n" * length: np.arange(3, dtype=np.float32)})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == 8 + header + 12


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    for there in (b"", b"abc"):
        with pytest.raises(CheckpointError, match=r"cut short at embed.weight"):
            tensors._fill(tmp_path / "model.safetensors", io.BytesIO(there), memoryview(bytearray(8)), "embed.weight")


def test_bfloat16_nan_infinity_negative_zero_and_layout_survive(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        snapshot = sample_snapshot(dtype=dtype)
        weight = snapshot.params["embed.weight"]
        weight[0, :4] = [np.nan, np.inf, -np.inf, -0.0]
        snapshot.params["layers.0.ffn.gate_proj.weight"] = np.asfortranarray(snapshot.params["layers.0.ffn.gate_proj.weight"])
        path = write_checkpoint(tmp_path, snapshot, **facts())
        assert_same(read_checkpoint(path), snapshot)


def test_big_endian_and_strided_arrays_are_written_in_the_order_of_the_format(tmp_path):
    snapshot = sample_snapshot()
    odd = {name: np.repeat(array, 2, axis=0)[::2].astype(">f4") for name, array in snapshot.params.items()}
    path = write_checkpoint(tmp_path, Snapshot(3, odd, snapshot.optimizer), **facts())
    assert_same(read_checkpoint(path), snapshot)


def test_arrays_come_to_the_host_only_in_their_turn(tmp_path):
    snapshot, alive = sample_snapshot(), []

    class OnDevice:
        def __init__(self, array):
            self.array, self.dtype, self.shape = array, array.dtype, array.shape

        def __array__(self, dtype=None, copy=None):
            alive.append(self)
            return self.array.copy()

    lazy = Snapshot(3, {name: OnDevice(array) for name, array in snapshot.params.items()}, {})  # type: ignore[misc]
    path = write_checkpoint(tmp_path, lazy, **facts())
    assert len(alive) == len(snapshot.params)
    assert_same_arrays(read_checkpoint(path).snapshot.params, snapshot.params)


def test_the_safetensors_package_reads_our_file_and_we_read_its(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    assert_same_arrays(safetensors.numpy.load_file(path), sample_snapshot().params)
    from smedjan_common.checkpoint.tensors import FileRecord, TensorRecord, read_tensors

    other = tmp_path / "other.safetensors"
    params = sample_snapshot().params
    safetensors.numpy.save_file(params, other, metadata={"format": "np"})
    records = {name: TensorRecord("F32", array.shape, 0) for name, array in params.items()}
    assert_same_arrays(read_tensors(other, FileRecord(other.stat().st_size, ""), records, verify=False), params)


def test_weights_can_be_read_alone(tmp_path):
    checkpoint = read_checkpoint(write(tmp_path), optimizer=False)
    assert checkpoint.snapshot.optimizer == {}
    assert checkpoint.info.optimizer == "adamw"


def test_final_has_weights_configuration_and_tokenizer_only_and_is_replaced(tmp_path):
    for step in (3, 10):
        path = write_final(tmp_path, sample_snapshot(step), **facts())
        assert path == tmp_path / "final"
        assert sorted(p.name for p in path.iterdir()) == ["checkpoint.json", "model.safetensors", "tokenizer.json"]
        checkpoint = read_checkpoint(tmp_path)
        assert_same(checkpoint, Snapshot(step, sample_snapshot(step).params, {}))
        assert checkpoint.info.optimizer is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "moved-aside"])
def test_a_step_that_exists_is_replaced_and_nothing_stays_behind(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr("smedjan_common.files.atomic_directory._exchange", lambda one, other: False)
    write(tmp_path)
    changed = sample_snapshot()
    changed.params["norm.weight"][:] = 7
    write_checkpoint(tmp_path, changed, **facts())
    assert_same(read_checkpoint(tmp_path), changed)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.txt").write_text("years of work")
    (tmp_path / "step-00000003").write_text("a file")
    for save in (lambda: write_final(tmp_path, sample_snapshot(), **facts()), lambda: write(tmp_path)):
        with pytest.raises(CheckpointError, match="in the way"):
            save()
    assert tree(tmp_path) == {"final/thesis.txt": b"years of work", "step-00000003": b"a file"}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", ".hidden", "a/b", "", "step-00000004", "..", "a\nb"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    if name == "":
        assert write(tmp_path, name=name).name == "step-00000003"
        return
    with pytest.raises(CheckpointError, match="name"):
        write(tmp_path / "run", name=name)
    assert not (tmp_path / "run").exists()


def test_a_tree_of_another_model_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"layers\.1\.mixer_norm\.weight is missing"):
        write(tmp_path / "run", model=dataclasses.replace(MODEL, layers=2))
    snapshot = sample_snapshot()
    with pytest.raises(CheckpointError, match="float64"):
        write_checkpoint(
            tmp_path / "run",
            dataclasses.replace(
                snapshot, params={n: a * np.float64(1) for n, a in snapshot.params.items()} | {"embed.weight": np.zeros((64, 8))}
            ),
            **facts(),
        )
    with pytest.raises(CheckpointError, match=r"mu\.embed\.weight has shape"):
        write_checkpoint(
            tmp_path / "run", dataclasses.replace(snapshot, optimizer={"mu.embed.weight": np.zeros((8, 64), np.float32)}), **facts()
        )
    assert not (tmp_path / "run").exists()


def test_figures_that_are_not_finite_or_not_json_are_written_plainly(tmp_path):
    metrics = {"loss": float("nan"), "lr": np.float32(0.5), "mfu": np.inf, "step": np.int64(4), "where": tmp_path}
    info = read_info(write(tmp_path, metrics=metrics, train=None, tokenizer=None, dataset=None))
    assert info.metrics == {"loss": None, "lr": 0.5, "mfu": None, "step": 4, "where": str(tmp_path)}
    assert (info.train, info.tokenizer_hash, info.dataset, info.optimizer) == (None, None, None, "unknown")
    assert read_checkpoint(tmp_path).tokenizer_json is None


def test_differences_are_lines_to_read():
    assert difference(MODEL, MODEL) == []
    other = dataclasses.replace(MODEL, dim=16, mixer=("attention", "attention"))
    assert difference(MODEL, other) == ["dim: 8 in the checkpoint, 16 now", "mixer: attention in the checkpoint, attention,attention now"]


def test_a_run_goes_on_only_with_its_model_and_optimizer(tmp_path):
    info = read_info(write(tmp_path))
    check_same(info, MODEL, TRAIN)
    assert changes(info, MODEL, TRAIN) == []
    model, longer = dataclasses.replace(MODEL, context_length=2048), dataclasses.replace(TRAIN, steps=20, lr=2e-3)
    check_same(info, model, longer)
    assert changes(info, model, longer) == [
        "context_length: 1024 in the checkpoint, 2048 now",
        "steps: 10 in the checkpoint, 20 now",
        "lr: 0.001 in the checkpoint, 0.002 now",
    ]
    with pytest.raises(CheckpointError, match="another model: dim is 8 there, 16 now; rope_base is"):
        check_same(info, dataclasses.replace(MODEL, dim=16, rope_base=500000.0), TRAIN)
    with pytest.raises(CheckpointError, match="--optimizer lion, not adamw"):
        check_same(dataclasses.replace(info, optimizer="lion"), MODEL, TRAIN)
    with pytest.raises(CheckpointError, match="weights only"):
        check_same(read_info(write_final(tmp_path, sample_snapshot(), **facts())), MODEL, TRAIN)


def test_importing_it_imports_no_framework():
    code = "import smedjan_common.checkpoint, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"jax", "mlx", "torch", "safetensors", "ml_dtypes"} & set(loaded)


def test_the_example_of_the_page_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[200, 300]\n2098304\n300 (128,)\n", "")


def flip(path: Path, index: int, bit: int = 1) -> None:
    """Flip a bit of the byte at `index`."""
    raw = bytearray(path.read_bytes())
    raw[index] ^= bit
    path.write_bytes(raw)


def in_subprocess(code: str, *args: object) -> str:
    """Run Python code in a process of its own, from the repository's root; returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]).stdout
