"""Requests that no honest client sends, for a server to survive: `attack(port, count, seed)` sends them from many threads.

Fuzzed JSON, fields of every wrong type, bodies that stop, connections that are cut at every place, heads without end, lies about
lengths, methods and hosts that there are not, clients that leave in the middle of an answer; and honest requests among them. The same
seed sends the same requests.
"""

import json
import random
import socket
import string
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CLIENTS = 16
SECONDS = 60.0  # a server that answers nothing for so long hangs
PATIENCE = 0.5  # of a client that leaves
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    1e308,
    -(1 << 63),
    1 << 80,
    "",
    "a",
    "\x00",
    "\ud800",
    "é😀" * 50,
    [],
    [[]],
    [1],
    [[1]],
    ["a"],
    {},
    {"a": 1},
)
FIELDS = (
    "model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p seed n best_of stop stream echo logprobs "
    "stream_options logit_bias top_logprobs presence_penalty frequency_penalty repetition_penalty ignore_eos stop_token_ids "
    "tools response_format suffix user metadata tokens content continue_final_message parse_special"
).split()


def attack(port: int, count: int, seed: int, clients: int = CLIENTS) -> Counter[str]:
    """How `count` requests ended: by status, "left" where it was the client that went, "closed" where the server said nothing."""
    kinds = list(KINDS)

    def one(number: int) -> str:
        rng = random.Random(f"{seed} {number}")
        return KINDS[rng.choice(kinds)](port, rng)

    with ThreadPoolExecutor(clients) as pool:
        return Counter(pool.map(one, range(count), chunksize=1))


