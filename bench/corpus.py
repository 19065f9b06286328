"""The default corpus as token files, made by the commands of `smedjan quickstart` unless they are there; training and evaluation on it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from smedjan_common.backend import Backend, State
from smedjan_common.commands import quickstart
from smedjan_common.data.batches import batches
from smedjan_common.data.order import eval_batches
from smedjan_common.data.token_file import TokenFile
from smedjan_common.run.evaluate import evaluate
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.schedule import learning_rate

FOLDER = quickstart.data_folder(Path("runs/quickstart"))


class Corpus:
    """`train` and `val` token files and the tokenizer in `folder`."""

    def __init__(self, folder: Path = FOLDER):
        self.train, self.val = TokenFile.open(folder / "train.bin"), TokenFile.open(folder / "val.bin")
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")

    def train_steps(self, backend: Backend, state: State, first: int = 0) -> State:
        """`backend.train.steps` optimizer steps in the order of a run."""
        config = backend.train
        order = batches(self.train, config.seq_len, config.batch_size, config.seed)
        for step in range(first, config.steps):
            state, metrics = backend.train_step(state, *order.batch(step)[:2], learning_rate(config, step))
            if step % 50 == 49:
                backend.read(metrics)  # bounds what is queued on the device
        return state

    def evaluate(self, backend: Backend, state: State, max_batches: int | None = None) -> dict[str, Any]:
        """val_loss and val_bits_per_byte over the held-out text."""
        config = backend.train
        return evaluate(
            backend, state, eval_batches(self.val, config.seq_len, config.batch_size, max_batches), self.tokenizer.token_bytes()
        )


def make(folder: Path = FOLDER) -> None:
    """Write the token files of the default corpus into `folder` unless they are there."""
    quickstart.write_corpus(folder)
    for made, command in quickstart.commands(folder, folder.parent, "jax", 1):
        if made is not None and not made.exists():
            subprocess.run([sys.executable, "-m", "smedjan_common.cli", *command], check=True)
