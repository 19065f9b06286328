"""Training on several GPUs beside one: tokens per second, memory and what travels, all cases compiled side by side, then timed in turn.

    python -m bench.mesh --plan four                              the table of docs/scale.md, on four GPUs
    python -m bench.mesh --plan one                               the rows of one GPU that it is held against
    python -m bench.mesh --plan equal                             20 steps on meshes of four GPUs against the same on one (float32)
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m bench.mesh --plan small          four virtual devices of a CPU, tiny

A row is a line of JSON in --lines as soon as it is there; a program that is started again leaves out what is there already. A step is
forward, backward, clipping and AdamW on random tokens. Every device has the rows of its own that one device would have alone (data,
fsdp), or all have them together (tensor). `python -m bench.render` makes the tables.
"""

import argparse
import functools
import json
import pathlib
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.rows import Row, scrubbed, versions
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.training.mesh import parse_mesh
from smedjan_jax.backend import JaxBackend
from smedjan_jax.startup import configure

XXL: Row = {"size": "xxl", "vocab_size": 32768, "seq_len": 2048, "rows": 16, "dtype": "bfloat16", "mixer": "attention"}
LARGE: Row = {**XXL, "size": "large"}
MAX: Row = {**XXL, "size": "max", "rows": 4}
HYBRID = "gated-deltanet,gated-deltanet,gated-deltanet,attention"
# Llama 2 7B: 32 layers of 4096, 32 heads, a feed-forward of 11008, 32000 tokens, a head of its own
LLAMA: Row = {**XXL, "size": "llama2-7b", "vocab_size": 32000, "seq_len": 4096, "rows": 2}
SHAPES: dict[str, Row] = {"llama2-7b": {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn_dim": 11008, "tied_head": False}}
FLOAT8: Row = {"dtype": "float8"}
OVERLAP: Row = {"xla": {"xla_gpu_enable_latency_hiding_scheduler": True}}
TINY: Row = {"size": "tiny", "vocab_size": 512, "seq_len": 64, "rows": 2, "dtype": "float32", "mixer": "attention"}

# rows: sequences of one device (with tensor alone: of all). compiled: what XLA makes of it, not run. xla: options of the compiler
PLANS: dict[str, list[Row]] = {
    "four": [
        {**LARGE, "mesh": "fsdp=4"},
        {**XXL, "mesh": "fsdp=4"},
        {**XXL, "mesh": "data=4"},
        {**LLAMA, "mesh": "fsdp=4"},
        {**LLAMA, "mesh": "fsdp=4", **FLOAT8},
        {**XXL, "mesh": "fsdp=4", **OVERLAP},
        {**LLAMA, "mesh": "fsdp=4", **OVERLAP},
        {**XXL, "mesh": "tensor=4"},
        {**XXL, "mesh": "data=2,fsdp=2"},
        {**XXL, "mesh": "fsdp=4", "mixer": HYBRID, "rows": 8},
        {**XXL, "mesh": "fsdp=4", **FLOAT8},
        {**XXL, "mesh": "fsdp=4", "mask_documents": True},
        {**XXL, "mesh": "fsdp=4", "seq_len": 4096, "rows": 8},
        {**LARGE, "mesh": "data=4"},
        {**LARGE, "mesh": "tensor=4"},
        {**XXL, "mesh": "fsdp=4", "again": False, "compiled": True},
        {**MAX, "mesh": "fsdp=4", "save": True},
    ],
    "one": [
        {**LARGE, "mesh": "data=1"},
        {**XXL, "mesh": "data=1"},
        {**XXL, "mesh": "data=1", **FLOAT8},
        {**XXL, "mesh": "data=1", "mixer": HYBRID, "rows": 8},
        {**XXL, "mesh": "data=1", "seq_len": 4096, "rows": 8},
        {**LARGE, "mesh": "data=1", **FLOAT8},
    ],
    "small": [
        {**TINY, "mesh": "data=1"},
        {**TINY, "mesh": "fsdp=4"},
        {**TINY, "mesh": "fsdp=4", "again": False, "compiled": True},
        {**TINY, "mesh": "data=2,tensor=2", "mask_documents": True},
        {**TINY, "mesh": "fsdp=2", **FLOAT8},
    ],
}
SAVING = 100  # seconds that a save is waited for
MESSAGES = ("all-gather", "reduce-scatter", "all-reduce")


def main() -> int:
    """Compile and run what is missing of a plan, a line each; 1 when one fails."""
    args = _arguments()
    configure()
    if args.plan == "equal":
        return equal(args.lines)
    done = [json.loads(line) for line in args.lines.read_text().splitlines()] if args.lines.exists() else []
    cases = [case for case in PLANS[args.plan] if not any(all(row.get(k) == v for k, v in case.items()) for row in done)]
    ends, failed = time.monotonic() + args.seconds, 0
    pool = ThreadPoolExecutor(args.jobs)
    steps = [pool.submit(Case, case) for case in cases]
    for case in cases:
        left = ends - time.monotonic()
        step = None
        try:
            step = steps.pop(0).result(timeout=max(1, left))  # popped, so that its arrays go before the next one's come
            row = step.row() if case.get("compiled") else step.timed(args.groups)
        except Exception as error:
            row, failed = {"error": scrubbed(f"{type(error).__name__}: {error}")}, 1
        _add(args.lines, {**case, **row})
        if step and case.get("save") and args.checkpoint and "error" not in row:
            _add(args.lines, stall(step, args.checkpoint))
    pool.shutdown(wait=False, cancel_futures=True)
    return failed


class Case:
    """A training step of one row, compiled for its mesh before there is any array of it."""

    def __init__(self, case: Row):
        began = time.perf_counter()
        self.case, mesh = case, parse_mesh(case["mesh"])
        assert mesh
        batch = case["rows"] * mesh.batch
        settings = {"vocab_size": case["vocab_size"], "context_length": case["seq_len"], "mixer": tuple(case["mixer"].split(","))}
        shape = SHAPES.get(case["size"])
        self.model = ModelConfig.build(**shape, **settings) if shape else ModelConfig.preset(case["size"], **settings)
        options = {name: case[name] for name in ("gradient_checkpointing", "mask_documents") if name in case}
        train = TrainConfig(steps=1000, batch_size=batch, seq_len=case["seq_len"], lr=3e-4, dtype=case["dtype"], **options)
        self.backend = JaxBackend(self.model, train, mesh)
        if self.backend._spread:
            self.backend._spread._again = case.get("again", True)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.model.vocab_size, (batch, case["seq_len"] + 1)).astype(np.int32)
        documents = np.cumsum(rng.random((batch, case["seq_len"])) < 1 / 200, axis=1, dtype=np.int32)  # of 200 tokens on average
        self.batch: Any = (tokens[:, :-1].copy(), tokens[:, 1:].copy(), documents if train.mask_documents else None, None)
        lowered = self.backend._train_step.lower(self.backend.shapes, self.batch, np.float32(3e-4))
        self.step: Any = lowered.compile(compiler_options=case.get("xla") or None)
        self.tokens, self.devices, self.seconds = batch * case["seq_len"], mesh.size, time.perf_counter() - began

    def row(self) -> Row:
        """What XLA laid out, per device."""
        memory, text = self.step.memory_analysis(), self.step.as_text()
        device = jax.devices()[0]
        return {
            "parameters": self.model.num_params(),
            "batch_size": self.tokens // self.case["seq_len"],
            "devices": self.devices,
            "device": device.device_kind,
            "temp_bytes": memory.temp_size_in_bytes,
            "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "messages": {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in MESSAGES},
            "float8_matmuls": text.count("matmul$f8"),
            "compile_seconds": round(self.seconds, 1),
            "versions": versions(),
        }

    def timed(self, groups: int) -> Row:
        """The same, and the median of `groups` groups of steps."""
        row = self.row()
        state = random_state(self.backend.shapes)
        batch = jax.device_put(self.batch)

        def seconds(count: int) -> float:
            nonlocal state
            began = time.perf_counter()
            for _ in range(count):
                state, metrics = self.step(state, batch, np.float32(3e-4))
            row["loss"] = float(metrics["loss"])
            return time.perf_counter() - began

        seconds(2)
        count = max(1, round(1.2 / seconds(1)))
        each = statistics.median(seconds(count) for _ in range(groups)) / count
        rate = self.tokens / each
        row |= {
            "tokens_per_second": round(rate),
            "tokens_per_second_per_device": round(rate / self.devices),
            "milliseconds_per_step": round(each * 1e3, 2),
        }
        for name, square in (("tflops_causal_once", False), ("tflops_full_square", True)):
            flops = train_flops_per_token(self.model, self.case["seq_len"], full_square=square)
            row[name] = round(rate / self.devices * flops / 1e12, 1)
        return row


def random_state(shapes: Any) -> Any:
    """A train state made on the devices, each its part: normal numbers of standard deviation 0.02, ones where a tensor is a vector."""

    def make(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) < 2:
            return jnp.ones(shape.shape, shape.dtype, device=shape.sharding)
        return _drawing(shape.shape, shape.sharding)(jax.random.key(sum(name.encode())))

    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype, device=shape.sharding), shapes)
    return {**zeros, "params": {name: make(name, shape) for name, shape in shapes["params"].items()}}


