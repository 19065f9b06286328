"""The table of formats: how each is recognised, read and written. A new format is a file beside this one and a row here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from convert import gguf_file, gguf_import, hf_export, hf_import, neutral, orbax, quantized
from convert.portable import Portable
from smedjan_common.checkpoint.lazy import Show
from smedjan_common.checkpoint.manifest import ARRAYS
from smedjan_common.errors import CheckpointError, ConfigError, unknown
from smedjan_common.files.names import CHAT_TEMPLATE, GENERATION_CONFIG, MANIFEST, OPTIMIZER, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from smedjan_common.nearby import beside

FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
DTYPES = (*FLOATS, "q8_0")
_SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Options:
    """What a writer is told beside the model: a name of DTYPES, the bytes of a shard at most, the bits of a quantised weight."""

    dtype: str = "float32"
    max_shard_bytes: int = 5_000_000_000
    bits: int = 8


@dataclass(frozen=True)
class Format:
    """detect(path): whether it is this. write(model, path, options, show) -> notes.

    parts: patterns of the names in a directory that `write` makes; none where it makes a file.
    """

    name: str
    about: str
    dtypes: tuple[str, ...]
    detect: Callable[[Path], bool]
    read: Callable[[Path], Portable]
    write: Callable[[Portable, Path, Options, Show], list[str]]
    parts: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "neutral",
            "smedjan's own checkpoint",
            ("float32",),
            neutral.detect,
            neutral.read,
            lambda model, path, options, show: neutral.write(model, path, show),
            (MANIFEST, WEIGHTS, OPTIMIZER, TOKENIZER, CHAT_TEMPLATE, TOKENIZER_CONFIG, GENERATION_CONFIG),
        ),
        Format(
            "orbax",
            "JAX's own checkpoint",
            ("float32",),
            orbax.detect,
            orbax.read,
            lambda model, path, options, show: orbax.write(model, path, show),
            (MANIFEST, ARRAYS, TOKENIZER, CHAT_TEMPLATE, TOKENIZER_CONFIG, GENERATION_CONFIG),
        ),
        Format(  # before hf: it is recognised by more
            "quantized",
            "a quantised model of smedjan or mlx-lm",
            ("float32",),
            quantized.detect,
            quantized.read,
            lambda model, path, options, show: quantized.write(model, path, options.bits, options.max_shard_bytes, show),
            hf_export.PARTS,
        ),
        Format(
            "hf",
            "a Hugging Face directory of the Llama family",
            tuple(FLOATS),
            hf_import.detect,
            hf_import.read,
            lambda model, path, options, show: hf_export.write(model, path, FLOATS[options.dtype], options.max_shard_bytes, show),
            hf_export.PARTS,
        ),
        Format(
            "gguf",
            "llama.cpp's file",
            DTYPES,
            gguf_file.detect,
            gguf_import.read,
            lambda model, path, options, show: gguf_file.write(model, path, options.dtype, show),
        ),
    )
}


def source_format(path: Path) -> Format:
    """The format of what stands at `path`. Raises CheckpointError when it is none that can be read."""
    if not path.exists():
        raise CheckpointError(f"There is no {path}.", beside(path) or "Nothing exists at that path.", "Check the path.")
    row = next((row for row in FORMATS.values() if row.detect(path)), FORMATS["hf"] if hf_import.is_damaged(path) else None)
    readable = ", ".join(f"{known.name} ({known.about})" for known in FORMATS.values())
    if row is None:
        more = "A single file is not a model: give the directory that contains it." if path.is_file() else "Check the path."
        raise CheckpointError(f"The format of {path} is not recognised.", f"Readable formats: {readable}.", more)
    return row


def dtype_name(text: str, target: Format) -> str:
    """The full name of a dtype that `target` can hold. Raises ConfigError."""
    name = _SHORT.get(text.lower(), text.lower())
    if name not in DTYPES:
        raise unknown("--dtype", text, DTYPES)
    if name not in target.dtypes:
        fix = f"Take --dtype {' or '.join(target.dtypes)}."
        raise ConfigError(f"--dtype {name} does not fit --to {target.name}.", f"It holds {', '.join(target.dtypes)}.", fix)
    return name
