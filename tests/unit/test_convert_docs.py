"""The table of families in docs/convert.md is the code's."""

import re
from pathlib import Path

from convert.families import FAMILIES
from convert.gguf_forms import FORMS

PAGE = (Path(__file__).parents[2] / "docs/convert.md").read_text()


def test_the_table_has_every_family_and_where_it_goes_in_gguf():
    rows = re.search(r"\| `model_type` \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE)
    assert rows
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]
    table = {kind.strip("`"): re.findall("`(.+?)`", forms) for kind, forms, _ in cells}
    assert table == {kind: [name for name, form in FORMS.items() if kind in form.families] for kind in FAMILIES}
