"""For notebooks and programs: load a scan, load a model, see what it finds.

::

    from voxelscale.api import Model, load_scan

    model = Model.load("model.vxs")
    prediction = model.predict(load_scan("patient.nii.gz"))
    for finding in prediction.findings:
        print(finding.x, finding.y, finding.z, finding.diameter_mm, finding.probability)

What is here stays as it is within a major version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from voxelscale.channels import Channel
from voxelscale.classes import Classes
from voxelscale.config import Config, load
from voxelscale.dataset.source import Source
from voxelscale.device import default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.evaluate import CaseResult, evaluate_case
from voxelscale.evaluate.froc import froc
from voxelscale.findings import Finding
from voxelscale.formats import read_scan
from voxelscale.geometry import Scan, Triple, reorient
from voxelscale.lungs import lung_field
from voxelscale.model.bundle import Bundle, read_bundle
from voxelscale.predict.classes import probability_file
from voxelscale.predict.work import Predictor, check_usable
from voxelscale.store.plausible import about

__all__ = [
    "CaseResult",
    "Finding",
    "Model",
    "Prediction",
    "Scan",
    "VoxelscaleError",
    "evaluate_case",
    "froc",
    "load_scan",
    "scan_of",
]


CASE = "scan"
"""The case that findings are of."""


def load_scan(path: str | Path) -> Scan:
    """A scan from a file (NIfTI, MetaImage, NRRD) or a DICOM folder; values are HU for CT.

    Raises:
        VoxelscaleError: it is not one whole, three-dimensional scan.
    """
    return read_scan(Path(path))


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
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras
    return Scan(np.ascontiguousarray(np.transpose(array, (2, 1, 0))), lps[:, [2, 1, 0, 3]])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model found in a scan.

    Attributes:
        findings: most confident first, with those too uncertain for the mask; positions are LPS mm.
        mask: on the scan's own voxels: 1 for a model of one class, else the classes' values.
        probabilities: of each class by name, (z, y, x) uint8 in steps of 1/255, on the scan's own voxels.
        warnings: in what the scan is unlike those that the model was trained on.
    """

    findings: tuple[Finding, ...]
    mask: Scan
    probabilities: Mapping[str, NDArray[np.uint8]]
    warnings: tuple[str, ...]

    def to_pandas(self) -> Any:
        """The findings as a pandas DataFrame, a row a finding; pandas must be installed."""
        try:
            import pandas
        except ImportError:
            raise VoxelscaleError("pandas is not installed", "pip install pandas") from None
        return pandas.DataFrame([asdict(finding) for finding in self.findings])


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

    def predict(self, *channels: Scan | str | Path, settings: Sequence[str] = ()) -> Prediction:
        """What there is in a scan; the same as ``voxelscale predict`` writes.

        Args:
            channels: the scan, or its path; of a model of several channels each of them, in its order.
            settings: keys of the config, such as ``"predict.threshold=0.3"``.

        Raises:
            VoxelscaleError: it is no scan for this model, or a setting is unknown.
        """
        if len(channels) != len(self.channels):
            names = ", ".join(channel.name for channel in self.channels)
            raise VoxelscaleError(
                f"{len(channels)} images for a model of {names}", f"give {names} in this order"
            )
        first, *more = (load_scan(one) if isinstance(one, str | Path) else one for one in channels)
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
            warnings=tuple(warnings),
        )
