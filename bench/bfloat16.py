"""The gates of the bfloat16 report: each combination's own rounding noise (tests/conformance/noise.py), kept in a result file.

    python -m bench.bfloat16            what the file lacks -> bench/results/bfloat16_noise-cpu.json

It is computed in float32, so a CPU does it, for every device. bench/conformance.py and docs/equivalence.md take their gates from the file.
"""

import argparse
import functools
import importlib.util
import json
import re

from bench.rows import RESULTS, Results

FILE = RESULTS / "bfloat16_noise-cpu.json"


@functools.cache
def noise() -> dict[str, dict[str, float]]:
    """Combination -> check of bench/conformance.py -> its gate in bfloat16; of the combinations that were measured."""
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    return {row["combination"]: row["noise"] for row in rows}


def gate(combination: str, check: str, otherwise: float) -> float:
    """The gate of a figure such as "jax forward": the noise; of "mlx-jax forward", where two sides are off, twice that. `otherwise` where
    bfloat16 has no part in what is compared, or its noise was not measured."""
    sides, _, what = check.partition(" ")
    found = noise().get(combination, {}).get(what)
    return otherwise if found is None else found * (2 if "-" in sides else 1)


def main() -> None:
    """Measure the combinations that are missing in the result file."""
    from bench.conformance import settle

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), default="mlx" if importlib.util.find_spec("mlx") else "jax")
    parser.add_argument("--combinations", default=".*", help="regular expression of the combinations to measure; default: all")
    flags = parser.parse_args()
    settle("cpu")
    from tests.conformance import noise as measured
    from tests.conformance.cases import CASES

    about = {"backend": flags.backend, "draws": measured.DRAWS, "runs": measured.RUNS, "fewer_bits": measured.FEWER}
    results = Results(FILE, ("combination",), **about)
    for name, case in CASES.items():
        row = {"combination": name}
        if re.fullmatch(flags.combinations, name) and not results.has(row):
            found = measured.noise(case, flags.backend)
            results.add(row | {"noise": {check: float(f"{value:.3g}") for check, value in found.items()}})


if __name__ == "__main__":
    main()
