"""Requests that no honest client sends: the server answers or refuses each, and is what it was before. `bench/serving.py` sends 10,000."""

import contextlib
import socket
from pathlib import Path

import pytest

from bench.hostile import KINDS, attack
from tests.fakes.serving import fake

ANSWERS = {"200", "204", "400", "401", "403", "404", "405", "408", "413", "429", "left"}


@pytest.fixture(scope="module")
def server():
    with fake(rows=4, max_queue=16, context=256, log=True) as running:
        yield running


def kept(running):
    """Bytes of memory and open files of the process, where Linux tells."""
    about = Path(f"/proc/{running.process.pid}")
    if not about.is_dir():
        return 0, 0
    pages = int((about / "statm").read_text().split()[1])
    return pages * 4096, len(list((about / "fd").iterdir()))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_attack_is_answered(server, kind, monkeypatch):
    monkeypatch.setattr("bench.hostile.KINDS", {kind: KINDS[kind]})
    found = attack(server.port, 16, seed=1, clients=4)
    assert found.keys() <= ANSWERS, found
    assert (kind != "honest") or found == {"200": 16}


def test_after_all_of_them_the_server_is_what_it_was(server):
    asked = {"prompt": "the cat", "max_tokens": 9, "seed": 5}
    before = server.post("/v1/completions", asked)["choices"]
    attack(server.port, 150, seed=2)
    memory, files = kept(server)
    found = attack(server.port, 350, seed=3)
    assert found.keys() <= ANSWERS, found
    server.wait_for(10, requests_running=0, requests_waiting=0)
    assert server.post("/v1/completions", asked)["choices"] == before
    now, open_now = kept(server)
    assert now < memory + (64 << 20)
    assert open_now <= files + 16
    log = "".join(server.log)
    assert "Traceback" not in log
    assert all(line.isprintable() for line in log.splitlines()), "nothing that a stranger wrote reaches the terminal raw"


def test_clients_that_say_nothing_keep_nobody_out(server):
    with contextlib.ExitStack() as idle:
        for begin in (b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{") * 40:
            idle.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(begin)
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 2})
    server.post("/v1/completions", {"prompt": "a", "max_tokens": 2})
