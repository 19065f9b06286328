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


def cell(row: Row, field: str, scale: float, shown: str) -> str:
    """A field of a row over `scale`, as `shown` formats it; or why it is not there."""
    if field in row and row[field] / scale >= 1000:
        shown = "{:,.0f}"  # three digits would be 1.23e+03
    return shown.format(row[field] / scale) if field in row else "out of memory" if "memory" in row.get("error", "").lower() else "-"


def gib(value: int | None) -> str:
    """Bytes in GiB."""
    return "-" if value is None else f"{value / 2**30:.1f}"


def thousands(value: int) -> str:
    """A length: 8192 is 8k."""
    return f"{value // 1024}k" if value >= 1024 else str(value)
