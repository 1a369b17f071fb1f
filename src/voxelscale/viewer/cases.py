"""The cases that a page shows: scan, truth and prediction of each, read once and kept for a while."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import Classes
from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import read_image
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import inside_any, lies_in
from voxelscale.evaluate.truth import Truth, findings_in, labels_in, truth_of
from voxelscale.files import read_json_object
from voxelscale.findings import Finding, components, lesions_of_mask, read_prediction
from voxelscale.formats import SAME_PLACE_MM, check_same_place, read_label
from voxelscale.geometry import Grid, Scan, as_lps, reorient, sphere_diameter
from voxelscale.predict.case import as_predicted
from voxelscale.report.facts import classes_in

OVERVIEW_VOXELS = 3_000_000
"""Of the volume that NiiVue gets. Its planes are overdrawn with the scan's own voxels, slice by slice: all
of 512 x 512 x 800 voxels as a texture took 62 s on two cores without a GPU (`docs/viewer.md`)."""

KEPT_CASES = 3
"""Scans kept in memory: the one that is shown, the next and the last one."""

CT_RANGE = (-1024.0, 3071.0)
OTHER_RANGE = (0.5, 99.5)
"""Percentiles of an image that is no CT, between which its grey levels lie."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A case of the list.

    Attributes:
        number: its place, from 0, by which the page asks for it.
        source: its scan.
        folder: of its prediction.
    """

    number: int
    source: Source
    folder: Path

    @property
    def name(self) -> str:
        """As in the data set."""
        return self.source.case


def list_predicted(predictions: Path, data: DataSet) -> list[Listed]:
    """The scans of a data set that were predicted.

    Raises:
        VoxelscaleError: there is none.
    """
    sources = data.named_as_in(predictions).cases_or_scans
    there = [s for s in sources if (predictions / s.case / "findings.json").is_file()]
    if not there:
        hint = "run voxelscale predict on these scans first"
        raise VoxelscaleError(f"{predictions}: no prediction of a scan of {data.path}", hint)
    return [Listed(number=n, source=s, folder=predictions / s.case) for n, s in enumerate(there)]


class Case:
    """What is shown of a case; each part is read when it is first asked for, once.

    Arrays run in LPS order (`voxelscale.geometry.reorient`), those of written masks as in the scan's file.

    Raises:
        VoxelscaleError: from each part that cannot be read.
    """

    def __init__(self, listed: Listed, reading: ReadingConfig) -> None:
        self.listed = listed
        self._reading = as_predicted(reading, read_json_object(listed.folder / "findings.json"))
        self._pool = ThreadPoolExecutor(3)
        self._image: Future[_Image] = self._pool.submit(self._read_image)
        self._prediction = self._pool.submit(self._read_prediction)
        self._truth = self._pool.submit(self._read_truth)
        self._pool.shutdown(wait=False)

    @property
    def image(self) -> _Image:
        """The scan."""
        return self._image.result()

    @property
    def prediction(self) -> Prediction:
        """The findings and their voxels."""
        return self._prediction.result()

    @property
    def truth(self) -> Truth | None:
        """The truth; None where there is none."""
        return self._truth.result()

    @property
    def name(self) -> str:
        """The case's."""
        return self.listed.name

    @property
    def classes(self) -> Classes:
        """What its mask distinguishes."""
        return self.prediction.classes

    def _read_image(self) -> _Image:
        raw = read_image(self.listed.source, self._reading)
        return _Image(raw, self.listed.source.channels[0].scheme == "ct")

    def _read_prediction(self) -> Prediction:
        folder = self.listed.folder
        _, facts = read_prediction(folder / "findings.json")
        classes = classes_in(facts) or self.listed.source.classes
        mask = labels_in(folder / "mask.nii.gz", classes)
        findings = findings_in(folder / "findings.json", mask.grid, classes)
        voxels = voxels_of(findings, mask, classes)
        return Prediction(
            findings=findings,
            facts=facts,
            classes=classes,
            grid=mask.grid,
            voxels=voxels,
            stored=mask.array,
            probability=_probability(folder, mask.grid, classes, findings, voxels),
            digest=_digest(folder / "findings.json", folder / "mask.nii.gz"),
        )

    def _read_truth(self) -> Truth | None:
        if not self.listed.source.labels:
            return None
        return truth_of(self.listed.source, self._reading)

    def check(self) -> None:
        """Raise a VoxelscaleError where scan, prediction and truth do not lie on each other."""
        source = self.listed.source
        image, mask = self.image.upright, self.prediction
        check_same_place(
            self.listed.folder / "mask.nii.gz", Scan(mask.stored, mask.grid.affine), source.image, image
        )
        if self.truth is not None:
            check_same_place(source.labels[0], self.truth.mask, source.image, image)

    @cached_property
    def judged(self) -> Judged:
        """The findings held against the truth."""
        return judge(self.prediction.findings, self.truth)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What was predicted of a case.

    Attributes:
        findings: most confident first.
        facts: what else ``findings.json`` says.
        classes: what the mask distinguishes.
        grid: the scan's lattice in LPS order.
        voxels: (n, 3) of each finding, indices (z, y, x) of `grid`; none of one below the threshold.
        stored: stored labels on `grid`.
        probability: of each voxel on `grid`, in steps of 1/255, where ``predict.probabilities`` kept it for
            the only class, and a finding's confidence is the highest of its voxels; else None.
        digest: of both files: by which a later prediction is told from this one.
    """

    findings: list[Finding]
    facts: Mapping[str, Any]
    classes: Classes
    grid: Grid
    voxels: list[NDArray[np.int64]]
    stored: NDArray[Any]
    probability: NDArray[np.uint8] | None
    digest: str

    @property
    def owners(self) -> NDArray[np.int32]:
        """For each voxel the finding that it belongs to, from 1; -1: of the mask, but of no finding."""
        owners = np.zeros(self.grid.shape, np.int32)
        for at in np.flatnonzero(self.stored.reshape(len(owners), -1).max(axis=1)).tolist():
            owners[at][self.stored[at] > 0] = -1
        for number, voxels in reversed(list(enumerate(self.voxels, start=1))):
            owners[tuple(voxels.T)] = number
        return owners


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Findings held against the truth by LUNA16's rule.

    Attributes:
        verdicts: of each finding ``hit``, ``ignored`` or ``false``; "" without a truth.
        lesions: each true lesion with its class's name and the findings that hit it, from 0.
    """

    verdicts: tuple[str, ...]
    lesions: tuple[tuple[Finding, str, tuple[int, ...]], ...] = ()


