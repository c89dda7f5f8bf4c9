"""Small pure functions that build one self-contained HTML page: text is escaped unless it was built here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence


class Html(str):
    """Text that is HTML already. Only functions of this module make it; anything else is escaped where it is used."""

    __slots__ = ()


_VOID = frozenset({"meta", "br", "hr"})


def render(child: object) -> Html:
    """Return a child as HTML: built HTML as it is, anything else escaped."""
    return child if isinstance(child, Html) else Html(html.escape(str(child), quote=True))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element; children and attribute values are escaped unless they are `Html`.

    Parameters
    ----------
    name : str
        Tag name.
    *children : object
    **attributes : object
        A trailing underscore is dropped and others become hyphens: ``class_="x"``, ``aria_label="y"``. None leaves one out.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{render(value)}"' for key, value in attributes.items() if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{join(children)}</{name}>")


def join(children: Iterable[object], separator: str = "") -> Html:
    """Return children one after the other."""
    return Html(separator.join(render(c) for c in children))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, emphasised: Sequence[int] = ()) -> Html:
    """Return a table that scrolls sideways on a narrow screen; the first column heads its row.

    Parameters
    ----------
    header : sequence
    rows : iterable of sequence
    emphasised : sequence of int
        Numbers of the columns to stress.
    """

    def mark(i: int) -> str | None:
        return "own" if i in emphasised else None

    head = element("tr", *(element("th", h, scope="col", class_=mark(i)) for i, h in enumerate(header)))
    body = [
        element("tr", *(element("td", v, class_=mark(i)) if i else element("th", v, scope="row") for i, v in enumerate(row)))
        for row in rows
    ]
    inner = element("table", element("thead", head), element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex="0")


def inline_svg(document: str, prefix: str, title: str, colours: Mapping[str, str]) -> Html:
    """Return an SVG document as an element of a page, with nothing left that names another address.

    The XML declaration, document type, metadata, namespaces and fixed size are dropped; ids get a prefix, so that several figures
    can share a page; the figure's colours become the page's variables, so that they follow its light and dark.

    Parameters
    ----------
    document : str
        An SVG document written by matplotlib.
    prefix : str
        Of letters and digits; unique in the page.
    title : str
        What a screen reader says.
    colours : mapping of str to str
        Name of a variable to the hexadecimal colour it replaces.
    """
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    start, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', start)
    view = f" {box.group(0)}" if box else ""
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', rest)
    rest = rest.replace("url(#", f"url(#{prefix}-")
    for name, colour in colours.items():
        rest = re.sub(re.escape(colour), f"var(--{name})", rest, flags=re.IGNORECASE)
    return Html(f'<svg{view} role="img" aria-label="{html.escape(title, quote=True)}">{rest.strip()}')


def page(title: str, style: str, *children: object) -> Html:
    """Return a whole document in one file: its style inside, nothing fetched, no script.

    Parameters
    ----------
    title : str
    style : str
        CSS.
    *children : object
        Of the main element.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    document = element("html", head, element("body", element("main", *children)), lang="en")
    return Html(f"<!doctype html>\n{document}\n")
