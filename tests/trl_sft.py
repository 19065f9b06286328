"""Makes tests/fixtures/sft-trl.json: the first step of TRL's SFTTrainer on the model and the conversations of tests/fakes/trl.py.

    pip install --no-deps --target DIR trl==1.16.0 accelerate==1.15.0          (beside torch, transformers and datasets)
    PYTHONPATH=DIR:. python -m tests.trl_sft > tests/fixtures/sft-trl.json

The step has four conversations, in batches of 4, 2 and 1 that are accumulated. Tokens and what of them is trained are transformers' own, by
a ChatML with its markers.
"""

import contextlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from convert.cli import main as convert
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, write_final
from tests.fakes.trl import MARKED, MESSAGES, MODEL, params, tokenizer

SPLITS = ((4, 1), (2, 2), (1, 4))  # conversations of a batch, batches of the step


def exported(folder: Path) -> Path:
    """The model as transformers reads it."""
    about = About(model=MODEL, tokenizer=SavedTokenizer.of(tokenizer()), framework={"name": "numpy"})
    write_final(folder, Snapshot(0, params(), {}), about)
    with contextlib.redirect_stdout(sys.stderr):
        assert not convert([str(folder / "final"), str(folder / "hf"), "--to", "hf"])
    return folder / "hf"


def step(model: Path, batch: int, parts: int) -> dict[str, float]:
    """Loss and norm of the gradients of the first step."""
    speaks = AutoTokenizer.from_pretrained(model)
    speaks.chat_template = MARKED
    speaks.pad_token = speaks.pad_token or "<|im_end|>"
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            learning_rate=1e-9,
            max_grad_norm=1e9,
            assistant_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            max_length=None,
        )
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        data = datasets.Dataset.from_list([{"messages": talk} for talk in MESSAGES])
        trainer = SFTTrainer(model=whole, args=config, train_dataset=data, processing_class=speaks)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        row = next(row for row in trainer.state.log_history if "grad_norm" in row)
    return {"batch": batch, "parts": parts, "loss": float(row["loss"]), "grad_norm": float(row["grad_norm"])}


def masks(model: Path) -> list[dict[str, list[int]]]:
    """Tokens of the conversations, and 1 where one is trained."""
    speaks = AutoTokenizer.from_pretrained(model)
    found = speaks.apply_chat_template(
        MESSAGES, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    return [{"ids": ids, "trained": mask} for ids, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = exported(Path(folder))
        made = {
            "versions": {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch", "accelerate")},
            "talks": masks(model),
            "steps": [step(model, *split) for split in SPLITS],
        }
    print(json.dumps(made))


if __name__ == "__main__":
    main()
