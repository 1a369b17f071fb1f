"""Tables of what came out, and which learning rate was the best."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.evaluate.bootstrap import percentile_interval
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, froc, pool, resampled

RESAMPLES = 10_000
FEWER = 2_000
"""Resamples of FROC curves, which take longer."""
Key = tuple[str, tuple[str, ...], float]
"""Contender, settings, budget."""


def best_rate(results: list[dict[str, Any]], name: str, settings: tuple[str, ...], budget: float) -> float:
    """The factor of the learning rate with the highest Dice on the cases that choose."""
    rates = _by_rate(results, "choose").get((name, settings, budget))
    if not rates:
        raise SystemExit(f"{name} {settings} {budget:g} s: no learning rate has been chosen")
    return max(rates, key=lambda rate: _mean(rates[rate], "dice"))


def show(results: list[dict[str, Any]], data: str, fold: int, on: str) -> None:
    """Print a row for each contender and budget at its best rate, and its difference from ours."""
    print(f"\n{data}, fold {fold}, {'cases that choose' if on == 'choose' else 'judge cases'}")
    columns = (
        f"{'budget':>6} {'rate':>5} {'Dice':>6} {'labels':>13} {'surface':>7} {'less ours (95 %)':>24}"
    )
    print(f"{columns} {'updates':>7} {'samples':>7} {'of rates':>20}  contender")
    table = _by_rate(results, on)
    for budget in sorted({key[2] for key in table}):
        rows = [(key, _best(table, key)) for key in table if key[2] == budget]
        rows.sort(key=lambda row: -_mean(row[1], "dice"))
        reference = next((runs for (name, *_), runs in rows if name == "ours"), [])
        for key, runs in rows:
            _row(key, runs, table[key], reference)


def _row(
    key: Key,
    runs: list[dict[str, Any]],
    rates: dict[float, list[dict[str, Any]]],
    reference: list[dict[str, Any]],
) -> None:
    name, settings, budget = key
    labels = np.mean([np.mean(run["score"]["dice"], axis=0) for run in runs], axis=0)
    updates = runs[0]["updates"]
    each = " ".join(f"{_mean(rates[rate], 'dice'):.4f}" for rate in sorted(rates))
    apart = "" if runs is reference or not reference else difference(runs, reference)
    print(
        f"{budget:6.0f} {runs[0]['job']['rate']:5.2f} {_mean(runs, 'dice'):6.4f} "
        f"{' '.join(f'{value:.4f}' for value in labels):>13} {_mean(runs, 'surface_dice_1mm'):7.4f} "
        f"{apart:>24} {updates:7} {updates * runs[0]['batch']:7} {each:>20}  "
        f"{name} {' '.join(settings)}"
    )
    if "matches" in runs[0]["score"]:
        print(f"{'':12} {_detection(runs, reference)}")


def _detection(runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """CPM and sensitivity at 1 false positive per scan, with a bootstrap over scans and seeds together, and
    how much they are less those of the reference, in pairs of scans."""
    once, sampled = _detected(runs)
    theirs = _detected(reference)[1] if reference and reference is not runs else None
    words = []
    for number, name in enumerate(("CPM", "sensitivity at 1")):
        words.append(f"{name} {once[number]:.3f} {_limits(sampled[number])}")
        if theirs is not None:
            apart = sampled[number] - theirs[number]
            words.append(f"less ours {np.nanmean(apart):+.3f} {_limits(apart)}")
    return ", ".join(words)


def _detected(runs: list[dict[str, Any]]) -> tuple[list[float], list[NDArray[np.float64]]]:
    """Means over seeds of both figures; and ``(FEWER,)`` of each for samples of scans and seeds."""
    matches = [[Matches(**one) for one in run["score"]["matches"]] for run in runs]
    curves = [froc(scans) for scans in matches]
    found = resampled([pool(scans) for scans in matches], FEWER)  # the same scans for every contender
    seeds = np.random.default_rng(0).integers(len(runs), size=(len(runs), FEWER))
    drawn = found[seeds, np.arange(FEWER)].mean(0)
    once = [curve.cpm for curve in curves], [curve.sensitivity_at(1) for curve in curves]
    return [float(np.mean(each)) for each in once], [drawn.mean(1), drawn[:, OPERATING_POINTS.index(1)]]


def _limits(values: NDArray[np.float64]) -> str:
    low, high = percentile_interval(values) or (np.nan, np.nan)
    return f"({low:.3f} to {high:.3f})"


def difference(runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> str:
    """Of the Dice, with a paired bootstrap over cases and seeds together."""
    ours, theirs = _matrix(reference), _matrix(runs)
    random = np.random.default_rng(0)
    cases = random.integers(ours.shape[1], size=(RESAMPLES, ours.shape[1]))
    means = []
    for values in (theirs, ours):
        seeds = random.integers(len(values), size=(RESAMPLES, len(values)))
        means.append(np.asarray([values[s][:, c].mean() for s, c in zip(seeds, cases, strict=True)]))
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return f"{theirs.mean() - ours.mean():+.4f} ({low:+.4f} {high:+.4f})"


def _matrix(runs: list[dict[str, Any]]) -> NDArray[np.float64]:
    """(seeds, cases) mean Dice of the labels."""
    return np.asarray([np.mean(run["score"]["dice"], axis=1) for run in runs])


def _mean(runs: list[dict[str, Any]], what: str) -> float:
    return float(np.mean([np.mean(run["score"][what]) for run in runs]))


def _best(table: dict[Key, dict[float, list[dict[str, Any]]]], key: Key) -> list[dict[str, Any]]:
    rates = table.get(key, {})
    return max(rates.values(), key=lambda runs: _mean(runs, "dice"), default=[])


def _by_rate(results: list[dict[str, Any]], on: str) -> dict[Key, dict[float, list[dict[str, Any]]]]:
    """Runs, one a seed, of each rate of each contender."""
    table: dict[Key, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        job = result["job"]
        if job["on"] == on:
            key = (job["contender"], tuple(job["settings"]), job["budget"])
            table[key][job["rate"]].append(result)
    return table
