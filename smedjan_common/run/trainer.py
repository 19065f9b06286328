"""Training a step at a time, for notebooks and experiments: `smedjan_jax.trainer(model)`, `smedjan_mlx.trainer(model)`.

    trainer = smedjan_jax.trainer(config, tokenizer, lr=1e-3)
    for batch in batches:                      # int [B, T + 1]
        print(trainer.step(batch)["loss"])

The step is the one of `smedjan train`, with `teacher=PATH` of a run that learns from a teacher too; schedules, data and checkpoints are the
caller's. It belongs to the thread that made it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smedjan_common.backend import Backend, Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, read_weights, write_final
from smedjan_common.errors import ConfigError
from smedjan_common.inference.keywords import check_keywords
from smedjan_common.inference.open import Foreign, open_model
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import initial_params
from smedjan_common.run.teacher import check_teacher, teacher_at
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.distillation import ALPHA

# imports a framework: -> (what makes a backend, the dtype that auto means here)
Load = Callable[[], tuple[Callable[[ModelConfig, TrainConfig], Backend], str]]
# fields of TrainConfig that are not options here
OWN = ("steps", "batch_size", "seq_len", "lr", "objective")
OWN += ("beta", "gamma", "label_smoothing", "nll_weight")  # of pairs
OWN += ("lora_rows_from", "lora_rows")  # of a tokenizer that has gained tokens


class Trainer:
    """`config`, `tokenizer`, `train`: what is trained and how. `teacher`: whom it learns from. `steps_done`: optimizer steps so far."""

    def __init__(
        self,
        load: Load,
        model: ModelConfig | str | os.PathLike,
        tokenizer: Tokenizer | None,
        lr: float,
        seed: int,
        teacher: str | os.PathLike | None = None,
        **options: Any,
    ):
        """model: a configuration, whose weights are drawn with `seed`, or the path of a model to start from. teacher: a run or a checkpoint
        to learn from besides, of the same tokenizer; distill_alpha (0.5) is its share of the loss. options: of TrainConfig.

        Raises TypeError for an unknown option, ConfigError, CheckpointError.
        """
        known = [field for field in TrainConfig.__dataclass_fields__ if field not in OWN]
        check_keywords("trainer", options, known=["model", "tokenizer", "lr", "seed", "teacher", *known])
        info = None
        if not isinstance(model, ModelConfig):
            info, own = open_model(model)
            model, tokenizer = info.model, tokenizer or own
        make_backend, auto = load()
        if options.get("dtype") == "auto":
            options["dtype"] = auto
        self._check_alpha(teacher, options)
        self.train = TrainConfig(steps=1, batch_size=options.get("grad_accum", 1), seq_len=1, lr=lr, **options)
        self.train.validate()
        self.train.check_model(model)
        self.config, self.tokenizer, self.steps_done = model, tokenizer, 0
        self._backend = make_backend(model, self.train)
        self.teacher = teacher_at(teacher, model, tokenizer) if teacher else None
        if self.teacher:
            check_teacher(self.teacher, self.train, self._backend.name)
            self._backend.learn_from(self.teacher.model, self.teacher.weights(self._backend.own), self.teacher.known)
        self._state = self._backend.init(self._weights(info, seed))

    def __repr__(self) -> str:
        device = self._backend.describe()
        return f"Trainer({self.config.num_params():,} parameters, {device.backend} on {device.name}, {self.steps_done} steps done)"

    def step(self, inputs: Any, targets: Any = None, lr: float | None = None) -> dict[str, Any]:
        """One optimizer step; waits for it. inputs, targets: int [B, T], a target of -1 does not count; without targets inputs are
        [B, T + 1] and each token's target is the next one. lr: of this step. Gives loss (nats per token), grad_norm, tokens; with a teacher
        kl and ce, of which the loss is made."""
        batch = self._batch(inputs, targets)
        if self.teacher and batch[0].shape[1] > (most := self.teacher.model.context_length):
            why = f"The teacher {self.teacher.info.path} has a context of {most}."
            raise ConfigError(f"The batch has sequences of {batch[0].shape[1]} tokens.", why, f"Take {most} at the most.")
        self._state, metrics = self._backend.train_step(self._state, *batch, self.train.lr if lr is None else lr)
        self.steps_done += 1
        return self._backend.read(metrics)

    def evaluate(self, inputs: Any, targets: Any = None) -> dict[str, float]:
        """loss (nats per token) and tokens of a batch, without training on it."""
        sums = self._backend.read(self._backend.eval_step(self._state, *self._batch(inputs, targets)))
        return {"loss": sums["loss_sum"] / max(sums["tokens"], 1), "tokens": sums["tokens"]}

    def params(self) -> dict[str, np.ndarray]:
        """A copy of the parameters, float32, by their names; with `ema` their averages, with `lora_rank` those of the model that adapters
        were merged into."""
        return {name: np.array(value) for name, value in self._backend.params_of(self._state).items()}

    def save(self, folder: str | os.PathLike) -> Path:
        """Write folder/final with weights, configuration and tokenizer; gives its path, which `load` opens."""
        snapshot = Snapshot(self.steps_done, self.params(), {})
        device, saved = self._backend.describe(), self.tokenizer and SavedTokenizer.of(self.tokenizer)
        about = About(model=self.config, tokenizer=saved, framework={"name": device.backend, **device.versions})
        return write_final(Path(folder), snapshot, about)

    @staticmethod
    def _check_alpha(teacher: str | os.PathLike | None, options: dict[str, Any]) -> None:
        """The share of the teacher, where nothing is said of it. Raises ConfigError for options that nothing would read."""
        if teacher is not None:
            options.setdefault("distill_alpha", ALPHA)
        elif given := [name for name in ("distill_alpha", "distill_temperature") if name in options]:
            raise ConfigError(f"{given[0]} would do nothing.", "It is read with a teacher only.", "Leave it out, or add teacher=PATH.")

    def _weights(self, info: Any, seed: int) -> dict[str, Any]:
        if info is None:
            return initial_params(self.config, seed)
        return info.read() if isinstance(info, Foreign) else read_weights(info, self._backend.own)

    def _batch(self, inputs: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
        """int32 [B, T] both. Raises ConfigError for arrays of other shapes, and tokens that the model does not have."""
        inputs = np.asarray(inputs)
        if targets is None:
            inputs, targets = inputs[..., :-1], inputs[..., 1:]
        targets = np.asarray(targets)
        if inputs.ndim != 2 or inputs.shape != targets.shape or not inputs.size:
            what = f"The batch has inputs {inputs.shape} and targets {targets.shape}."
            raise ConfigError(what, "Both are [sequences, tokens].", "Without targets, give one token more.")
        if inputs.shape[0] % self.train.grad_accum:
            what = f"A batch of {inputs.shape[0]} sequences has no {self.train.grad_accum} equal parts."
            raise ConfigError(what, f"grad_accum is {self.train.grad_accum}.", "Take a multiple of it.")
        if inputs.min() < 0 or max(inputs.max(), targets.max()) >= self.config.vocab_size:
            raise ConfigError(
                "The batch has tokens that the model has not.", f"It has 0 to {self.config.vocab_size - 1}.", "Use its tokenizer."
            )
        return inputs.astype(np.int32), targets.astype(np.int32)
