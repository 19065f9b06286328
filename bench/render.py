"""Fills the generated parts of the documentation and draws its pictures from the files in bench/results.

    python -m bench.render

A generated part stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` and is made by the function NAME of PARTS; the prose around
is kept. A part without results stays as it is. Each device has its own result files; those of an accelerator come first.
"""

import re
from collections.abc import Callable

from bench import cost_tables, equivalence_tables, inference_tables, mixer_tables, scale_tables, speed_tables
from bench.rows import ROOT
from bench.tables import newest

DOCS, IMAGES = ROOT / "docs", ROOT / "docs" / "images"
PAGES = ("checkpoints.md", "convert.md", "equivalence.md", "generate.md", "mixers.md", "performance.md", "scale.md", "training.md")


def main() -> None:
    """Write the pages and the pictures."""
    from bench import pictures

    for page in PAGES:
        path = DOCS / page
        path.write_text(rendered(path.read_text()))
    IMAGES.mkdir(exist_ok=True)
    for name, found in (
        ("equivalence", equivalence_tables.conformance()),
        *((name, newest(name)) for name in ("learning", "mixers", "curves")),
    ):
        if found:
            getattr(pictures, name)(found, IMAGES / f"{name}.png")


def rendered(text: str) -> str:
    """A page with its generated parts made anew."""

    def fill(match: re.Match) -> str:
        content = PARTS[match[1]]()
        return match[0] if content is None else f"<!-- bench:{match[1]} -->\n{content}\n<!-- /bench:{match[1]} -->"

    return re.sub(r"<!-- bench:([\w-]+) -->\n.*?<!-- /bench:\1 -->", fill, text, flags=re.DOTALL)


PARTS: dict[str, Callable[[], str | None]] = {
    **equivalence_tables.PARTS,
    **mixer_tables.PARTS,
    **cost_tables.PARTS,
    **inference_tables.PARTS,
    **speed_tables.PARTS,
    **scale_tables.PARTS,
}

if __name__ == "__main__":
    main()
