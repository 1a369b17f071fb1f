"""The page and the table of `voxelscale inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from voxelscale.console import aligned, count
from voxelscale.pages.charts import Panel, chart
from voxelscale.pages.page import legend, notes, sortable_table, swatch, write_page
from voxelscale.report.overlays import LUNG_WINDOW, WINDOW_NAME, Slice, draw_slice
from voxelscale.store.inspect import (
    BINS,
    HU_EDGES,
    SEVERITIES,
    ChannelFacts,
    Facts,
    Inspection,
    Problem,
)

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
CLASS_COLUMNS = ("Class", "Cases", "Components", "ml in a case: median", "least", "most")


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
        *_class_sections(found.cases),
        "<h2>Cases</h2>",
        _table(found),
        _thumbnails(found.cases),
        "<footer>Spacing and voxels in the order z, y, x. Diameters are those of spheres of the same "
        f"volume; {_noun(found.cases)}s are 26-connected components of {_whose(found.cases)}"
        f"{_lungs(found.cases)}. Pictures: {_window_name(found.cases)}.</footer>",
    ]
    write_page(f"Voxelscale: {name}", sections, out)


def headline(found: Inspection) -> list[str]:
    """The data set in a few words."""
    lesions = sum(len(one.lesions_mm3) for one in found.cases)
    counts = Counter(problem.severity for problem in found.problems)
    counted = [count(counts[severity], severity) for severity in SEVERITIES]
    names = _classes(found.cases)
    if names:
        counted.insert(0, count(len(names), "class", "classes"))
    if channels := _channels(found.cases):
        counted.insert(0, f"{count(len(channels), 'channel')} ({', '.join(channels)})")
    lead = f"{found.kind} of {count(len(found.cases), 'readable case')}"
    return [lead, count(lesions, _noun(found.cases)), *counted]


def _classes(cases: Sequence[Facts]) -> list[str]:
    """The names of several classes; [] where there is one."""
    return list(dict.fromkeys(n for one in cases if one.classes_mm3 for n in one.classes.names))


def _channels(cases: Sequence[Facts]) -> list[str]:
    """The names of the channels; [] of one CT."""
    return list(dict.fromkeys(channel.name for one in cases for channel in one.channels))


def _noun(cases: Sequence[Facts]) -> str:
    return "component" if _classes(cases) else "lesion"


def _is_ct(cases: Sequence[Facts]) -> bool:
    return not cases or any(one.is_ct for one in cases)


def _whose(cases: Sequence[Facts]) -> str:
    return "each class" if _classes(cases) else "the mask"


def _lungs(cases: Sequence[Facts]) -> str:
    return "; lungs are what was found of them in the scan" if _is_ct(cases) else ""


def _window_name(cases: Sequence[Facts]) -> str:
    return WINDOW_NAME if _is_ct(cases) else "1st to 99th percentile of the values"


def text_table(found: Inspection) -> list[str]:
    """The cases as lines of text, columns aligned; then those that cannot be read, with their errors."""
    columns = _columns(found.cases)
    rows = [columns, *([text for text, _ in _row(one, columns)] for one in found.cases)]
    first = max(len(row[0]) for row in rows)
    unreadable = [f"{p.case.ljust(first)}  cannot be read: {p.text}" for p in found.unreadable]
    return [aligned(rows), *unreadable, *_text_channels(found.cases), *_text_classes(found.cases)]


def _text_classes(cases: Sequence[Facts]) -> list[str]:
    """A line a class: cases, components, volume in a case that has it."""
    rows = _class_rows(cases)
    return ["", aligned([CLASS_COLUMNS, *rows])] if rows else []


def _text_channels(cases: Sequence[Facts]) -> list[str]:
    rows = []
    for name, own in _by_channel(cases).items():
        _, low, middle, high, _ = np.median([one.values for one in own], axis=0)
        ends = f"{min(one.values[0] for one in own):g} to {max(one.values[4] for one in own):g}"
        usual = f"1st to 99th percentile of a typical case {low:.4g} to {high:.4g}, median {middle:.4g}"
        rows.append(f"channel {name} ({own[0].scheme}): {ends}; {usual}")
    return ["", *rows] if rows else []


def _by_channel(cases: Sequence[Facts]) -> dict[str, list[ChannelFacts]]:
    """The cases' facts of each channel by name."""
    found: dict[str, list[ChannelFacts]] = {}
    for one in cases:
        for channel in one.channels:
            found.setdefault(channel.name, []).append(channel)
    return found


def _class_rows(cases: Sequence[Facts]) -> list[tuple[str, ...]]:
    """Of each of several classes: name, cases that have it, components, and ml in such a case."""
    rows = []
    for name in _classes(cases):
        own = [dict(zip(one.classes.names, one.classes_mm3, strict=False)).get(name, ()) for one in cases]
        volumes = [sum(parts) / 1000 for parts in own if parts]
        spread = (np.median(volumes), min(volumes), max(volumes)) if volumes else ()
        texts = [f"{volume:.3g}" for volume in spread] or ["-"] * 3
        rows.append((name, f"{len(volumes)} of {len(cases)}", str(sum(map(len, own))), *texts))
    return rows


def _columns(cases: Sequence[Facts]) -> list[str]:
    """The columns of the table of cases; of one class and one CT channel `COLUMNS`."""
    columns = list(COLUMNS)
    if not _is_ct(cases):
        columns[columns.index("HU")] = "Values"
        columns.remove("Lungs, l")
    if _classes(cases):
        columns[columns.index("Lesions")] = "Components"
        columns[columns.index("Lesions, ml")] = "All, ml"
        columns.insert(columns.index("Components"), "Classes")
    return columns