def judge(findings: Sequence[Finding], truth: Truth | None) -> Judged:
    """Which findings hit a lesion of their class, and which lesions are hit."""
    if truth is None:
        return Judged(verdicts=("",) * len(findings))
    places = np.asarray([(f.x, f.y, f.z) for f in findings]).reshape(-1, 3)
    ignored = inside_any(places, truth.ignored) | lies_in(places, truth.uncounted)
    verdicts = ["ignored" if out else "false" for out in ignored.tolist()]
    lesions = []
    for name, where in truth.classes.each(truth.mask.array):
        same = np.asarray([truth.classes.single or f.label == name for f in findings], bool)
        for lesion in lesions_of_mask(truth.case, where, truth.mask.grid):
            hits = np.flatnonzero(inside_any(places, [lesion]) & same).tolist()
            lesions.append((lesion, name, tuple(hits)))
            for at in hits:
                verdicts[at] = "hit"
    return Judged(verdicts=tuple(verdicts), lesions=tuple(lesions))


def voxels_of(findings: Sequence[Finding], mask: Scan, classes: Classes) -> list[NDArray[np.int64]]:
    """The voxels (n, 3) of each finding: the components of its class whose centres lie nearest to its own.

    A component belongs to a finding if either's centre lies within the other's radius, as in
    `voxelscale.evaluate.lesions`. A finding may be several components, and a candidate none.
    """
    parts: list[list[NDArray[np.int64]]] = [[] for _ in findings]
    places = np.asarray([(f.x, f.y, f.z) for f in findings]).reshape(-1, 3)
    for name, where in classes.each(mask.array):
        of_class = np.asarray([classes.single or f.label == name for f in findings], bool)
        if not of_class.any():
            continue
        reach = [max(f.diameter_mm, f.axial_diameter_mm, 2 * max(mask.spacing)) / 2 for f in findings]
        for voxels in components(where):
            centre = mask.grid.index_to_mm(voxels.mean(axis=0))
            radius = sphere_diameter(len(voxels) * mask.grid.voxel_mm3) / 2
            apart = np.where(of_class, np.linalg.norm(places - centre, axis=1), np.inf)
            within = apart <= np.maximum(reach, radius)
            if within.any():
                parts[int(np.where(within, apart, np.inf).argmin())].append(voxels)
    nothing = np.zeros((0, 3), np.int64)
    return [np.concatenate(each) if each else nothing for each in parts]


