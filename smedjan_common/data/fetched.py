"""A token file at an address, brought to the cache of this machine: a run maps its tokens, which only a file lets it.

    CACHE/tokens/KEY/train.bin  .offsets  .mask  tokenizer.json  train.bin.json    KEY: of the manifest, so other tokens never mix

The manifest comes first and is written last: where it stands in the cache, all the rest was there whole, with the hashes that it says.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from smedjan_common.errors import DataError, notice
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.files.names import TOKENIZER
from smedjan_common.remote.address import Address
from smedjan_common.remote.cache import cache_folder
from smedjan_common.remote.download import download
from smedjan_common.remote.store import Place

SUFFIXES = {"": "sha256", ".offsets": "offsets_sha256", ".mask": "mask_sha256"}  # of the files -> where the manifest has their hash
_TELL_FROM = 64 << 20  # bytes; what is smaller comes without a word
_TELL_EVERY = 30.0  # seconds


def fetched(url: str) -> Path:
    """The token file in the cache, where it is the first time brought to. Raises DataError, ConfigError, OSError."""
    place = Place(Address(url))
    try:
        raw = Place(Address(f"{url}.json")).read_all()
    except DataError as error:
        if error.case != "absent":
            raise
        why = "Its manifest, of the same name with .json, is not there."
        raise DataError(f"There is no token file {place}.", why, "Check the address, and that all files of it were sent.") from None
    return bring(place, raw, cache_folder("tokens") / hashlib.sha256(raw).hexdigest()[:24] / place.address.name)


def bring(place: Place, raw: bytes, target: Path) -> Path:
    """The token file of this manifest as `target`, with all that stands beside it. As `fetched` otherwise."""
    url, manifest, own = os.fspath(place.address), _manifest(place, raw), target.with_name(target.name + ".json")
    if own.is_file() and target.is_file():
        return target
    told = _teller(place, target.parent)
    for suffix, key in SUFFIXES.items():
        if suffix != ".mask" or key in manifest:
            _bring(url + suffix, target.with_name(target.name + suffix), manifest.get(key), key in manifest, told)
    for name in _tokenizers(target.name, manifest):
        _bring(os.fspath(place.address.parent / name), target.with_name(name))
    write_atomically(own, raw)
    return target


def _bring(
    url: str, target: Path, sha256: str | None = None, needed: bool = False, told: Callable[[int], None] = lambda done: None
) -> None:
    found = Place(Address(url))
    if needed or found.stat_if_there():
        download(found, target, sha256, told)


def _manifest(place: Place, raw: bytes) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError):
        manifest = json.loads(raw)
        if isinstance(manifest, dict) and isinstance(manifest.get("sha256"), str):
            return manifest
    raise DataError(f"The manifest of {place} cannot be read.", "It is no JSON with the hash of the tokens.", "Send it to the store again.")


def _tokenizers(name: str, manifest: Mapping[str, Any]) -> dict[str, None]:
    """Names that the tokenizer may have beside the token file."""
    recorded = manifest.get("tokenizer")
    own = [PurePath(recorded).name] if isinstance(recorded, str) else []
    return dict.fromkeys([TOKENIZER, f"{name}.tokenizer.json", f"{PurePath(name).stem}.tokenizer.json", *own])


def _teller(place: Place, folder: Path) -> Callable[[int], None]:
    """What says now and then how far a download that takes long is."""
    size, said = place.stat().size or 0, time.monotonic()
    if size >= _TELL_FROM:
        notice(f"bringing {place} ({size / 1e9:,.2f} GB) to {folder}, once.")

    def told(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _TELL_EVERY:
            notice(f"{done / 1e9:,.2f} of {size / 1e9:,.2f} GB of {place} are here.")
            said = time.monotonic()

    return told
