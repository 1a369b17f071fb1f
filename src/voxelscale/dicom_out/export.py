"""A case's prediction as DICOM objects and other files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale import __version__
from voxelscale.classes import LESION, Classes, UnknownValues
from voxelscale.config import ReadingConfig
from voxelscale.config.export import ExportConfig
from voxelscale.console import Progress, first_of, notice, warn
from voxelscale.dataset.source import Source
from voxelscale.dicom_out import rtstruct, seg, sr
from voxelscale.dicom_out.codes import Concept, concept_of
from voxelscale.dicom_out.objects import Algorithm, finished, plain, uid_of
from voxelscale.dicom_out.original import Original, read_original
from voxelscale.dicom_out.segments import (
    Part,
    Segment,
    class_maps,
    on_slices,
    parts_of,
    whole_classes,
    with_probabilities,
)
from voxelscale.errors import HOSPITAL_EXTRA, VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.findings import Finding, read_prediction
from voxelscale.formats import SAME_PLACE_MM, read_label
from voxelscale.predict.case import as_predicted, made_from_this, probability_file
from voxelscale.report.cases import CaseScans

MOST_NAMED = 10
"""Classes that a message names at most."""

AGAIN = "run voxelscale predict again"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What was predicted of a case, and where its scan came from.

    Attributes:
        folder: the case's.
        source: the scan.
        reading: how it was read.
        findings: most confident first.
        facts: what ``findings.json`` says beside them.
        stored: labels (z, y, x) on the scan's lattice.
    """

    folder: Path
    source: Source
    reading: ReadingConfig
    original: Original
    findings: list[Finding]
    facts: dict[str, Any]
    classes: Classes
    stored: NDArray[Any]
    options: ExportConfig

    @property
    def algorithm(self) -> Algorithm:
        """What predicted it."""
        version, model = (str(self.facts.get(key, "")) for key in ("voxelscale", "model"))
        return Algorithm(model=plain(model), version=plain(version) or __version__)

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """Each class in codes."""
        lungs = self.facts.get("lungs")
        chest = isinstance(lungs, dict) and bool(lungs.get("found"))
        return {name: concept_of(name, self.options.codes, chest=chest) for name in self.classes.names}

    @cached_property
    def parts(self) -> list[Part]:
        """The voxels of each finding that the mask has, and of each class what is no finding.

        Raises:
            VoxelscaleError: findings and mask contradict each other.
        """
        merge_mm = self.facts.get("merge_mm", 0.0)
        try:
            merge_mm = float(merge_mm)
            parts = parts_of(self.stored, self.classes, self.findings, self.original.grid, merge_mm)
            self._warn_of_lost({part.rank for part in parts})
            return parts
        except (TypeError, ValueError) as error:
            raise VoxelscaleError(f"{self.original.case}: {error}", AGAIN) from None

    def _warn_of_lost(self, shown: Collection[int | None]) -> None:
        """Say which findings of the mask have no part, as overlapping regions run together in it."""
        thresholds = self.facts.get("thresholds")
        least = thresholds.get("threshold") if isinstance(thresholds, dict) else None
        if not self.classes.regions or not isinstance(least, float):
            return
        lost = [
            f"{finding.label} {rank} ({finding.probability:.2f})"
            for rank, finding in enumerate(self.findings, start=1)
            if rank not in shown and finding.score is not None and finding.score >= least
        ]
        if lost:
            what = f"not in the report, as they run together with others: {', '.join(lost)}"
            warn(f"{self.original.case}: {what}")

    @cached_property
    def of_findings(self) -> list[Segment]:
        """A segment of each part."""
        return self._on_slices(self.parts, per_finding=True)

    @cached_property
    def segments(self) -> list[Segment]:
        """A segment of each finding, or of each class, as the options say."""
        if self.options.segments == "finding":
            return self.of_findings
        return self._on_slices(whole_classes(self.stored, self.classes), per_finding=False)

    def _on_slices(self, parts: Sequence[Any], *, per_finding: bool) -> list[Segment]:
        return on_slices(
            parts,
            self.original,
            self.classes,
            self.concepts,
            self.findings,
            per_finding=per_finding,
            model=self.algorithm.model,
        )

    @property
    def probable(self) -> list[Segment]:
        """The segments with probabilities.

        Raises:
            VoxelscaleError: they were not kept.
        """
        maps = {}
        for name in self.classes.names:
            path = self.folder / probability_file(self.classes, name)
            if not path.is_file():
                hint = "predict again with --set predict.probabilities=true, or with --dicom-out"
                raise VoxelscaleError(f"{self.original.case}: its probabilities were not kept", hint)
            maps[name] = _on_scan(path, self.original).astype(np.uint8)
        if self.options.segments == "class":
            return class_maps(maps, self.original, self.concepts, self.algorithm.model)
        return with_probabilities(self.of_findings, maps, self.original)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of an export.

    Attributes:
        files: written, by case.
        failed: case, error and hint of each that is not.
    """

    files: dict[str, list[Path]]
    failed: tuple[tuple[str, str, str], ...]


def export_cases(
    predictions: Path,
    sources: Sequence[Source],
    out: Path,
    kinds: Sequence[str],
    options: ExportConfig,
    reading: ReadingConfig,
) -> Exported:
    """`export_case` of each; what cannot be exported does not keep the others from it."""
    files: dict[str, list[Path]] = {}
    failed = []
    with Progress("export", len(sources)) as progress:
        for done, source in enumerate(sources, start=1):
            try:
                files[source.case] = export_case(predictions, source, out, kinds, options, reading)
            except VoxelscaleError as error:
                failed.append((source.case, source.without_paths(error.message), error.hint))
            progress.update(done, source.case)
    return Exported(files=files, failed=tuple(failed))


def export_case(
    prediction_folder: Path,
    source: Source,
    out: Path,
    kinds: Sequence[str],
    options: ExportConfig | None = None,
    reading: ReadingConfig | None = None,
) -> list[Path]:
    """Write a case's prediction as DICOM, and as a page, into ``<out>/<case>/``.

    The same prediction gives the same bytes.

    Where nothing was found there is no SEG and no RTSTRUCT, as neither can be empty; the SR says so.
    Everything is made before the first file is written. Files of these kinds from an earlier export that
    are no longer due are removed.

    Args:
        prediction_folder: what ``voxelscale predict`` wrote, with a folder of each case.
        source: the case; its scan must have come as DICOM.
        kinds: of `voxelscale.dicom_out.kinds.ALL_KINDS`.
        options: None: the defaults.
        reading: how images are read, but for what the prediction itself says; None: the defaults.

    Returns:
        the files, in that order.

    Raises:
        VoxelscaleError: the scan did not come as DICOM, the prediction is missing, of another scan or of
            another state of its files, or a file cannot be written.
    """
    check_installed()
    prediction = read_predicted(prediction_folder, source, options or ExportConfig(), reading)
    made = _made(prediction, kinds)
    folder = out / source.case
    for kind in kinds:
        for old in (folder / f"{kind}.dcm", *folder.glob(f"{kind}_*.dcm")):
            if old.name not in made:
                old.unlink(missing_ok=True)
    for name, content in made.items():
        write_atomic(folder / name, content)
    if not prediction.segments and set(kinds) & {"seg", "rtstruct"}:
        notice(f"{source.case}: nothing found: no SEG and no RTSTRUCT")
    return [folder / name for name in made]


def check_installed() -> None:
    """Raise a VoxelscaleError where highdicom is not installed."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise VoxelscaleError(
            "DICOM is written by highdicom, which is not installed", HOSPITAL_EXTRA
        ) from None


