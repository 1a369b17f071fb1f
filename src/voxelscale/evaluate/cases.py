"""Which cases are scored, and the same work on each of them; one case's fault does not stop the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from voxelscale.console import count, first_and_more, notice, warn
from voxelscale.dataset import DataSet, Source
from voxelscale.errors import VoxelscaleError
from voxelscale.parallel import map_processes
from voxelscale.predict.case import made_from_this, predicted_by
from voxelscale.predict.record import RECORD, read_record

Made = TypeVar("Made")

MASK, FINDINGS = "mask.nii.gz", "findings.json"
"""What a case's prediction consists of."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case that could not be used, and why."""

    source: Source
    error: VoxelscaleError

    @property
    def for_terminal(self) -> dict[str, str]:
        """For the person at the terminal: the file is named."""
        return {"case": self.source.case, "error": self.error.message, "hint": self.error.hint}

    @property
    def kept(self) -> dict[str, str]:
        """For a file that others see: without paths, which may be named after the patient."""
        return {**self.for_terminal, "error": self.source.without_paths(self.error.message)}


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The cases of a data set whose truth is known, and the predictions of them.

    Attributes:
        predictions, data: where they are.
        predicted: cases with truth and prediction.
        failed: cases that were to be predicted and are not, or only in part.
        missing: names of cases with truth that have no prediction, those that failed not among them.
        recorded: whether the folder of predictions says what it was to hold.
        without_truth: names of predicted cases that have no mask and do not count as healthy.
        unknown: names of predictions of which the data set has no case.
        unfinished: predicted cases that do not say by which model, where others do.
        other_models: cases predicted by another model than most.
        stale: cases predicted from other files than the scans here.
        twice: cases that are the same scan as another one.
        counted_as_empty: cases among `predicted` that have no prediction.
    """

    predictions: Path
    data: Path
    predicted: tuple[Source, ...]
    failed: tuple[Failure, ...]
    missing: tuple[str, ...]
    recorded: bool
    without_truth: tuple[str, ...]
    unknown: tuple[str, ...]
    unfinished: tuple[str, ...]
    other_models: tuple[str, ...]
    stale: tuple[str, ...]
    twice: tuple[str, ...]
    counted_as_empty: tuple[str, ...]

    def coverage(self, scored: int) -> dict[str, Any]:
        """How much of the data set the figures are of, as plain values for JSON."""
        names = (
            *("missing", "without_truth", "unknown"),
            *("unfinished", "other_models", "stale", "twice", "counted_as_empty"),
        )
        return {
            "with_truth": len(self.predicted) + len(self.failed) + len(self.missing),
            "scored": scored,
            **{name: list(getattr(self, name)) for name in names},
        }

    def warn(self) -> None:
        """Warn of what the figures leave out, and of predictions that do not belong together."""
        if self.missing:
            # Where there is a record, these were never asked for: training scans, mostly.
            what = f"{self.predictions}: no prediction of {_some('case with truth', self.missing)}"
            (notice if self.recorded else warn)(what)
        if self.counted_as_empty:
            cases = _some("case", self.counted_as_empty)
            warn(f"{self.predictions}: no prediction of {cases}: scored as if nothing was found")
        if self.without_truth:
            warn(
                f"{self.data}: left out {_some('predicted case without a mask', self.without_truth)}; "
                "if such scans are healthy, set reading.allow_empty=true to count them"
            )
        if self.unknown:
            warn(f"{self.data}: left out {_some('prediction without a case there', self.unknown)}")
        if self.unfinished:
            what = _some("prediction", self.unfinished)
            warn(f"{self.predictions}: unfinished, or by another program (no case.json): {what}")
        if self.other_models:
            what = _some("prediction", self.other_models)
            warn(f"{self.predictions}: several models; by another one than most: {what}")
        if self.stale:
            warn(
                f"{self.predictions}: {_some('prediction', self.stale)} of other files than the scans "
                "here, or of these before they changed; if they changed, run voxelscale predict again"
            )
        if self.twice:
            names = first_and_more(self.twice)
            warn(f"{self.data}: one scan under several names, counted each time: {names}")

    def none_scored(self, failed: Sequence[Failure]) -> VoxelscaleError:
        """The error where not one case could be scored."""
        what = f"{self.predictions}: no prediction of a case of {self.data} that has a mask"
        if self.without_truth:
            hint = "add the masks, or set reading.allow_empty=true if scans without one are healthy"
        elif self.unknown:
            what += f", but {_some('prediction', self.unknown)}"
            hint = "name the data set that was predicted, with reading.names and reading.name_key as then"
        else:
            hint = "run voxelscale predict on that data set first"
        return none_usable(what, failed, hint)


def predicted_cases(
    predictions: Path,
    data: DataSet,
    *,
    needs: Sequence[str] = (MASK, FINDINGS),
    missing_is_empty: bool = False,
) -> Cases:
    """Match predictions with the cases of a data set whose truth is known.

    The truth is known of a case with a label, and with ``reading.allow_empty`` of one without, too: it is
    healthy. A case without a prediction fails where `predict` recorded that it was to be predicted.

    Args:
        predictions: what `voxelscale predict` wrote.
        needs: the files that a prediction must have.
        missing_is_empty: a case without a prediction counts as predicted.
    """
    listed = data.named_as_in(predictions).cases
    there = {path.name for path in _folders(predictions) if _has_any(path)}
    record = read_record(predictions)
    known = [s for s in listed if s.labels or s.fault or data.reading.allow_empty]
    predicted, failed, missing = [], [], []
    for source in known:
        fault = _half(predictions / source.case, needs) if source.case in there else None
        if fault is None and (source.case in there or missing_is_empty):
            predicted.append(source)
        elif fault is not None or (record is not None and source.case in record.cases):
            failed.append(Failure(source=source, error=fault or _lost(predictions, source)))
        else:
            missing.append(source.case)
    here = [source for source in predicted if source.case in there]
    by = {source.case: predicted_by(predictions / source.case) for source in here}
    models = Counter(model for model in by.values() if model)
    most = max(models, key=lambda model: models[model], default="")
    scans = Counter((s.image, s.series, s.files) for s in predicted)
    return Cases(
        predictions=predictions,
        data=data.path,
        predicted=tuple(predicted),
        failed=tuple(failed),
        missing=tuple(missing),
        recorded=record is not None,
        without_truth=tuple(s.case for s in listed if s.case in there - {k.case for k in known}),
        unknown=tuple(sorted(there - {s.case for s in listed})),
        unfinished=tuple(case for case, model in by.items() if most and not model),
        other_models=tuple(case for case, model in by.items() if model not in ("", most)),
        stale=tuple(s.case for s in here if made_from_this(predictions / s.case, s) is False),
        twice=tuple(s.case for s in predicted if scans[s.image, s.series, s.files] > 1),
        counted_as_empty=tuple(s.case for s in predicted if s.case not in there),
    )


def _folders(predictions: Path) -> list[Path]:
    try:
        return sorted(path for path in predictions.iterdir() if path.is_dir())
    except OSError:
        return []


def _has_any(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (MASK, FINDINGS))


def _half(folder: Path, needs: Sequence[str]) -> VoxelscaleError | None:
    """The error of a prediction that lacks a file."""
    lacks = [file for file in needs if not (folder / file).is_file()]
    if not lacks:
        return None
    return VoxelscaleError(f"{folder}: holds no {' and no '.join(lacks)}", "run voxelscale predict again")


def _lost(predictions: Path, source: Source) -> VoxelscaleError:
    return VoxelscaleError(
        f"{predictions / source.case}: no prediction, though {RECORD} lists it",
        f"run voxelscale predict again; or drop the case from {predictions / RECORD}",
    )


def _some(noun: str, cases: Sequence[str]) -> str:
    """How many, and the first names."""
    first, _, rest = noun.partition(" with")
    plural = f"{first}s with{rest}" if rest else ""
    return f"{count(len(cases), noun, plural)} ({first_and_more(cases)})"


def each_case(
    label: str, sources: Sequence[Source], work: Callable[[Source], Made]
) -> tuple[dict[str, Made], list[Failure]]:
    """What was made of each case, by name in the order of `sources`, and the failures.

    Args:
        label: what the progress bar says.
    """
    made: dict[str, Made] = {}
    failed = []
    for source, result in map_processes(work, sources, label=label, name=lambda one: one.case, here=True):
        if isinstance(result, VoxelscaleError):
            failed.append(Failure(source=source, error=result))
        else:
            made[source.case] = result
    return made, failed


def none_usable(what: str, failed: Sequence[Failure], hint: str) -> VoxelscaleError:
    """The error where not one case could be used, with the first failure's reason."""
    reason = f": {failed[0].error.message}" if failed else ""
    return VoxelscaleError(f"{what}{reason}", hint)
