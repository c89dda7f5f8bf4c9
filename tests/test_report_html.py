"""Pages: whatever text goes in comes out as text, and nothing in the page names another address."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from hfdtl_bayes.report.figures import PALETTE, figure_svg
from hfdtl_bayes.report.html import Html, element, inline_svg, join, page, table

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=http://example.org/x onerror=1>"
# HTML has no way to write these, and a parser turns a carriage return into a line feed.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80)


class Outline(HTMLParser):
    """Elements and text as a parser sees them."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@given(TEXT, TEXT)
def test_text_and_attributes_survive_a_parser(words: str, attribute: str) -> None:
    outline = Outline(element("p", words, title=attribute))
    assert outline.tags == [("p", {"title": attribute})]
    assert "".join(outline.words) == words


def test_hostile_text_makes_no_element() -> None:
    outline = Outline(table(["a", HOSTILE], [[HOSTILE, HOSTILE]]))
    assert {tag for tag, _ in outline.tags} == {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert outline.words.count(HOSTILE) == 3
    assert not outline.open


def test_built_html_is_not_escaped_twice() -> None:
    inner = element("b", "a < b")
    assert element("p", inner, "&") == "<p><b>a &lt; b</b>&amp;</p>"
    assert join([inner, "<"], " ") == "<b>a &lt; b</b> &lt;"
    assert isinstance(inner, Html)


def test_attributes() -> None:
    assert element("meta", name="x", charset=None) == '<meta name="x">'
    assert element("div", class_="a", aria_label='"') == '<div class="a" aria-label="&quot;"></div>'


def test_first_column_heads_its_row_and_a_column_can_be_stressed() -> None:
    found = table(["regime", "own"], [["low", 1]], emphasised=[1])
    assert '<th scope="row">low</th><td class="own">1</td>' in found
    assert '<th scope="col" class="own">own</th>' in found


def drawing(words: str) -> str:
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 5], "o-", color=PALETTE["blue"], label=words)
    axes.axvspan(0, 0.5, color=PALETTE["line"])
    axes.set_xlim(0.1, 0.6)
    axes.legend()
    return figure_svg(figure)


@pytest.fixture(scope="module")
def two_drawings() -> str:
    return page("two", "p{}", *(inline_svg(drawing(HOSTILE), f"d{i}", HOSTILE, PALETTE) for i in range(2)))


def test_an_embedded_figure_names_no_address(two_drawings: str) -> None:
    outline = Outline(two_drawings)
    assert not outline.open
    for tag, attributes in outline.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "metadata"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name in {"title", "aria-label"} or "://" not in (value or "")


def test_two_figures_share_a_page(two_drawings: str) -> None:
    outline = Outline(two_drawings)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids)) > 10
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', two_drawings))
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_a_figure_takes_the_colours_of_its_page(two_drawings: str) -> None:
    assert "var(--blue)" in two_drawings
    assert PALETTE["blue"] not in two_drawings


def test_a_figure_fits_any_width(two_drawings: str) -> None:
    starts = re.findall(r"<svg[^>]*>", two_drawings)
    assert len(starts) == 2
    assert all("viewBox" in s and "width" not in s and 'role="img"' in s for s in starts)
