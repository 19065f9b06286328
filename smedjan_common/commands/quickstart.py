"""`smedjan quickstart` (`make train`): the whole way once, in about two minutes: text, tokenizer, token files, a tiny model, a sample.
With `--chat` (`make chat`) the model is then taught to answer, in another minute.

It runs the commands that a user would, and shows each. What is there already is not made again, so it resumes, or says it is done.
"""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from tyro.conf import arg

from smedjan_common.command_line import parse
from smedjan_common.errors import SmedjanError, run_command
from smedjan_common.files.names import DATA, FINAL, MANIFEST, QUICKSTART, TOKENIZER, TRAIN_TOKENS, VAL_TOKENS

VOCAB_SIZE, VAL_FRACTION = 2048, 0.03
CHATS = "chats.jsonl"
STEPS = 320  # on 2 quiet cores about 45 s with JAX, 100 s with MLX, whose exp on a CPU is slow
TRAINING = "--size tiny --batch-size 8 --seq-len 128 --eval-batches 8 --log-every 20"
PROMPTS = {"shakespeare": "**ROMEO**  \n", "python-stdlib": "def "}
# as often as it takes to know the answers by heart: no model of this size and so little text learns more from them
TEACHING = "--batch-size 8 --seq-len 128 --lr 4e-3 --log-every 20"
TEACHING_STEPS = 500
GENERATION = "--max-tokens 120 --temperature 0.8 --top-p 0.95"


