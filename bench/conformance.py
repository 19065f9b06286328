"""The equivalence report: how far the backends are from the float64 reference and from each other, as JSON.

    python bench/conformance.py                         float32 on the CPU -> bench/results/conformance-cpu.json
    python bench/conformance.py --device gpu            float32 and bfloat16 on the accelerator, whichever backends are installed

It measures what tests/conformance demands, with the same checks, and exits with 1 when a figure is over its gate. Differences
are relative: outputs by their largest value, gradients, parameters and moments by their L2 norm (gates.py).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Measure, write the file, print one line a combination."""
    arguments = parse_arguments()
    os.environ["SMEDJAN_TEST_DEVICE"] = arguments.device
    import tests.conftest  # noqa: F401  (the settings that must stand before a framework is imported)
    from tests.conformance.cases import CASES

    backends = arguments.backends or [name for name, package in (("jax", "jax"), ("mlx", "mlx.core")) if installed(package)]
    started, rows, output = time.time(), [], None
    chosen = [case for case in CASES.values() if re.fullmatch(arguments.combinations, case.id)]
    for dtype in arguments.dtypes or (["float32"] if arguments.device == "cpu" else ["float32", "bfloat16"]):
        for case in chosen:
            row = {"combination": case.id, "dtype": dtype} | measure(backends, case, dtype)
            rows.append(row)
            print(case.id, dtype, *(f"{name} {figure['value']:.1e}" for name, figure in row["figures"].items()), flush=True)
            output = write(backends, arguments, rows, time.time() - started)  # after each, so that a time limit costs one row only
    over = [f"{row['combination']} {row['dtype']} {name}" for row in rows for name, f in row["figures"].items() if not f["conforms"]]
    print(f"{output}: {len(rows)} rows, {len(over)} figures over their gates", *over, sep="\n  ")
    return 1 if over else 0


def write(backends: list[str], arguments: argparse.Namespace, rows: list[dict], seconds: float) -> pathlib.Path:
    """The report so far as JSON; returns its path."""
    report = about(backends, arguments) | {"seconds": round(seconds, 1), "largest": largest(rows), "combinations": rows}
    output = arguments.output or ROOT / "bench" / "results" / f"conformance-{slug(report)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    return output


def measure(backends: list[str], case, dtype: str) -> dict:
    """The largest difference of each check over one combination, with its gate and the tensor it was found in."""
    from smedjan_common.errors import ConfigError
    from smedjan_common.params import initial_params
    from tests.conformance import checks, subjects

    case = dataclasses.replace(case, train=dataclasses.replace(case.train, dtype=dtype))
    found: dict[str, list] = {}
    refused: dict[str, str] = {}

    def run(name: str, check: Callable[[], Iterable]) -> None:
        try:
            found[name] = list(check())
        except ConfigError as error:
            refused[name] = str(error)

    start, runs = initial_params(case.model, 1), {}
    for backend in backends:
        run(f"{backend} forward", lambda b=backend: checks.forward(b, case))
        run(f"{backend} loss", lambda b=backend: checks.loss(b, case))
        run(f"{backend} gradients", lambda b=backend: checks.gradient(b, case))
        run(f"{backend} decoding", lambda b=backend: checks.decoding(b, case, [13, 1, 1, 1, 1]))
        run(f"{backend} optimizer", lambda b=backend: checks.optimizer(b, case))
        run(f"{backend} accumulation", lambda b=backend: checks.same_step(b, case, grad_accum=2))
        run(f"{backend} checkpointing", lambda b=backend: checks.same_step(b, case, gradient_checkpointing="full"))
        try:
            runs[backend] = subjects.train(backend, case.model, case.train, start, case.batches)
        except ConfigError as error:
            refused[f"{backend} 20 steps"] = str(error)
    if len(runs) == 2:
        run("mlx-jax forward", lambda: checks.forward("mlx", case, want="jax"))
        run("mlx-jax gradients", lambda: checks.gradients_between("mlx", "jax", case))
        steps = checks.runs(runs["mlx"], runs["jax"], gates=case.gates)
        for name, part in (("loss", "loss"), ("gradient norm", "gradient norm"), ("parameters", "trained"), ("moments", "optimizer's")):
            run(f"mlx-jax 20 steps {name}", lambda part=part: [d for d in steps if d.name.startswith(part)])
    figures = {name: worst(differences) for name, differences in found.items()}
    return {"figures": figures, **({"refused": refused} if refused else {})}


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
        "python": platform.python_version(),
        "backends": {
            name: {"kind": d["kind"], "name": d["name"], **rows.made_with(name), **d["versions"]} for name, d in described.items()
        },
        "settings": {name: os.environ.get(name, "") for name in ("MLX_ENABLE_TF32", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS")},
    }


def slug(report: dict) -> str:
    """`cpu`, or the accelerator's name: nvidia-h100-80gb-hbm3."""
    names = {side["name"] for side in report["backends"].values() if side["kind"] != "cpu"}
    return re.sub(r"[^a-z0-9]+", "-", min(names).lower()).strip("-") if names else "cpu"


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
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/conformance-DEVICE.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