class _Image:
    """A scan as the page shows it: int16 in LPS order.

    Attributes:
        upright: the scan in LPS order, its array int16.
        raw: the lattice of its file.
        slope, inter: from int16 to the scan's values.
        low, high: the values that are worth showing.
        ct: whether they are HU.
    """

    def __init__(self, raw: Scan, ct: bool) -> None:
        scan = reorient(raw)
        self.raw, self.ct = raw.grid, ct
        self.slope, self.inter = 1.0, 0.0
        self.low, self.high = CT_RANGE
        values = scan.array
        if not ct:
            flat = values.reshape(-1)[:: -(-values.size // 2**22)]
            self.low, self.high = (float(v) for v in np.percentile(flat, OTHER_RANGE))
            self.high = max(self.high, self.low + 1e-6)
        if values.dtype != np.int16 and ct:
            values = values.clip(-32768, 32767).round().astype(np.int16)
        elif values.dtype != np.int16:
            self.slope, self.inter = (self.high - self.low) / 4096, (self.high + self.low) / 2
            values = ((values - self.inter) / self.slope).clip(-32768, 32767).round().astype(np.int16)
        self.upright = Scan(values, scan.affine)

    @property
    def grid(self) -> Grid:
        """In LPS order."""
        return self.upright.grid

    def plane(self, axis: int, at: int) -> bytes:
        """The int16 voxels of a slice, little-endian.

        Raises:
            IndexError: there is no such slice.
        """
        if not (0 <= axis < 3 and 0 <= at < self.upright.array.shape[axis]):
            raise IndexError(f"no slice {at} across axis {axis}")
        return np.ascontiguousarray(self.upright.array.take(at, axis)).astype("<i2", copy=False).tobytes()

    @cached_property
    def overview(self) -> bytes:
        """A NIfTI file of at most `OVERVIEW_VOXELS` of the voxels, spread evenly over the same box.

        An axis that is more than 37 degrees oblique is shown as if it were not: NiiVue might turn it
        otherwise than `reorient`. Positions are the page's own, from the true affine.
        """
        import nibabel

        whole = np.asarray(self.grid.shape)
        spacing = np.asarray(self.grid.spacing)
        step = np.cbrt(max(np.prod(whole * spacing) / OVERVIEW_VOXELS, 1e-9))
        count = np.minimum(whole, np.maximum(np.floor(whole * spacing / step), 1)).astype(int)
        if whole.prod() <= OVERVIEW_VOXELS:
            count = whole
        picked = [((np.arange(n) + 0.5) * of / n).astype(int) for n, of in zip(count, whole, strict=True)]
        values = self.upright.array[np.ix_(*picked)]
        affine = self.grid.affine.copy()
        if np.abs(self.grid.direction.diagonal()).min() < 0.8:
            affine[:3, :3] = np.fliplr(np.diag(spacing[::-1]))
        ratio = whole / count
        affine[:3, 3] += affine[:3, :3] @ ((ratio - 1) / 2)
        affine[:3, :3] *= ratio
        to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine[:, [2, 1, 0, 3]]
        image = nibabel.Nifti1Image(values.transpose(2, 1, 0), to_ras)
        image.header.set_slope_inter(self.slope, self.inter)
        image.header["cal_min"], image.header["cal_max"] = self.low, self.high
        content: bytes = image.to_bytes()
        return content


def _probability(
    folder: Path,
    grid: Grid,
    classes: Classes,
    findings: Sequence[Finding],
    voxels: Sequence[NDArray[np.int64]],
) -> NDArray[np.uint8] | None:
    """The only class's probability on a lattice; None where it was not kept, or confidences are no voxel's.

    After calibration, or false-positive reduction, a threshold of confidences is none of voxels.
    """
    path = folder / "probability.nii.gz"
    if not classes.single or not path.is_file():
        return None
    found = reorient(read_label(path))
    if not found.grid.same_as(grid, SAME_PLACE_MM):
        return None
    values: NDArray[np.uint8] = found.array.astype(np.uint8)
    for finding, places in zip(findings, voxels, strict=True):
        highest = values[tuple(places.T)].max(initial=0) / 255
        if len(places) and abs(highest - finding.probability) > 1 / 255:
            return None
    return values


def _digest(*files: Path) -> str:
    return hashlib.sha256(
        b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    ).hexdigest()


class Cases:
    """All cases; the last ones shown, and the next, are kept in memory."""

    def __init__(self, listed: Sequence[Listed], reading: ReadingConfig) -> None:
        self.listed, self._reading = tuple(listed), reading
        self._kept: OrderedDict[int, Case] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def kept(self) -> set[int]:
        """The numbers of the cases in memory."""
        with self._lock:
            return set(self._kept)

    def open(self, number: int) -> Case:
        """A case, which begins to be read where it is not there yet.

        Raises:
            IndexError: there is no such case.
        """
        if not 0 <= number < len(self.listed):
            raise IndexError(f"no case {number}")
        with self._lock:
            case = self._kept.get(number) or Case(self.listed[number], self._reading)
            self._kept[number] = case
            self._kept.move_to_end(number)
            while len(self._kept) > KEPT_CASES:
                self._kept.popitem(last=False)
        return case


def finding_facts(finding: Finding, grid: Grid) -> dict[str, Any]:
    """What the page shows of a finding; ``voxel``: its centre (z, y, x) in the LPS order."""
    facts = {
        name: value for name, value in asdict(finding).items() if name not in ("case", "index", "score")
    }
    return facts | {"voxel": grid.mm_to_index([finding.x, finding.y, finding.z]).tolist()}


def lattice(image: _Image) -> dict[str, Any]:
    """What the page must know to place voxels: LPS order (z, y, x), affine to LPS mm."""
    order, flipped, _ = as_lps(image.raw)
    return {
        "shape": list(image.grid.shape),
        "affine": image.grid.affine.tolist(),
        "spacing": list(image.grid.spacing),
        "slope": image.slope,
        "inter": image.inter,
        "ct": image.ct,
        "range": [image.low, image.high],
        "file_order": order,
        "file_flipped": flipped,
    }


def as_in_file(array: NDArray[Any], raw: Grid) -> Scan:
    """An array in LPS order, turned back to the lattice of the scan's file."""
    order, flipped, _ = as_lps(raw)
    back = np.flip(array, tuple(flipped)).transpose(np.argsort(order))
    return Scan(np.ascontiguousarray(back), raw.affine)
