"""What a run costs on GPUs that are not here: against steps that were measured on one, two and four, and by closed forms."""

import dataclasses
import json

import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.params import count_params
from smedjan_common.training import cluster
from smedjan_common.training.cluster import HARDWARE, Cluster, cost, costs, fits, hardware, traffic
from smedjan_common.training.mesh import MeshShape, parse_mesh
from tests.fakes.runs import ROOT

SHAPES = {"llama2-7b": {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn_dim": 11008, "tied_head": False}}
WITHIN = 0.15  # of what was measured
MODEL = ModelConfig.preset("xxl", vocab_size=32768, context_length=2048)


def train(**changes) -> TrainConfig:
    return TrainConfig(**({"steps": 10, "batch_size": 64, "seq_len": 2048, "lr": 1e-3, "dtype": "bfloat16"} | changes))


def measured():
    """(row, model, training, mesh) of every step that was timed on several GPUs, and on one with the same model."""
    found = json.loads((ROOT / "bench/results/scale-h200.json").read_text())["rows"] + json.loads(
        (ROOT / "bench/results/mesh-h200.json").read_text()
    )
    for row in found:
        if not row.get("milliseconds_per_step") or "table" in row:
            continue
        settings = {
            "vocab_size": row["vocab_size"],
            "context_length": row["seq_len"],
            "mixer": tuple(row.get("mixer", "attention").split(",")),
        }
        shape = SHAPES.get(row["size"])
        model = ModelConfig.build(**shape, **settings) if shape else ModelConfig.preset(row["size"], **settings)
        mesh = parse_mesh(row["mesh"])
        assert mesh
        yield row, model, train(batch_size=row["batch_size"], seq_len=row["seq_len"], dtype=row["dtype"]), mesh


ROWS = list(measured())


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{row['size']}-{row['dtype']}-{row['mesh']}-{row['batch_size']}x{row['seq_len']}" for row, *_ in ROWS]
)
def test_a_step_on_several_gpus_takes_what_was_measured(row):
    found, model, training, mesh = row
    estimate = cost(model, training, mesh, Cluster(hardware("h200"), mesh.size))
    assert estimate.seconds * 1e3 == pytest.approx(found["milliseconds_per_step"], rel=WITHIN)


def test_the_rows_have_every_axis():
    assert {axis for _, _, _, mesh in ROWS for axis in ("data", "fsdp", "tensor") if getattr(mesh, axis) > 1} == {"data", "fsdp", "tensor"}


def test_bytes_of_a_step_are_those_of_rings():
    parameters = count_params(MODEL)
    found = traffic(MODEL, train(), MeshShape(data=4))
    assert found["data"].bytes == pytest.approx(2 * 3 / 4 * 4 * parameters)
    assert not found["fsdp"].bytes + found["tensor"].bytes
    found = traffic(MODEL, train(), MeshShape(fsdp=4))
    assert found["fsdp"].bytes == pytest.approx(3 / 4 * (2 * 2 + 4) * parameters, rel=0.01)  # bfloat16 twice, float32 sums; vectors besides
    assert traffic(MODEL, train(grad_accum=2), MeshShape(fsdp=4))["fsdp"].bytes == pytest.approx(2 * found["fsdp"].bytes)
    sums = (4 * MODEL.layers + 2) * 64 * 2048 * MODEL.dim * 2
    assert traffic(MODEL, train(), MeshShape(tensor=2))["tensor"].bytes == pytest.approx(2 / 2 * sums)


def test_a_ring_that_crosses_hosts_goes_at_the_speed_of_the_network():
    cluster = Cluster(hardware("h100"), 64, per_host=8, network=50e9)
    inside = cluster.bandwidth(MeshShape(fsdp=8, data=8), "fsdp")
    assert inside == cluster.bandwidth(MeshShape(data=64), "data"), "eight rings at once have eight networks"
    assert cluster.bandwidth(MeshShape(data=8, fsdp=8), "data") == pytest.approx(0.8 * 50e9)
    assert cluster.bandwidth(MeshShape(data=16, tensor=4), "data") == pytest.approx(2 * 0.8 * 50e9)
    assert cluster.bandwidth(MeshShape(data=16, tensor=4), "tensor") == inside


def test_the_fastest_mesh_that_fits_comes_first():
    cluster = Cluster(hardware("h100"), 8)
    found = costs(ModelConfig.preset("max", vocab_size=32768, context_length=4096), train(batch_size=16, seq_len=4096), cluster)
    enough = [fits(one, cluster) for one in found]
    assert enough == sorted(enough, reverse=True)
    assert 0 < sum(enough) < len(enough), "the whole model on each of the GPUs is too much"
    assert [one.seconds for one in found if fits(one, cluster)] == sorted(one.seconds for one in found if fits(one, cluster))
    small = costs(ModelConfig.preset("tiny", vocab_size=512, context_length=64), train(batch_size=64, seq_len=64), cluster)
    assert str(small[0].mesh) == "data=8", "what fits everywhere is split the cheapest way"


def test_recomputing_mixers_and_experts_change_the_time():
    cluster = Cluster(hardware("h100"), 8)

    def seconds(changed: ModelConfig = MODEL, **changes) -> float:
        return cost(changed, train(**changes), MeshShape(data=8), cluster).compute

    whole = seconds()
    assert seconds(gradient_checkpointing="full") == pytest.approx(4 / 3 * whole)
    assert seconds(dtype="float8") < whole
    assert seconds(dataclasses.replace(MODEL, mixer=("rwkv",))) > whole
    long = {"batch_size": 8, "seq_len": 16384}
    wide = dataclasses.replace(MODEL, context_length=16384)
    assert seconds(dataclasses.replace(wide, mixer=("linear",)), **long) < 0.8 * seconds(wide, **long), "attention grows with the length"


def test_unknown_hardware_is_refused():
    with pytest.raises(ConfigError, match="h100"):
        hardware("h1000")
    assert all(row.share and row.memory > 2**30 for row in HARDWARE.values())


def test_mixers_take_kernels_in_a_plan_where_the_backend_takes_them_by_itself():
    kernels = pytest.importorskip("smedjan_jax.kernels", reason="jax is not installed here")
    assert kernels.SIZES == cluster.KERNEL_SIZES
    assert set(kernels.FASTER) == cluster.KERNEL_FEATURES
    hybrid = ModelConfig.preset("xxl", vocab_size=32768, context_length=2048, mixer=("gated-deltanet", "attention"))
    wide = ModelConfig.preset(
        "xxl", vocab_size=32768, context_length=2048, mixer=("gated-deltanet", "attention"), heads=8
    )  # of 256 features

    def needed(model, name="h200", **changes):
        return cost(model, train(**changes), MeshShape(), Cluster(hardware(name), 1)).needed

    assert needed(hybrid) == needed(hybrid, "h100") < 0.9 * needed(hybrid, kernels="plain")
    assert needed(hybrid, "a100") == needed(hybrid, kernels="plain")
    assert needed(wide) == needed(wide, kernels="plain")
