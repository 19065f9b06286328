"""`smedjan push RUN OWNER/NAME`: a run as a model on the Hugging Face Hub, private unless it is told otherwise."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from smedjan_common import errors
from smedjan_common.command_line import parse
from smedjan_common.optional import MaybeStr


@dataclass(frozen=True)
class Flags:
    """Send a model to the Hugging Face Hub, as transformers and mlx-lm read it, with a card. It is private unless --public is given."""

    src: Annotated[Positional[str], arg(metavar="RUN")]
    """A run folder (its newest weights), or a checkpoint in one: step-*/ or final/."""
    name: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """The model on the Hub; it is made where there is none."""
    dtype: Annotated[str, arg(metavar="float32|bfloat16|float16")] = "bfloat16"
    """Precision of the weights that are sent."""
    license: Annotated[MaybeStr, arg(metavar="NAME", help_behavior_hint="")] = None
    """The licence of the weights, as the Hub names it: apache-2.0, mit …"""
    public: Annotated[bool, FlagCreatePairsOff] = False
    """Everybody may see it. Without it a new model is private."""
    dry_run: Annotated[bool, FlagCreatePairsOff] = False
    """Show the card and the files, send nothing."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        Flags,
        "smedjan push",
        argv,
        "smedjan push runs/mine me/mine --license apache-2.0",
        "smedjan push runs/mine/final me/mine --public --dtype float32",
    )
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from convert import hf_export, hub
    from convert.card import card
    from convert.formats import FLOATS, FORMATS, dtype_name
    from convert.neutral import read
    from smedjan_common.reporting.progress import progress_bar

    repository = hub.parse(hub.SCHEME + flags.name)
    package = hub.package()
    dtype = FLOATS[dtype_name(flags.dtype, FORMATS["hf"])]
    model = read(Path(flags.src))
    with tempfile.TemporaryDirectory(prefix="smedjan-push-") as parent:
        folder = Path(parent) / "model"
        with progress_bar() as show:
            notes = hf_export.write(model, folder, dtype, 5_000_000_000, show)
        (folder / "README.md").write_text(card(model, repository.name, flags.license), encoding="utf-8")
        for note in (*model.notes, *notes):
            print(f"note: {note}")
        if flags.dry_run:
            print((folder / "README.md").read_text(encoding="utf-8"))
            for file in sorted(folder.iterdir()):
                print(f"{file.stat().st_size / 1e6:12,.1f} MB  {file.name}")
            return 0
        print(_send(package, hub, repository, folder, flags.public))
    return 0


def _send(package: Any, hub: Any, repository: Any, folder: Path, public: bool) -> str:
    """Make the model where there is none, and send the files in one commit; where it is then."""
    api = package.HfApi()
    with hub.explained(repository):
        made = api.create_repo(repository.name, private=not public, exist_ok=True)
        sent = api.upload_folder(repo_id=repository.name, folder_path=folder, commit_message="A model trained with smedjan")
    seen = "public" if public else "private, unless it was there and public"
    return f"{made}: {len(list(folder.iterdir()))} files, commit {sent.oid[:12]}, {seen}"
