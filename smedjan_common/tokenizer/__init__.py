"""Byte-level BPE: train, encode, decode, import, export. `from smedjan_common.tokenizer import Tokenizer`."""

from smedjan_common.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
