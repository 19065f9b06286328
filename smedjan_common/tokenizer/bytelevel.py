"""The byte alphabet of `tokenizer.json`: each of the 256 bytes written as one printable character (GPT-2, Radford et al. 2019).

A byte that Latin-1 prints as a visible character is written as that character; the other 68, in order, as U+0100, U+0101, …
"""

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in set(_VISIBLE)]

BYTE_TO_CHAR: dict[int, str] = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_HIDDEN)}
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}

# Which byte each of the first 256 ids stands for. "gpt2" ranks the characters above, as GPT-2 and `tokenizers` do; "raw" is the
# byte itself, as tiktoken-style trainers do. The order also decides ties between equally frequent pairs.
BYTE_ORDERS: dict[str, list[int]] = {
    "gpt2": sorted(range(256), key=BYTE_TO_CHAR.__getitem__),
    "raw": list(range(256)),
}


def to_chars(token: bytes) -> str:
    """The token as `tokenizer.json` writes it."""
    return "".join(map(BYTE_TO_CHAR.__getitem__, token))


def to_bytes(chars: str) -> bytes:
    """The token's bytes from how `tokenizer.json` writes it; KeyError at a character that is not of the alphabet."""
    return bytes(map(CHAR_TO_BYTE.__getitem__, chars))
