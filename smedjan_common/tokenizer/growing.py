"""A tokenizer with special tokens added: the old ids stay what they were, the new names come after the last of them."""

import dataclasses
from collections.abc import Sequence

from smedjan_common.errors import DataError
from smedjan_common.tokenizer.tokenizer import Tokenizer


def grown(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with those of the special tokens `names` appended that it lacks. Raises DataError where it takes none."""
    if not isinstance(tokenizer, Tokenizer):  # but a LibraryTokenizer, which stands for one
        what = f"The tokenizer has no {names[0]}, and none can be added to it."
        raise DataError(what, "It is of another kind than smedjan's byte-level BPE.", "Name a template of its own tokens: --template FILE.")
    vocabulary, first = tokenizer.vocabulary, tokenizer.vocab_size
    lacking = [name for name in names if name not in vocabulary.specials]
    specials = vocabulary.specials | {name: first + number for number, name in enumerate(lacking)}
    made = Tokenizer(dataclasses.replace(vocabulary, specials=specials))
    made.chat, made.ends = tokenizer.chat, tokenizer.ends
    return made


def extends(new: Tokenizer, old: Tokenizer) -> bool:
    """Whether `new` is `old`, or `old` with special tokens appended: weights of the one are weights of the other, and a few more rows."""
    if new.hash == old.hash:
        return True
    if not isinstance(new, Tokenizer) or not isinstance(old, Tokenizer):
        return False
    added = new.special_tokens.keys() - old.special_tokens.keys()
    kept = {name: number for name, number in new.special_tokens.items() if name not in added}
    same = dataclasses.replace(new.vocabulary, specials=kept).hash == old.hash
    return same and all(new.special_tokens[name] >= old.vocab_size for name in added)
