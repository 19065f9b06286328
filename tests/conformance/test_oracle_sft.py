"""A step of answers is one of TRL's SFTTrainer: what is trained, the loss and the norm of the gradients, however the step is split.

tests/fixtures/sft-trl.json is made by tests/trl_sft.py; model, tokenizer and conversations are those of tests/fakes/trl.py.
"""

import importlib
import json
import os

import numpy as np
import pytest

from smedjan_common.backend import IGNORED, Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, write_final
from smedjan_common.commands import sft
from smedjan_common.reporting.metrics import read_rows, train_rows
from smedjan_common.tokenizer.chat import ChatML
from smedjan_common.training.config import TrainConfig
from tests.conformance import subjects
from tests.conformance.compare import Difference, demand
from tests.conformance.gates import FLOAT32
from tests.fakes.runs import ROOT
from tests.fakes.trl import MESSAGES, MODEL, params, tokenizer

FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
TRL = json.loads((ROOT / "tests" / "fixtures" / "sft-trl.json").read_text())


def test_tokens_and_what_is_trained_are_those_of_transformers():
    speaks = tokenizer()
    for messages, known in zip(MESSAGES, TRL["talks"], strict=True):
        ids, spans = ChatML().encode_turns(speaks, messages)
        trained = np.zeros(len(ids), int)
        for start, stop in spans:
            trained[start:stop] = 1
        assert (ids, trained.tolist()) == (known["ids"], known["trained"])


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a conversation a row, the short ones filled up."""
    length = max(len(talk["ids"]) for talk in TRL["talks"]) - 1
    inputs, targets = np.zeros((len(TRL["talks"]), length), np.int32), np.full((len(TRL["talks"]), length), IGNORED, np.int32)
    for row, talk in enumerate(TRL["talks"]):
        ids, trained = np.array(talk["ids"]), np.array(talk["trained"])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(trained[1:], ids[1:], IGNORED)
    return inputs, targets


@pytest.mark.parametrize("known", TRL["steps"], ids=lambda known: f"{known['batch']}x{known['parts']}")
def test_loss_and_norm_of_the_gradients_are_those_of_trl_for_every_split(backend: str, known):
    if backend == "jax" and known["batch"] != 2 and not FULL:
        pytest.skip("JAX compiles each split for seconds: SMEDJAN_TEST_FULL=1")
    inputs, targets = rows()
    assert known["batch"] * known["parts"] == len(inputs)
    train = TrainConfig(steps=1, batch_size=4, seq_len=inputs.shape[1], lr=1e-9, grad_accum=known["parts"], objective="sft")
    side = subjects.make_backend(backend, MODEL, train)
    _, metrics = side.train_step(side.init(params()), inputs, targets, 1e-9)
    told = side.read(metrics)
    demand(Difference(name, abs(told[name] / known[name] - 1), FLOAT32.oracle) for name in ("loss", "grad_norm"))


def test_the_command_packs_them_into_rows_and_has_the_same_step(tmp_path):
    pytest.importorskip("mlx.core")
    about = About(model=MODEL, tokenizer=SavedTokenizer.of(tokenizer()), framework={"name": "numpy"})
    write_final(tmp_path / "base", Snapshot(0, params(), {}), about)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in MESSAGES))
    words = f"{tmp_path / 'chats.jsonl'} --pretrained {tmp_path / 'base'} --checkpoint-dir {tmp_path / 'run'} --steps 1 --batch-size 2"
    words += " --seq-len 128 --val-fraction 0 --sample-every 0 --dtype float32 --lr 1e-9 --warmup 0"
    assert sft.run("mlx", importlib.import_module("smedjan_mlx.sft").load, words.split()) == 0
    [row] = train_rows(read_rows(tmp_path / "run"))
    known = TRL["steps"][0]
    told = {"loss": row["batch_loss"], "grad_norm": row["grad_norm"]}
    demand(Difference(name, abs(value / known[name] - 1), FLOAT32.oracle) for name, value in told.items())
