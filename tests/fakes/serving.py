"""A server in a process of its own, and what tests do with one: ask, stream, leave, look at its metrics."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

from tests.fakes.runs import ROOT


class Running:
    """`port` and `process` of a server. Its standard output is read up to the port, its error output is kept in `log`."""

    def __init__(self, *command, wait=True, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        )
        self.log, self.said = [], []
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stderr, self.log), (self.process.stdout, self.said))
        ]
        for reader in self._readers:
            reader.start()
        if wait:
            self.wait_until(lambda: "ready" in "".join(self.said) or self._address())
        self.port = self._port()

    def _read(self, stream, lines):
        for line in stream:
            lines.append(line)

    def _address(self):
        return re.search(r"http://[^ ]*:(\d+)", "".join(self.said))

    def _port(self):
        self.wait_until(lambda: self.said)
        found = self._address()
        return int(found[1] if found else self.said[0])

    def wait_until(self, what, seconds=60):
        """Wait until it is true; the process may not end before."""
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < end, "".join(self.log)
            time.sleep(0.01)

    def ask(self, method, path, body=None, headers=None, timeout=30):
        """(status, headers, JSON or text). body: a value, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, raw, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
            told = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, told, json.loads(text) if told.get("content-type") == "application/json" else text

    def post(self, path, body, **headers):
        """The JSON of an answer that is right."""
        status, _, found = self.ask("POST", path, body, headers)
        assert status == 200, found
        return found

    def refused(self, path, body, status=400, **headers):
        """The error of an answer that is one."""
        code, told, found = self.ask("POST", path, body, headers)
        assert code == status, found
        assert found["error"].keys() == {"message", "type", "param", "code"}
        assert told["x-request-id"].startswith("req_")
        return found["error"]

    def stream(self, path, body):
        """Every event of a stream: JSON, or "[DONE]"."""
        with self.open_stream(path, body) as answer:
            assert answer.status == 200, answer.read()
            assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
            lines = [line.rstrip(b"\n") for line in answer]
        assert lines[1::2] == [b""] * (len(lines) // 2), "each event is one line and an empty one"
        data = [line.removeprefix(b"data: ") for line in lines[::2] if not line.startswith(b":")]
        return [each.decode() if each == b"[DONE]" else json.loads(each) for each in data]

    @contextlib.contextmanager
    def open_stream(self, path, body, headers=None):
        """The answer while it goes on; leaving closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", path, json.dumps(body | {"stream": True}), headers or {})
            answer = connection.getresponse()
            yield answer
        finally:
            answer.close()
            connection.close()

    def metrics(self, **headers):
        """name{labels} -> value."""
        rows = [line.rpartition(" ") for line in self.ask("GET", "/metrics", headers=headers)[2].splitlines() if line[0] != "#"]
        return {name.removeprefix("smedjan_"): float(value) for name, _, value in rows}

    def wait_for(self, seconds=10, **values):
        """Wait until the metrics have these values."""
        end = time.monotonic() + seconds
        while any((found := self.metrics())[name] != value for name, value in values.items()):
            assert time.monotonic() < end, {name: found[name] for name in values}
            time.sleep(0.02)

    def stop(self, number=signal.SIGTERM, timeout=20):
        """Send it a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def fake(wait=True, **options):
    """A server with a decoder that needs no framework (tests.fakes.serve)."""
    running = Running("tests.fakes.serve", json.dumps(options), wait=wait)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.stop()
