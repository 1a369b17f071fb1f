"""What every page must be, read back by a parser."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "br", "input"}
FORBIDDEN = {"img", "link", "iframe", "object", "embed"}
"""Elements that would load something, or come from a name that was not escaped."""


class Page(HTMLParser):
    """Fails on a tag that is not closed where it should be; keeps what was opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str, *classes: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a kind that have all these classes."""
        return [a for t, a in self.seen if t == tag and set(classes) <= set((a.get("class") or "").split())]


def checked(html: str) -> Page:
    """A page that is well-formed, loads nothing, draws only finite numbers and can be used without eyes."""
    page = Page(html)
    tags = [tag for tag, _ in page.seen]
    assert not FORBIDDEN & set(tags)
    assert tags.count("h1") == 1
    assert tags.count("title") >= 1
    assert [a["lang"] for tag, a in page.seen if tag == "html"] == ["en"]
    assert any((a.get("content") or "").startswith("default-src 'none'") for a in page.all("meta"))
    for _, attributes in page.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    for style in ("wide", "scroll"):
        for box in page.all("div", style):
            assert box.get("tabindex") == "0", "it can be scrolled by keyboard"
            assert box.get("aria-label")
    for drawn in [*page.all("svg"), *page.all("div", "plot")]:
        assert drawn.get("aria-hidden") or (drawn.get("role") == "img" and drawn.get("aria-label"))
    shown = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    for drawn in re.findall(r"<svg.*?</svg>", shown, re.DOTALL):
        for element in ElementTree.fromstring(drawn).iter():
            for place in ("d", "x", "y", "cx", "cy", "r", "width", "height"):
                numbers = re.findall(r"nan|inf|-?[\d.]+", element.get(place) or "")
                assert all(math.isfinite(float(n)) for n in numbers)
    return page
