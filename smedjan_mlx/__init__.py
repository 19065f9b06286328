"""The MLX backend (Apple Silicon; CUDA and CPU on Linux)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from smedjan_common.inference.language_model import LanguageModel
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.run.trainer import Trainer
    from smedjan_common.tokenizer import Tokenizer


def load(
    path: "str | os.PathLike",
    dtype: str | None = None,
    *,
    draft: "str | os.PathLike | None" = None,
    draft_tokens: int | None = None,
    ema: bool = False,
) -> "LanguageModel":
    """A trained model to use: a run folder, a checkpoint in it, or a Hugging Face directory. docs/python.md has examples.

    dtype: "float32" (None too), "bfloat16", or "auto": what is fastest on the device. draft: a smaller model of the same tokenizer, which
    guesses `draft_tokens` tokens ahead (None: 4); texts stay what they are. ema: the average of the weights that a step of a run with
    --ema keeps. Raises SmedjanError, in three sentences, for what is no model,
    cannot be read by this backend, or does not fit into memory.
    """
    from smedjan_common.commands.backends import check_installed
    from smedjan_common.inference.language_model import LanguageModel
    from smedjan_mlx.generate import load as framework

    check_installed("mlx")
    return LanguageModel(path, "mlx", framework, dtype or "float32", draft, draft_tokens, ema)


def fit(**flags: Any) -> "LanguageModel":
    """Train as `smedjan train` does, with its flags as keywords: fit(dataset="my.txt", size="tiny", steps=200, checkpoint_dir="runs/mine").

    Gives the trained model. A run that is there goes on. Raises TypeError for an unknown flag, SmedjanError, KeyboardInterrupt.
    """
    from smedjan_common.commands.backends import check_installed
    from smedjan_common.commands.fit import fit as run
    from smedjan_mlx.train import load as framework

    check_installed("mlx")
    return load(run("mlx", framework, flags))


def trainer(
    model: "ModelConfig | str | os.PathLike",
    tokenizer: "Tokenizer | None" = None,
    *,
    lr: float = 1e-3,
    seed: int = 0,
    teacher: "str | os.PathLike | None" = None,
    **options: Any,
) -> "Trainer":
    """Train a step at a time. model: a ModelConfig, or the path of a model to start from; teacher: a run or a checkpoint to learn from
    besides; options: optimizer, weight_decay, clip_norm, dtype and the other fields of TrainConfig."""
    from smedjan_common.commands.backends import check_installed
    from smedjan_common.run.trainer import Trainer
    from smedjan_mlx.train import load as framework

    check_installed("mlx")
    return Trainer(framework, model, tokenizer, lr, seed, teacher, **options)
