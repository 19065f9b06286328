"""`python -m tests.fakes.serve '{"rows": 2, …}'`: the server with a decoder that needs no framework. Prints its port once it is ready.

rows, max_queue, queue_seconds, drain_seconds, context, max_tokens, names; key, hosts, origins; loading: seconds that opening takes;
step: seconds of a decode step; script: the text that it wants to write after the prompt, <|endoftext|> at its end; template: plain;
fails: after so many steps the thread breaks down; body, body_seconds: limits of bodies; ping, idle: seconds of the server's clocks.
"""

import functools
import itertools
import json
import sys
import time

import numpy as np

from smedjan_common.errors import run_command
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.logprobs import log_softmax, most_probable
from smedjan_common.serving import app, server
from smedjan_common.serving.access import Access
from smedjan_common.serving.bodies import Bodies
from smedjan_common.serving.served import Served
from smedjan_common.serving.sockets import listen
from smedjan_common.serving.start import Settings, start
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.rows import FakeDecoder

TEXT = "the cat sat on the mat; a smith at his anvil — été 😀 日本語. "


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts([TEXT * 20], vocab_size=290)


class Slow(FakeDecoder):
    """Each step takes a while, and after `fails` of them it breaks down. `wanted`: ids that it wants to write after any prompt."""

    def __init__(self, *args, seconds=0.0, fails=None, wanted=None, **more):
        super().__init__(*args, **more)
        self.seconds, self.fails, self.wanted = seconds, fails, wanted
        self.begins = [0] * self.rows

    def feed(self, ids, row=0):
        self.begins[row] = self.position(row) + len(ids)
        return super().feed(ids, row)

    def _logits(self, row, last):
        logits = super()._logits(row, last)
        if self.wanted is not None:
            logits[: self.vocab_size] = 0
            logits[self.wanted[min(self.position(row) - self.begins[row], len(self.wanted) - 1)]] = 9
        return logits

    def step(self, tokens, active):
        time.sleep(self.seconds)
        self.events.clear()
        if self.fails is not None:
            self.fails -= 1
            if self.fails < 0:
                raise RuntimeError("the abacus broke")
        return super().step(tokens, active)


def scores(ids, top):
    """Log-probabilities as the decoder gives them."""
    decoder, vocab_size = FakeDecoder(tokenizer().vocab_size), tokenizer().vocab_size
    found = [(None, ())]
    for before, token in itertools.pairwise(ids):
        logprobs = log_softmax(decoder.feed([before])[:vocab_size].astype(np.float64))
        found.append((float(logprobs[token]), most_probable(logprobs, top)))
    return found


def main(options):
    ours = tokenizer()
    served = Served(
        names=tuple(options.get("names", ["fake"])),
        created=1,
        tokenizer=ours,
        vocab_size=ours.vocab_size,
        context_length=options.get("context", 256),
        max_tokens=options.get("max_tokens"),
        at_once=options.get("max_queue", 64) + options.get("rows", 4),
        template=PLAIN if options.get("template", "plain") == "plain" else None,
        fingerprint="fake",
    )

    def open_engine():
        time.sleep(options.get("loading", 0))
        script = options.get("script")
        ids = None if script is None else ours.encode(script, "all")
        decoder = Slow(ours.vocab_size, options.get("rows", 4), wanted=ids, seconds=options.get("step", 0.0), fails=options.get("fails"))
        return Engine(decoder, ours, score=scores)

    settings = Settings(
        Access(options.get("key", ""), tuple(options.get("hosts", ())), tuple(options.get("origins", ()))),
        options.get("max_queue", 64),
        options.get("queue_seconds", 0.0),
        options.get("drain_seconds", 2.0),
        quiet=not options.get("log", False),
        bodies=Bodies(options.get("body", 1 << 20), seconds=options.get("body_seconds", 5.0)),
    )
    app.PING_SECONDS = options.get("ping", app.PING_SECONDS)
    server.IDLE_SECONDS = options.get("idle", server.IDLE_SECONDS)
    sockets = listen("127.0.0.1", 0)
    print(sockets[0].getsockname()[1], flush=True)
    return start(served, open_engine, settings, sockets, lambda: print("ready", flush=True))


class Plain:
    """User: …, Assistant: …"""

    name, stop, strips = "plain", ("\nUser:",), True

    def encode(self, ours, messages, add_generation_prompt=True, continue_final=False):
        roles = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        text = "".join(roles[each["role"]] + each["content"] + "\n" for each in messages)
        return ours.encode(text.rstrip("\n") if continue_final else text + "Assistant:")

    def stop_ids(self, ours):
        return frozenset({ours.eot_id})


PLAIN = Plain()

if __name__ == "__main__":
    sys.exit(run_command(lambda: main(json.loads(sys.argv[1] if sys.argv[1:] else "{}"))))
