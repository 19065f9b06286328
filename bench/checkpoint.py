"""What checkpoints cost: how long training stands still per save, and how much memory `convert` takes.

    python bench/checkpoint.py stall --size large                  -> bench/results/checkpoint-stall-cpu.json
    python bench/checkpoint.py stall --size large --device gpu     -> bench/results/checkpoint-stall-gpu.json
    python bench/checkpoint.py convert --size xxl --vocab-size 32768     -> bench/results/checkpoint-convert-cpu.json

stall: the state of a real run, saved in each way while steps go on. `stall_seconds`: the loop does nothing else; `written_seconds`: until
the checkpoint stands, synced and hashed; `step_seconds` of steps without a save, and of those while one is being written.
convert: a step checkpoint of the size goes to Hugging Face, back, to Orbax and back, each in a process of its own; peak memory is VmHWM
(with the pages of files that it has mapped or read) and the peak of RssAnon (its own), both less what the same command takes for a tiny
model. With 1.3B parameters (the second command) it needs 32 GB of disk; everything is removed again. Linux only.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bench.rows  # noqa: E402 - started as a file, too

REPEATS = 3


def main() -> None:
    """Run a part, print its rows, write them."""
    args = _arguments()
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="smedjan-bench-", dir=args.folder) as folder:
        result = {"command": _command(args), **PARTS[args.part](args, Path(folder))}
    print(json.dumps(result, indent=1))
    output = args.output or ROOT / "bench" / "results" / f"checkpoint-{args.part}-{args.device}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")


def _command(args: argparse.Namespace) -> str:
    """What gives these figures, without the folders of this machine."""
    shared = f"python bench/checkpoint.py {args.part} --size {args.size} --vocab-size {args.vocab_size}"
    return shared if args.part == "convert" else f"{shared} --device {args.device} --batch-size {args.batch_size} --seq-len {args.seq_len}"


def stall(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each way of saving, REPEATS times each, between real steps."""
    from smedjan_common.config import ModelConfig, TrainConfig
    from smedjan_common.model.params import initial_params
    from smedjan_jax.backend import JaxBackend, default_dtype

    model = ModelConfig.preset(args.size, vocab_size=args.vocab_size, context_length=args.seq_len)
    train = TrainConfig(steps=1000, batch_size=args.batch_size, seq_len=args.seq_len, lr=1e-4, dtype=default_dtype())
    backend = JaxBackend(model, train)
    run = _Run(backend, initial_params(model, 0), args)
    plain = [run.step() for _ in range(args.steps + 2)][2:]
    ways = {name: [_saved(run, save) for _ in range(REPEATS)] for name, save in _ways(backend, folder).items()}
    device = backend.describe()
    return {
        "parameters": model.num_params(),
        "state_bytes": 12 * model.num_params(),
        "size": args.size,
        "batch": [args.batch_size, args.seq_len],
        "dtype": train.dtype,
        "step_seconds": round(statistics.median(plain), 4),
        "saves": {name: {key: _middle(row[key] for row in rows) for key in rows[0]} for name, rows in ways.items()},
        **_machine(device.name, device.versions),
    }


class _Run:
    """Steps of one batch over and over."""

    def __init__(self, backend: Any, params: dict[str, np.ndarray], args: argparse.Namespace):
        self.backend, self.state, self.number = backend, backend.init(params), 0
        rows = np.random.default_rng(0).integers(0, args.vocab_size, (args.batch_size, args.seq_len + 1)).astype(np.int32)
        self.batch = rows[:, :-1], rows[:, 1:]

    def step(self) -> float:
        """Seconds of one step, waited for."""
        begun = time.perf_counter()
        self.state, metrics = self.backend.train_step(self.state, *self.batch, lr=1e-4)
        self.backend.read(metrics)
        self.number += 1
        return time.perf_counter() - begun


def _ways(backend: Any, folder: Path) -> dict[str, Callable[[_Run], Callable[[], Path]]]:
    """name -> what takes the state and returns what writes it. A synchronous save does both at once."""
    from smedjan_common.checkpoint import About, start_own, write_checkpoint

    about = About(model=backend.model, train=backend.train, framework={"name": "jax"})

    def neutral(run: _Run) -> Callable[[], Path]:
        snapshot = backend.save(run.state)
        return lambda: write_checkpoint(folder, snapshot, about)

    def orbax(run: _Run) -> Callable[[], Path]:
        params, slots = backend.own.tensors(run.state)
        arrays = {"params": params, "optimizer_arrays": slots}
        state = run.state
        return start_own(folder, lambda place: backend.own.begin(state, place), about, kind="orbax", step=run.number, **arrays)

    def at_once(way: Callable[[_Run], Callable[[], Path]]) -> Callable[[_Run], Callable[[], Path]]:
        def save(run: _Run) -> Callable[[], Path]:
            path = way(run)()
            return lambda: path

        return save

    return {"neutral, synchronous": at_once(neutral), "neutral": neutral, "orbax, synchronous": at_once(orbax), "orbax": orbax}


