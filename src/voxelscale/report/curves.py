"""The charts of a report: the FROC curve with its interval, and how the model was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voxelscale.evaluate.froc import OPERATING_POINTS
from voxelscale.pages.charts import Line, line_chart


def froc_chart(froc: Mapping[str, Any]) -> str:
    """The curve between 1/8 and 8 false positives per scan, as LUNA16 draws it; "" without a lesion.

    Args:
        froc: of ``evaluation.json``; without ``interval`` in its points, as older versions wrote it, there
            is no band.
    """
    rates, found = froc["fp_per_scan"], froc["sensitivity"]
    if not found:
        return ""
    first, last = OPERATING_POINTS[0], OPERATING_POINTS[-1]
    points = [(p["fp_per_scan"], p["sensitivity"]) for p in froc["points"]]
    bounds = [(p["fp_per_scan"], p.get("interval")) for p in froc["points"]]
    band = [(at, low_high[0], low_high[1]) for at, low_high in bounds if low_high]
    lines = [Line(name="FROC", points=visible(rates, found, first, min(last, rates[-1])))]
    if band:
        lines.append(Line(name="95 % interval", points=(), band=band, style="s0"))
    note = ""
    if rates[-1] < last:
        rest = [(max(rates[-1], first), found[-1]), (last, found[-1])]
        lines.append(Line(name="no further findings", points=rest, dashed=True, style="s0"))
    elif rates[-1] > last:
        note = f"The curve goes on to {found[-1]:.3f} at {rates[-1]:.3g} false positives per scan."
    lines.append(Line(name="LUNA16's operating points", points=points, dots=True, bare=True, style="s1"))
    return line_chart(
        lines,
        x_label="false positives per scan (log)",
        y_label="sensitivity",
        y_range=(0.0, 1.0),
        x_ticks=OPERATING_POINTS,
        note=note,
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
    trained = [e for e in events if e["event"] == "train"]
    # A validation without a lesion has no Dice.
    measured = [e for e in events if e["event"] == "validation" and "dice" in e]
    validated = [(e["samples"], _number(e["dice"])) for e in measured]
    if not trained:
        return []
    dice = [
        Line(name="validation, whole scans", points=validated, dots=True),
        Line(name="training, soft Dice of patches", points=_smooth(trained, "dice"), dashed=True),
    ]
    loss = [Line(name="training loss", points=_smooth(trained, "loss"))]
    return [
        line_chart(dice, x_label="samples", y_label="Dice", y_range=(0.0, 1.0)),
        line_chart(loss, x_label="samples", y_label="loss"),
    ]


def _smooth(events: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A running mean over a twentieth of the events: single batches differ wildly."""
    width = max(1, len(events) // 20)
    values = [_number(e[name]) for e in events]
    means = [float(np.mean(values[max(0, i + 1 - width) : i + 1])) for i in range(len(values))]
    return [(e["samples"], mean) for e, mean in zip(events, means, strict=True)]


def _number(value: Any) -> float:
    """A log's number; NaN for what is none, as the loss of a training that diverged."""
    return float("nan") if value is None else float(value)
