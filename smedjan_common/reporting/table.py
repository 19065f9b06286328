"""Text in two columns, names and words, within the width of the terminal."""

import shutil
import sys
import textwrap

from smedjan_common.streams import is_live

PIPE, LEAST = 80, 40  # columns of what is no terminal, and of the narrowest that is looked at
Line = tuple[str, str]


def as_table(lines: list[Line]) -> str:
    """The lines, their words wrapped under one another; no word, such as a path, is broken, and no command, which is there to be copied."""
    width = max(LEAST, shutil.get_terminal_size().columns if is_live(sys.stdout) else PIPE)
    names = max(len(name) for name, _ in lines) + 1
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * names, break_long_words=False, break_on_hyphens=False)
    whole = (f"{name:<{names}}{words}" for name, words in lines)
    return "\n".join(line if line[names:].startswith("smedjan ") else wrapper.fill(line) for line in whole)