def _saved(run: _Run, save: Callable[[_Run], Callable[[], Path]]) -> dict[str, float | None]:
    """One save: how long the loop waits for it, how long until it stands, how long steps take meanwhile."""
    from smedjan_common.checkpoint import Background

    writes, during = Background(), []
    begun = time.perf_counter()
    writes.start(save(run))
    stalled = time.perf_counter() - begun
    while not (path := writes.take()):
        during.append(run.step())
    written = time.perf_counter() - begun
    shutil.rmtree(path)
    return {"stall_seconds": stalled, "written_seconds": written, "step_seconds_meanwhile": statistics.median(during) if during else None}


def convert(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """neutral -> hf -> neutral and neutral -> orbax -> neutral, with the memory of each."""
    rows, model = {}, None
    for size in ("tiny", args.size):
        place = folder / size
        model = _write_state(size, args.vocab_size, place)
        for name, source, target, form, done_with in CONVERTS:
            words = ["-m", "convert", str(place / source), str(place / target), "--to", form]
            rows[size, name] = _measured([sys.executable, *words])
            print(size, name, rows[size, name], flush=True)
            for old in done_with:
                shutil.rmtree(place / old)
    assert model
    measured = {}
    for (size, name), row in rows.items():
        if size != args.size:
            continue
        passed = (3 if "orbax" in name else 1) * 4 * model.num_params()
        extra = {key: row[key] - rows["tiny", name][key] for key in ("peak_bytes", "peak_anonymous_bytes")}
        shares = {key.replace("bytes", "over_model"): round(value / passed, 3) for key, value in extra.items()}
        measured[name] = {"model_bytes": passed, **extra, **shares, "seconds": round(row["seconds"], 1)}
    return {"parameters": model.num_params(), "size": args.size, "converts": measured, **_machine(_processor(), {})}


CONVERTS = (  # name, source, target, --to, what may go afterwards
    ("neutral -> hf", "step-00000001", "hf", "hf", ()),
    ("hf -> neutral", "hf", "weights", "neutral", ("hf", "weights")),
    ("neutral -> orbax", "step-00000001", "orbax", "orbax", ("step-00000001",)),
    ("orbax -> neutral", "orbax", "back", "neutral", ("orbax", "back")),
)


def _write_state(size: str, vocab_size: int, place: Path) -> Any:
    """A step checkpoint of a size: one block of random numbers over and over."""
    from convert.portable import Lazy
    from smedjan_common.backend import Snapshot
    from smedjan_common.checkpoint import About, write_checkpoint
    from smedjan_common.config import ModelConfig, TrainConfig
    from smedjan_common.model.params import parameter_table

    model = ModelConfig.preset(size, vocab_size=vocab_size)
    block = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)
    float32 = np.dtype(np.float32)
    params = {
        name: Lazy(float32, spec.shape, lambda shape=spec.shape: np.resize(block, shape)) for name, spec in parameter_table(model).items()
    }
    slots = {f"{slot}.{name}": value for slot in ("mu", "nu") for name, value in params.items()}
    train = TrainConfig(steps=10, batch_size=1, seq_len=64, lr=1e-4)
    arrays: Any = (params, slots)
    write_checkpoint(place, Snapshot(1, *arrays), About(model=model, train=train, framework={"name": "bench"}))
    return model


def _measured(command: list[str]) -> dict[str, float]:
    """Run a command; its peak memory and its seconds."""
    begun, peaks = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    status = Path(f"/proc/{process.pid}/status")

    def watch() -> None:
        while process.poll() is None:
            try:
                for line in status.read_text().splitlines():
                    if (key := line.split(":")[0]) in peaks:
                        peaks[key] = max(peaks[key], int(line.split()[1]) * 1024)
            except OSError:
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    watcher.join()
    assert process.returncode == 0, error.decode()
    return {"peak_bytes": peaks["VmHWM"], "peak_anonymous_bytes": peaks["RssAnon"], "seconds": time.perf_counter() - begun}


def _middle(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _machine(device: str, versions: dict[str, str]) -> dict[str, Any]:
    known = bench.rows.versions() | {"orbax-checkpoint": importlib.metadata.version("orbax-checkpoint")}
    cpu = {"processor": _processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return {"device": device, **cpu, "python": platform.python_version(), "versions": known | versions}


PARTS = {"stall": stall, "convert": convert}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", default="large")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="steps without a save, for comparison")
    parser.add_argument("--folder", help="a folder on the disk to measure (default: the system's temporary one)")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
