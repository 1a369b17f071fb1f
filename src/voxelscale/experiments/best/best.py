"""``voxelscale best``: which of several configurations, alone or averaged, and with which settings.

All is judged on unseen predictions: each scan's are of models that were not trained on it. What is then
chosen on these same scans, the settings of prediction, is judged once more by leaving out a fold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from voxelscale.dataset import DataSet
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.bootstrap import RESAMPLES
from voxelscale.experiments.best.figures import METRICS, Metric, choose, compared, rule
from voxelscale.experiments.best.page import write_best_page
from voxelscale.experiments.best.settings import tune
from voxelscale.experiments.best.unseen import Asked, Unseen, lacking, read_cross_validations
from voxelscale.files import write_atomic
from voxelscale.tune.ensemble import ensemble


def best(
    folders: Sequence[Path], data: DataSet, out: Path, metric: Metric = "dice", seed: int = 0
) -> dict[str, Any]:
    """Compare configurations, choose one, find its settings, write one model of all its folds.

    Args:
        folders: what `voxelscale cv` wrote of each, of the same cases in the same folds.
        data: the data set with the true masks.
        out: gets ``model.vxs``, ``best.json`` and ``best.html``.
        metric: what is compared and tuned: the mean Dice over classes and cases, or the classes' mean CPM.
        seed: of the bootstrap over patients.

    Returns:
        the content of ``best.json`` (docs/folds.md).

    Raises:
        VoxelscaleError: a folder is no whole cross-validation, or two do not go together.
    """
    names = _names(folders)
    each, sources = read_cross_validations(folders, data)
    unseen = Unseen(each=tuple(each), sources=tuple(sources), reading=data.reading)
    left_out = lacking(each, names)
    candidates = _candidates(len(each), averages=not left_out)
    asked = [
        Asked(members=members, settings=None if left_out else unseen.settings(members))
        for members in candidates
    ]
    scores = unseen.score(asked)
    rows = compared(scores, [len(members) > 1 for members in candidates], unseen.patients, metric, seed)
    if all(row[metric] is None for row in rows):
        what = f"{folders[0]}: these cases have no {METRICS[metric]}"
        raise VoxelscaleError(what, "choose another --metric, or cases with lesions")
    for row, members in zip(rows, candidates, strict=True):
        row["name"] = " + ".join(names[member] for member in members)
    chosen = choose(rows, metric)
    members = candidates[chosen]
    settings, tuning = tune(unseen, members, scores[chosen], metric, kept=not left_out, seed=seed)
    models = [model for member in members for model in each[member].models]
    ensemble(models, out / "model.vxs", settings)
    result = {
        "metric": metric,
        "rule": rule(metric),
        "cases": len(sources),
        "patients": int(unseen.patients.max()) + 1,
        "folds": sorted(set(unseen.folds.tolist())),
        "classes": list(unseen.classes.names),
        "left_out": left_out,
        "configurations": rows,
        "chosen": rows[chosen]["name"],
        "networks": len(models),
        "tuning": tuning,
        "seed": seed,
        "resamples": RESAMPLES,
    }
    write_atomic(out / "best.json", json.dumps(result, indent=1))
    write_best_page(result, out / "best.html")
    return result


def _candidates(number: int, *, averages: bool) -> list[tuple[int, ...]]:
    """Each alone, then each two."""
    singles: list[tuple[int, ...]] = [(member,) for member in range(number)]
    return [*singles, *combinations(range(number), 2)] if averages else singles


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; with as many of those above them as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if twice := [folder for folder, part in zip(folders, parts, strict=True) if parts.count(part) > 1]:
        raise VoxelscaleError(f"{twice[0]}: named twice", "name each folder of voxelscale cv once")
    depth = next(
        n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)
    )
    return ["/".join(part[-depth:]) for part in parts]
