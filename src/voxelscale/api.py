"""For notebooks and programs: load a scan and a model, see what it finds and how good that is, train.

::

    from voxelscale.api import Model, evaluate, load_scan

    model = Model.load("model.vxs")
    prediction = model.predict(load_scan("patient.nii.gz"))
    for finding in prediction.findings:
        print(finding.x, finding.y, finding.z, finding.diameter_mm, finding.probability)
    print(evaluate(prediction, "patient_mask.nii.gz").overlap.dice)

What is here stays as it is within a major version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from voxelscale.channels import Channel
from voxelscale.classes import IGNORED, LESION, Classes, UnknownValues
from voxelscale.config import Config, load
from voxelscale.dataset.reading import check_overlap
from voxelscale.dataset.source import Source
from voxelscale.device import default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.evaluate import CaseResult, evaluate_classes, summarise
from voxelscale.evaluate.froc import Froc, Matches, match_marks
from voxelscale.evaluate.froc import froc as curve_of
from voxelscale.evaluate.truth import Truth
from voxelscale.findings import Finding, lesions_of_mask
from voxelscale.formats import check_same_place, check_scan, read_label, read_scan, write_scan
from voxelscale.geometry import Scan, Triple, reorient
from voxelscale.lungs import lung_field
from voxelscale.model.bundle import Bundle, read_bundle
from voxelscale.predict.case import probability_file
from voxelscale.predict.predictor import Predictor, check_usable
from voxelscale.store.plausible import about
from voxelscale.train import Result, fit, load_weights

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "CaseResult",
    "Channel",
    "Classes",
    "Config",
    "Finding",
    "Froc",
    "Matches",
    "Model",
    "Points",
    "Prediction",
    "Result",
    "Scan",
    "VoxelscaleError",
    "array_of",
    "evaluate",
    "fit",
    "froc",
    "load_scan",
    "load_weights",
    "save_scan",
    "scan_of",
    "summarise",
]


CASE = "scan"
"""The case that findings are of."""

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From LPS mm to RAS mm, and back."""


def load_scan(path: str | Path) -> Scan:
    """A scan from a file (NIfTI, MetaImage, NRRD) or a DICOM folder; values are HU for CT.

    Raises:
        VoxelscaleError: it is not one whole, three-dimensional scan.
    """
    return read_scan(Path(path))


def save_scan(scan: Scan, path: str | Path) -> None:
    """Write a scan or a mask as .nii, .nii.gz, .mha or .nrrd, without anything that names a patient.

    Raises:
        VoxelscaleError: the extension is another, or the file cannot be written.
    """
    write_scan(scan, Path(path))


def scan_of(array: NDArray[Any], affine: ArrayLike) -> Scan:
    """A scan from an array (x, y, z) and an affine to RAS mm, as nibabel gives both.

    A `Scan` itself holds (z, y, x) and an affine to LPS mm.

    Args:
        array: HU for CT.
        affine: (4, 4), voxel index (x, y, z, 1) to RAS mm.
    """
    ras = np.asarray(affine, np.float64)
    if np.shape(array) != np.shape(array)[:3] or np.ndim(array) != 3 or ras.shape != (4, 4):
        raise VoxelscaleError("a scan is an array with three axes and a 4 x 4 affine", "give one volume")
    return Scan(np.ascontiguousarray(np.transpose(array, (2, 1, 0))), (RAS @ ras)[:, [2, 1, 0, 3]])


