"""/metrics: counters, gauges and histograms in Prometheus' text format, named after vLLM's with smedjan in front."""

from collections import Counter
from collections.abc import Iterable, Mapping

from smedjan_common.inference.service import Report
from smedjan_common.inference.stats import Histogram

PATHS = ("models", "completions", "chat/completions", "tokenize", "detokenize", "tokenizer_info", "health", "metrics")
Labels = Mapping[str, object]


class Metrics:
    """HTTP requests are counted here; everything else the engine has counted. info: what the server is, as labels."""

    def __init__(self, info: Labels):
        self._info = info
        self._requests: Counter[tuple[str, int]] = Counter()

    def told(self, path: str, status: int) -> None:
        """A request ended. Paths that there are not count as one."""
        name = path.removeprefix("/v1").strip("/")
        known = name if name in PATHS else "models" if name.startswith("models/") else "page" if not name else "other"
        self._requests[known, status] += 1

    def text(self, report: Report) -> str:
        """What Prometheus reads."""
        stats = report.engine
        finished = [({"finish_reason": reason}, stats.finished[reason]) for reason in ("stop", "length")]
        http = [({"path": path, "status": status}, count) for (path, status), count in sorted(self._requests.items())]
        rows: list[str] = []
        for name, kind, about, values in (
            ("build_info", "gauge", "What serves.", [(self._info, 1)]),
            ("requests_running", "gauge", "Requests that have a slot.", [({}, report.running)]),
            ("requests_waiting", "gauge", "Requests that wait for one.", [({}, report.waiting)]),
            ("batch_rows", "gauge", "Slots.", [({}, report.rows)]),
            ("slot_usage_ratio", "gauge", "Slots in use, of all.", [({}, report.running / max(report.rows, 1))]),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", [({}, stats.prompt_tokens)]),
            ("generation_tokens_total", "counter", "Tokens generated.", [({}, stats.generation_tokens)]),
            ("spec_decode_num_draft_tokens_total", "counter", "Tokens that the draft guessed.", [({}, stats.drafted_tokens)]),
            ("spec_decode_num_accepted_tokens_total", "counter", "Those of them that were right.", [({}, stats.accepted_tokens)]),
            ("prefix_cache_queries_total", "counter", "Tokens of prompts looked for in what is kept.", [({}, stats.prompt_tokens)]),
            ("prefix_cache_hits_total", "counter", "Tokens of prompts found there.", [({}, stats.cached_tokens)]),
            ("request_success_total", "counter", "Requests answered.", finished),
            ("requests_cancelled_total", "counter", "Requests whose client left.", [({}, stats.finished["cancelled"])]),
            ("requests_failed_total", "counter", "Requests that ended in an error.", [({}, stats.finished["error"])]),
            ("http_requests_total", "counter", "HTTP requests; status 499: the client left.", http),
        ):
            rows += _family(name, kind, about)
            rows += [_row(name, labels, value) for labels, value in values]
        for name, about, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", stats.first_token_seconds),
            ("inter_token_latency_seconds", "Between tokens.", stats.token_seconds),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", stats.request_seconds),
            ("request_queue_seconds", "From a request's arrival to its slot.", stats.queue_seconds),
        ):
            rows += _family(name, "histogram", about)
            rows += _histogram(name, histogram)
        return "\n".join(rows) + "\n"


def _family(name: str, kind: str, about: str) -> Iterable[str]:
    return f"# HELP smedjan_{name} {about}", f"# TYPE smedjan_{name} {kind}"


def _histogram(name: str, histogram: Histogram) -> Iterable[str]:
    for bound, count in histogram.cumulative():
        yield _row(f"{name}_bucket", {"le": "+Inf" if bound == float("inf") else f"{bound:g}"}, count)
    yield _row(f"{name}_sum", {}, histogram.sum)
    yield _row(f"{name}_count", {}, histogram.count)


def _row(name: str, labels: Labels, value: float) -> str:
    return f"smedjan_{name}{_labels(labels)} {value!r}"


def _labels(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
