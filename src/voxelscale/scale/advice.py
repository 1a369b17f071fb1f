"""What a training costs at each number of workers, and which number is worth its price, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.console import count
from voxelscale.pages.charts import duration, number
from voxelscale.scale.cost import Scaling, TrainingTime
from voxelscale.scale.study import Row

Verdict = Literal["kept", "not certain", "lost", "unknown"]
"""What becomes of one worker's Dice: the interval's lower end reaches the target; only the mean does, or
there is one seed; not even the mean does; or there is no training with one worker."""


@dataclass(frozen=True, kw_only=True)
class CostedRow:
    """A row of the study with what it costs.

    Attributes:
        row: Dice over seeds.
        time: of one training, modelled.
        scaling: three scalings against one worker of the same recipe; None where there is none.
    """

    row: Row
    time: TrainingTime
    scaling: Scaling | None


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a device costs.

    Attributes:
        per_hour: price of one device for an hour; None: not known.
        watts: power of one device with its share of the node; None: not known.
        node_devices: devices of a node.
    """

    per_hour: float | None = None
    watts: float | None = None
    node_devices: int = 1

    def price(self, time: TrainingTime) -> float | None:
        """Of one training."""
        return None if self.per_hour is None else self.per_hour * time.device_hours

    def kwh(self, time: TrainingTime) -> float | None:
        """Energy of one training, as if all devices took their full power for the whole time."""
        return None if self.watts is None else self.watts / 1000 * time.device_hours

    def nodes(self, workers: int) -> int:
        """That so many workers need."""
        return math.ceil(workers / self.node_devices)


def verdict(row: Row, target: float) -> Verdict:
    """Whether the share `target` of one worker's Dice is kept."""
    if row.relative is None:
        return "unknown"
    if row.diverged or row.relative < target:
        return "lost"
    certain = row.seeds > 1 and row.relative_low is not None and row.relative_low >= target
    return "kept" if certain else "not certain"


def best(findings: Sequence[CostedRow], target: float) -> CostedRow | None:
    """Which is worth its price: of those that keep the Dice, the one with the least time x device hours.

    That is the knee of Eager, Zahorjan and Lazowska ("Speedup versus efficiency in parallel systems", IEEE
    Transactions on Computers 38, 1989): up to there more workers gain more in time than they lose in
    efficiency. Where no interval shows that the Dice is kept, those whose mean reaches the target count.
    """
    for wanted in ("kept", "not certain"):
        kept = [f for f in findings if verdict(f.row, target) == wanted]
        if kept:
            return min(kept, key=lambda f: f.time.total * f.time.device_hours)
    return None


def advice(findings: Sequence[CostedRow], target: float, prices: Prices) -> list[str]:
    """Sentences for a person who decides: what to take, what it costs, and what not to take.

    Args:
        target: share of one worker's Dice that counts as kept.
    """
    chosen = best(findings, target)
    share = f"{100 * target:.4g} % of one worker's Dice"
    if chosen is None:
        alone = any(f.row.relative is not None for f in findings)
        if not alone:
            return ["No number of workers can be recommended: one worker was not trained, or has no Dice."]
        return [f"No number of workers can be recommended: none keeps {share}."]
    lines = [f"Worth its price: {_named(chosen, prices)}. {_costs(chosen, findings, prices)}"]
    if verdict(chosen.row, target) == "not certain":
        lines.append(f"It is not certain that this keeps {share}: more seeds (scale.seeds) would tell.")
    kept = [f for f in findings if verdict(f.row, target) == verdict(chosen.row, target)]
    lines += _others(chosen, kept)
    for recipe in dict.fromkeys(f.row.recipe for f in findings):
        lost = [f for f in findings if f.row.recipe == recipe and verdict(f.row, target) == "lost"]
        if lost:
            workers = ", ".join(str(f.row.workers) for f in lost)
            lines.append(f"Not recommended: {recipe} with {workers} workers; that does not keep {share}.")
    return lines


def _named(finding: CostedRow, prices: Prices) -> str:
    workers, nodes = finding.row.workers, prices.nodes(finding.row.workers)
    return f"{count(workers, 'worker')} on {count(nodes, 'node')} with the recipe {finding.row.recipe}"


def _costs(finding: CostedRow, findings: Sequence[CostedRow], prices: Prices) -> str:
    """Time, device hours, price and energy of one training, against one worker where there is one."""
    time = finding.time
    words = f"One training takes {duration(time.total)} and {number(time.device_hours)} device hours"
    price, kwh = prices.price(time), prices.kwh(time)
    more = [f"price {number(price)}"] if price is not None else []
    more += [f"{number(kwh)} kWh"] if kwh is not None else []
    words += f" ({'; '.join(more)})" if more else ""
    one = next((f for f in findings if f.row.workers == 1), None)
    if one is not None and finding.row.workers > 1:
        faster, dearer = one.time.total / time.total, time.device_hours / one.time.device_hours
        words += (
            f": {number(faster)} times as fast as one worker, for {number(dearer)} times its device hours"
        )
    return f"{words}. Its devices compute for {100 * time.busy:.0f} % of that time."


def _others(chosen: CostedRow, kept: Sequence[CostedRow]) -> list[str]:
    """The fastest and the cheapest that keep the Dice as well, where they are others."""
    fastest = min(kept, key=lambda f: f.time.total)
    cheapest = min(kept, key=lambda f: f.time.device_hours)
    lines = []
    if fastest.time.total < chosen.time.total:
        times = number(fastest.time.device_hours / chosen.time.device_hours)
        lines.append(
            f"Fastest: {count(fastest.row.workers, 'worker')} with {fastest.row.recipe}, "
            f"{duration(fastest.time.total)}, for {times} times the device hours of the above."
        )
    if cheapest.time.device_hours < chosen.time.device_hours:
        lines.append(
            f"Cheapest: {count(cheapest.row.workers, 'worker')} with {cheapest.row.recipe}, "
            f"{number(cheapest.time.device_hours)} device hours, but {duration(cheapest.time.total)}."
        )
    return lines
