"""`chat` gives the same talk in both backends: templates, history, what is used again of the state, one answer after another."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from smedjan_common.tokenizer import Tokenizer
from tests.fakes.runs import ROOT
from tests.unit.convert_models import TEXT, model_config, neutral

SAID = "The smith heats\nand <|im_end|> then?\nÉ 漢 🔥\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = Tokenizer.train_from_texts([TEXT] * 3, 300, special_tokens=names)
    config = model_config(tokenizer.vocab_size, layers=2, mixer=("attention", "ssm"), ssm_state=8, ssm_head_dim=8, context_length=512)
    return neutral(tmp_path_factory.mktemp("chat"), config, tok=tokenizer)


def talk(backend: str, model, *words: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", f"smedjan_{backend}.chat", str(model), "--json", "--max-tokens", "8", "--system", "Be a smith.", *words],
        input=SAID,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "SMEDJAN_NO_OPENBLAS": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_second"} for line in done.stdout.splitlines()]


def test_both_backends_hold_the_same_talk(model):
    in_jax, in_mlx = (talk(backend, model, "--temperature", "0.8", "--seed", "3") for backend in ("jax", "mlx"))
    assert in_jax == in_mlx
    assert len(in_jax) == 3
    for before, answer in itertools.pairwise(in_jax):
        assert answer["cached_tokens"] >= before["prompt_tokens"], "the state of the talk so far is used again"
        assert answer["prompt_tokens"] > answer["cached_tokens"]
