"""The frame of every page: one HTML file that loads nothing, and tables in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from voxelscale.files import write_atomic

COLOURS = {
    "page": ("#f6f7f9", "#10151c"),
    "card": ("#ffffff", "#18202a"),
    "ink": ("#1b2330", "#e7edf4"),
    "soft": ("#5d6b7e", "#93a2b5"),
    "rule": ("#e1e6ec", "#2a3542"),
    "s0": ("#0b7a75", "#3fc1b8"),
    "s1": ("#d1495b", "#ff7b89"),
    "s2": ("#5b6ee1", "#94a3ff"),
    "s3": ("#b7791f", "#f0b95b"),
    "s4": ("#8a4fbf", "#cf9dff"),
    "s5": ("#4f6472", "#a9bccb"),
    "accent": ("#0b7a75", "#3fc1b8"),
    "good": ("#2e9e6b", "#52c98f"),
    "bad": ("#d1495b", "#ff7b89"),
    "shade": ("#1b233340", "#000000b0"),
}
"""Colours of pages and charts by CSS variable, light and dark; ``s0`` to ``s5`` are those of lines."""

CLASS_COLOURS = (
    *("#78a5f0", "#b4961e", "#9600ff", "#b42d87", "#695ad2", "#f087a5"),
    *("#00f0ff", "#00784b", "#96f000", "#d2e178", "#696900", "#87a55a"),
)
"""Of classes, over black: at least 24 apart (CIE 1976) for everyone, also as they are seen without one kind
of cone (Machado, Oliveira and Fernandes, IEEE TVCG 15, 2009); the first ones farthest."""

LIGHT = {name: light for name, (light, _) in COLOURS.items()}
"""The colours of a light page."""


def class_colour(at: int) -> str:
    """The colour of class number `at`, from 0; after `CLASS_COLOURS` they begin again."""
    return CLASS_COLOURS[at % len(CLASS_COLOURS)]


def swatch(at: int) -> str:
    """A small square in the colour of class number `at`, HTML."""
    box = "display:inline-block;width:12px;height:12px;border-radius:3px;border:1px solid var(--rule)"
    return f'<i style="{box};background:{class_colour(at)};margin-right:6px;vertical-align:-1px"></i>'


def legend(names: Sequence[str]) -> str:
    """The classes by colour, names in plain text."""
    each = "".join(f"<span>{swatch(at)}{escape(name)}</span>" for at, name in enumerate(names))
    style = "display:flex;flex-wrap:wrap;gap:2px 16px;margin-bottom:14px;font-size:13px"
    return f'<div class="facts" style="{style}">{each}</div>'


def palette(selector: str) -> str:
    """CSS that gives the elements the colours as variables, those of the dark where it is wanted."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    wanted = "@media (prefers-color-scheme:dark)"
    return f"{selector}{{color-scheme:light dark;{light}}}{wanted}{{{selector}{{{dark}}}}}"


def write_page(title: str, sections: Sequence[str], out: Path, scripts: Sequence[str] = ()) -> None:
    """Write the page of `page_of`.

    Raises:
        VoxelscaleError: the file cannot be written.
    """
    write_atomic(out, page_of(title, sections, scripts))


def page_of(title: str, sections: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """The HTML of a page with styles and scripts of its own.

    The page runs these scripts and no others: its security policy names their digests, so that a script
    that found its way into `sections` would not run.

    Args:
        title: plain text, of the browser's tab.
        sections: HTML, from the top.
        scripts: JavaScript beside the page's own, run before it.
    """
    files = resources.files("voxelscale.pages")
    page = files.joinpath("page.html").read_text(encoding="utf-8")
    scripts = [*scripts, files.joinpath("page.js").read_text(encoding="utf-8")]
    parts = {
        "title": escape(title),
        "palette": palette(":root"),
        "body": "\n".join(sections),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "trusted": " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    }
    return Template(page).substitute(parts)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], label: str, style: str = "wide"
) -> str:
    """A table.

    Args:
        columns: plain text.
        rows: HTML of each cell.
        label: what it shows, for readers who do not see the heading above it.
        style: CSS classes of the box around it.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return wide(table, label, style)


def sortable_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[tuple[str, str]]],
    label: str,
    style: str = "wide",
    more: str = "",
) -> str:
    """A table that the page sorts by the column whose head is pressed.

    Args:
        columns: plain text; the first is sorted as text, all others as numbers.
        rows: HTML of each cell, and what it is sorted by.
        label, style: as of `plain_table`.
        more: HTML of a body below, which is not sorted.
    """
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in columns
    )
    body = ""
    for row in rows:
        cells = (f'<td data-value="{escape(by, quote=True)}">{cell}</td>' for cell, by in row)
        body += f"<tr>{''.join(cells)}</tr>"
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{more}</table>'
    return wide(table, label, style)


def wide(content: str, label: str, style: str = "wide") -> str:
    """A box whose content may be wider than the page: it scrolls, by keyboard too, and shows it."""
    return f'<div class="{style}" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'


def cards(facts: Sequence[tuple[str, str, str]]) -> str:
    """The figures at the top of a page: name, value and note of each, in plain text."""
    body = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in facts
    )
    return f'<div class="cards">{body}</div>'


MOST_NOTES = 5
"""Lines of a block that are shown at once."""


def notes(title: str, lines: Sequence[str], style: str = "") -> str:
    """A block that stands out with lines of plain text, many of them folded; "" where there are none."""
    if not lines:
        return ""
    colour = f' style="border-color:{style}"' if style else ""
    each = [f"<div>{escape(line)}</div>" for line in lines]
    shown = len(each) if len(each) <= MOST_NOTES + 1 else MOST_NOTES
    body, rest = "".join(each[:shown]), "".join(each[shown:])
    if rest:
        body += f"<details><summary>and {len(each) - shown} more</summary>{rest}</details>"
    return f'<div class="warn"{colour}><b>{escape(title)}</b>{body}</div>'