@functools.cache
def _drawing(shape: tuple[int, ...], place: Any) -> Any:
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape), out_shardings=place)


def stall(step: Case, folder: pathlib.Path) -> Row:
    """One save with Orbax: how long the loop waits, how long until it is whole on disk (None: longer than SAVING), how long steps take
    meanwhile."""
    from smedjan_common.checkpoint import About, Background, start_own

    state, batch, during = random_state(step.backend.shapes), jax.device_put(step.batch), []
    about = About(model=step.model, train=step.backend.train, framework={"name": "jax"})

    def one() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step.step(state, batch, np.float32(3e-4))
        float(metrics["loss"])
        return time.perf_counter() - began

    alone = statistics.median([one() for _ in range(4)][1:])
    backend, began = step.backend, time.perf_counter()
    params, slots = backend.own.tensors(state)
    arrays: Any = {"params": params, "optimizer_arrays": slots}
    begin = start_own(folder, functools.partial(backend.own.begin, state), about, kind="orbax", step=int(state["step"]), **arrays)
    writes = Background()
    writes.start(begin)
    stalled = time.perf_counter() - began
    while not (path := writes.take()) and time.perf_counter() - began < SAVING:
        during.append(one())
    row = {"table": "checkpoint", "way": "orbax", **step.case, **step.row(), "step_seconds": alone, "stall_seconds": stalled}
    row["state_bytes"] = sum(array.nbytes for array in jax.tree.leaves(state))
    row["written_seconds"] = time.perf_counter() - began if path else None
    return row | {"step_seconds_meanwhile": statistics.median(during) if during else None}


