"""Speculative decoding over the backends' own decoders: a draft changes no text, of whatever mixers the models are."""

import functools

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.inference.speculation import Speculator
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer
from tests.conformance import subjects
from tests.conformance.conftest import FULL
from tests.conformance.test_engine import answers

ROWS, HELD = 3, 32  # positions that the state holds: some texts are longer
# what can be set back, what cannot, and both in one model
MODELS = [("attention",), ("gated-deltanet", "attention")]
if FULL:
    MODELS = [*MODELS, *((name,) for name in MIXERS if name != "attention"), tuple(MIXERS)]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts(["the smith heats the iron until it glows, naïve café 雪"] * 5, vocab_size=270)


@functools.cache
def decoder(backend: str, mixers: tuple[str, ...], off: float = 0.0):
    """off: how much its weights differ from those of the model that it guesses for."""
    sizes = {"dim": 32, "layers": len(mixers), "heads": 4, "context_length": 64, "init_std": 0.3, "mixer": mixers}
    own = {name: 8 for name, mixer in (("block_size", "block-sparse"), ("rwkv_head_dim", "rwkv")) if mixer in mixers}
    model = ModelConfig.build(vocab_size=tokenizer().vocab_size, ffn_mult=2.0, **sizes, **own)
    random, params = np.random.default_rng(2), initial_params(model, 1)
    params = {name: (array + off * random.standard_normal(array.shape)).astype(np.float32) for name, array in params.items()}
    side = subjects.backend(backend, model, TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3))
    return side.decoder(params, HELD, ROWS)


@functools.cache
def requests() -> list[Request]:
    """Of all kinds; some go past what is held."""
    random, begin = np.random.default_rng(5), tokenizer().encode("the smith heats the iron")
    made = []
    for number in range(16):
        prompt = begin[: int(random.integers(1, len(begin)))] + random.integers(0, 256, int(random.integers(0, 6))).tolist()
        penalty = 1.1 if number % 3 == 0 else 1.0
        sampling = Sampling(0 if number % 2 else 0.9, int(random.choice([0, 30])), 0.95, 0.01, penalty, seed=number)
        tokens = int(random.integers(8, 20)) if number % 8 else 45
        made.append(Request(prompt, tokens, sampling, stop=["e"] if number % 5 == 0 else [], logprobs=1 if number % 7 == 0 else None))
    return made


@functools.cache
def plain(backend: str, mixers: tuple[str, ...]):
    return answers(Engine(decoder(backend, mixers), tokenizer(), chunk=4, reuse=False), requests())


@pytest.mark.parametrize("mixers", MODELS, ids="+".join)
def test_a_draft_changes_no_text(backend: str, mixers: tuple[str, ...]):
    size = tokenizer().vocab_size
    speculator = Speculator(decoder(backend, mixers, 0.02), 3, size, size, 0)
    engine = Engine(decoder(backend, mixers), tokenizer(), chunk=4, reuse=False, speculator=speculator)
    assert answers(engine, requests()) == plain(backend, mixers)
    assert 0.1 < engine.stats.accepted_tokens / engine.stats.drafted_tokens < 0.95
    assert engine.stats.drafted_tokens > 100
