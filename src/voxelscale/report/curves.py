"""The charts of a report: the FROC curve with its interval, and how the model was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voxelscale.evaluate.froc import OPERATING_POINTS
from voxelscale.pages.charts import Line, Panel, chart


def froc_chart(froc: Mapping[str, Any]) -> str:
    """The curve between 1/8 and 8 false positives per scan, as LUNA16 draws it; "" without a lesion."""
    if not froc["sensitivity"]:
        return ""
    last, found = froc["fp_per_scan"][-1], froc["sensitivity"][-1]
    note = f"The curve continues to {found:.3f} at {last:.3g} false positives per scan."
    return chart(froc_panel(froc), note if last > OPERATING_POINTS[-1] else "")


def froc_panel(froc: Mapping[str, Any]) -> Panel:
    """What `froc_chart` draws.

    Args:
        froc: of ``evaluation.json``, of at least one lesion; without ``interval`` in its points, as older
            versions wrote it, there is no band.
    """
    rates, found = froc["fp_per_scan"], froc["sensitivity"]
    first, last = OPERATING_POINTS[0], OPERATING_POINTS[-1]
    points = [(p["fp_per_scan"], p["sensitivity"]) for p in froc["points"]]
    band = [(p["fp_per_scan"], *p["interval"]) for p in froc["points"] if p.get("interval")]
    lines = [Line(name="FROC", points=visible(rates, found, first, min(last, rates[-1])))]
    if band:
        lines.append(Line(name="95 % interval", band=band))
    if rates[-1] < last:
        rest = [(max(rates[-1], first), found[-1]), (last, found[-1])]
        lines.append(Line(name="no further findings", points=rest, dashed=True))
    lines.append(
        Line(name="LUNA16's operating points", points=points, mark="o", marks_only=True, colour="s1")
    )
    return Panel(
        x_label="false positives per scan (log)",
        y_label="sensitivity",
        lines=lines,
        x_range=(first, last),
        y_range=(0.0, 1.0),
        x_ticks=OPERATING_POINTS,
        x_log=True,
    )


def visible(
    rates: Sequence[float], found: Sequence[float], first: float, last: float
) -> list[tuple[float, float]]:
    """The part of the curve between two rates, both above 0, its ends among them.

    Between two points it is linear in the rate, as `voxelscale.evaluate.froc.Froc.sensitivity_at` reads it:
    points are put in between, as a straight line is bent on a logarithmic axis.
    """
    if last < first:
        return []
    inside = [(x, y) for x, y in zip(rates, found, strict=True) if first < x <= last]
    corners = {x for x, _ in inside}
    between = [x for x in np.geomspace(first, last, 65).tolist() if x not in corners]
    drawn = [(x, float(np.interp(x, rates, found))) for x in between]
    # Where the rate is the same the curve steps up: the order of the points is kept.
    return sorted([*drawn, *inside])


def training_charts(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dice and loss against the samples seen, from a run's events; [] without a training step."""
    return [chart(panel) for panel in training_panels(events)]


def training_panels(events: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """What `training_charts` draws."""
    trained = [e for e in events if e["event"] == "train"]
    if not trained:
        return []
    # A validation without a lesion has no Dice.
    measured = [e for e in events if e["event"] == "validation" and e.get("dice") is not None]
    validated = [(e["samples"], float(e["dice"])) for e in measured]
    dice = [
        Line(name="validation, whole scans", points=validated, mark="o"),
        Line(
            name="training, soft Dice of patches",
            points=_smooth(trained, "dice"),
            dashed=True,
            colour="s1",
        ),
    ]
    loss = [Line(name="training loss", points=_smooth(trained, "loss"))]
    return [
        Panel(x_label="samples", y_label="Dice", lines=dice, y_range=(0.0, 1.0)),
        Panel(x_label="samples", y_label="loss", lines=loss),
    ]


def _smooth(events: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A running mean over a twentieth of the events: single batches differ wildly.

    An event without the number is left out: the first of several ranks precedes any sum of theirs, a
    training that diverged has no loss, and a loss of one's own may come without a Dice.
    """
    known = [e for e in events if e.get(name) is not None]
    width = max(1, len(known) // 20)
    values = [float(e[name]) for e in known]
    means = [float(np.mean(values[max(0, i + 1 - width) : i + 1])) for i in range(len(values))]
    return [(e["samples"], mean) for e, mean in zip(known, means, strict=True)]
