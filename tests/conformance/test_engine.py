"""The engine over the backends' own decoders: a text does not depend on who shares the batch, and both backends write the same one."""

import functools

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer
from tests.conformance import subjects

ROWS, HELD = 8, 32  # positions that the state holds: some texts are longer
MODELS = ("attention", "gated-deltanet")  # what can be rewound, and what cannot


@pytest.fixture(autouse=True)
def short_texts_are_kept(monkeypatch):
    monkeypatch.setattr("smedjan_common.inference.prefixes.SHORTEST", 1)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts(["the smith heats the iron until it glows, naïve café 雪"] * 5, vocab_size=270)


@functools.cache
def decoder(backend: str, name: str):
    sizes = {"dim": 32, "layers": 1, "heads": 4, "context_length": 64, "init_std": 0.4, "mixer": (name,)}
    model = ModelConfig.build(vocab_size=tokenizer().vocab_size, ffn_mult=2.0, **sizes)
    side = subjects.backend(backend, model, TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3))
    return side.decoder(initial_params(model, 1), HELD, ROWS)


@functools.cache
def requests() -> list[Request]:
    """64 of all kinds, some with a common beginning."""
    random, begin = np.random.default_rng(5), tokenizer().encode("the smith heats the iron")
    made = []
    for number in range(64):
        prompt = begin[: int(random.integers(1, len(begin)))] + random.integers(0, 256, int(random.integers(0, 6))).tolist()
        sampling = Sampling(float(random.choice([0, 0.8])), int(random.choice([0, 30])), repetition_penalty=1.1, seed=number)
        tokens = int(random.integers(2, 12)) if number % 8 else 40
        made.append(Request(prompt, tokens, sampling, stop=["e"] if number % 9 == 0 else [], logprobs=1 if number % 10 == 0 else None))
    return made


def answers(engine: Engine, asked: list[Request]) -> list[tuple[str, list[int], str | None]]:
    """(text, ids, why it ended) of each, side by side."""
    tickets, texts = [engine.submit(one) for one in asked], [""] * len(asked)
    for number, piece in engine.answer(tickets):
        texts[number] += piece.text
    return [(text, ticket.ids, ticket.reason) for text, ticket in zip(texts, tickets, strict=True)]


@functools.cache
def alone(backend: str, name: str) -> list[tuple[str, list[int], str | None]]:
    engine = Engine(decoder(backend, name), tokenizer(), chunk=4, reuse=False)
    return [answers(engine, [one])[0] for one in requests()]


@pytest.mark.parametrize("name", MODELS)
def test_each_of_64_requests_gives_the_text_that_it_gives_alone(backend: str, name: str):
    engine = Engine(decoder(backend, name), tokenizer(), chunk=4, reuse=False)
    assert answers(engine, requests()) == alone(backend, name)


@pytest.mark.parametrize("name", MODELS)
def test_beginnings_that_are_not_computed_again_change_no_text(backend: str, name: str):
    engine = Engine(decoder(backend, name), tokenizer(), chunk=4, keep_bytes=1 << 20)
    assert answers(engine, requests()) == alone(backend, name)
    assert engine.stats.cached_tokens > 200


@pytest.mark.parametrize("name", MODELS)
def test_both_backends_write_the_same_texts(name: str):
    for package in ("jax", "mlx.core"):
        pytest.importorskip(package)
    assert alone("jax", name) == alone("mlx", name)


def test_blocks_that_the_device_draws_are_the_texts_that_the_host_draws():
    pytest.importorskip("mlx.core")
    name = MODELS[0]  # in MLX, where nothing is compiled on a CPU; what JAX draws is held in test_decoder_block.py
    assert answers(Engine(decoder("mlx", name), tokenizer(), chunk=4, reuse=False, blocks=True), requests()) == alone("mlx", name)
