"""Training on a mesh of devices is training on one: eight virtual devices of the CPU, in a process of their own.

`measure` runs there, once for all tests: 20 steps on each mesh beside the same steps on one device.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.adapters import trained_table
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.params import parameter_table
from smedjan_common.reporting.metrics import read_rows, train_rows
from smedjan_common.training.mesh import ONE_DEVICE, MeshShape, mesh_axes, parse_mesh
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.schedule import learning_rate
from tests.conformance.cases import CASES, model_config
from tests.conformance.compare import Difference, demand, demand_equal_bits, largest
from tests.conformance.gates import FLOAT32
from tests.conformance.routing import separated
from tests.fakes.objectives import PAIRED
from tests.fakes.runs import ROOT, arguments, saved_steps, write_text

pytestmark = pytest.mark.skipif(os.environ.get("SMEDJAN_TEST_DEVICE") == "gpu", reason="virtual devices are of the CPU")
ONE_WORKER = pytest.mark.xdist_group("mesh")  # that makes the report once
MHA, GQA = CASES["attention-swiglu-mha"], CASES["attention-swiglu-gqa"]
WITH_KERNELS = [name for name, row in MIXERS.items() if row.training is Chunked]
EXPERTS = CASES["attention-experts-mha"].model


class Run(NamedTuple):
    """A mesh, the model on it, changes of its training, steps, and the shares that one device has of layers.0.mixer.k_proj.weight,
    [heads, width], and embed.weight, [vocabulary, width]."""

    mesh: str
    model: ModelConfig
    changes: dict[str, object]
    steps: int = 20
    shares: tuple[tuple[int, ...], ...] = ()


def every_mixer() -> ModelConfig:
    """One model with every row of the menu."""
    model = model_config(tuple(MIXERS), next(iter(FFNS)))
    assert model
    return model


RUNS = {
    "data": Run("data=8", MHA.model, {}, shares=((32, 32), (64, 32))),
    "fsdp": Run("fsdp=8", GQA.model, {}, shares=((16, 4), (64, 4))),
    "tensor": Run("tensor=4", MHA.model, {}, shares=((8, 32), (16, 32))),
    "all axes": Run("data=2,fsdp=2,tensor=2", GQA.model, {"grad_accum": 2}, shares=((8, 16), (32, 16))),
    "experts": Run("data=2,fsdp=2", EXPERTS, {"optimizer": "muon", "mask_documents": True, "grad_accum": 2, "ema": 0.3}, 3),
    "pairs": Run("data=2,fsdp=2", MHA.model, {"objective": PAIRED.name, "mask_documents": True, "grad_accum": 2}, 2),
    "teacher": Run("data=2,fsdp=2,tensor=2", GQA.model, {"distill_alpha": 0.5, "grad_accum": 2}, 3),
    "adapters": Run("data=2,fsdp=2,tensor=2", GQA.model, {"lora_rank": 4, "lora_rows_from": 50, "lora_rows": 3, "grad_accum": 2}, 3),
    "every mixer": Run("data=2,fsdp=2,tensor=2", every_mixer(), {"mask_documents": True}, 0),  # evaluation alone: to compile is long
}


def batches():
    """Eight rows a step, of two steps of the suite's."""
    return [tuple(np.concatenate(pair) for pair in zip(*two, strict=True)) for two in zip(MHA.batches, MHA.batches[::-1], strict=True)]


BESIDE = {"tensor": "data", "all axes": "fsdp"}  # runs that are the same on one device


@functools.cache
def train(name: str, mesh: MeshShape) -> dict[str, Any]:
    """What a run gives on a mesh."""
    from smedjan_common.model.params import initial_params
    from smedjan_jax.backend import JaxBackend

    run = RUNS[name]
    config = dataclasses.replace(MHA.train, batch_size=8, **run.changes)
    OBJECTIVES.setdefault(PAIRED.name, PAIRED)
    backend = JaxBackend(run.model, config, mesh)
    if config.distill_alpha:
        teacher = dataclasses.replace(MHA.model, tied_head=False)
        backend.learn_from(teacher, initial_params(teacher, 2), teacher.vocab_size)
    state, rows = backend.init(separated(run.model, initial_params(run.model, 1))), []
    documents = np.concatenate([MHA.documents] * 2) if config.mask_documents else None
    reference = -np.random.default_rng(3).uniform(1, 9, (8, 4)).astype(np.float32) if config.objective == PAIRED.name else None
    for step, batch in enumerate(batches()[: run.steps]):
        state, metrics = backend.train_step(state, *batch, learning_rate(config, step), documents, reference)
        rows.append(backend.read(metrics))
    snapshot = backend.save(state)
    if config.adapters:  # of which a snapshot has these alone
        frozen = {name: np.asarray(value) for name, value in state["params"].items() if name not in snapshot.params}
        snapshot = dataclasses.replace(snapshot, params=frozen | snapshot.params)
    found = {"rows": rows, "snapshot": snapshot, "backend": backend, "state": state}
    if run.model is GQA.model:
        found["logits"] = backend.decoder(backend.params_of(state), 8).feed([1, 2, 3, 4])
    if run.model is GQA.model or not run.steps or reference is not None:
        found["evaluated"] = backend.read(backend.eval_step(state, *batches()[0], documents, reference))
    if reference is not None or config.adapters:
        found["losses"] = backend.token_losses(backend.params_of(state), *batches()[0], documents)
    return found


