"""Cross-validation: every fold trained, its validation scans predicted, all of them evaluated as one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from voxelscale.config import Config, load_stored
from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.files import whole_folder, write_atomic
from voxelscale.ranks.place import fill
from voxelscale.train.track import Tracking

if TYPE_CHECKING:
    from voxelscale.dataset import DataSet
    from voxelscale.dataset.listing import Source

PREDICTIONS, EVALUATION = "predictions", "evaluation"


def run_folds(config: Config, store: Path, data: DataSet, out: Path, folds: Sequence[int]) -> bool:
    """Train the folds one after another in ``<out>/fold_<k>/run``; predict each one's validation scans.

    Run again it goes on where it stopped, and keeps what is done. `voxelscale.experiments.at_once` has
    several of them trained at a time.

    Args:
        config: of each training, but for ``data.fold``.
        data: the scans that the store was made of.
        folds: numbers from 0.

    Returns:
        whether all are done; False where a training was asked to stop.

    Raises:
        VoxelscaleError: the store has no such folds, or a step failed.
    """
    from voxelscale.model.bundle import read_bundle
    from voxelscale.predict.predict import predict
    from voxelscale.train.launch import start

    check(config, out)
    unseen = {fold: _unseen(store, data, fold) for fold in folds}
    for fold, sources in unseen.items():
        run = out / f"fold_{fold}" / "run"
        notice(f"fold {fold}: {count(len(sources), 'case')} to predict")
        if not start(replace(config, data=replace(config.data, fold=fold)), store, run):
            return False
        outcome = predict(
            sources, read_bundle(run), config.predict, _predictions(out, fold), config.reading
        )
        if outcome.failed:
            case, message, hint = outcome.failed[0]
            raise VoxelscaleError(f"fold {fold}: {case}: {message}", hint)
    return True


def missing_folds(store: Path, data: DataSet, out: Path) -> list[int]:
    """The store's folds of which a validation scan has not been predicted."""
    from voxelscale.store import open_store

    return [
        fold
        for fold in range(len(open_store(store).folds))
        if any(
            not (_predictions(out, fold) / source.case / "findings.json").is_file()
            for source in _unseen(store, data, fold)
        )
    ]


