"""How far confidences are from what came true: expected calibration error and reliability diagram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.pages.charts import Frame, Line, draw_axes, draw_lines

BINS = 10

WIDTH, HEIGHT, HEAD, FOOT = 460, 420, 34, 30

STYLE = """
svg.reliability { color-scheme: light dark; background: var(--card); --card: #fff; --ink: #1b2330;
  --soft: #5d6b7e; --rule: #e1e6ec; --before: #d1495b; --after: #0b7a75; }
@media (prefers-color-scheme: dark) { svg.reliability { --card: #18202a; --ink: #e7edf4; --soft: #93a2b5;
  --rule: #2a3542; --before: #ff7b89; --after: #3fc1b8; } }
.reliability text { fill: var(--soft); font: 12.5px system-ui, "Segoe UI", Roboto, sans-serif; }
.reliability .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.reliability .grid { stroke: var(--rule); }
.reliability .before { --c: var(--before); } .reliability .after { --c: var(--after); }
.reliability .ideal { --c: var(--soft); }
.reliability .line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.reliability .bar { fill: none; stroke: var(--c); stroke-width: 1.2; opacity: .6; }
.reliability .dot { fill: var(--c); stroke: var(--card); stroke-width: 1.5; }
.reliability .hollow { fill: var(--card); stroke: var(--c); stroke-width: 2; }
"""


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
    """The diagram of what `voxelscale.tune.calibrate.calibrate` returns, as an SVG that stands alone."""
    frame = Frame(x=(0.0, 1.0), y=(0.0, 1.0), width=WIDTH, height=HEIGHT)
    lines = [
        Line(name="ideal", points=[(0.0, 0.0), (1.0, 1.0)], dashed=True, style="ideal"),
        _line("before", summary["bins_before"], hollow=True, bars=False),
        _line("after", summary["bins_after"], hollow=False, bars=True),
    ]
    body = draw_axes(frame, x_label="confidence, mean of a bin") + draw_lines(frame, lines)
    names = (
        ("before", f"before: ECE {summary['ece_before']:.3f}"),
        ("after", f"after ({summary['method']}): ECE {summary['ece_after']:.3f}"),
    )
    legend = "".join(
        f'<circle class="dot{" hollow" * (style == "before")} {style}" cx="{20 + 160 * i}" cy="12" r="4"/>'
        f'<text x="{30 + 160 * i}" y="16">{text}</text>'
        for i, (style, text) in enumerate(names)
    )
    title = f"Share of {summary['findings']} findings that are lesions"
    return (
        f'<svg class="reliability" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {WIDTH} {HEAD + HEIGHT + FOOT}" role="img" aria-label="{title}">'
        f'<style>{STYLE}</style><text class="title" x="14" y="24">{title}</text>'
        f'<g transform="translate(0 {HEAD})">{body}</g>'
        f'<g transform="translate(0 {HEAD + HEIGHT})">{legend}</g></svg>'
    )


def _line(name: str, rows: list[dict[str, Any]], *, hollow: bool, bars: bool) -> Line:
    return Line(
        name=name,
        points=[(row["confidence"], row["share"]) for row in rows],
        dots=True,
        hollow=hollow,
        style=name,
        titles=[
            f"{name}: {row['share']:.2f} of {row['findings']} at {row['confidence']:.2f}" for row in rows
        ],
        bars=[(row["confidence"], *row["interval"]) for row in rows] if bars else (),
    )
