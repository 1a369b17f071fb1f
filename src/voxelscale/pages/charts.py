"""Static charts as data, drawn by Matplotlib as SVG in the page's colours, light and dark."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from voxelscale.pages.page import LIGHT, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6
"""Colours for lines: ``s0`` to ``s5``."""

SMALL = (420, 300)
"""Width and height of a chart beside others; its text is still legible on a phone."""

POINTS_PER_INCH = 72
"""Matplotlib's sizes are in inches, an SVG's in points."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend; "": not there.
        points: (x, y), x rising; the line is broken at one that is not finite.
        colour: a name of `voxelscale.pages.page.LIGHT`.
        mark: at each point: ``o`` a dot, ``ring``, or "" for none.
        marks_only: whether the points are not joined.
        dashed: whether the line is.
        stairs: whether a value holds until the next point.
        intervals: (x, low, high), drawn as upright bars.
        band: (x, low, high), x rising, drawn as a shaded area.
        shift: to the right, in points, so that the intervals of several lines do not cover each other.
    """

    name: str
    points: Sequence[tuple[float, float]] = ()
    colour: str = "s0"
    mark: str = ""
    marks_only: bool = False
    dashed: bool = False
    stairs: bool = False
    intervals: Sequence[tuple[float, float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    shift: float = 0.0


def number(value: float) -> str:
    """Three digits, or whole from 1000 on, or thousands as k from 10 000 on, or millions as M."""
    for letter, size, least in (("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if abs(value) >= least:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time as people say it: three digits in ms, s, min, h or d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(1000 * seconds)} ms"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes and what is drawn in it.

    Attributes:
        x_label, y_label: names of the axes with their units.
        lines: in the order of the legend.
        counts: of a histogram; () for none.
        edges: of its bins, one more than counts.
        title: above the panel; "" for none.
        x_range, y_range: smallest and largest value; None: from what is drawn.
        x_ticks, y_ticks: where ticks are; None: at round numbers.
        x_log, y_log: whether an axis is logarithmic.
        x_whole, y_whole: whether an axis counts something, so that its ticks are whole numbers.
        y_text: what stands at a tick of the y axis.
    """

    x_label: str
    y_label: str = ""
    lines: Sequence[Line] = ()
    counts: Sequence[float] = ()
    edges: Sequence[float] = ()
    title: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_ticks: Sequence[float] | None = None
    y_ticks: Sequence[float] | None = None
    x_log: bool = False
    y_log: bool = False
    x_whole: bool = False
    y_whole: bool = False
    y_text: Callable[[float], str] = field(default=number)


def chart(panel: Panel, note: str = "") -> str:
    """A small chart as an HTML figure.

    Args:
        note: a sentence below it.
    """
    label = f"{panel.y_label} against {panel.x_label}"
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure>{draw([panel], *SMALL, label)}{caption}</figure>"


