"""The page and the table of `voxelscale inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from voxelscale.console import count
from voxelscale.geometry import sphere_diameter
from voxelscale.pages.charts import Panel, chart
from voxelscale.pages.page import notes, wide, write_page
from voxelscale.report.overlays import WINDOW_NAME, Slice, draw_slice
from voxelscale.store.inspect import HU_EDGES, SEVERITIES, Facts, Inspection, Problem

MOST_THUMBNAILS = 200
"""About 20 kB each."""
COLOURS = {"error": "var(--bad)", "warning": "#ff9f1c", "note": "var(--soft)"}
COLUMNS = (
    "Case",
    "Voxels",
    "Spacing, mm",
    "Axes",
    "HU",
    "Lesions",
    "Largest, mm",
    "Lesions, ml",
    "Lungs, l",
)


def write_dataset_page(found: Inspection, name: str, out: Path) -> None:
    """Write one self-contained HTML page.

    Args:
        name: of the data set, for the head.
        out: the page.

    Raises:
        VoxelscaleError: the file cannot be written.
    """
    sections = [
        f'<h1>{escape(name)}</h1><p class="lead">{escape(" · ".join(headline(found)))}</p>',
        "<h2>Problems</h2>",
        _problems(found.problems),
        "<h2>Distributions</h2>",
        _histograms(found.cases),
        "<h2>Cases</h2>",
        _table(found),
        _thumbnails(found.cases),
        "<footer>Spacing and voxels in the order z, y, x. Diameters are those of spheres of the same "
        "volume; lesions are 26-connected components of the mask; lungs are what was "
        f"found of them in the scan. Pictures: {WINDOW_NAME}.</footer>",
    ]
    write_page(f"Voxelscale: {name}", sections, out)


def headline(found: Inspection) -> list[str]:
    """The data set in a few words."""
    lesions = sum(len(one.lesions_mm3) for one in found.cases)
    counts = Counter(problem.severity for problem in found.problems)
    told = [count(counts[severity], severity) for severity in SEVERITIES]
    return [f"{found.kind} of {count(len(found.cases), 'readable case')}", count(lesions, "lesion"), *told]


def text_table(found: Inspection) -> list[str]:
    """The cases as lines of text, columns aligned; then those that cannot be read, with their errors."""
    rows = [COLUMNS, *([text for text, _ in _row(one)] for one in found.cases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return lines + [f"{p.case.ljust(widths[0])}  cannot be read: {p.text}" for p in found.unreadable]


def _row(one: Facts) -> list[tuple[str, str]]:
    """Each column's text, and what it is sorted by."""
    largest = sphere_diameter(one.lesions_mm3[0]) if one.lesions_mm3 else 0.0
    volume = sum(one.lesions_mm3) / 1000
    lungs = one.lungs_ml
    return [
        (one.case, one.case),
        (" x ".join(map(str, one.shape)), f"{np.prod(one.shape)}"),
        (" x ".join(f"{s:.3g}" for s in one.spacing), f"{max(one.spacing):.6f}"),
        (one.axes, str(sum(ord(c) << 8 * i for i, c in enumerate(one.axes)))),
        (f"{one.hu[0]:.0f} to {one.hu[4]:.0f}", f"{one.hu[0]:.3f}"),
        (str(len(one.lesions_mm3)) if one.labelled else "no mask", str(len(one.lesions_mm3))),
        (f"{largest:.1f}" if one.lesions_mm3 else "", f"{largest:.3f}"),
        (f"{volume:.2f}" if one.lesions_mm3 else "", f"{volume:.6f}"),
        ("not found" if lungs is None else f"{lungs / 1000:.2f}", f"{lungs or 0}"),
    ]


def _table(found: Inspection) -> str:
    head = "".join(f'<th><button type="button">{name}</button></th>' for name in COLUMNS)
    rows = []
    for one in found.cases:
        cells = [
            f'<td data-value="{escape(key, quote=True)}">{escape(text)}</td>' for text, key in _row(one)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    # A body of its own, which is not sorted: its rows have no values.
    unreadable = "".join(
        f'<tr><td>{escape(problem.case)}</td><td colspan="{len(COLUMNS) - 1}">cannot be read: '
        f"{escape(problem.text)}</td></tr>"
        for problem in found.unreadable
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody><tbody>{unreadable}</tbody>"
    return wide(f'<table class="sortable">{body}</table>', "Cases")


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return "<p>None found.</p>"
    blocks = []
    for severity in SEVERITIES:
        lines = [_said(p) for p in problems if p.severity == severity]
        blocks.append(notes(f"{severity.capitalize()}s ({len(lines)})", lines, COLOURS[severity]))
    return "".join(blocks)


def _said(problem: Problem) -> str:
    return f"{problem.case}: {problem.text}" if problem.case else problem.text


def _histograms(cases: Sequence[Facts]) -> str:
    if not cases:
        return "<p>No case could be read.</p>"
    return f'<div class="charts">{"".join(chart(panel) for panel in distributions(cases))}</div>'


def distributions(cases: Sequence[Facts]) -> list[Panel]:
    """Histograms of spacings, HU, lesion diameters and lesions per case."""
    diameters = [sphere_diameter(volume) for one in cases for volume in one.lesions_mm3]
    hu = np.sum([one.histogram for one in cases], axis=0)
    panels = [
        _of_values([one.spacing[0] for one in cases], "spacing along z, mm", "cases"),
        _of_values([one.spacing[2] for one in cases], "spacing along x, mm", "cases"),
        Panel(x_label="HU", y_label="voxels", counts=hu, edges=HU_EDGES, y_whole=True),
    ]
    if diameters:
        panels.append(_of_values(diameters, "lesion diameter, mm", "lesions"))
    counts = np.bincount([len(one.lesions_mm3) for one in cases]).tolist()
    return [
        *panels,
        Panel(
            x_label="lesions per case",
            y_label="cases",
            counts=counts,
            edges=[place - 0.5 for place in range(len(counts) + 1)],
            x_whole=True,
            y_whole=True,
        ),
    ]


def _of_values(values: Sequence[float], label: str, counted: str) -> Panel:
    low, high = min(values), max(values)
    # A data set of one spacing is one bar, not an empty range.
    spread = (max(low - 0.5, 0.0), high + 0.5) if high - low < 1e-3 else (low, high)
    counts, edges = np.histogram(values, bins=min(24, max(5, round(2 * len(values) ** 0.5))), range=spread)
    return Panel(x_label=label, y_label=counted, counts=counts.tolist(), edges=edges.tolist(), y_whole=True)


def _thumbnails(cases: Sequence[Facts]) -> str:
    shown = [one for one in cases if one.thumbnail is not None]
    if not shown:
        return ""
    left = len(shown) - MOST_THUMBNAILS
    more = f" <small>the first {MOST_THUMBNAILS}; {left} more are not shown</small>" if left > 0 else ""
    drawn = []
    for one in shown[:MOST_THUMBNAILS]:
        if (small := one.thumbnail) is not None:
            cut = Slice(small.pixels, small.mask, np.zeros_like(small.mask), small.spacing)
            caption = (
                f"{one.case}: {len(one.lesions_mm3)}, largest {sphere_diameter(one.lesions_mm3[0]):.1f} mm"
            )
            drawn.append(
                f"<figure>{draw_slice(cut, 50)}<figcaption>{escape(caption)}</figcaption></figure>"
            )
    grid = 'class="charts" style="grid-template-columns:repeat(auto-fill,minmax(200px,1fr))"'
    return f"<h2>Largest lesions{more}</h2><div {grid}>{''.join(drawn)}</div>"