def differences(got: dict, want: dict) -> list[Difference]:
    """A run on a mesh beside the one on one device, under the gates of 20-step runs."""
    found = []
    gates = {
        "loss": FLOAT32.steps_loss,
        "balance_loss": FLOAT32.steps_loss,
        "margin": FLOAT32.steps_loss,
        "kl": FLOAT32.steps_loss,
        "grad_norm": FLOAT32.steps_params,
        "tokens": 0.0,
    }
    for a, b in zip(got["rows"], want["rows"], strict=True):
        found += [Difference(key, abs(a[key] / b[key] - 1), gate) for key, gate in gates.items() if key in b]
    if "losses" in want:
        found.append(Difference("losses of tokens", largest(got["losses"], want["losses"]), FLOAT32.steps_params))
    if "logits" in want:
        found.append(Difference("logits of the decoder", largest(got["logits"], want["logits"]), FLOAT32.steps_params))
    if "evaluated" in want:
        pairs = {key: (got["evaluated"][key], value) for key, value in want["evaluated"].items()}
        found += [Difference(f"evaluated {key}", abs(a / b - 1), FLOAT32.steps_loss) for key, (a, b) in pairs.items()]
    for kind in ("params", "optimizer"):
        for name, value in getattr(want["snapshot"], kind).items():
            off = np.linalg.norm(getattr(got["snapshot"], kind)[name] - value) / (np.linalg.norm(value) or 1.0)
            found.append(Difference(name, float(off), FLOAT32.steps_params))
    return found


def shares(state) -> dict[str, tuple]:
    """Shapes of what the first device holds, of all tensors of the train state."""
    held = {
        f"{kind}.{name}": array
        for kind, tensors in (state["slots"] | {"params": state["params"]}).items()
        for name, array in tensors.items()
    }
    return {name: array.addressable_shards[0].data.shape for name, array in held.items()}


def measure(path: str) -> None:
    """In the process with eight devices: what the tests ask of every run, as JSON."""
    report: dict[str, Any] = {}
    for name, run in RUNS.items():
        got, want = train(name, parse_mesh(run.mesh)), train(BESIDE.get(name, name), ONE_DEVICE)
        report[name] = {"differences": differences(got, want), "shares": shares(got["state"])}
        for mesh in (ONE_DEVICE, parse_mesh("data=2,fsdp=2,tensor=2")):
            other = type(got["backend"])(run.model, got["backend"].train, mesh)
            again = other.save(other.restore(got["snapshot"])).params
            demand_equal_bits(again, {key: got["snapshot"].params[key] for key in again}, f"{name} restored on {mesh} ")
    report["messages"] = messages()
    report["kernels"] = {name: kernel_over_heads(parse_mesh(name)) for name in ("tensor=2", "data=2,tensor=2", "data=2,fsdp=2,tensor=2")}
    report["float8"] = float8_over_fsdp()
    report["interpreted"] = {name: interpreted(name) for name in WITH_KERNELS}
    Path(path).write_text(json.dumps(report))


def messages() -> dict[str, dict[str, int]]:
    """How many arrays of which dtype the bfloat16 step gathers, and reduces and splits, over fsdp."""
    import jax

    from smedjan_jax.backend import JaxBackend

    backend = JaxBackend(GQA.model, dataclasses.replace(MHA.train, batch_size=8, dtype="bfloat16"), parse_mesh("data=2,fsdp=4"))
    rows, rate = jax.ShapeDtypeStruct((8, 17), np.int32), jax.ShapeDtypeStruct((), np.float32)
    program = backend._train_step.lower(backend.shapes, (rows, rows, None, None), rate).as_text()
    found = {}
    for kind in ("all_gather", "reduce_scatter"):
        found[kind] = Counter(re.findall(rf'"stablehlo\.{kind}".*?: \(tensor<[\dx]*x(\w+)>\) ->', program, re.DOTALL))
    return found