def read_predicted(
    predictions: Path, source: Source, options: ExportConfig, reading: ReadingConfig | None = None
) -> Prediction:
    """What was predicted of a case, on the slices of its scan; arguments and errors as of `export_case`."""
    folder = predictions / source.case
    if not (folder / "findings.json").is_file():
        raise VoxelscaleError(
            f"{source.case}: was not predicted in {predictions}", "run voxelscale predict first"
        )
    findings, facts = read_prediction(folder / "findings.json")
    if made_from_this(folder, source) is False:
        what = "was predicted from another scan, or from another state of its files"
        raise VoxelscaleError(f"{source.case}: {what}", AGAIN)
    reading = as_predicted(reading or ReadingConfig(), facts)
    original = read_original(source, reading)
    classes = _classes(source.case, facts)
    _check_codes(source.case, options, classes)
    try:
        stored = classes.of_written(_on_scan(folder / "mask.nii.gz", original))
    except UnknownValues as error:
        raise VoxelscaleError(f"{folder / 'mask.nii.gz'}: {error}", AGAIN) from None
    return Prediction(
        folder=folder,
        source=source,
        reading=reading,
        original=original,
        findings=findings,
        facts=facts,
        classes=classes,
        stored=stored,
        options=options,
    )


def _check_codes(case: str, options: ExportConfig, classes: Classes) -> None:
    names = {name.casefold() for name in classes.names}
    if wrong := [str(key) for key in options.codes if str(key).casefold() not in names]:
        known = first_of(classes.names, MOST_NAMED)
        what = f"{case}: export.codes names {wrong[0]}, but its classes are {known}"
        raise VoxelscaleError(what, "correct export.codes")