def _sent(port: int, *parts: bytes, leaves: int | None = None) -> str:
    """Send the parts; the status of the answer. leaves: close after so many bytes of it."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS if leaves is None else PATIENCE) as client:
        try:
            for part in parts:
                client.sendall(part)
            if leaves == 0:
                return "left"
            answer = b""
            while len(answer) < (leaves or 12) and (more := client.recv(4096)):
                answer += more
        except TimeoutError:
            return "hangs" if leaves is None else "left"
        except (ConnectionResetError, BrokenPipeError):
            return "closed"
        if leaves:
            return "left"
        return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"


def _head(method: str, path: str, length: object = None, more: str = "", host: str = "localhost") -> bytes:
    sized = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{sized}{more}\r\n".encode("latin-1")


def _post(rng: random.Random, raw: bytes, path: str | None = None, more: str = "") -> bytes:
    return _head("POST", path or rng.choice(PATHS), len(raw), more) + raw


def _body(rng: random.Random, **values: object) -> bytes:
    honest = {"prompt": "the cat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": rng.randrange(9), "tokens": [5]}
    return json.dumps(honest | values).encode()


def _honest(port: int, rng: random.Random) -> str:
    return _sent(port, _post(rng, _body(rng, stream=rng.random() < 0.3)))


def _wrong_types(port: int, rng: random.Random) -> str:
    fields = rng.sample(FIELDS, rng.randint(1, 4))
    return _sent(port, _post(rng, _body(rng, **{"max_tokens": 2} | {name: rng.choice(VALUES) for name in fields})))


def _broken_json(port: int, rng: random.Random) -> str:
    raw = bytearray(_body(rng, **{name: rng.choice(VALUES) for name in rng.sample(FIELDS, 3)}))
    for _ in range(rng.randint(1, 8)):
        raw[rng.randrange(len(raw))] = rng.choice(b'{}[]",:0123456789eE\\\x00\xff ntf') if rng.random() < 0.7 else rng.randrange(256)
    return _sent(port, _post(rng, bytes(raw[: rng.randint(0, len(raw))] if rng.random() < 0.3 else raw)))


def _noise(port: int, rng: random.Random) -> str:
    return _sent(port, rng.randbytes(rng.randint(1, 2000)) + b"\r\n\r\n", leaves=rng.choice((0, 1)))


def _nested(port: int, rng: random.Random) -> str:
    begin = rng.choice((b"[", b'{"prompt":', b'{"a":[', b'[{"messages":'))
    return _sent(port, _post(rng, begin * rng.randint(1000, 20_000)))


def _long_head(port: int, rng: random.Random) -> str:
    size = rng.choice((10_000, 60_000, 200_000))
    more = f"X-Long: {'a' * size}\r\n" if rng.random() < 0.5 else "".join(f"X-{i}: b\r\n" for i in range(size // 10))
    return _sent(port, _head("GET", "/health", more=more))


def _odd_head(port: int, rng: random.Random) -> str:
    letters = "".join(rng.choice(string.printable[:-5]) for _ in range(rng.randint(0, 40)))
    head = rng.choice(
        (
            _head("GET", "/health", host=rng.choice(("evil.example", "", "localhost.", "[::1", letters))),
            _head(rng.choice(("HEAD", "PUT", "DELETE", "TRACE", "CONNECT", "get", "A" * 50)), rng.choice((*PATHS, "/health", "*"))),
            _head("GET", f"/{letters.replace(' ', '%')}"),
            _head("GET", "/" + "a" * rng.choice((100, 10_000))),
            _head("GET", "/v1/models/" + rng.choice(("..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "../../../etc/passwd"))),
            _head("GET", "/health", more=f"Origin: {rng.choice(('null', 'http://evil.example', 'http://[', letters))}\r\n"),
            _head("OPTIONS", "/v1/completions", more="Origin: http://evil.example\r\nAccess-Control-Request-Headers: a\r\n"),
            _head("GET", "/health", more="Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: AAAA\r\n"),
            _head("POST", "/v1/completions", rng.choice(("-1", "a", "1e9", "99999999999999999999999999", "5, 6"))),
            b"GET /health HTTP/9.9\r\n\r\n",
            b"GET /health\r\n\r\n",
            b"GET /health HTTP/1.0\r\n\r\n",
            b"\r\n" * 100 + b"GET /health HTTP/1.1\r\n\r\n",
        )
    )
    return _sent(port, head)


def _cut(port: int, rng: random.Random) -> str:
    raw = _post(rng, _body(rng, stream=True))
    return _sent(port, raw[: rng.randrange(len(raw))], leaves=0)


def _leaves(port: int, rng: random.Random) -> str:
    raw = _body(rng, max_tokens=200, ignore_eos=True, stream=rng.random() < 0.7, n=rng.choice((1, 1, 3)))
    return _sent(port, _post(rng, raw, rng.choice(PATHS[:2])), leaves=rng.choice((0, 1, 300, 2000)))


def _lies(port: int, rng: random.Random) -> str:
    raw = _body(rng)
    kind = rng.randrange(4)
    if kind == 0:  # a body that never ends
        return _sent(port, _head("POST", PATHS[0], len(raw) + 1000), raw, leaves=0)
    if kind == 1:  # more than was told: a second request that is none
        return _sent(port, _head("POST", PATHS[0], len(raw) // 2), raw)
    chunked = _head("POST", PATHS[0], more="Transfer-Encoding: chunked\r\n")
    if kind == 2:
        return _sent(port, chunked, b"zz\r\n" + raw)
    return _sent(port, chunked, b"".join(b"1\r\n%c\r\n" % byte for byte in raw), b"0\r\n\r\n")


def _too_long(port: int, rng: random.Random) -> str:
    text = rng.choice(("a", " a", "é", "\x00", "<|endoftext|>")) * rng.choice((20_000, 300_000))
    asked = {"prompt": text} if rng.random() < 0.5 else {"messages": [{"role": "user", "content": text}]}
    return _sent(port, _post(rng, json.dumps(asked).encode(), rng.choice(PATHS[:3])))


def _many(port: int, rng: random.Random) -> str:
    asked = rng.choice(
        (
            {"n": 128},
            {"prompt": ["a"] * 5000},
            {"prompt": [[5]] * 3000},
            {"stop": ["a"] * 5000},
            {"logit_bias": {str(i): 1 for i in range(900)}},
        )
    )
    return _sent(port, _post(rng, _body(rng, **asked), PATHS[0]))


KINDS: dict[str, Callable[[int, random.Random], str]] = {
    "honest": _honest,
    "wrong types": _wrong_types,
    "broken JSON": _broken_json,
    "noise": _noise,
    "nested": _nested,
    "long head": _long_head,
    "odd head": _odd_head,
    "cut": _cut,
    "leaves": _leaves,
    "lies": _lies,
    "too long": _too_long,
    "many": _many,
}
