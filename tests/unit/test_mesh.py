"""The mesh as text, what it can share out, what it costs, and what users are told."""

import dataclasses
import os
import subprocess
import sys

import pytest

from smedjan_common.backend import Device
from smedjan_common.commands import train
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.params import count_params, parameter_table
from smedjan_common.run.asked import Asked
from smedjan_common.run.data import RunData
from smedjan_common.run.decided import Decided
from smedjan_common.run.flags import TrainFlags
from smedjan_common.run.plan import heading
from smedjan_common.run.start import New
from smedjan_common.training.memory import training_bytes
from smedjan_common.training.mesh import ONE_DEVICE, RULES, MeshShape, check_mesh, mesh_axes, parse_mesh
from tests.fakes.runs import ROOT, arguments, check_new, train_here, write_text

MODEL = ModelConfig.preset("tiny", kv_heads=2)
TRAIN = TrainConfig(steps=1, batch_size=16, seq_len=64, lr=1e-3)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=2", MeshShape(2, 1, 1)),
        ("fsdp=4,data=2", MeshShape(2, 4, 1)),
        (" data = 2 , fsdp=4,tensor=1 ", MeshShape(2, 4, 1)),
        ("auto", None),
    ],
)
def test_any_axes_in_any_order(text, shape):
    assert parse_mesh(text) == shape


@pytest.mark.parametrize("shape", [MeshShape(2), MeshShape(2, 2, 2), MeshShape(1, 4), ONE_DEVICE])
def test_what_a_mesh_says_of_itself_is_the_flag(shape):
    assert parse_mesh(str(shape)) == shape
    assert shape.size == shape.batch * shape.tensor


def test_every_logical_axis_of_the_table_has_a_rule():
    assert {axis for spec in parameter_table(MODEL).values() for axis in spec.axes if axis} <= set(RULES)


def test_an_axis_splits_one_dimension_and_vectors_stay_whole():
    assert mesh_axes(ParamSpec("w", (8, 8), ("embed", "embed"))) == ("fsdp", None)
    assert mesh_axes(ParamSpec("w", (4, 8, 8), ("experts", "ffn", "embed"))) == (None, "tensor", "fsdp")
    assert mesh_axes(ParamSpec("w", (8,), ("embed",))) == (None,)


@pytest.mark.parametrize(
    ("mesh", "what"),
    [
        (MeshShape(data=3), "--batch-size 18"),
        (MeshShape(data=4, fsdp=8), "--batch-size 32"),
        (MeshShape(tensor=4), "--kv-heads 2"),
        (MeshShape(tensor=8), "--heads 4"),
        (MeshShape(fsdp=256), "--batch-size"),
    ],
)
def test_what_cannot_be_shared_out_evenly_is_refused_with_the_fix(mesh, what):
    with pytest.raises(ConfigError, match=what) as refused:
        check_mesh(mesh, MODEL, TRAIN.batch_size, TRAIN.grad_accum)
    assert "Take " in refused.value.fix


def test_the_parts_of_gradient_accumulation_are_what_is_shared_out():
    check_mesh(MeshShape(data=4), MODEL, TRAIN.batch_size, 4)
    with pytest.raises(ConfigError, match=r"8 parts \(--grad-accum\)"):
        check_mesh(MeshShape(data=4), MODEL, TRAIN.batch_size, 8)


def test_the_fix_works():
    with pytest.raises(ConfigError) as refused:
        check_mesh(MeshShape(data=3, fsdp=2), MODEL, TRAIN.batch_size, 2)
    rows = int(refused.value.fix.split()[2].strip(","))
    check_mesh(MeshShape(data=3), MODEL, rows, 2)


def test_a_width_that_fsdp_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="--dim 128"):
        check_mesh(MeshShape(fsdp=3), MODEL, 3, TRAIN.grad_accum)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_on_each_device_falls_with_the_axes_that_split_it(dtype):
    large = dataclasses.replace(TRAIN, batch_size=64, dtype=dtype)
    meshes = (ONE_DEVICE, MeshShape(4), MeshShape(1, 4), MeshShape(1, 1, 2))
    alone, data, fsdp, tensor = (training_bytes(MODEL, large, mesh) for mesh in meshes)
    assert fsdp < data < alone
    assert tensor < alone
    state = 16 * count_params(MODEL)
    one_row = dataclasses.replace(TRAIN, batch_size=4, seq_len=1, dtype="bfloat16")
    embed = 4 * MODEL.padded_vocab_size * MODEL.dim  # its gradient is whole until all devices have theirs
    assert training_bytes(MODEL, one_row, MeshShape(1, 4)) < state / 4 + 2.1 * count_params(MODEL) + embed


def test_the_heading_names_the_mesh_and_devices_that_are_not_used():
    def first_line(*mesh) -> str:
        device = Device("jax", "gpu", "H100", *mesh[:1], None, None, {}, *mesh[1:])
        asked = Asked(TrainFlags(), frozenset())
        decided = Decided("jax", asked, New(), ROOT, None, MODEL, TRAIN, RunData(None, None, None))
        return heading(decided, device).splitlines()[0]

    assert first_line(1, "data=1", 1) == "device   jax on H100 (gpu), float32"
    assert first_line(4, "data=2,fsdp=2", 4) == "device   jax on 4 x H100 (gpu), float32, mesh data=2,fsdp=2"
    assert first_line(1, "data=1", 2).endswith("1 of 2 devices, --mesh data=2 takes all")


def test_a_vocabulary_that_is_not_known_yet_refuses_no_mesh():
    words = "--size custom --dim 192 --layers 1 --heads 3 --batch-size 3 --mesh tensor=3".split()
    for known in (["--dataset", "a.bin"], ["--dataset", "a.txt", "--tokenizer", "tokenizer.json"], ["--vocab-size", "384"]):
        check_new(*words, *known)
    with pytest.raises(ConfigError, match=r"embed\.weight, which is 8192"):
        check_new(*words, "--dataset", "a.txt")


@pytest.mark.parametrize(
    ("mesh", "what"),
    [
        ("tenser=2", "Did you mean tensor?"),
        ("data", "has no number"),
        ("data=0", "at least 1"),
        ("data=2,data=4", "twice"),
        ("", "empty"),
        ("data=3", "--batch-size 4"),
        ("tensor=3", "--heads 2"),
    ],
)
def test_a_wrong_mesh_is_exit_2_before_the_text_is_tokenised(tmp_path, capsys, mesh, what):
    text = write_text(tmp_path)
    assert train_here(*arguments(text, tmp_path / "run", 3, "--mesh", mesh)) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mesh_is_refused_where_a_run_takes_one_device_before_the_framework_is_imported(tmp_path, capsys):
    words = [str(word) for word in arguments(write_text(tmp_path), tmp_path / "run", 3, "--mesh", "data=2")]
    assert train.run("mlx", lambda: pytest.fail("imported"), words) == 2
    assert "--backend jax" in capsys.readouterr().err


def test_more_devices_than_there_are_is_exit_2(tmp_path):
    words = [str(word) for word in arguments(write_text(tmp_path), "run", 3, "--mesh", "data=2")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "smedjan_jax.train", *words], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2, done.stderr
    assert "needs 2 devices" in done.stderr
    assert "JAX sees one, cpu" in done.stderr
    assert "Traceback" not in done.stderr
