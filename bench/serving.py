"""How fast `smedjan serve` answers many clients at a time, and whether it survives hostile ones.

    python -m bench.serving                    both backends -> bench/results/serving-DEVICE.json
    python -m bench.serving --backend mlx --clients 64 --hostile 0

Table `load`: a model of random weights (2 layers of width 128, context 512; on a GPU the preset small), `clients` that stream texts of 32
tokens after prompts of some 20, two each, to a server with `batch` rows. Time to the first token and between tokens are the clients', from
the request's first byte to an event's last; they share the machine with the server. Before, as many other texts are asked for, twice, so
that everything is compiled.

Table `hostile`: requests of bench/hostile.py, with the memory of the server after 1, 4 and 10 tenths of them.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from bench.hostile import attack
from bench.rows import Results, Row, default_output, device_name
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, write_final
from smedjan_common.config import ModelConfig
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer

KEY = ("table", "backend", "clients", "batch")
TEXT = "".join(f"The smith of village {i} heats the iron until it glows; {i * i} sparks fly and the anvil rings.\n" for i in range(600))
TOKENS, EACH = 32, 2
WARM_UPS = 2
LOADS = ((1, 16), (16, 16), (64, 16), (64, 64))  # clients, rows
BATCHES = (1000, 3000, 6000)  # of hostile requests, of 10,000


def main() -> None:
    """Measure what is missing, a server for each number of rows."""
    args = _arguments()
    results = Results(args.output or default_output("serving"), KEY, tokens=TOKENS, each=EACH)
    with tempfile.TemporaryDirectory() as folder:
        run = write_model(pathlib.Path(folder) / "model")
        for backend in args.backend:
            for batch in sorted({batch for _, batch in LOADS}):
                _load(results, run, backend, batch, args.clients)
            if args.hostile and not results.has(row := _row("hostile", backend, 16, 4)):
                with Server(run, backend, 4, "--max-queue", "16", "--no-log") as server:
                    results.add(row | hostile(server, args.hostile))


def write_model(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A checkpoint of random weights."""
    tokenizer = Tokenizer.train_from_texts([TEXT], 600)
    if changes or device_name() == "cpu":
        shape = {"dim": 128, "layers": 2, "heads": 4, "context_length": 512} | changes
        model = ModelConfig.build(vocab_size=tokenizer.vocab_size, **shape)
    else:
        model = ModelConfig.preset("small", vocab_size=tokenizer.vocab_size)
    about = About(model=model, tokenizer=SavedTokenizer.of(tokenizer), framework={"name": "none"})
    return write_final(folder, Snapshot(0, initial_params(model, 0), {}), about)


class Server:
    """`smedjan serve` in a process of its own, as a context."""

    def __init__(self, run: pathlib.Path, backend: str, batch: int, *words: str):
        line = [sys.executable, "-m", f"smedjan_{backend}.serve", str(run), "--port", "0", "--max-batch", str(batch), *words]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = ""
        assert self.process.stdout
        while "Ctrl-C" not in said:
            said += (more := self.process.stdout.readline())
            assert more, self.process.communicate()[1]
        self.port = int(re.findall(r"http://[^ ]*:(\d+)", said)[-1])
        os.set_blocking(self.process.stderr.fileno(), False)  # type: ignore[union-attr]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=20)
        self.process.kill()

    def memory(self) -> int | None:
        """Bytes that the process holds; None where the system does not tell."""
        with contextlib.suppress(OSError):
            return int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return None

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return float(re.findall(rf"^smedjan_{name} (\S+)$", text, re.MULTILINE)[0])


class Times(NamedTuple):
    """Of one text: seconds to its first token, and between its tokens; how many there were."""

    first: float
    between: list[float]
    tokens: int


async def ask(port: int, number: int) -> Times:
    """Stream one text."""
    asked = {"prompt": TEXT[number * 90 : number * 90 + 60], "max_tokens": TOKENS, "seed": number, "ignore_eos": True, "stream": True}
    raw = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, at, tokens = time.perf_counter(), [], 0
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
    while line := await reader.readline():
        if line.startswith(b'data: {"id"'):
            at.append(time.perf_counter())
            if found := re.search(rb'"completion_tokens":(\d+)', line):
                tokens = int(found[1])
    writer.close()
    assert tokens == TOKENS, "the answer was cut short"
    return Times(at[0] - began, [after - before for before, after in itertools.pairwise(at[:-3])], tokens)


async def load(port: int, clients: int, again: int = 0) -> tuple[float, list[Times]]:
    """Seconds, and the times of every text, with so many clients at a time. again: how often it was called before; its texts are new."""

    async def client(number: int) -> list[Times]:
        return [await ask(port, number + clients * (turn + EACH * again)) for turn in range(EACH)]

    began = time.perf_counter()
    found = await asyncio.gather(*map(client, range(clients)))
    return time.perf_counter() - began, [times for each in found for times in each]


def measure(server: Server, clients: int) -> Row:
    """A row of the table `load`."""
    for again in range(WARM_UPS):
        asyncio.run(load(server.port, clients, again))
    seconds, times = asyncio.run(load(server.port, clients, WARM_UPS))
    between = [value for each in times for value in each.between]
    memory = server.memory()
    return {
        "tokens_per_second": round(sum(each.tokens for each in times) / seconds),
        **_quantiles("first_token_ms", [each.first for each in times]),
        **_quantiles("between_tokens_ms", between),
        "memory_mib": memory and memory >> 20,
    }


def hostile(server: Server, count: int) -> Row:
    """A row of the table `hostile`."""
    began, ends, memory = time.perf_counter(), {}, []
    for number, share in enumerate(BATCHES):
        for end, times in attack(server.port, count * share // sum(BATCHES), seed=number).items():
            ends[end] = ends.get(end, 0) + times
        memory.append(server.memory())
    deadline = time.monotonic() + 30
    while server.metric("requests_running") or server.metric("requests_waiting"):
        assert time.monotonic() < deadline, "requests of clients that left go on"
        time.sleep(0.1)
    assert server.process.poll() is None, "the server ended"
    told = {"memory_mib": [value and value >> 20 for value in memory], "failed": server.metric("requests_failed_total")}
    return {"requests": sum(ends.values()), "ends": dict(sorted(ends.items())), "seconds": round(time.perf_counter() - began), **told}


def _load(results: Results, run: pathlib.Path, backend: str, batch: int, wanted: list[int]) -> None:
    """Every row of the table `load` with so many rows in the server."""
    rows = [_row("load", backend, clients, rows) for clients, rows in LOADS if rows == batch and clients in wanted]
    if missing := [row for row in rows if not results.has(row)]:
        with Server(run, backend, batch, "--no-log") as server:
            for row in missing:
                results.add(row | measure(server, row["clients"]))


def _row(table: str, backend: str, clients: int, batch: int) -> Row:
    return dict(zip(KEY, (table, backend, clients, batch), strict=True))


def _quantiles(name: str, seconds: list[float]) -> Row:
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {f"{name}_p50": round(cuts[9] * 1e3, 2), f"{name}_p95": round(cuts[18] * 1e3, 2)}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), nargs="+", default=["jax", "mlx"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--hostile", type=int, default=10_000, help="how many hostile requests")
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/serving-DEVICE.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
