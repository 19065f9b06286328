"""Result files and Markdown tables, for the generated parts of the documentation."""

import json

from bench.rows import RESULTS, Row


def reports(name: str) -> dict[str, Row]:
    """Device -> result file, accelerators first."""
    found = {path.stem.removeprefix(f"{name}-"): json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[0] == "cpu"))


def newest(name: str) -> Row | None:
    """The result file of the best device."""
    return next(iter(reports(name).values()), None)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