@dataclass(frozen=True)
class QuickstartFlags:
    """Run everything once on a small corpus (the plays of Shakespeare, or Python's standard library), in about two minutes."""

    checkpoint_dir: Annotated[str, arg(metavar="DIR")] = "runs/quickstart"
    """Where everything is written."""
    backend: Annotated[str, arg(metavar="auto|jax|mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""
    steps: int = STEPS
    """Optimizer steps; more steps make a better model."""
    chat: bool = False
    """Then teach it to answer, by some hundred short conversations, in DIR-chat."""
    chat_steps: Annotated[int, arg(metavar="N")] = TEACHING_STEPS
    """Optimizer steps of that."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        QuickstartFlags, "smedjan quickstart", argv, "smedjan quickstart", "smedjan quickstart --steps 1000 --checkpoint-dir runs/longer"
    )
    return run_command(lambda: _quickstart(flags))


def _quickstart(flags: QuickstartFlags) -> int:
    from smedjan_common.commands.backends import check_installed, choose
    from smedjan_common.run.claim import check_folder

    backend = choose(["--backend", flags.backend])
    check_installed(backend)
    folder = Path(flags.checkpoint_dir)
    check_folder(folder)
    write_corpus(data_folder(folder))
    for made, command in commands(data_folder(folder), folder, backend, flags.steps):
        if made is not None and made.exists():
            continue
        if code := _smedjan(command):
            return code
    sample = _sample(folder, backend)
    print(f"\n{sample.rstrip()}\n")
    print(summary(folder, backend))
    return _teach(folder, backend, flags.chat_steps) if flags.chat else 0


def _teach(folder: Path, backend: str, steps: int) -> int:
    """The model that answers, in the folder beside."""
    from smedjan_common.run.claim import check_folder

    taught = folder.with_name(f"{folder.name}-chat")
    check_folder(taught)
    write_chats(data_folder(taught))
    chats, kinds = str(data_folder(taught) / CHATS), ["--backend", backend, "--steps", str(steps), *TEACHING.split()]
    if code := _smedjan(["sft", "--dataset", chats, "--pretrained", str(folder), "--checkpoint-dir", str(taught), *kinds]):
        return code
    print("\n".join(("\nTalk to it; it knows its answers by heart, and nothing else:", *activation(), f"  smedjan chat {taught}")))
    return 0


def data_folder(folder: Path) -> Path:
    """Where corpus, tokenizer and token files of the run in `folder` go."""
    return folder / DATA / QUICKSTART


def write_corpus(folder: Path) -> None:
    """Write corpus.jsonl, a document a line, unless it is there."""
    from smedjan_common.files.atomic_file import write_atomically
    from smedjan_common.text.corpus import default_corpus

    target = folder / "corpus.jsonl"
    if not target.exists():
        corpus = default_corpus()
        print(f"corpus: {corpus.description} -> {target}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": path.read_text(encoding="utf-8"), "source": path.name}) for path in corpus.paths)
        write_atomically(target, ("\n".join(lines) + "\n").encode())


def write_chats(folder: Path) -> None:
    """Write chats.jsonl, a conversation a line, unless it is there."""
    from smedjan_common.files.atomic_file import write_atomically
    from smedjan_common.text.chat_corpus import PACKAGE, chat_corpus

    target = folder / CHATS
    if target.exists():
        return
    talks = chat_corpus()
    print(f"\nconversations: {len(talks)} short ones (package {PACKAGE}) -> {target}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(talk)] for talk in talks]
    write_atomically(target, "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows).encode())


def commands(data: Path, folder: Path, backend: str, steps: int) -> list[tuple[Path | None, list[str]]]:
    """(what a command makes, the command): it is run unless that is there. data: where the corpus is."""
    text, tokenizer, train, val = (str(data / name) for name in ("corpus.jsonl", TOKENIZER, TRAIN_TOKENS, VAL_TOKENS))
    tokenising = ["--input", text, "--tokenizer", tokenizer, "--output", train, "--val-output", val, "--val-fraction", str(VAL_FRACTION)]
    training = [
        "--backend",
        backend,
        "--dataset",
        train,
        "--val-dataset",
        val,
        "--checkpoint-dir",
        str(folder),
        "--steps",
        str(steps),
        *TRAINING.split(),
    ]
    return [
        (Path(tokenizer), ["tokenizer", "--input", text, "--vocab-size", str(VOCAB_SIZE), "--output", tokenizer]),
        (Path(f"{val}.json"), ["prepare", *tokenising]),
        (None, ["train", *training]),
    ]


def _sample(folder: Path, backend: str) -> str:
    """A sample of the trained model, kept in sample.txt."""
    from smedjan_common.text.corpus import default_corpus

    target = folder / "sample.txt"
    prompt = PROMPTS[default_corpus().name]
    command = ["generate", "--backend", backend, "--checkpoint", str(folder), "--prompt", prompt, *GENERATION.split()]
    if not target.exists() or target.stat().st_mtime < (folder / FINAL / MANIFEST).stat().st_mtime:
        done = _smedjan(command, capture=True)
        target.write_text(done, encoding="utf-8")
    return target.read_text(encoding="utf-8")


def _smedjan(command: list[str], capture: bool = False) -> Any:
    """Show and run a command of smedjan; returns its exit code, or what it prints."""
    print(f"\n$ smedjan {shlex.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "smedjan_common.cli", *command], stdout=subprocess.PIPE if capture else None, text=True, encoding="utf-8"
    )

    def pass_on(number: int, _: FrameType | None) -> None:
        """Ctrl-C reaches the command by itself; SIGTERM comes to this process alone. Either way the command decides."""
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        output, _ = process.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = 128 - process.returncode if process.returncode < 0 else process.returncode
    if not capture:
        return code
    if code:
        raise SmedjanError(f"`smedjan {command[0]}` ended with {code}.", "", "See its message above.")
    return output


def summary(folder: Path, backend: str) -> str:
    """First and last loss and bits per byte, where things are, and what to try next."""
    from smedjan_common.data.token_file import TokenFile
    from smedjan_common.reporting.metrics import eval_rows, read_rows, train_rows

    rows, data = read_rows(folder), TokenFile.open(data_folder(folder) / TRAIN_TOKENS)
    train, checks = train_rows(rows), eval_rows(rows)
    per_byte = data.num_tokens / data.num_bytes / math.log(2) if data.num_bytes else math.nan
    first, last, check = train[0]["loss"], train[-1]["loss"], checks[-1]
    other, more = "mlx" if backend == "jax" else "jax", f"smedjan train --checkpoint-dir {folder} --steps {2 * train[-1]['step']}"
    tries = (
        (f'smedjan generate {folder} "To be, or not" --temperature 0.7', "another text"),
        (f"smedjan chat {folder}", "write a text together"),
        (more, "goes on"),
        (f"{more} --backend {other}", "goes on in the other framework"),
        ("smedjan train YOUR.txt --size small --checkpoint-dir runs/mine", "your own text"),
        ("smedjan sizes", "the models that there are"),
    )
    width = max(len(command) for command, _ in tries)
    next_commands = "\n".join([*activation(), *(f"  {command:{width}}   {what}" for command, what in tries)])
    return f"""first loss {first:.3f} ({first * per_byte:.3f} bits per byte)
last loss  {last:.3f} ({last * per_byte:.3f} bits per byte)
on held-out text {check["val_loss"]:.3f} ({check["val_bits_per_byte"]:.3f} bits per byte)

In {folder}: step-*/ (checkpoints), final/ (the model), metrics.jsonl, loss.png, sample.txt
In {data_folder(folder)}: corpus.jsonl, tokenizer.json, train.bin, val.bin

Try next:
{next_commands}"""


def activation() -> list[str]:
    """The command that makes the shell find `smedjan`, where it does not: `make train` runs it by its path."""
    place = Path(sys.executable).parent
    return [] if shutil.which("smedjan") or not (place / "activate").is_file() else [f"  source {os.path.relpath(place)}/activate"]