def draw(
    panels: Sequence[Panel],
    width: int,
    height: int,
    label: str,
    *,
    columns: int = 2,
    alone: bool = False,
) -> str:
    """Panels with one legend below them, as an SVG element that scales with the page.

    Args:
        width, height: in points, of the whole.
        label: what it shows, for readers who do not see it.
        columns: panels in a row.
        alone: whether it is to be a file of its own, which brings its colours.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # It would report that it builds its cache of fonts, once on each machine.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # Text stays text, and is never taken for a formula; equal charts are equal files.
    settings = {"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": label, "font.size": 12}
    with rc_context({**settings, **_theme()}):
        figure = Figure((width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        for place, panel in enumerate(panels, start=1):
            _draw_panel(figure.add_subplot(rows, columns, place), panel)
        _draw_legend(figure, [line for panel in panels for line in panel.lines if line.name], width)
        file = io.StringIO()
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=about)
    return _for_page(file.getvalue(), width, height, label, alone)


def _theme() -> dict[str, Any]:
    soft, rule = LIGHT["soft"], LIGHT["rule"]
    return {
        "axes.edgecolor": rule,
        "axes.labelcolor": soft,
        "axes.titlecolor": LIGHT["ink"],
        "axes.titlelocation": "left",
        "axes.titlesize": 14,
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": rule,
        "legend.frameon": False,
        "legend.labelcolor": LIGHT["ink"],
        "lines.linewidth": 2.2,
        "lines.markersize": 7,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": soft,
        "ytick.labelcolor": soft,
    }


def _draw_panel(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.set_title(panel.title)
    axes.set_xscale("log" if panel.x_log else "linear")
    axes.set_yscale("log" if panel.y_log else "linear")
    if len(panel.counts):
        axes.stairs(panel.counts, panel.edges, fill=True, color=LIGHT["s0"])
        axes.set_ylim(0, 1.05 * max(1, *panel.counts))
    for line in panel.lines:
        _draw_line(axes, line)
    if panel.x_range:
        axes.set_xlim(*panel.x_range)
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    for axis, ticks, log, whole, text in (
        (axes.xaxis, panel.x_ticks, panel.x_log, panel.x_whole, number),
        (axes.yaxis, panel.y_ticks, panel.y_log, panel.y_whole, panel.y_text),
    ):
        if ticks is not None:
            axis.set_major_locator(FixedLocator(ticks))
        elif not log:
            axis.set_major_locator(MaxNLocator(5, integer=whole, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))


def _draw_line(axes: Axes, line: Line) -> None:
    from matplotlib.transforms import ScaledTranslation

    colour = LIGHT[line.colour]
    along = axes.transData
    if line.shift:  # only the bare transform tells the axes how far the data reach
        along = along + ScaledTranslation(line.shift / POINTS_PER_INCH, 0, axes.figure.dpi_scale_trans)
    if line.band:
        at, low, high = zip(*line.band, strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.22, linewidth=0)
    if line.intervals:
        at, low, high = zip(*line.intervals, strict=True)
        axes.vlines(at, low, high, color=colour, alpha=0.75, transform=along)
    if line.points:
        x, y = zip(*line.points, strict=True)
        axes.plot(x, y, transform=along, **_style(line))


def _style(line: Line) -> dict[str, Any]:
    colour = LIGHT[line.colour]
    # A line of one point would not be seen without a mark.
    mark = line.mark or ("o" if len(line.points) == 1 else "")
    return {
        "color": colour,
        "linestyle": "none" if line.marks_only else "dashed" if line.dashed else "solid",
        "drawstyle": "steps-post" if line.stairs else "default",
        "marker": mark and "o",
        "markerfacecolor": LIGHT["card"] if mark == "ring" else colour,
        "markeredgecolor": colour if mark == "ring" else LIGHT["card"],
        "markeredgewidth": 1.8 if mark == "ring" else 1.2,
        "clip_on": not mark,
        "in_layout": False,
        "zorder": 3 if mark else 2,
    }


def _draw_legend(figure: Figure, lines: Sequence[Line], width: int) -> None:
    """What the lines are, in as many columns as the longest name leaves."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    named = {line.name: line for line in reversed(lines)}
    named = {name: named[name] for name in dict.fromkeys(line.name for line in lines)}
    if not named:
        return
    keys = [
        Patch(color=LIGHT[line.colour], alpha=0.22, linewidth=0)
        if line.band and not line.points
        else Line2D([], [], **_style(line))
        for line in named.values()
    ]
    columns = max(1, int(width / (48 + 6.7 * max(map(len, named)))))
    figure.legend(keys, list(named), loc="outside lower left", ncols=columns, fontsize=12)


def _for_page(svg: str, width: int, height: int, label: str, alone: bool) -> str:
    """Matplotlib's drawing without what only a file needs, its colours as the page's variables."""
    body = svg[svg.index("</defs>") + len("</defs>") : svg.rindex("</svg>")]
    body = re.sub(r' id="[a-zA-Z.]+\d*_\d+"', "", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    style = f"<style>{palette('svg.alone')}</style>" if alone else ""
    kind, back = ("chart alone", ";background:var(--card)") if alone else ("chart", "")
    return (
        f'<svg class="{kind}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'style="max-width:100%{back}" role="img" aria-label="{escape(label)}">{style}{body}</svg>'
    )
