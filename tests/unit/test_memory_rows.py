"""Estimates of memory against what was measured: the committed rows of bench.estimates and bench.memory, computed anew.

A row's peak is what the allocator held at most, or the state and what XLA laid out beside it (on a CPU, whose allocator does not count).
"""

import json
import pathlib

import pytest

from bench.estimates import configs
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.config import parse_pattern
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.training.memory import Place, by_kernels, state_bytes, training_bytes
from smedjan_common.training.mesh import ONE_DEVICE, parse_mesh

RESULTS = pathlib.Path(__file__).parents[2] / "bench" / "results"
WITHIN = 0.15
FILES = sorted(path.name for path in RESULTS.glob("estimates-*.json"))


def rows(name: str):
    """(row, model, training, place) of a result file."""
    results = json.loads((RESULTS / name).read_text())
    for row in results["rows"]:
        yield row, *configs(row), Place(row["backend"], row["device"], results["versions"][row["backend"]])


@pytest.mark.parametrize("name", FILES)
def test_every_estimate_is_within_15_percent_of_the_measured_peak(name: str):
    off = {}
    for row, model, train, place in rows(name):
        peak = row.get("peak_bytes") or row["planned_bytes"] + state_bytes(model, train)
        if abs(error := training_bytes(model, train, place=place) / peak - 1) > WITHIN:
            off[json.dumps([row["model"], row["train"]])] = round(error, 3)
    assert not off


@pytest.mark.parametrize("name", FILES)
def test_every_mixer_and_feed_forward_was_measured_at_two_depths_and_with_each_gradient_checkpointing(name: str):
    measured = {(m.mixer[0], m.ffn[0], m.layers, t.gradient_checkpointing) for _, m, t, _ in rows(name)}
    kept = ("none", "full")
    wanted = {(mixer, "swiglu", layers, how) for mixer in MIXERS for layers in (2, 4) for how in kept}
    wanted |= {("attention", ffn, layers, how) for ffn in FFNS for layers in (2, 4) for how in kept}
    assert not wanted - measured


def test_the_rows_of_real_models_on_an_h100_are_within_15_percent():
    found = json.loads((RESULTS / "memory-h100.json").read_text())["rows"]
    compared = 0
    for row in found:
        if row["logits"] != "default" or "peak_memory_bytes" not in row:
            continue
        mixer = parse_pattern(row["mixer"])
        model = ModelConfig.preset(row["size"], vocab_size=row["vocab_size"], context_length=row["seq_len"], mixer=mixer)
        options = {name: row[name] for name in ("gradient_checkpointing", "grad_accum", "dtype")}
        train = TrainConfig(1000, row["batch_size"], row["seq_len"], 3e-4, **options)
        assert training_bytes(model, train) == pytest.approx(row["peak_memory_bytes"], rel=WITHIN), row
        compared += 1
    assert compared >= 6


def test_the_rows_of_meshes_are_within_15_percent_on_each_device():
    for row in json.loads((RESULTS / "mesh-h200.json").read_text()):
        model = ModelConfig.preset(row["size"], vocab_size=row["vocab_size"], context_length=row["seq_len"])
        train = TrainConfig(1000, row["batch_size"], row["seq_len"], 3e-4, dtype=row["dtype"])
        estimate = training_bytes(model, train, parse_mesh(row["mesh"]) or ONE_DEVICE)
        assert estimate == pytest.approx(row["peak_memory_bytes"], rel=WITHIN), row


def test_what_kernels_keep_is_within_15_percent_and_no_less():
    """Whole models at two depths and three lengths."""
    compared = set()
    for name in ("kernels-h200.json", "kernel_lengths-h200.json"):
        for row in json.loads((RESULTS / name).read_text())["rows"]:
            taken = by_kernels(row["runs"])
            if row["mixer"] not in taken:
                continue
            layers = {"layers": row["layers"]} if row["layers"] else {}
            model = ModelConfig.preset("medium", context_length=row["seq_len"], mixer=(row["mixer"],), **layers)
            train = TrainConfig(1000, row["batch_size"], row["seq_len"], 3e-4, dtype="bfloat16")
            peak = row["bytes_per_token"] * row["batch_size"] * row["seq_len"] + state_bytes(model, train)
            assert 0 <= training_bytes(model, train, place=Place(kernels=taken)) / peak - 1 < WITHIN, row
            compared.add((row["mixer"], row["layers"], row["seq_len"]))
    assert {mixer for mixer, *_ in compared} == {"linear", "ssm", "rwkv", "gated-deltanet", "block-sparse"}
    assert len(compared) == 15


def test_a_device_says_which_mixers_take_kernels():
    assert by_kernels("") == by_kernels("plain") == by_kernels("cuDNN with a mask for block-sparse") == frozenset()
    assert by_kernels("pallas") == {"linear", "ssm", "rwkv", "gated-deltanet"}
    assert by_kernels("pallas for linear, plain for ssm, pallas for block-sparse") == {"linear", "block-sparse"}


def test_the_rows_of_four_gpus_are_within_15_percent_of_what_xla_lays_out():
    pytest.importorskip("jax", reason="jax is not installed here")
    from bench.mesh import SHAPES

    compared = 0
    for row in json.loads((RESULTS / "scale-h200.json").read_text())["rows"]:
        if row.get("table") or not row.get("again", True):
            continue
        mixer = parse_pattern(row["mixer"])
        settings = {"vocab_size": row["vocab_size"], "context_length": row["seq_len"], "mixer": mixer}
        shape = SHAPES.get(row["size"])
        model = ModelConfig.build(**shape, **settings) if shape else ModelConfig.preset(row["size"], **settings)
        train = TrainConfig(1000, row["batch_size"], row["seq_len"], 3e-4, dtype=row["dtype"])
        place = Place(kernels=frozenset(mixer))
        assert training_bytes(model, train, parse_mesh(row["mesh"]) or ONE_DEVICE, place) == pytest.approx(row["bytes"], rel=WITHIN), row
        compared += 1
    assert compared >= 12


@pytest.mark.parametrize("name", [name for name in FILES if "cpu" in name])
def test_a_process_on_a_cpu_grows_by_about_the_estimate(name: str):
    """The process holds more than its arrays: buffers kept for later, threads' own; and the initial values it was made from."""
    grown = [row["resident_bytes"] / training_bytes(model, train, place=place) for row, model, train, place in rows(name)]
    assert min(grown) > 0.75
    assert sorted(grown)[len(grown) // 2] < 1.3
