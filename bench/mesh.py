"""Training on several GPUs beside one: bench/train_speed.py on each mesh, one process after the other, in one JSON list.

    python bench/mesh.py --output bench/results/mesh.json                       # two GPUs: medium and large, 1 device, data, fsdp, tensor
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python bench/mesh.py --small     # two virtual devices of a CPU, tiny

Every device has the rows that one device has alone (data, fsdp), or all have them together (tensor), and data once more with the
batch of one device. `times_one_device` is tokens per second over those of one device of the same size.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

SPEED = os.path.relpath(pathlib.Path(__file__).with_name("train_speed.py"))
# size -> rows on one device, and the flags that all its runs share
SIZES = {
    "medium": (64, "--vocab-size 8192 --seq-len 1024"),
    "large": (16, "--vocab-size 32768 --seq-len 2048"),
}
SMALL = {"tiny": (4, "--vocab-size 512 --seq-len 64 --dtype float32 --warmup 1 --steps 2 --repeats 1")}


def main() -> int:
    """Run all cases and print a line for each; 1 when one fails."""
    args = _arguments()
    sizes = SMALL if args.small else SIZES
    rows, failed = [], 0
    for size in args.sizes or sizes:
        batch, flags = sizes[size]
        alone = None
        for mesh, times in _meshes(args.devices):
            row = _run("--size", size, *flags.split(), "--mesh", mesh, "--batch-size", str(batch * times))
            if row is None:
                failed = 1
                continue
            alone = alone or row["tokens_per_second"]
            rows.append({**row, "times_one_device": round(row["tokens_per_second"] / alone, 3)})
            speed, memory = f"{row['tokens_per_second']:,} tokens/s", (row["peak_memory_bytes"] or 0) / 2**30
            print(f"{size:7} {mesh:9} batch {batch * times:4} {speed:>18} x{rows[-1]['times_one_device']:.2f} {memory:6.1f} GiB a device")
            if args.output:
                pathlib.Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")
    return failed


def _meshes(devices: int) -> list[tuple[str, int]]:
    """(mesh, batch over that of one device)"""
    return [("data=1", 1), (f"data={devices}", devices), (f"data={devices}", 1), (f"fsdp={devices}", devices), (f"tensor={devices}", 1)]


def _run(*flags: str) -> dict | None:
    done = subprocess.run([sys.executable, SPEED, "--backend", "jax", *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"failed: {' '.join(flags)}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--sizes", nargs="*", help="default: all")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--output", default="")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
