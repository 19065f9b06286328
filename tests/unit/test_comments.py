"""What comments and docstrings send a reader to."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("smedjan_common", "smedjan_jax", "smedjan_mlx", "convert", "bench", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def cited(text: str) -> set[str]:
    """Pages named in capitals, README.md say."""
    return set(re.findall(r"\b[A-Z]{4,}\.md\b", text))


def test_a_page_that_a_source_file_names_is_in_the_project():
    names = {str(path.relative_to(ROOT)): cited(path.read_text(encoding="utf-8")) for path in SOURCES}
    missing = {file: gone for file, found in names.items() if (gone := {name for name in found if not (ROOT / name).is_file()})}
    assert not missing


def test_a_page_that_is_named_is_found():
    nowhere = "NOWHERE" + ".md"
    assert cited(f"as fast (see README.md, docs/mixers.md and {nowhere})") == {"README.md", nowhere}