def evaluate_folds(store: Path, data: DataSet, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Put the predictions of all folds together in ``<out>/predictions`` and evaluate them as one.

    No scan was predicted by a model that was trained on it. But where a fold's best validation was kept,
    its validation scans chose it; `train.validate_every=0` keeps the last model, which nothing chose.
    Writes ``<out>/evaluation`` and ``<out>/cv.json``: the folds, and of each class the mean Dice and CPM
    over all scans with intervals.

    Returns:
        what `voxelscale.evaluate.evaluate.evaluate_folder` does, and of each fold its number, cases, and
        mean Dice over cases and classes (None where all masks are empty), and of each class of several.
    """
    from voxelscale.evaluate.evaluate import evaluate_folder
    from voxelscale.predict.record import record_cases
    from voxelscale.store import open_store

    each = {fold: _unseen(store, data, fold) for fold in range(len(open_store(store).folds))}
    with _alone(out):
        with whole_folder(out / PREDICTIONS) as together:
            record_cases(together, [source.case for sources in each.values() for source in sources])
            data.names.keep_in(together)
            for fold, sources in each.items():
                for source in sources:
                    folder = _predictions(out, fold) / source.case
                    shutil.copytree(folder, together / source.case, copy_function=_link)
        summary = evaluate_folder(out / PREDICTIONS, data, out / EVALUATION, one_model=False)
    rows = [_fold(fold, sources, summary) for fold, sources in each.items()]
    write_atomic(out / "cv.json", json.dumps({"folds": rows, **_pooled(summary)}, indent=1))
    return summary, rows


def _fold(fold: int, sources: Sequence[Source], summary: Mapping[str, Any]) -> dict[str, Any]:
    """A fold's number and cases, each class's mean Dice where there are several, and the mean Dice."""
    names = {source.case for source in sources}
    own = [row for row in summary["cases"] if row["case"] in names and row["dice"] is not None]
    row: dict[str, Any] = {"fold": fold, "cases": len(names), "dice": _mean([one["dice"] for one in own])}
    if "classes" in summary:
        row["classes"] = {
            name: _mean([one["dice"] for one in own if one["class"] == name]) for name in summary["classes"]
        }
        row["dice"] = _mean([dice for dice in row["classes"].values() if dice is not None])
    return row


def _pooled(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Over all folds: of each class the mean Dice and the CPM, with intervals; of several the mean Dice."""
    classes = {
        name: {
            "dice": own["dice"],
            "cpm": own["froc"]["cpm"],
            "cpm_interval": own["froc"]["cpm_interval"],
            "sensitivity_at_1_fp": own["sensitivity_at_1_fp"],
        }
        for name, own in summary.get("classes", {"": summary}).items()
    }
    if "classes" in summary:
        return {"classes": classes, "mean_dice": summary["mean_dice"]}
    return classes[""]


def log_figures(tracking: Tracking, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Log what `evaluate_folds` returned in the trackers: figures, and no case."""
    for row in rows:
        if row["dice"] is not None:
            tracking.log({"fold/dice": row["dice"]}, row["fold"])
    pooled = _pooled(summary)
    for name, own in pooled.get("classes", {"": pooled}).items():
        figures = {"dice": own["dice"]["mean"], "cpm": own["cpm"]}
        for key, bounds in (("dice", own["dice"]["interval"]), ("cpm", own["cpm_interval"])):
            figures |= dict(zip((f"{key}_low", f"{key}_high"), bounds or (), strict=False))
        known = {key: value for key, value in figures.items() if value is not None}
        tracking.log({"/".join(filter(None, ("cv", name, key))): v for key, v in known.items()}, len(rows))
    if "mean_dice" in pooled and pooled["mean_dice"]["mean"] is not None:
        tracking.log({"cv/mean_dice": pooled["mean_dice"]["mean"]}, len(rows))
    tracking.done = True


def _link(file: str, link: str) -> None:
    """The same file under another name: probabilities are large. Where that is not possible, a copy."""
    try:
        os.link(file, link)
    except OSError:
        shutil.copy2(file, link)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Of several jobs that end together each evaluates in its turn."""
    with (out / ".evaluating").open("w") as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def check(config: Config, out: Path) -> None:
    """Raise a VoxelscaleError where a config, or how the command was started, is not for several folds.

    Nor is a config other than that of the folds that are there: they are evaluated as one.
    """
    from voxelscale.train.launch import check_claim

    fill()
    if "RANK" in os.environ:
        hint = "start it alone, with train.ranks processes; or each fold as a job: --folds 0"
        raise VoxelscaleError(f"{out}: cv was started as one of several ranks", hint)
    if config.data.fold is not None:
        raise VoxelscaleError(
            f"data.fold is {config.data.fold}, but cv trains each fold", "name them by --folds"
        )
    for begun in out.glob("fold_*/run/config.yaml"):
        fold = load_stored(begun).data.fold
        check_claim(begun.parent, replace(config, data=replace(config.data, fold=fold)))


def _unseen(store: Path, data: DataSet, fold: int) -> list[Source]:
    """The validation scans of a fold.

    Raises:
        VoxelscaleError: the store has no such fold, or its scans are not in the data set.
    """
    from voxelscale.store.fingerprint import open_fold

    wanted = {info.case for info in open_fold(store, fold).split("val")}
    sources = [source for source in data.scans if source.case in wanted]
    if len(sources) < len(wanted):
        lost = min(wanted - {source.case for source in sources})
        hint = "name the data set that the store was prepared from, with the same reading.names"
        raise VoxelscaleError(f"{data.path}: holds no {lost}, which is in {store}", hint)
    return sources


def _predictions(out: Path, fold: int) -> Path:
    return out / f"fold_{fold}" / PREDICTIONS
