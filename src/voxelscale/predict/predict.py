"""From raw scans to masks and findings on the scans' own voxels."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from voxelscale.config import PredictConfig
from voxelscale.console import Progress, notice
from voxelscale.data.listing import Source
from voxelscale.data.lungs import lung_field
from voxelscale.data.prepare import resample_hu, source_stamp
from voxelscale.data.reading import read_image
from voxelscale.device import choose_precision, default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, reorient, resample
from voxelscale.predict.bundle import Bundle
from voxelscale.predict.findings import Finding, find_lesions, read_findings, write_findings
from voxelscale.predict.sliding_window import predict_volume


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a prediction.

    Attributes:
        findings: by case, most confident first.
        kept: how many cases were there already.
        failed: case, error and hint of each that is not.
    """

    findings: dict[str, list[Finding]]
    kept: int
    failed: tuple[tuple[str, str, str], ...]


class Predictor:
    """A trained network ready to look at scans.

    Args:
        bundle: what training wrote.
        config: windows and thresholds.
        device: where it computes.
        precision: float32 or bfloat16.
    """

    def __init__(
        self, bundle: Bundle, config: PredictConfig, device: torch.device, precision: torch.dtype
    ) -> None:
        self._bundle, self._config, self._device, self._precision = bundle, config, device, precision
        self._network: nn.Module = bundle.network(device)

    def probability(self, image: Scan) -> NDArray[np.float32]:
        """Lesion probability in [0, 1] at every voxel of a scan in HU, on the scan's own grid."""
        volume = resample_hu(reorient(image), self._bundle.spacing)
        config = self._config
        box = tuple(slice(0, n) for n in volume.array.shape)
        if config.lungs:
            start, shape = lung_field(volume).box  # the whole scan where no lungs were found
            box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        hu = torch.from_numpy(np.ascontiguousarray(volume.array[box])).to(self._device)
        probability = predict_volume(
            self._network,
            self._bundle.normalisation(hu),
            config.patch_size or self._bundle.patch,
            overlap=config.overlap,
            batch_size=config.batch_size,
            flips=config.flips,
            precision=self._precision,
        )
        whole = np.zeros(volume.array.shape, np.float32)
        whole[box] = probability.cpu().numpy()
        coarse = Scan(whole, volume.affine)
        return np.asarray(resample(coarse, image.grid, "linear", fill=0.0).array, np.float32)

    def look(self, case: str, image: Scan) -> tuple[list[Finding], Scan]:
        """The findings in a scan, most confident first, and their mask on the scan's own voxels."""
        findings, mask = find_lesions(
            case,
            self.probability(image),
            image.grid,
            threshold=self._config.threshold,
            candidates=self._config.candidates,
            min_volume_mm3=self._config.min_volume_mm3,
            image=image.array,
        )
        return findings, Scan(mask, image.affine)


def predict(sources: Sequence[Source], bundle: Bundle, config: PredictConfig, out: Path) -> Outcome:
    """Look at every scan; write masks and findings.

    ``<out>/<case>/mask.nii.gz`` lies voxel on voxel on the scan, ``<case>/findings.csv`` is LUNA16's
    table and ``findings.json`` has every field; ``<out>/findings.csv`` is the table of all cases. Run
    again with the same arguments it keeps what is whole and unchanged.

    Raises:
        VoxelscaleError: no scan could be predicted at all.
    """
    predictor: Predictor | None = None
    findings: dict[str, list[Finding]] = {}
    failed: list[tuple[str, str, str]] = []
    kept = 0
    with Progress("predict", len(sources)) as progress:
        for done, source in enumerate(sources, start=1):
            key = _key(source, bundle, config)
            folder = out / source.case
            try:
                if _done(folder, key):
                    findings[source.case] = read_findings(folder / "findings.json")
                    kept += 1
                else:
                    predictor = predictor or make_predictor(bundle, config)
                    findings[source.case] = _predict_case(predictor, source, folder, key)
            except VoxelscaleError as error:
                failed.append((source.case, error.message, error.hint))
            progress.update(done, source.case)
    if not findings:
        case, message, hint = failed[0]
        raise VoxelscaleError(f"no scan could be predicted; {case}: {message}", hint)
    write_findings([f for case in findings for f in findings[case]], out / "findings.csv")
    return Outcome(findings=findings, kept=kept, failed=tuple(failed))


def make_predictor(bundle: Bundle, config: PredictConfig) -> Predictor:
    """A predictor on the best device here."""
    device = default_device()
    return Predictor(bundle, config, device, choose_precision(bundle.config.train.precision, device))


def _predict_case(predictor: Predictor, source: Source, folder: Path, key: str) -> list[Finding]:
    started = time.monotonic()
    image = read_image(source)
    findings, mask = predictor.look(source.case, image)
    write_scan(mask, folder / "mask.nii.gz")
    write_findings(findings, folder / "findings.csv", folder / "findings.json")
    facts = {"key": key, "seconds": round(time.monotonic() - started, 2)}
    notice(f"{source.case}: {len(findings)} findings in {facts['seconds']} s", level=2)
    # Last, so that its being there says that the case is whole.
    write_atomic(folder / "case.json", json.dumps(facts))
    return findings


def _key(source: Source, bundle: Bundle, config: PredictConfig) -> str:
    return digest_of([source_stamp(source), bundle.digest, asdict(config)])[:16]


def _done(folder: Path, key: str) -> bool:
    try:
        return bool(json.loads((folder / "case.json").read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False