def kernel_over_heads(shape: MeshShape) -> float:
    """The sum of twice 256 ones, doubled on every device's own heads by what JAX lowers as it does cuDNN attention."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.custom_partitioning import custom_partitioning

    from smedjan_jax import sharding

    double = custom_partitioning(lambda x: 2 * x)
    double.def_partition(partition=None, infer_sharding_from_operands=None, sharding_rule="b t h k -> b t h k")
    mesh = sharding.make_mesh(shape)
    spread = sharding.Spread(parameter_table(GQA.model), mesh, set(), "float32")
    total = spread.sums(lambda params, x: jnp.sum(sharding.over_heads(double, (x,))))
    params = {name: jnp.zeros(spec.shape) for name, spec in parameter_table(GQA.model).items()}
    return float(jax.jit(total)(params, jax.device_put(jnp.ones((4, 8, 4, 2)), sharding.rows(mesh))))


def float8_over_fsdp() -> list[Difference]:
    """The product of two joined matrices in float8 and its gradients, rows and matrices over fsdp=4, beside one device. The rows of every
    device have the same largest value, and so the same scale."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from smedjan_jax import products, sharding

    rng, bfloat16 = np.random.default_rng(0), jnp.dtype("bfloat16")
    x, dy = (jnp.asarray(np.tile(rng.standard_normal((8, size)), (4, 1)), bfloat16) for size in (128, 384))
    weights = tuple(jnp.asarray(0.02 * rng.standard_normal((size, 128)), jnp.float32) for size in (128, 256))

    def together(x, weights, dy):
        y, back = jax.vjp(lambda x, weights: products.linear(x, list(weights), float8="plain"), x, weights)
        return y, *back(dy)

    def over(x, weights, dy):
        parts = tuple(products.Shard(weight, at, bfloat16) for weight, at in zip(weights, (1, 0), strict=True))
        y, dx, dparts = together(x, parts, dy)
        return y, dx, tuple(part.array for part in dparts)

    rows, places = PartitionSpec("fsdp"), (PartitionSpec(None, "fsdp"), PartitionSpec("fsdp"))
    specs = {"in_specs": (rows, places, rows), "out_specs": (rows, rows, places)}
    mesh = sharding.make_mesh(MeshShape(fsdp=4))
    got = jax.jit(jax.shard_map(over, mesh=mesh, check_vma=False, **specs))(x, weights, dy)
    want = jax.jit(together)(x, weights, dy)
    names = ("y", "dx", "first weight", "second weight")
    pairs = zip(names, jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    # four sums, each rounded to bfloat16, beside one
    gates = {"y": 0.0, "dx": 0.0, "first weight": 2**-8, "second weight": 2**-8}
    return [Difference(name, largest(np.asarray(a, np.float32), np.asarray(b, np.float32)), gates[name]) for name, a, b in pairs]


def interpreted(mixer: str) -> list[Difference]:
    """A mixer with its kernel, interpreted, over tensor=2 beside one device: what it gives for random numbers, and their gradient."""
    import jax
    import jax.numpy as jnp

    from smedjan_common.model.params import initial_params
    from smedjan_jax import sharding
    from smedjan_jax.mixers import mixer_class
    from smedjan_jax.modules import Context, Rope

    model = dataclasses.replace(model_config((mixer,), next(iter(FFNS))) or MHA.model, rwkv_head_dim=16)
    params = {name: jnp.asarray(value) for name, value in initial_params(model, 1).items()}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 16, model.dim)), jnp.float32)

    def total(x):
        y, _ = mixer_class(mixer)(model, params, "layers.0.mixer", "pallas")(x, Context(Rope(model, 16), None, None, 16), {})
        return jnp.sum(jnp.sin(y)), y

    def on(mesh):
        with jax.sharding.use_abstract_mesh(sharding.make_mesh(mesh).abstract_mesh):
            gradient, y = jax.jit(jax.grad(total, has_aux=True))(jax.device_put(x, sharding.everywhere(sharding.make_mesh(mesh))))
        return {"outputs": np.asarray(y), "gradient": np.asarray(gradient)}

    got, want = on(MeshShape(tensor=2)), on(ONE_DEVICE)
    return [Difference(f"{mixer} {name}", largest(got[name], want[name]), FLOAT32.one_op) for name in want]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("mesh") / "report.json"
    script = f"import tests.conftest; from tests.conformance import test_mesh; test_mesh.measure({str(path)!r})"
    flags = f"--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
    env = os.environ | {"XLA_FLAGS": flags}  # what is compared is arithmetic: compiling for speed would take longer than it saves
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@ONE_WORKER
@pytest.mark.parametrize("name", RUNS)
def test_training_on_a_mesh_equals_training_on_one_device(report, name):
    demand(Difference(*values) for values in report[name]["differences"])


