"""Values, times and names of a search for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from voxelscale.search.results import SearchResults, State, TrialResult, Value

STATES: tuple[State, ...] = ("done", "pruned", "running", "waiting", "infeasible", "diverged", "failed")
"""In the order of legends."""

LABELS = {"dice": "Dice", "time": "time", "parameters": "parameters"}


def value_text(objective: str, value: float) -> str:
    """An objective's value for people: Dice to four places, times with a unit, 1.23M parameters."""
    if objective == "dice":
        return f"{value:.4f}"
    if objective == "time":
        return duration(value)
    for letter, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def param_text(value: Value) -> str:
    """A searched key's value as it would stand in YAML, floats with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    """Seconds for people, in a unit that leaves two to four digits."""
    for unit, size, least in (("d", 86400.0, 2.0), ("h", 3600.0, 2.0), ("min", 60.0, 2.0)):
        if seconds >= least * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def label(objective: str) -> str:
    """An objective's name for people."""
    return LABELS.get(objective, objective)


def axis_label(objective: str) -> str:
    """An objective's name with its unit."""
    return "time, s" if objective == "time" else label(objective)


def score(results: SearchResults, trial: TrialResult) -> float | None:
    """The first objective; the last validation's Dice where a trial has not ended with one."""
    if trial.values:
        value = trial.values[0]
    elif trial.curve and results.objectives[0] == "dice":
        value = trial.curve[-1][1]
    else:
        return None
    return value if math.isfinite(value) else None


def value_range(values: Sequence[float], more: bool) -> tuple[float, float]:
    """The worst and the best value that a scale should show.

    A few hopeless trials would squeeze all others into a line: what is more than three times as far
    from the best as the median lies beyond the scale.

    Args:
        more: whether more is better.
    """
    sign = 1.0 if more else -1.0
    goods = sorted(sign * value for value in values)
    if not goods:
        return 0.0, 1.0
    best, middle = goods[-1], goods[len(goods) // 2]
    worst = max(goods[0], best - 3 * (best - middle)) if best > middle else goods[0]
    return sign * worst, sign * best


def padded(a: float, b: float) -> tuple[float, float]:
    """A range with margins at both ends; no Dice, time or count is below 0, nor is its axis."""
    low, high = min(a, b), max(a, b)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return max(low - pad, 0.0) if low >= 0 else low - pad, high + pad
