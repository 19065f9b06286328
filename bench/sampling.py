"""What one token costs on the host: `sample` and its plain form (tests/plain_sampling.py) at vocabularies and settings of real models.

    python -m bench.sampling            -> bench/results/sampling-cpu.json, and the table of docs/performance.md by `python -m bench.render`

Logits: normal numbers times 3, a row of each vocabulary. Milliseconds of CPU, the median of `--repeats` calls, the two forms in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from bench.rows import RESULTS, Results
from smedjan_common.inference.sampling import Sampling, sample
from tests.plain_sampling import plain_sample

VOCABULARIES = (4096, 32768, 131072)
SETTINGS: dict[str, Sampling] = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(0.8),
    "top-k 50": Sampling(0.8, top_k=50),
    "top-p 0.9": Sampling(0.8, top_p=0.9),
    "min-p 0.05": Sampling(0.8, min_p=0.05),
    "top-k 50, top-p 0.9, penalty 1.1": Sampling(0.8, top_k=50, top_p=0.9, repetition_penalty=1.1),
}
Sample = Callable[[np.ndarray, Sequence[int], Sampling, int], int]


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    results = Results(RESULTS / "sampling-cpu.json", ("vocabulary", "setting"), repeats=repeats)
    for size in VOCABULARIES:
        for name, sampling in SETTINGS.items():
            row = {"vocabulary": size, "setting": name}
            if not results.has(row):
                results.add(row | measured(size, sampling, repeats))


def measured(size: int, sampling: Sampling, repeats: int) -> dict[str, float]:
    """Milliseconds of a token in both forms, which must take the same one."""
    random = np.random.default_rng(size)
    logits = (random.standard_normal(size) * 3).astype(np.float32)
    history = random.integers(0, size, 1000).tolist()
    spent: dict[Sample, list[float]] = {plain_sample: [], sample: []}
    for position in range(repeats):
        assert len({_timed(form, times, logits, history, sampling, position) for form, times in spent.items()}) == 1
    return {name: round(statistics.median(spent[form]) * 1e3, 3) for name, form in (("plain_ms", plain_sample), ("ms", sample))}


def _timed(form: Sample, times: list[float], logits: np.ndarray, history: list[int], sampling: Sampling, position: int) -> int:
    began = time.process_time()
    token = form(logits, history, sampling, position)
    times.append(time.process_time() - began)
    return token


if __name__ == "__main__":
    main()
