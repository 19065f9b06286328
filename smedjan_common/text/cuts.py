"""Where text may be cut: safe cuts, at which every pattern of the tokenizer's table ends a word whatever stands on either side."""

import re

_SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\w)")


def safe_cut(text: str, start: int) -> int | None:
    """The first safe cut at or after `start`, None when there is none; valid for the patterns of the table."""
    found = _SAFE_CUT.search(text, start)
    return found.start() if found else None


def last_safe_cut(text: str, window: int = 1 << 14) -> int | None:
    """A safe cut near the end of `text` (the last one of the last `window` characters that hold any), None when there is none."""
    end = len(text)
    while end > 0:
        start = max(0, end - window)
        cuts = [match.start() for match in _SAFE_CUT.finditer(text, start, end)]
        if cuts and cuts[-1] > 0:
            return cuts[-1]
        end = start
    return None


def mend_surrogates(text: str) -> str:
    """Surrogate pairs joined, lone surrogates as U+FFFD: what can be written as UTF-8; other text unchanged."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
