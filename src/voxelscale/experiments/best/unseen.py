"""What the folds of cross-validations predicted of scans they had not seen, scored under any settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.config import PredictConfig, ReadingConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import read_image
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.cases import Cases, predicted_cases
from voxelscale.evaluate.compare import Score, scores_of
from voxelscale.evaluate.evaluate import read_prediction
from voxelscale.evaluate.truth import Truth, truth_of
from voxelscale.experiments.folds import PREDICTIONS
from voxelscale.findings.depth import lung_depth
from voxelscale.geometry import Scan as Image
from voxelscale.geometry import reorient
from voxelscale.model.bundle import Bundle, read_bundle, same_task
from voxelscale.parallel import map_processes
from voxelscale.predict.case import predicted_by
from voxelscale.predict.classes import found_by
from voxelscale.predict.kept import KeptMaps, has_probabilities, maps_of_labels, read_kept
from voxelscale.predict.predictor import NearLungs

AGAIN = "run voxelscale cv again, which predicts what is missing"

FEW = 20
"""So few cases are scored in this process: others take seconds to begin."""

Scan = tuple[Path, str]
"""What identifies a scan, whatever it is called: its file or folder, and its series."""


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """A folder that `voxelscale cv` wrote.

    Attributes:
        folder: it.
        models: each fold's.
        bundle: the first of them.
        case_of: what each scan is called there.
        fold_of: the fold in which each scan is unseen.
        lacks: why other settings and averages cannot be tried on it; "": they can.
    """

    folder: Path
    models: tuple[Path, ...]
    bundle: Bundle
    case_of: Mapping[Scan, str]
    fold_of: Mapping[Scan, int]
    lacks: str

    def prediction(self, scan: Scan) -> Path:
        """The folder of a scan's prediction."""
        return self.folder / PREDICTIONS / self.case_of[scan]


def read_cross_validations(
    folders: Sequence[Path], data: DataSet
) -> tuple[list[CrossValidation], list[Source]]:
    """Cross-validations of the same cases in the same folds, and these cases.

    Raises:
        VoxelscaleError: one is not whole, or of other cases, folds, classes or channels than the first.
    """
    cases = [predicted_cases(_predictions(folder), data) for folder in folders]
    each = [_read(folder, of) for folder, of in zip(folders, cases, strict=True)]
    first = each[0]
    for other in each[1:]:
        _require_same(first, other)
    return each, list(cases[0].predicted)


def _predictions(folder: Path) -> Path:
    if not (folder / PREDICTIONS).is_dir() or not (folder / "cv.json").is_file():
        what = f"{folder}: no whole cross-validation (no {PREDICTIONS}/ and cv.json)"
        raise VoxelscaleError(what, f"run voxelscale cv STORE SCANS {folder} until all folds are done")
    return folder / PREDICTIONS


def _read(folder: Path, cases: Cases) -> CrossValidation:
    if cases.failed:
        raise cases.failed[0].error
    replace(cases, other_models=(), missing=()).warn()
    if not cases.predicted:
        raise cases.none_scored(())
    numbers = sorted(int(p.name.removeprefix("fold_")) for p in folder.glob("fold_*") if _is_fold(p))
    fold_of_case = {
        path.name: number
        for number in numbers
        for path in (folder / f"fold_{number}" / PREDICTIONS).iterdir()
        if path.is_dir()
    }
    runs = {number: folder / f"fold_{number}" / "run" for number in numbers}
    bundles = {number: read_bundle(run) for number, run in runs.items()}
    case_of, fold_of = {}, {}
    for source in cases.predicted:
        if (fold := fold_of_case.get(source.case)) is None:
            raise VoxelscaleError(f"{folder}: no fold has predicted {source.case}", AGAIN)
        if predicted_by(folder / PREDICTIONS / source.case) != bundles[fold].identity:
            what = f"{folder / PREDICTIONS / source.case}: predicted by another model than {runs[fold]}"
            raise VoxelscaleError(what, AGAIN)
        case_of[source.image, source.series] = source.case
        fold_of[source.image, source.series] = fold
    kept = all(
        has_probabilities(folder / PREDICTIONS / case, bundles[numbers[0]].classes)
        for case in case_of.values()
    )
    reduced = any(bundle.false_positives is not None for bundle in bundles.values())
    return CrossValidation(
        folder=folder,
        models=tuple(runs.values()),
        bundle=bundles[numbers[0]],
        case_of=case_of,
        fold_of=fold_of,
        lacks="was run without predict.probabilities=true"
        if not kept
        else "has false-positive reduction, which its probabilities do not show"
        if reduced
        else "",
    )


def _is_fold(path: Path) -> bool:
    return path.name.removeprefix("fold_").isdigit() and (path / PREDICTIONS).is_dir()


