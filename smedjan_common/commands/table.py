"""The commands of `smedjan`, by strings: who reads the table imports none of them."""

import importlib
from typing import NamedTuple


class Command(NamedTuple):
    """`module` has `main(argv) -> exit code`; `about` is its line in `smedjan help`; `flags` is the class of its flags, in `module` or as
    MODULE:CLASS."""

    module: str
    about: str
    flags: str = "Flags"

    def flags_class(self) -> type:
        """The dataclass of its flags; imports its module."""
        module, _, name = self.flags.rpartition(":")
        return getattr(importlib.import_module(module or self.module), name)


COMMANDS: dict[str, Command] = {
    "tokenizer": Command("smedjan_common.commands.tokenizer", "train a tokenizer on your text"),
    "prepare": Command("smedjan_common.commands.prepare", "tokenise text into a token file to train on"),
    "import-bpe": Command("smedjan_common.commands.import_bpe", "make tokenizer.json from GPT-2, tiktoken or Hugging Face files"),
    "process": Command("smedjan_common.commands.process", "clean text: separators, normalisation, quality rules, provenance"),
    "dedup": Command("smedjan_common.commands.dedup", "leave out documents that repeat others, exactly or nearly"),
    "mix": Command("smedjan_common.commands.mix", "mix token files by weight into one"),
    "hash": Command("smedjan_common.commands.hash", "fingerprints of texts, tokenizers and token files"),
    "sizes": Command("smedjan_common.commands.sizes", "parameters, FLOPs and memory of every model size", "SizesFlags"),
    "train": Command("smedjan_common.commands.train", "train a model, or go on with a run", "smedjan_common.run.flags:TrainFlags"),
    "sft": Command("smedjan_common.commands.sft", "teach a model to answer, by conversations", "smedjan_common.run.flags:SftFlags"),
    "dpo": Command("smedjan_common.commands.dpo", "teach a model which of two answers is better", "smedjan_common.run.flags:DpoFlags"),
    "merge": Command("smedjan_common.commands.merge", "merge models of one shape, or a run's last checkpoints", "MergeFlags"),
    "grow": Command("smedjan_common.commands.grow", "make a larger model that computes the same", "GrowFlags"),
    "generate": Command("smedjan_common.commands.generate", "continue a text with a trained model", "GenerateFlags"),
    "chat": Command("smedjan_common.commands.chat", "talk with a model in the terminal", "ChatFlags"),
    "serve": Command("smedjan_common.commands.serve", "answer over HTTP as OpenAI's API does", "ServeFlags"),
    "eval": Command("smedjan_common.commands.eval", "measure loss, bits per byte and right answers of a trained model", "EvalFlags"),
    "convert": Command("convert.cli", "to and from Hugging Face, llama.cpp's GGUF, PEFT and mlx-lm"),
    "push": Command("convert.push", "send a model to the Hugging Face Hub"),
    "info": Command("smedjan_common.commands.info", "say what a checkpoint, run, token file or tokenizer is", "InfoFlags"),
    "runs": Command("smedjan_common.commands.runs", "list runs and compare them in numbers", "RunsFlags"),
    "plot": Command("smedjan_common.commands.plot", "draw the loss of one or several runs", "PlotFlags"),
    "track": Command("smedjan_common.commands.track", "replay a run into TensorBoard, W&B, trackio or MLflow", "TrackFlags"),
    "completion": Command("smedjan_common.commands.completion", "what makes the Tab key complete commands and flags", "CompletionFlags"),
    "quickstart": Command(
        "smedjan_common.commands.quickstart", "all of it once, on a small corpus, in about two minutes", "QuickstartFlags"
    ),
}
