"""The frame of every page: one HTML file that loads nothing, and tables in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from voxelscale.files import write_atomic


def write_page(title: str, sections: Sequence[str], out: Path) -> None:
    """Write a page with styles and script of its own.

    Args:
        title: plain text, of the browser's tab.
        sections: HTML, from the top.

    Raises:
        VoxelscaleError: the file cannot be written.
    """
    page = resources.files("voxelscale.pages").joinpath("page.html").read_text(encoding="utf-8")
    write_atomic(out, Template(page).substitute(title=escape(title), body="\n".join(sections)))


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
) -> str:
    """A table that the page sorts by the column whose head is pressed.

    Args:
        columns: plain text; the first is sorted as text, all others as numbers.
        rows: HTML of each cell, and what it is sorted by.
        label, style: as of `plain_table`.
    """
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in columns
    )
    body = ""
    for row in rows:
        cells = (f'<td data-value="{escape(by, quote=True)}">{cell}</td>' for cell, by in row)
        body += f"<tr>{''.join(cells)}</tr>"
    table = f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
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


def notes(title: str, lines: Sequence[str], style: str = "") -> str:
    """A block that stands out with lines of plain text; "" where there are none."""
    if not lines:
        return ""
    colour = f' style="border-color:{style}"' if style else ""
    body = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return f'<div class="warn"{colour}><b>{escape(title)}</b>{body}</div>'
