"""`smedjan hash`: what identifies tokenizers, token files and texts, and whether a token file is what its manifest says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smedjan_common import errors
from smedjan_common.command_line import parse
from smedjan_common.errors import DataError
from smedjan_common.remote.address import Address, is_remote, shown


@dataclass(frozen=True)
class Flags:
    """Print the hash of files: for a tokenizer.json of what determines its ids, for a token file its SHA-256, once checked."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...", help_behavior_hint="(required)")]
    """Tokenizers, token files, or any other files (SHA-256 of the content)."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code, 2 if a token file is not what its manifest says."""
    flags = parse(Flags, "smedjan hash", argv, "smedjan hash train.bin", "smedjan hash tokenizer.json my.txt")
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    if not flags.files:
        raise DataError("No file was given.", "", "Name one or more files: smedjan hash train.bin.")
    for path in flags.files:
        print(f"{hash_of(path)}  {shown(path) if is_remote(path) else path}")
    return 0


def hash_of(path: str) -> str:
    """The hash by which checkpoints and manifests know the file."""
    from smedjan_common.data.token_file import TokenFile, manifest_path
    from smedjan_common.files.hashing import file_hash
    from smedjan_common.tokenizer import Tokenizer

    if is_remote(path):
        return _hash_there(path)
    if Path(path).is_dir():
        fix = "Name the files in it; `smedjan info PATH --verify` compares those of a checkpoint with their hashes."
        raise errors.DataError(f"{path!r} is a directory.", "Only files have a hash.", fix)
    if manifest_path(Path(path)).is_file():
        file = TokenFile.open(path)
        file.verify()
        return file.hash
    if path.endswith(".json"):
        try:
            return Tokenizer.load(path).hash
        except errors.DataError:
            pass  # some other JSON
    return file_hash(path)


def _hash_there(url: str) -> str:
    """Of an object; a token file is brought to the cache, whose hashes are compared on the way."""
    from smedjan_common.data.token_file import TokenFile
    from smedjan_common.files.hashing import rest_hash
    from smedjan_common.remote.reading import open_remote

    if url.endswith(".bin"):
        file = TokenFile.open(url)
        file.verify()
        return file.hash
    with open_remote(Address(url)) as file:
        return rest_hash(file)