def _require_same(first: CrossValidation, other: CrossValidation) -> None:
    """Raise a VoxelscaleError where two are of other scans, folds, classes or channels."""
    where = f"{other.folder} and {first.folder}"
    if not same_task(first.bundle, other.bundle):
        raise VoxelscaleError(f"{where}: of other classes or channels", "compare models of one task")
    for scan in (*first.fold_of, *other.fold_of):
        known = first if scan in first.fold_of else other
        if scan not in first.fold_of or scan not in other.fold_of:
            what = f"{known.case_of[scan]} is in {known.folder} only"
            raise VoxelscaleError(
                f"{where}: of other cases: {what}", "run voxelscale cv on one data set with the same folds"
            )
        if first.fold_of[scan] != other.fold_of[scan]:
            what = f"{known.case_of[scan]} is in fold {first.fold_of[scan]} of one, {other.fold_of[scan]}"
            raise VoxelscaleError(
                f"{where}: of other folds: {what} of the other", "prepare both with the same prepare.splits"
            )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be scored: the mean of some cross-validations' probabilities, under some settings.

    Attributes:
        members: their numbers; one where it is no mean.
        settings: of prediction; None: as it was predicted, which only one can be.
    """

    members: tuple[int, ...]
    settings: PredictConfig | None = None


@dataclass(frozen=True, kw_only=True)
class _Case:
    source: Source
    folders: tuple[Path, ...]
    asked: tuple[Asked, ...]


Scored = NDArray[Any]
"""(asked, classes, cases) of `Score`."""


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """The unseen predictions of cross-validations of the same cases.

    Attributes:
        each: the cross-validations.
        sources: the cases, by the names of the first.
        reading: how they are read.
    """

    each: tuple[CrossValidation, ...]
    sources: tuple[Source, ...]
    reading: ReadingConfig

    @property
    def classes(self) -> Classes:
        """Of all of them."""
        return self.each[0].bundle.classes

    @property
    def folds(self) -> NDArray[np.int64]:
        """(cases,) the fold in which each is unseen."""
        return np.asarray([self.each[0].fold_of[s.image, s.series] for s in self.sources])

    @property
    def patients(self) -> NDArray[np.int64]:
        """(cases,) whose each is, by number."""
        return np.unique([source.patient for source in self.sources], return_inverse=True)[1]

    def settings(self, members: Sequence[int]) -> PredictConfig:
        """Of prediction, as one model of these cross-validations has it."""
        return replace(self.each[members[0]].bundle.config.predict, probabilities=False)

    def score(self, asked: Sequence[Asked]) -> Scored:
        """Score all cases.

        Raises:
            VoxelscaleError: a case cannot be read.
        """
        cases = [
            _Case(
                source=source,
                folders=tuple(one.prediction((source.image, source.series)) for one in self.each),
                asked=tuple(asked),
            )
            for source in self.sources
        ]
        lungs = tuple(one.bundle.looks_at_lungs for one in self.each)
        work = partial(score_case, classes=self.classes, reading=self.reading, lungs=lungs)
        made = map_processes(
            work,
            cases,
            label="score",
            name=lambda case: case.source.case,
            here=len(cases) <= FEW,
        )
        found: dict[str, list[list[Score]]] = {}
        for case, scores in made:
            if isinstance(scores, VoxelscaleError):
                raise scores
            found[case.source.case] = scores
        table = np.empty((len(asked), len(self.classes.names), len(cases)), object)
        for at, source in enumerate(self.sources):
            for row, scores_of_classes in enumerate(found[source.case]):
                table[row, :, at] = scores_of_classes
        return table


def score_case(
    case: _Case, *, classes: Classes, reading: ReadingConfig, lungs: Sequence[bool]
) -> list[list[Score]]:
    """A case's score of each class, for each that is asked.

    Args:
        lungs: whether each cross-validation looks at the lungs where its settings do not say.

    Raises:
        VoxelscaleError: the truth or a prediction cannot be read.
    """
    truth = truth_of(case.source, reading)
    near = _Near(case.source, reading, truth)
    means: dict[tuple[int, ...], Any] = {}
    scores = []
    for one in case.asked:
        settings = one.settings
        if settings is None:
            (folder,) = (case.folders[member] for member in one.members)
            scores.append(scores_of(truth, *read_prediction(folder, case.source, truth)))
            continue
        if one.members not in means:
            means = {one.members: _mean(case, one.members, classes, truth)}  # one at a time in memory
        looks = any(lungs[m] for m in one.members) if settings.lungs is None else settings.lungs
        keep = near.rule() if looks else None
        mean = means[one.members]
        findings, stored = found_by(settings, truth.case, classes, mean, truth.mask.grid, keep=keep)
        if classes.regions:  # a mask cannot hold every overlap, and it is masks that are scored
            stored = classes.of_written(classes.written(stored))
        scores.append(scores_of(truth, stored, findings))
    return scores


def _mean(case: _Case, members: Sequence[int], classes: Classes, truth: Truth) -> Any:
    """The mean probability of the only class, or the maps of all; of one without any, its mask."""
    maps = [_maps(case.folders[member], classes, case.source, truth) for member in members]
    if not classes.single:
        return maps
    mean = maps[0].output(0)
    for other in maps[1:]:
        mean = mean + other.output(0)
    return mean / len(maps)


def _maps(folder: Path, classes: Classes, source: Source, truth: Truth) -> KeptMaps:
    if has_probabilities(folder, classes):
        return read_kept(folder, classes, source.image, truth.mask)
    return maps_of_labels(read_prediction(folder, source, truth)[0], classes, truth.mask.grid)


class _Near:
    """Which findings lie near the lungs, as predict asks; the image is read when first needed."""

    def __init__(self, source: Source, reading: ReadingConfig, truth: Truth) -> None:
        self._source, self._reading, self._truth = source, reading, truth
        self._known = False
        self._depth: Image | None = None

    def rule(self) -> NearLungs | None:
        """None where no lungs are found."""
        if not self._known:
            image = reorient(read_image(self._source, self._reading))
            self._known, self._depth = True, lung_depth(image)
        return None if self._depth is None else NearLungs(self._depth, self._truth.mask.grid)


def lacking(each: Sequence[CrossValidation], names: Sequence[str]) -> str:
    """Why averages and thresholds are left out, in one line; "" where they are not."""
    for one, name in zip(each, names, strict=True):
        if one.lacks:
            return f"{name} {one.lacks}: no averages and no thresholds"
    return ""
