"""How far confidences are from what came true: expected calibration error and reliability diagram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.pages.charts import Line, Panel, draw

BINS = 10
"""Of equally many findings each."""


def calibration_error(probability: NDArray[np.float64], hit: NDArray[np.bool_]) -> float:
    """Expected calibration error: the mean gap between confidence and share of hits, bin by bin.

    After Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", 2015, but over
    `BINS` bins of equally many findings.
    """
    rows = reliability(probability, hit)
    gaps = sum(row["findings"] * abs(row["confidence"] - row["share"]) for row in rows)
    return float(gaps / max(1, len(hit)))


def reliability(probability: NDArray[np.float64], hit: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Of each of `BINS` bins of equally many findings, least confident first: ``findings``, mean
    ``confidence``, ``share`` of hits, and its 95 % ``interval`` (Wilson 1927)."""
    # Among equal confidences the order means nothing: each gets their common share.
    _, number = np.unique(probability, return_inverse=True)
    share = (np.bincount(number, weights=hit) / np.bincount(number))[number]
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    return [
        {
            "findings": len(part),
            "confidence": float(probability[part].mean()),
            "share": float(share[part].mean()),
            "interval": _wilson(float(share[part].mean()), len(part)),
        }
        for part in parts
    ]


def _wilson(share: float, count: int) -> list[float]:
    z2 = 1.96**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def reliability_figure(summary: Mapping[str, Any]) -> str:
    """The reliability diagram of what `voxelscale.tune.calibrate.calibrate` returns, as an SVG file."""
    return draw([reliability_panel(summary)], 460, 480, _title(summary), alone=True)


def reliability_panel(summary: Mapping[str, Any]) -> Panel:
    """What `reliability_figure` draws: each bin before and after calibration, beside the ideal."""
    before, after = (
        [(row["confidence"], row["share"]) for row in summary[bins]]
        for bins in ("bins_before", "bins_after")
    )
    return Panel(
        title=_title(summary),
        x_label="mean confidence of a bin",
        y_label="share of lesions",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        lines=[
            Line(name="ideal", points=[(0.0, 0.0), (1.0, 1.0)], dashed=True, colour="soft"),
            Line(name=f"before: ECE {summary['ece_before']:.3f}", points=before, mark="ring", colour="s1"),
            Line(
                name=f"after ({summary['method']}): ECE {summary['ece_after']:.3f}",
                points=after,
                mark="o",
                intervals=[(row["confidence"], *row["interval"]) for row in summary["bins_after"]],
            ),
        ],
    )


def _title(summary: Mapping[str, Any]) -> str:
    return f"Share of {summary['findings']} findings that are lesions"