def array_of(scan: Scan) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The array (x, y, z) of a scan or a mask, and its affine to RAS mm: what `scan_of` takes.

    ``nibabel.Nifti1Image(*array_of(prediction.mask))`` is the mask for nibabel.
    """
    return np.transpose(scan.array, (2, 1, 0)), (RAS @ scan.affine)[:, [2, 1, 0, 3]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model found in a scan.

    Attributes:
        findings: most confident first, with those too uncertain for the mask; positions are LPS mm.
        mask: on the scan's own voxels: 1 for a model of one class, else the classes' values.
        probabilities: of each class by name, (z, y, x) uint8 in steps of 1/255, on the scan's own voxels.
        warnings: in what the scan is unlike those that the model was trained on.
        classes: what the model tells apart.
    """

    findings: tuple[Finding, ...]
    mask: Scan
    probabilities: Mapping[str, NDArray[np.uint8]]
    warnings: tuple[str, ...]
    classes: Classes

    @property
    def probability(self) -> NDArray[np.float32]:
        """Of the only class, (z, y, x) in [0, 1], on the scan's own voxels.

        Raises:
            VoxelscaleError: there are several.
        """
        steps = self.probabilities[_chosen(self.classes, None)]
        return steps.astype(np.float32) / np.float32(255)

    def to_pandas(self) -> DataFrame:
        """The findings as a pandas DataFrame: a row a finding, a column a field of `Finding`.

        Raises:
            VoxelscaleError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise VoxelscaleError("pandas is not installed", "pip install pandas") from None
        columns = [field.name for field in fields(Finding)]
        return pandas.DataFrame([asdict(finding) for finding in self.findings], columns=columns)


class Model:
    """A trained model; made by `load`."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self._bundle, self._device = bundle, device

    @classmethod
    def load(cls, path: str | Path, device: str | None = None) -> Model:
        """The model in a file, or in a run's folder.

        Args:
            device: as of PyTorch; None: a GPU if there is one.

        Raises:
            VoxelscaleError: there is none, it is damaged, or of another version.
        """
        return cls(read_bundle(Path(path)), torch.device(device) if device else default_device())

    @property
    def classes(self) -> Classes:
        """What it tells apart."""
        return self._bundle.classes

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Of the images that it takes."""
        return self._bundle.channels

    @property
    def spacing(self) -> Triple:
        """(z, y, x) mm that scans are resampled to."""
        return self._bundle.spacing

    @property
    def config(self) -> Config:
        """Of its training, with the settings of prediction."""
        return self._bundle.config

    def predict(
        self,
        *channels: Scan | str | Path | NDArray[Any],
        affine: ArrayLike | None = None,
        settings: Sequence[str] = (),
    ) -> Prediction:
        """What there is in a scan; the same as ``voxelscale predict`` writes.

        Args:
            channels: the scan, its path, or its array (x, y, z); of a model of several channels each of
                them, in its order.
            affine: of arrays, (4, 4), to RAS mm, as of `scan_of`.
            settings: keys of the config, such as ``"predict.threshold=0.3"``.

        Raises:
            VoxelscaleError: it is no scan for this model, channels do not overlap, an array has no affine
                or holds NaN, or a setting is unknown.
        """
        if len(channels) != len(self.channels):
            names = ", ".join(channel.name for channel in self.channels)
            raise VoxelscaleError(
                f"{len(channels)} images for a model of {names}", f"give {names} in this order"
            )
        if affine is not None and not any(isinstance(one, np.ndarray) for one in channels):
            raise VoxelscaleError("an affine, but no array", "leave it out: a scan has its own")
        first, *more = (_as_scan(one, affine) for one in channels)
        lacking = [
            check_overlap(first.grid, scan.grid, f"channel {channel.name}", "the first", channel.name)
            for channel, scan in zip(self.channels[1:], more, strict=True)
        ]
        config = load(None, settings, self.config).predict
        lungs, warnings = None, list[str]()
        if self._bundle.of_ct:
            upright = reorient(first)
            lungs = lung_field(upright)
            source, name = None, "the scan"
            if isinstance(channels[0], str | Path):
                source = Source(case=CASE, patient=CASE, image=Path(channels[0]), labels=())
                name = str(channels[0])
            facts = about(upright, lungs, source)
            warnings = check_usable(self._bundle, facts, name, config.refuse_unusable)
        seen = Predictor(self._bundle, config, self._device).see(CASE, first, None, lungs, more)
        files = dict(seen.probabilities)
        return Prediction(
            findings=tuple(seen.findings),
            mask=seen.mask,
            probabilities={
                name: files[probability_file(self.classes, name)] for name in self.classes.names
            },
            warnings=(*warnings, *filter(None, lacking)),
            classes=self.classes,
        )


def _as_scan(given: Scan | str | Path | NDArray[Any], affine: ArrayLike | None) -> Scan:
    if isinstance(given, str | Path):
        return load_scan(given)
    if isinstance(given, Scan):
        scan = given
    elif affine is None:
        raise VoxelscaleError("an array without an affine", "give affine=, (4, 4) to RAS mm")
    else:
        scan = scan_of(given, affine)
    check_scan(scan)
    return scan


def evaluate(
    prediction: Prediction | Scan | str | Path,
    truth: Scan | str | Path,
    *,
    label: str | None = None,
    case: str = CASE,
) -> CaseResult:
    """How good a prediction is: overlap, surfaces, and lesions found; as ``voxelscale evaluate`` counts.

    `summarise` sums up the results of several scans, `froc` makes their curve.

    Args:
        prediction: of `Model.predict`; or a mask or its file, in which what is not 0 is lesion and each of
            its components is a finding of probability 1.
        truth: the true mask, or its file, with the values of the model's data set.
        label: which class is meant, where the model has several.
        case: what the scan is called in the result.

    Raises:
        VoxelscaleError: a file is no mask, the two do not lie on one lattice, the truth has values of no
            class, or there are several classes and none of them is named.
    """
    classes = prediction.classes if isinstance(prediction, Prediction) else LESION
    name = _chosen(classes, label)
    true, of_truth = _mask_of(truth, "the truth")
    findings: Sequence[Finding]
    if isinstance(prediction, Prediction):
        mask, of_mask = reorient(prediction.mask), "the prediction"
        predicted, findings = classes.of_written(mask.array), prediction.findings
    else:
        mask, of_mask = _mask_of(prediction, "the prediction")
        predicted = mask.array > 0
        findings = lesions_of_mask(case, predicted, mask.grid)
    check_same_place(Path(of_mask), mask, Path(of_truth), true)
    try:
        stored = classes.stored(true.array)
    except UnknownValues as error:
        hint = "give the mask with the values of the model's data set"
        raise VoxelscaleError(f"{of_truth}: {error}", hint) from None
    ignored = Scan(stored == IGNORED, true.affine) if classes.ignore else None
    held = Truth(case=case, mask=Scan(stored, true.affine), ignored=(), classes=classes, uncounted=ignored)
    results = evaluate_classes(held, predicted, findings)
    return results[classes.names.index(name)]


def _chosen(classes: Classes, label: str | None) -> str:
    known = ", ".join(classes.names)
    if label is None and not classes.single:
        raise VoxelscaleError(f"one class is needed of {known}", "name one of them")
    if label is not None and label not in classes.names:
        raise VoxelscaleError(f"no class is called {label}", f"name one of {known}")
    return label or classes.names[0]


def _mask_of(given: Scan | str | Path, name: str) -> tuple[Scan, str]:
    """A mask, its axes turned to LPS, and what errors call it."""
    if not isinstance(given, Scan):
        return reorient(read_label(Path(given))), str(given)
    whole = given.array.astype(np.int32)
    if (whole != given.array).any() or whole.min(initial=0) < 0:
        raise VoxelscaleError(f"{name}: values that are no whole numbers of at least 0", "give a mask")
    return reorient(Scan(whole, given.affine)), name


@dataclass(frozen=True, kw_only=True)
class Points:
    """One scan's marks and lesions as points, for `froc`; of any program, in any one frame of mm.

    Attributes:
        marks: a row x, y, z in mm and confidence for each.
        lesions: a row x, y, z and diameter in mm for each.
        excluded: as `lesions`: what is neither right nor wrong to find.
    """

    marks: ArrayLike
    lesions: ArrayLike
    excluded: ArrayLike = ()


def froc(scans: Sequence[Points | CaseResult | Matches]) -> Froc:
    """Sensitivity against false positives per scan, by LUNA16's rule.

    A mark hits a lesion when it lies nearer to its centre than its radius; of several the most confident
    counts. `Froc.cpm` is the mean sensitivity at 1/8 to 8 false positives per scan.

    Args:
        scans: every scan, also one without marks or lesions; as points, or as `evaluate` scored it.

    Raises:
        VoxelscaleError: points are no rows of four numbers; or no scan has a lesion, so that there is no
            sensitivity.
    """
    matches = [_matches_of(number, scan) for number, scan in enumerate(scans)]
    if not any(match.hits for match in matches):
        raise VoxelscaleError("froc: no scan has a lesion", "give at least one scan with a lesion")
    return curve_of(matches)


def _matches_of(number: int, scan: Points | CaseResult | Matches) -> Matches:
    if isinstance(scan, Points):
        return match_marks(
            _rows(number, "marks", scan.marks),
            _rows(number, "lesions", scan.lesions),
            _rows(number, "excluded", scan.excluded),
        )
    return scan.matches if isinstance(scan, CaseResult) else scan


def _rows(number: int, name: str, given: ArrayLike) -> NDArray[np.float64]:
    table = np.asarray(given, np.float64)
    table = table.reshape(0, 4) if not table.size else table
    if table.ndim != 2 or table.shape[1] != 4 or not np.isfinite(table).all():
        last = "confidence" if name == "marks" else "diameter"
        hint = f"give a row x, y, z, {last} for each"
        raise VoxelscaleError(f"froc: {name} of scan {number} are no rows of four numbers", hint)
    if name != "marks" and (table[:, 3] <= 0).any():
        raise VoxelscaleError(f"froc: {name} of scan {number}: a diameter is not above 0", "give it in mm")
    return table