def _row(one: Facts, columns: Sequence[str]) -> list[tuple[str, str]]:
    """Each column's text, and what it is sorted by."""
    largest = max(one.diameters_mm, default=0.0)
    volume = one.all_mm3 / 1000
    lungs = one.lungs_ml
    number = (str(len(one.lesions_mm3)) if one.labelled else "no mask", str(len(one.lesions_mm3)))
    ml = (f"{volume:.2f}" if one.lesions_mm3 else "", f"{volume:.6f}")
    there = sum(map(bool, one.classes_mm3))
    digits = ".0f" if one.is_ct else ".4g"
    reach = (f"{one.hu[0]:{digits}} to {one.hu[4]:{digits}}", f"{one.hu[0]:.3f}")
    cells = {
        "Case": (one.case, one.case),
        "Voxels": (" x ".join(map(str, one.shape)), f"{np.prod(one.shape)}"),
        "Spacing, mm": (" x ".join(f"{s:.3g}" for s in one.spacing), f"{max(one.spacing):.6f}"),
        "Axes": (one.axes, str(sum(ord(c) << 8 * i for i, c in enumerate(one.axes)))),
        "HU": reach,
        "Values": reach,
        "Classes": (f"{there} of {len(one.classes_mm3)}", str(there)),
        "Lesions": number,
        "Components": number,
        "Largest, mm": (f"{largest:.1f}" if one.lesions_mm3 else "", f"{largest:.3f}"),
        "Lesions, ml": ml,
        "All, ml": ml,
        "Lungs, l": ("not found" if lungs is None else f"{lungs / 1000:.2f}", f"{lungs or 0}"),
    }
    return [cells[name] for name in columns]


def _table(found: Inspection) -> str:
    columns = _columns(found.cases)
    rows = [[(escape(text), key) for text, key in _row(one, columns)] for one in found.cases]
    # A body of its own, which is not sorted: its rows have no values.
    unreadable = "".join(
        f'<tr><td>{escape(problem.case)}</td><td colspan="{len(columns) - 1}">cannot be read: '
        f"{escape(problem.text)}</td></tr>"
        for problem in found.unreadable
    )
    return sortable_table(columns, rows, "Cases", more=f"<tbody>{unreadable}</tbody>")


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
    """Histograms of spacings, HU or each channel's values, lesion diameters and lesions per case."""
    diameters = [diameter for one in cases for diameter in one.diameters_mm]
    noun = _noun(cases)
    panels = [
        _of_values([one.spacing[0] for one in cases], "spacing along z, mm", "cases"),
        _of_values([one.spacing[2] for one in cases], "spacing along x, mm", "cases"),
    ]
    if of_hu := [one.histogram for one in cases if one.histogram]:
        hu = np.sum(of_hu, axis=0)
        panels.append(Panel(x_label="HU", y_label="voxels", counts=hu, edges=HU_EDGES, y_whole=True))
    panels += [
        _of_channel(name, own)
        for number, (name, own) in enumerate(_by_channel(cases).items())
        if number or not of_hu
    ]
    if diameters:
        panels.append(_of_values(diameters, f"{noun} diameter, mm", f"{noun}s"))
    counts = np.bincount([len(one.lesions_mm3) for one in cases]).tolist()
    return [
        *panels,
        Panel(
            x_label=f"{noun}s per case",
            y_label="cases",
            counts=counts,
            edges=[place - 0.5 for place in range(len(counts) + 1)],
            x_whole=True,
            y_whole=True,
        ),
    ]


def _of_channel(name: str, cases: Sequence[ChannelFacts]) -> Panel:
    """The voxels of all cases by value, between the cases' 1st and 99th percentiles."""
    low, high = min(one.values[1] for one in cases), max(one.values[3] for one in cases)
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    counts = np.zeros(BINS)
    for one in cases:
        step = (one.values[4] - one.values[0]) / BINS
        middles = one.values[0] + step * (np.arange(BINS) + 0.5)
        counts += np.histogram(np.clip(middles, edges[0], edges[-1]), edges, weights=one.histogram)[0]
    label = f"{name}, its own unit"
    return Panel(
        x_label=label, y_label="voxels", counts=counts.tolist(), edges=edges.tolist(), y_whole=True
    )


def _class_sections(cases: Sequence[Facts]) -> list[str]:
    """The classes with their colours: cases, components and volumes; [] where there is one."""
    rows = [
        [
            (f"{swatch(at)}{escape(row[0])}", row[0]),
            *((text, "Infinity" if text == "-" else text.split()[0]) for text in row[1:]),
        ]
        for at, row in enumerate(_class_rows(cases))
    ]
    return ["<h2>Classes</h2>", sortable_table(CLASS_COLUMNS, rows, "Classes")] if rows else []


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
            cut = Slice(
                small.pixels,
                small.mask,
                np.zeros_like(small.mask),
                small.spacing,
                classes=one.classes,
                window=small.window or LUNG_WINDOW,
            )
            caption = f"{one.case}: {len(one.lesions_mm3)}, largest {one.diameters_mm[0]:.1f} mm"
            drawn.append(
                f"<figure>{draw_slice(cut, 50)}<figcaption>{escape(caption)}</figcaption></figure>"
            )
    grid = 'class="charts" style="grid-template-columns:repeat(auto-fill,minmax(200px,1fr))"'
    names = _classes(cases)
    key = legend(names) if names else ""
    return f"<h2>Largest {_noun(cases)}s{more}</h2>{key}<div {grid}>{''.join(drawn)}</div>"
