"""From raw scans to masks and findings on the scans' own voxels."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from voxelscale.config import PredictConfig
from voxelscale.console import Progress, notice
from voxelscale.data.listing import Source
from voxelscale.data.lungs import body_field, lung_field
from voxelscale.data.prepare import resample_hu, source_stamp
from voxelscale.data.reading import read_image
from voxelscale.device import choose_inference, default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic
from voxelscale.formats import write_scan
from voxelscale.geometry import SAME_MM, Scan, reorient, resample
from voxelscale.predict.bundle import Bundle
from voxelscale.predict.findings import Finding, find_lesions, read_findings, write_findings
from voxelscale.predict.findings.depth import lung_depth
from voxelscale.predict.sliding_window import Windows, predict_volume


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a prediction.

    Attributes:
        findings: by case, most confident first.
        kept: how many cases were there already.
        failed: case, error and hint of each that is not.
        rank: of this process; 0 knows of all cases, the others of their own.
    """

    findings: dict[str, list[Finding]]
    kept: int
    failed: tuple[tuple[str, str, str], ...]
    rank: int = 0


class Predictor:
    """A trained network ready to look at scans.

    Args:
        bundle: what training wrote.
        config: windows and thresholds.
        device: where it computes.
        precision: float32 or bfloat16; None: what the training says, and the faster where it says nothing.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: PredictConfig,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self._bundle, self._config, self._device = bundle, config, device
        self._network: nn.Module = bundle.network(device)
        self._patch = config.patch_size or bundle.patch
        wanted = bundle.config.train.precision
        shape = (1, 1, *self._patch)
        self._precision = precision or choose_inference(self._network, shape, device, wanted)

    def probability(self, image: Scan) -> NDArray[np.float32]:
        """Lesion probability in [0, 1] at every voxel of a scan in HU, on the scan's own grid."""
        volume = resample_hu(reorient(image), self._bundle.spacing)
        box = tuple(slice(0, n) for n in volume.array.shape)
        if self._config.lungs:
            start, shape = lung_field(volume).box  # the whole scan where no lungs were found
            box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        within = body_field(volume)[box] if self._config.skip_air else None
        probability = predict_volume(
            self._network,
            torch.from_numpy(volume.array[box]),
            self._windows,
            prepare=self._bundle.normalisation,
            within=None if within is None else torch.from_numpy(within),
            device=self._device,
        ).numpy()
        if probability.shape != volume.array.shape:
            whole = np.zeros(volume.array.shape, np.float32)
            whole[box] = probability
            probability = whole
        if volume.grid.same_as(image.grid, SAME_MM):
            return probability
        coarse = Scan(probability, volume.affine)
        return np.asarray(resample(coarse, image.grid, "linear", fill=0.0).array, np.float32)

    @property
    def _windows(self) -> Windows:
        config = self._config
        threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        return Windows(
            patch=self._patch,
            overlap=config.overlap,
            # Threads have a window each at a time: together they are a batch.
            batch_size=config.batch_size if threads == 1 else 1,
            flips=config.flips,
            precision=self._precision,
            threads=threads,
        )

    def look(self, case: str, image: Scan) -> tuple[list[Finding], Scan]:
        """The findings in a scan, most confident first, and their mask on the scan's own voxels."""
        findings, mask = find_lesions(
            case,
            self.probability(image),
            image.grid,
            threshold=self._config.threshold,
            low=self._config.low,
            candidates=self._config.candidates,
            merge_mm=self._config.merge_mm,
            min_volume_mm3=self._config.min_volume_mm3,
            image=image.array,
            depth=lung_depth(image),
        )
        if (calibration := self._bundle.calibration) is not None:
            findings = [
                replace(f, probability=float(calibration(f.probability if f.score is None else f.score)))
                for f in findings
            ]
        return findings, Scan(mask, image.affine)


def predict(sources: Sequence[Source], bundle: Bundle, config: PredictConfig, out: Path) -> Outcome:
    """Look at every scan; write masks and findings.

    ``<out>/<case>/mask.nii.gz`` lies voxel on voxel on the scan, ``<case>/findings.csv`` is LUNA16's
    table and ``findings.json`` has every field; ``<out>/findings.csv`` is the table of all cases. Run
    again with the same arguments it keeps what is whole and unchanged. Started by torchrun, the ranks share
    the scans out.

    Raises:
        VoxelscaleError: no scan could be predicted at all.
    """
    if "RANK" not in os.environ:
        outcome = _predict_each(sources, bundle, config, out, default_device())
    else:
        from voxelscale.train.distributed import join

        with join(virtual=1, threads=0) as workers:
            own = _predict_each(sources[workers.rank :: workers.ranks], bundle, config, out, workers.device)
            outcome = _gathered(own, sources, workers.rank, workers.ranks)
    if outcome.rank:
        return outcome
    if not outcome.findings:
        case, message, hint = outcome.failed[0]
        raise VoxelscaleError(f"no scan could be predicted; {case}: {message}", hint)
    write_findings([f for found in outcome.findings.values() for f in found], out / "findings.csv")
    return outcome


def _gathered(own: Outcome, sources: Sequence[Source], rank: int, ranks: int) -> Outcome:
    """On rank 0 what became of all ranks' scans, in their order."""
    import torch.distributed as dist

    if ranks == 1:
        return own
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, own)
    if rank:
        return replace(own, rank=rank)
    found = {case: found for part in parts for case, found in part.findings.items()}
    return Outcome(
        findings={s.case: found[s.case] for s in sources if s.case in found},
        kept=sum(part.kept for part in parts),
        failed=tuple(sorted(fault for part in parts for fault in part.failed)),
    )


def _predict_each(
    sources: Sequence[Source], bundle: Bundle, config: PredictConfig, out: Path, device: torch.device
) -> Outcome:
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
                    predictor = predictor or Predictor(bundle, config, device)
                    findings[source.case] = _predict_case(predictor, source, folder, key)
            except VoxelscaleError as error:
                failed.append((source.case, error.message, error.hint))
            progress.update(done, source.case)
    return Outcome(findings=findings, kept=kept, failed=tuple(failed))


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
