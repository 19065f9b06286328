"""Tiny models for the tests of convert: written as neutral checkpoints, run in either backend, greedy."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from convert.cli import main
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, read_checkpoint, write_final
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer

TEXT = (
    "The smith heats the iron until it glows, then the hammer falls. Sparks fly; the anvil rings.\n"
    "def forge(iron, heat=1200):\n    return [blow(iron) for _ in range(heat // 100)]\n\n"
    "Smedjan är varm, and it's late: 3 horseshoes, 14 nails, 1592 rivets… naïve café 中文 🔥\n"
)
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 32}
LINEAR = {"rope_scaling": "linear", "rope_factor": 4.0}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_len": 32}
NTK = {"rope_scaling": "ntk", "rope_factor": 4.0}
PROMPT = "The smith "


@functools.cache
def tokenizer(pattern: str = "cl100k", size: int = 300) -> Tokenizer:
    return Tokenizer.train_from_texts([TEXT] * 3, size, pattern)


def model_config(vocab_size: int, **changes: Any) -> ModelConfig:
    values = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context_length": 128, "init_std": 0.3} | changes
    return ModelConfig.build(vocab_size=vocab_size, ffn_mult=2.0, **values)


def parameters(config: ModelConfig, seed: int = 1) -> dict[str, np.ndarray]:
    """Random ones; rows of the embedding that no token has are zero, as after training they are never chosen."""
    params = initial_params(config, seed)
    params["embed.weight"][config.vocab_size :] = 0
    for name in params:
        if params[name].ndim == 1:  # norms not all ones, biases not zero, so that one in the wrong place is seen
            params[name] += np.linspace(-0.2, 0.2, len(params[name]), dtype=np.float32)
    if "head.weight" in params:
        params["head.weight"][config.vocab_size :] = 0
    return params


def neutral(directory: Path, config: ModelConfig | None = None, params: dict | None = None, tok: Tokenizer | None = None) -> Path:
    """A neutral checkpoint in `directory`/final."""
    tok = tok or tokenizer()
    config = config or model_config(tok.vocab_size)
    about = About(model=config, tokenizer=SavedTokenizer.of(tok), framework={"name": "test"})
    return write_final(directory, Snapshot(7, params or parameters(config), {}), about)


def convert(*args: Any) -> None:
    """Run the command; the assertion shows what it said through pytest's capture."""
    assert main([str(arg) for arg in args]) == 0


def logits(backend: str, path: Path, ids: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]: what a backend makes of a neutral checkpoint."""
    from tests.conformance import subjects

    checkpoint = read_checkpoint(path)
    return subjects.logits(backend, checkpoint.model, checkpoint.snapshot.params, ids)[..., : checkpoint.model.vocab_size]


def greedy(backend: str, path: Path, prompt: str = PROMPT, tokens: int = 48) -> list[int]:
    """Ids that a backend goes on with from `prompt`, the most probable one each time."""
    from tests.conformance import subjects

    checkpoint = read_checkpoint(path)
    assert checkpoint.tokenizer_json is not None
    tok = Tokenizer.from_json(checkpoint.tokenizer_json)
    side = subjects.backend(backend, checkpoint.model, TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3))
    prompt_ids = tok.encode(prompt)
    decoder = side.decoder(checkpoint.snapshot.params, len(prompt_ids) + tokens)
    engine = Engine(decoder, tok)
    ticket = engine.submit(Request(prompt_ids, tokens, Sampling(temperature=0)))
    assert [piece.finish_reason for _, piece in engine.answer([ticket])][-1] in ("stop", "length")
    return ticket.ids[len(prompt_ids) :]
