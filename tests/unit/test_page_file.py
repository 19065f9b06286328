"""The page of `smedjan serve` as a file: what it must not have, that it is installed, its colours. In a browser: tests/e2e/test_page.py."""

import re
import tomllib

from smedjan_common.serving.page import page
from tests.fakes.runs import ROOT


def test_the_page_asks_nobody_else_and_has_no_way_to_make_html():
    text = page().body.decode()
    outside = set(re.findall(r"https?://[a-z][\w.]+", text)) - {"http://www.w3.org"}
    assert not outside, "only the name of SVG's language is an address"
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
        "setHTML",
        "DOMParser",
    ):
        assert sink not in text, sink
    assert not re.findall(r"<[^>]*\son\w+=", text.partition("<script>")[0]), "no handler in an attribute"
    assert re.findall(r"<(script|style|link|img|iframe|object)\b", text.partition("<script>")[0]) == ["link", "style"]


def test_the_page_is_installed_with_the_package():
    assert (
        "serving/page.html" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["smedjan_common"]
    )


def test_colours_have_the_contrast_that_text_needs():
    """4.5 : 1 (WCAG 2, level AA)."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    themes = re.findall(r":root[^{]*\{([^}]*)\}", page().body.decode())[:2]
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme))
        pairs = [(ink, paper) for ink in ("ink", "quiet", "ember", "alarm") for paper in ("paper", "raised", "sunken", "code")]
        for ink, paper in [*pairs, ("ink", "mine"), ("on-ember", "ember")]:
            bright, dim = sorted((light(colours[ink]), light(colours[paper])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, paper)