def _classes(case: str, facts: dict[str, Any]) -> Classes:
    if "classes" not in facts:
        name = facts.get("class")
        return replace(LESION, names=(name,)) if isinstance(name, str) and name.isprintable() else LESION
    try:
        return Classes.from_dict(facts["classes"])
    except (KeyError, TypeError, ValueError):
        raise VoxelscaleError(f"{case}: the classes in findings.json cannot be read", AGAIN) from None


def _on_scan(path: Path, original: Original) -> NDArray[Any]:
    """A predicted mask (z, y, x), which lies voxel on voxel on the scan.

    Raises:
        VoxelscaleError: it does not.
    """
    mask = read_label(path)
    if not mask.grid.same_as(original.grid, SAME_PLACE_MM):
        what = f"{original.case}: {path.name} does not lie on the scan"
        raise VoxelscaleError(what, f"check that the pair belongs together, or {AGAIN}")
    return mask.array


def _made(prediction: Prediction, kinds: Sequence[str]) -> dict[str, bytes]:
    """The files of a case by their names."""
    made: dict[str, bytes] = {}
    written: list[tuple[Segment, Any, int]] = []
    if "seg" in kinds:
        for name, group, dataset in _segmentations(prediction, prediction.segments, "seg"):
            made[name] = finished(dataset, "seg")
            written += [(segment, dataset, number) for number, segment in enumerate(group, start=1)]
    if "probability" in kinds:
        for name, _, dataset in _segmentations(prediction, prediction.probable, "probability"):
            made[name] = finished(dataset, "probability")
    if "sr" in kinds:
        kinds_of_findings = [concept.kind for concept in prediction.concepts.values()]
        dataset = sr.report(_measured(prediction, written), kinds_of_findings, *_common(prediction))
        made["sr.dcm"] = finished(dataset, "sr")
    if "rtstruct" in kinds and prediction.segments:
        dataset = rtstruct.structure_set(prediction.segments, *_common(prediction))
        made["rtstruct.dcm"] = finished(dataset, "rtstruct")
    if "page" in kinds:
        made["page.html"] = _page(prediction).encode()
    return made


def _page(prediction: Prediction) -> str:
    from voxelscale.dicom_out.page import case_page

    scans = CaseScans(
        replace(prediction.source, labels=()),
        prediction.folder / "mask.nii.gz",
        prediction.reading,
        prediction.classes,
    )
    names, findings = prediction.classes.names, prediction.findings
    listed = [(p.rank, names[p.at], findings[p.rank - 1]) for p in prediction.parts if p.rank is not None]
    named = prediction.options.patient_names
    return case_page(
        prediction.original, listed, prediction.facts, scans, prediction.algorithm, named=named
    )


def _common(prediction: Prediction) -> tuple[Original, Algorithm]:
    return prediction.original, prediction.algorithm


def _segmentations(
    prediction: Prediction, segments: list[Segment], kind: str
) -> Iterator[tuple[str, list[Segment], Any]]:
    """The SEG objects of a kind: each one's file, segments and data set."""
    fractional = kind == "probability"
    if not segments:
        return
    groups = seg.groups_of(segments, prediction.original, fractional=fractional)
    for number, group in enumerate(groups, start=1):
        dataset = seg.segmentation(group, *_common(prediction), number, fractional=fractional)
        yield (f"{kind}.dcm" if len(groups) == 1 else f"{kind}_{number}.dcm"), group, dataset


def _measured(prediction: Prediction, written: Sequence[tuple[Segment, Any, int]]) -> list[sr.Measured]:
    """The findings that the mask has, each with the segment of the SEG that shows it.

    Args:
        written: each segment, the SEG that holds it, and its number there.
    """
    per_finding = prediction.options.segments == "finding"
    tracked = {segment.rank: segment for segment in prediction.of_findings}
    measured = []
    for part in prediction.parts:
        if part.rank is None:
            continue
        finding, name = prediction.findings[part.rank - 1], prediction.classes.names[part.at]
        shown = next(
            (
                (dataset, number)
                for segment, dataset, number in written
                if (segment.rank == part.rank if per_finding else segment.class_name == name)
            ),
            None,
        )
        own = tracked.get(part.rank)
        measured.append(
            sr.Measured(
                finding=finding,
                name=own.name if own else f"{name} {part.rank}",
                tracking=own.tracking if own else uid_of(prediction.original.series, name, part.rank),
                concept=prediction.concepts[name],
                shown=shown,
            )
        )
    return measured