def equal(lines: pathlib.Path) -> int:
    """The conformance suite's runs on meshes of four devices, against the same on one: the largest difference under each gate."""
    from tests.conformance import test_mesh

    failed = 0
    for name, run in test_mesh.RUNS.items():
        mesh = re.sub("8", "4", run.mesh) if "=8" in run.mesh else run.mesh.replace("data=2,fsdp=2,tensor=2", "data=2,tensor=2")
        began = time.perf_counter()
        got, want = test_mesh.train(name, parse_mesh(mesh)), test_mesh.train(test_mesh.BESIDE.get(name, name), parse_mesh("data=1"))
        found = test_mesh.differences(got, want)
        worst = {gate: max(each.value for each in found if each.gate == gate) for gate in {each.gate for each in found}}
        row = {"table": "equal", "run": name, "mesh": mesh, "mixers": list(run.model.mixer), "steps": len(got["rows"])}
        row |= {"largest": [{"gate": gate, "value": float(worst[gate])} for gate in sorted(worst)], "device": jax.devices()[0].device_kind}
        row["conforms"] = all(value <= gate for gate, value in worst.items())
        failed |= not row["conforms"]
        _add(lines, {**row, "seconds": round(time.perf_counter() - began, 1)})
    return failed


def _add(lines: pathlib.Path, row: Row) -> None:
    with lines.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=(*PLANS, "equal"), default="four")
    parser.add_argument("--lines", type=pathlib.Path, default=pathlib.Path("mesh.jsonl"), help="where the rows go, a line each")
    parser.add_argument("--jobs", type=int, default=8, help="cases that are compiled side by side")
    parser.add_argument("--groups", type=int, default=3, help="groups of steps that are timed")
    parser.add_argument("--seconds", type=float, default=3000, help="how long to wait for compilation altogether")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a folder: rows that say so save there once, with Orbax")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
