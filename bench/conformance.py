"""The equivalence report: how far the backends are from the float64 reference and from each other, as JSON.

    python bench/conformance.py                         float32 on the CPU -> bench/results/conformance-cpu.json
    python bench/conformance.py --device gpu            float32 and bfloat16 on the accelerator, whichever backends are installed

It measures what tests/conformance demands, with the same checks, and exits with 1 when a figure is over its gate. Differences
are relative: outputs by their largest value, gradients, parameters and moments by their L2 norm (gates.py). In bfloat16 each
combination is held to its own rounding noise (bench/bfloat16.py). The file is whole after every combination; started again on the same
sources, versions and device it goes on with those that are missing.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from bench import bfloat16
from bench.rows import RESULTS, scrubbed, slug, sources
from smedjan_common.files.atomic_file import write_atomically


def main() -> int:
    """Measure what is missing, write the file, print one line a combination."""
    arguments = parse_arguments()
    settle(arguments.device)
    from tests.conformance.cases import CASES

    backends = arguments.backends or [name for name, package in (("jax", "jax"), ("mlx", "mlx.core")) if installed(package)]
    dtypes = arguments.dtypes or (["float32"] if arguments.device == "cpu" else ["float32", "bfloat16"])
    wanted = [(case, dtype) for dtype in dtypes for case in CASES if re.fullmatch(arguments.combinations, case)]
    report = about(backends, arguments)
    output = arguments.output or RESULTS / f"conformance-{report_slug(report)}.json"
    rows, deadline = kept(output, report, wanted), time.monotonic() + arguments.limit_seconds
    missing = [key for key in wanted if key not in rows]
    print(f"{len(rows)} of {len(wanted)} combinations are in {output.name} already, {len(missing)} to go", flush=True)
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), settle, (arguments.device,)) as pool:
        running = {pool.submit(measure, backends, case, dtype, deadline): (case, dtype) for case, dtype in missing}
        for future in as_completed(running):
            case, dtype = running[future]
            row = future.result()
            if not row["figures"] and "error" not in row:
                continue  # its turn came after the time limit
            print(
                case, dtype, *(f"{name} {figure['value']:.1e}" for name, figure in row["figures"].items()), row.get("error", ""), flush=True
            )
            if row["figures"]:
                rows[case, dtype] = row
                write(output, report, [rows[key] for key in wanted if key in rows])
    over = [f"{case} {dtype} {name}" for (case, dtype), row in rows.items() for name, f in row["figures"].items() if not f["conforms"]]
    errors = [f"{case} {dtype}: {row['error']}" for (case, dtype), row in rows.items() if "error" in row]
    absent = [f"{case} {dtype} is missing" for case, dtype in wanted if (case, dtype) not in rows]
    print(
        f"{output.name}: {len(rows)} rows, {len(over)} figures over their gates, {len(errors)} errors", *over, *errors, *absent, sep="\n  "
    )
    return 1 if over or errors or absent else 0


def settle(device: str) -> None:
    """The settings that must stand before a framework is imported, in this process or in one of its pool."""
    os.environ["SMEDJAN_TEST_DEVICE"] = device
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes, two frameworks, one device
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # as many threads as cores in every process: four times the minutes
        os.environ.setdefault(name, "1")
    full = "--xla_backend_optimization_level=3"  # XLA's own; the tests compile for less
    if device == "cpu" and full not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {full}".strip()
    importlib.import_module("tests.conftest")


def kept(output: pathlib.Path, report: dict, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """The rows of an earlier report on the same sources, versions, device and settings, without those that had an error."""
    before = json.loads(output.read_text()) if output.exists() else {}
    if any(before.get(name) != report[name] for name in ("sources", "device", "python", "backends", "settings")):
        return {}
    found = {(row["combination"], row["dtype"]): row for row in before["combinations"] if "error" not in row}
    return {key: found[key] for key in wanted if key in found}


def write(output: pathlib.Path, report: dict, rows: list[dict]) -> None:
    """The report so far as JSON."""
    content = report | {"seconds": round(sum(row["seconds"] for row in rows), 1), "largest": largest(rows), "combinations": rows}
    write_atomically(output, (json.dumps(content, indent=1) + "\n").encode())


def measure(backends: list[str], name: str, dtype: str, deadline: float) -> dict:
    """The largest difference of each check over one combination, with its gate and the tensor it was found in.

    Nothing is measured after `deadline` (time.monotonic()). An error of a side is told under "error", and the rest goes on.
    """
    from smedjan_common.errors import ConfigError
    from smedjan_common.model.mixers import MIXERS
    from tests.conformance import checks, subjects
    from tests.conformance.cases import CASES, CHUNK

    case, started = CASES[name], time.monotonic()
    case = dataclasses.replace(case, train=dataclasses.replace(case.train, dtype=dtype))
    found: dict[str, list] = {}
    refused: dict[str, str] = {}
    errors: list[str] = []

    def run(check_name: str, check: Callable[[], Any]) -> Any:
        if started > deadline:
            return None
        try:
            return check()
        except ConfigError as error:
            refused[check_name] = str(error)
        except Exception as error:  # the other checks are still worth knowing
            errors.append(scrubbed(f"{check_name}: {type(error).__name__}: {error}".splitlines()[0]))
        return None

    def differences(check_name: str, check: Callable[[], Iterable]) -> None:
        if (got := run(check_name, lambda: list(check()))) is not None:
            found[check_name] = got

    rows = [MIXERS[mixer] for mixer in case.model.mixer]
    runs = {}
    for backend in backends:
        differences(f"{backend} forward", lambda b=backend: checks.forward(b, case))
        differences(f"{backend} loss", lambda b=backend: checks.loss(b, case))
        differences(f"{backend} gradients", lambda b=backend: checks.gradient(b, case))
        differences(f"{backend} decoding", lambda b=backend: checks.decoding(b, case, [13, 1, 1, 1, 1]))
        if case.takes_documents:
            differences(f"{backend} documents", lambda b=backend: checks.forward(b, case, documents=case.documents))
        if case.default:  # what does not depend on the other combinations' options
            if any(row.linear for row in rows):
                differences(f"{backend} chunk sizes", lambda b=backend: checks.chunk_sizes(b, case, (CHUNK, 2, 7, 64)))
            differences(f"{backend} optimizer", lambda b=backend: checks.optimizer(b, case))
            differences(f"{backend} accumulation", lambda b=backend: checks.accumulation(b, case, 2))
            differences(f"{backend} checkpointing", lambda b=backend: checks.same_step(b, case, gradient_checkpointing="full"))
        runs[backend] = run(f"{backend} 20 steps", lambda b=backend: subjects.train(b, case.model, case.train, case.start, case.batches))
    if runs.get("jax") and runs.get("mlx"):
        differences("mlx-jax forward", lambda: checks.forward("mlx", case, want="jax"))
        differences("mlx-jax gradients", lambda: checks.gradients_between("mlx", "jax", case))
        steps = checks.runs(runs["mlx"], runs["jax"], gates=case.gates)
        for part_name, part in (
            ("loss", "loss"),
            ("gradient norm", "gradient norm"),
            ("parameters", "trained"),
            ("moments", "optimizer's"),
        ):
            differences(f"mlx-jax 20 steps {part_name}", lambda part=part: [d for d in steps if d.name.startswith(part)])
    return {
        "combination": name,
        "dtype": dtype,
        "seconds": round(time.monotonic() - started, 1),
        "figures": {check: worst(own_gates(name, dtype, check, values)) for check, values in found.items()},
        **({"refused": refused} if refused else {}),
        **({"error": "; ".join(errors)} if errors else {}),
    }


def own_gates(name: str, dtype: str, check: str, differences: list) -> list:
    """In bfloat16 with the gate that is the combination's own rounding noise; what must be equal must still be."""
    if dtype != "bfloat16":
        return differences
    return [d._replace(gate=bfloat16.gate(name, check, d.gate)) if d.gate else d for d in differences]


