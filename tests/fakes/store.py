"""A real S3 server (moto's) and a plain web server, both behind a door that fails on demand: 500s, cut answers, cut uploads, silence."""

import contextlib
import http.client
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, SECRET = "AKIATESTTESTTESTTEST", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose target contains `part`.

    kind: "500", "403", "cut" (half of the answer), "cut upload" (half of what is sent is read), "silent" (no answer), "slow".
    """

    kind: str
    method: str = "GET"
    part: str = ""
    times: int = 1


@dataclass
class Door:
    """`url`: of the door. `faults` to come, `seen`: (method, target) of every request."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)

    def fault_of(self, method: str, target: str) -> str:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.part in target:
                fault.times -= 1
                return fault.kind
        return ""


@contextlib.contextmanager
def door(host: str, port: int) -> Iterator[Door]:
    """A door before the server at this address."""
    found = Door()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def pass_on(self) -> None:
            found.seen.append((self.command, self.path))
            kind = found.fault_of(self.command, self.path)
            length = int(self.headers.get("Content-Length") or 0)
            if kind == "cut upload":
                self.rfile.read(length // 2)
                return self.hang_up()
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
            body = _chunks(self.rfile) if chunked else self.rfile.read(length)
            if kind == "silent":
                time.sleep(1.5)
                return self.hang_up()
            if kind in ("500", "403"):
                self.send_response(int(kind))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            back = http.client.HTTPConnection(host, port)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            back.request(self.command, self.path, body, headers | ({"Content-Length": str(len(body))} if chunked else {}))
            answer = back.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "server", "date", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or str(len(data)))
            self.end_headers()
            if kind == "cut":
                self.wfile.write(data[: len(data) // 2])
                return self.hang_up()
            if kind == "slow":
                for start in range(0, len(data), 1 << 16):
                    self.wfile.write(data[start : start + (1 << 16)])
                    time.sleep(0.02)
                return None
            self.wfile.write(data)
            return None

        def hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    with serving(Handler) as url:
        found.url = url
        yield found


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server of this handler."""

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass  # a client that went away

    server = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3() -> Iterator[Door]:
    """An S3 server with the bucket "bucket", behind its door; the environment has what clients need."""
    import logging

    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # fsspec keeps file systems by their arguments: one of an earlier server would ask that one
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    try:
        with door(host, port) as found:
            os.environ.update(environment(found))
            made = http.client.HTTPConnection(host, port)
            made.request("PUT", "/bucket")
            made.getresponse().read()
            yield found
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@contextlib.contextmanager
def static_files(folder: Path) -> Iterator[Door]:
    """A web server of a folder (Starlette under uvicorn; it answers ranges) behind its door."""
    import uvicorn
    from starlette.staticfiles import StaticFiles

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(StaticFiles(directory=folder), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        with door(*listening.getsockname()) as found:
            yield found
    finally:
        server.should_exit = True
        thread.join(10)


def environment(found: Door) -> dict[str, str]:
    """What tells a client where the server is, and who it is."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": found.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def put(found: Door, name: str, data: bytes) -> None:
    """Write an object as somebody else would."""
    host, _, port = found.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    signed = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request("PUT", f"/bucket/{name}", data, {"Authorization": signed})
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")


def _chunks(file: Any) -> bytes:
    """The body of a request in chunks."""
    body = b""
    while size := int(file.readline().split(b";")[0], 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body