@ONE_WORKER
@pytest.mark.parametrize("name", RUNS)
def test_parameters_and_slots_are_split_as_the_table_says(report, name):
    run, got = RUNS[name], {key: tuple(shape) for key, shape in report[name]["shares"].items()}
    adapters = dataclasses.replace(MHA.train, **run.changes).adapters
    table, mesh = trained_table(run.model, adapters), parse_mesh(run.mesh)
    for key, shape in got.items():
        spec = table[key.partition(".")[2]]
        assert shape == tuple(size // (getattr(mesh, axis) if axis else 1) for size, axis in zip(spec.shape, mesh_axes(spec), strict=True))
    if run.shares:
        assert (got["params.layers.0.mixer.k_proj.weight"], got["params.embed.weight"]) == run.shares


@ONE_WORKER
def test_matrices_travel_in_the_compute_dtype_and_their_gradients_are_summed_in_float32(report):
    """Linear maps' are gathered where they are multiplied and again for the backward pass; the embedding once, looked up in float32."""
    matrices = sum(len(spec.shape) > 1 for spec in parameter_table(GQA.model).values())
    assert report["messages"] == {"all_gather": {"bf16": 2 * (matrices - 1), "f32": 1}, "reduce_scatter": {"f32": matrices}}


@ONE_WORKER
def test_kernels_run_on_every_devices_own_heads(report):
    assert report["kernels"] == dict.fromkeys(report["kernels"], 2.0 * 4 * 8 * 4 * 2)


@ONE_WORKER
def test_float8_over_fsdp_multiplies_the_same_numbers(report):
    demand(Difference(*values) for values in report["float8"])


@ONE_WORKER
@pytest.mark.parametrize("mixer", WITH_KERNELS)
def test_a_mixer_with_its_kernel_gives_over_tensor_what_it_gives_on_one_device(report, mixer):
    demand(Difference(*values) for values in report["interpreted"][mixer])


@pytest.mark.parametrize("mixer", MIXERS)
def test_linear_maps_see_only_the_compute_dtype_as_their_weights_travel_in_it(mixer, monkeypatch):
    import jax

    from smedjan_jax import modules
    from smedjan_jax.model import Model

    plain, seen = modules.Linear.__call__, set()
    monkeypatch.setattr(modules.Linear, "__call__", lambda self, x: (seen.add(str(x.dtype)), plain(self, x))[1])
    model = model_config((mixer,), list(FFNS)[-1])
    assert model
    params = {name: jax.ShapeDtypeStruct(spec.shape, np.float32) for name, spec in parameter_table(model).items()}
    tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
    jax.eval_shape(lambda params, tokens: Model(model, params, "bfloat16").hidden(tokens), params, tokens)
    assert seen == {"bfloat16"}


def test_a_run_killed_on_one_mesh_goes_on_on_another(tmp_path):
    """The command as users type it: parameters split over four devices, killed, the rest on two and two, samples on the way."""
    import smedjan_jax.train

    text = write_text(tmp_path)
    steady = ("--lr-schedule", "constant", "--warmup", 2, "--lr", 1e-3, "--log-every", 1, "--checkpoint-every", 8)
    flags = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"

    def command(steps: int, mesh: str) -> subprocess.Popen:
        words = arguments(text, tmp_path / "run", steps, *steady, "--sample-every", 4, "--sample-tokens", 3, "--mesh", mesh)
        env = os.environ | {"XLA_FLAGS": flags, "SMEDJAN_FAKE": ""}
        return subprocess.Popen([sys.executable, "-m", "smedjan_jax.train", *words], stdout=-1, stderr=-2, text=True, cwd=ROOT, env=env)

    process, deadline = command(100_000, "fsdp=4"), time.monotonic() + 300
    while not saved_steps(tmp_path / "run"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    output, _ = process.communicate()
    assert "4 x cpu, float32, mesh fsdp=4" in output
    steps = saved_steps(tmp_path / "run")[-1] + 4
    process = command(steps, "data=2,tensor=2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "mesh data=2,tensor=2" in output
    assert "  | " in output, "a sample was written"
    alone = [str(word) for word in arguments(text, tmp_path / "alone", steps, *steady)]
    assert smedjan_jax.train.main(alone) == 0
    got, want = (train_rows(read_rows(tmp_path / name)) for name in ("run", "alone"))
    assert [row["step"] for row in got] == [row["step"] for row in want]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(got, want, strict=True))
    demand([Difference("losses of the whole run", worst, FLOAT32.steps_loss)])