def worst(differences: list) -> dict:
    """The difference that is closest to its gate, or farthest over it."""
    top = max(differences, key=lambda d: d.value / d.gate if d.gate else (float("inf") if d.value else 0.0))
    return {"value": top.value, "gate": top.gate, "conforms": all(d.value <= d.gate for d in differences), "in": top.name}


def largest(rows: list[dict]) -> dict[str, dict[str, float]]:
    """dtype -> check -> the largest figure over all combinations."""
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        of_dtype = result.setdefault(row["dtype"], {})
        for name, figure in row["figures"].items():
            of_dtype[name] = max(of_dtype.get(name, 0.0), figure["value"])
    return result


def about(backends: list[str], arguments: argparse.Namespace) -> dict:
    """Where and with what the report was made."""
    from tests.conformance import rows, subjects
    from tests.conformance.cases import CASES

    case = next(iter(CASES.values()))
    described = {name: dataclasses.asdict(subjects.backend(name, case.model, case.train).describe()) for name in backends}
    return {
        "command": " ".join(["python", "bench/conformance.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": arguments.device,
        "sources": sources("tests/conformance"),
        "python": platform.python_version(),
        "backends": {
            name: {"kind": d["kind"], "name": d["name"], **rows.made_with(name), **d["versions"]} for name, d in described.items()
        },
        "settings": {name: os.environ.get(name, "") for name in ("MLX_ENABLE_TF32", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS")},
    }


def report_slug(report: dict) -> str:
    """`cpu`, or the accelerator's name: h100."""
    names = {side["name"] for side in report["backends"].values() if side["kind"] != "cpu"}
    return slug(min(names)) if names else "cpu"


def installed(package: str) -> bool:
    """Whether the package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default=os.environ.get("SMEDJAN_TEST_DEVICE", "cpu"))
    parser.add_argument("--backends", nargs="+", choices=("jax", "mlx"), help="default: those that are installed")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16 too")
    parser.add_argument("--combinations", default=".*", help="regular expression of the combinations to measure; default: all")
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at a time; default: the CPU's cores, at most 8"
    )
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="measure no further combination after this long")
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/conformance-DEVICE.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
