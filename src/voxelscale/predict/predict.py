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
from voxelscale.geometry import SAME_MM, Grid, Scan, Triple, reorient, resample
from voxelscale.predict.bundle import Bundle
from voxelscale.predict.findings import Finding, find_lesions, read_findings, write_findings
from voxelscale.predict.findings.depth import lung_depth
from voxelscale.predict.sliding_window import Windows, predict_volume

CASE_FACTS = "case.json"
"""Beside a case's mask and findings: by what they were made, and that they are whole."""


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


@dataclass(frozen=True, kw_only=True)
class _Region:
    """A scan as a network takes it.

    Attributes:
        volume: all of it, at the network's spacing.
        box: where it is looked at.
        within: (z, y, x) bool, of the box; None: all of it.
    """

    volume: Scan
    box: tuple[slice, ...]
    within: NDArray[np.bool_] | None

    @classmethod
    def of(cls, image: Scan, spacing: Triple, config: PredictConfig) -> _Region:
        """Resample the scan and bound what is looked at."""
        volume = resample_hu(reorient(image), spacing)
        box = tuple(slice(0, n) for n in volume.array.shape)
        if config.lungs:
            start, shape = lung_field(volume).box  # the whole scan where no lungs were found
            box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        return cls(volume=volume, box=box, within=body_field(volume)[box] if config.skip_air else None)


class _Network:
    """One trained network on its device."""

    def __init__(
        self, bundle: Bundle, config: PredictConfig, device: torch.device, precision: torch.dtype | None
    ) -> None:
        self._normalisation, self._device = bundle.normalisation, device
        self._network: nn.Module = bundle.network(device)
        self._patch = config.patch_size or bundle.patch
        self._config = config
        wanted = bundle.config.train.precision
        shape = (1, 1, *self._patch)
        self._precision = precision or choose_inference(self._network, shape, device, wanted)

    def __call__(self, region: _Region) -> NDArray[np.float32]:
        """Lesion probability in [0, 1] at every voxel of the region's box."""
        probability = predict_volume(
            self._network,
            torch.from_numpy(region.volume.array[region.box]),
            self._windows,
            prepare=self._normalisation,
            within=None if region.within is None else torch.from_numpy(region.within),
            device=self._device,
        )
        return probability.numpy()

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


class Predictor:
    """A trained network, or several as one, ready to look at scans.

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
        self._config, self._calibration = config, bundle.calibration
        self._networks: dict[Triple, list[_Network]] = {}
        for one in bundle.networks:
            same_spacing = self._networks.setdefault(one.spacing, [])
            same_spacing.append(_Network(one, config, device, precision))

    def probability(self, image: Scan) -> NDArray[np.float32]:
        """Lesion probability in [0, 1] at every voxel of a scan in HU, on the scan's own grid.

        Of several networks it is the mean.
        """
        count = sum(map(len, self._networks.values()))
        total: NDArray[np.float32] | None = None
        for spacing, networks in self._networks.items():
            region = _Region.of(image, spacing, self._config)
            mean = networks[0](region)
            for network in networks[1:]:
                mean += network(region)
            mean *= 1 / count
            mean = _on_grid(mean, region, image.grid)
            total = mean if total is None else np.add(total, mean, out=total)
        assert total is not None  # noqa: S101 (a bundle has a network)
        return total

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
        if (calibration := self._calibration) is not None:
            findings = [
                replace(f, probability=float(calibration(f.probability if f.score is None else f.score)))
                for f in findings
            ]
        return findings, Scan(mask, image.affine)


def _on_grid(probability: NDArray[np.float32], region: _Region, grid: Grid) -> NDArray[np.float32]:
    """A box's probabilities on a scan's own voxels; 0 elsewhere."""
    volume = region.volume
    if probability.shape != volume.array.shape:
        whole = np.zeros(volume.array.shape, np.float32)
        whole[region.box] = probability
        probability = whole
    if volume.grid.same_as(grid, SAME_MM):
        return probability
    coarse = Scan(probability, volume.affine)
    return np.asarray(resample(coarse, grid, "linear", fill=0.0).array, np.float32)


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
    identity = bundle.identity
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
                    findings[source.case] = _predict_case(
                        predictor, source, folder, {"key": key, "model": identity}
                    )
            except VoxelscaleError as error:
                failed.append((source.case, error.message, error.hint))
            progress.update(done, source.case)
    return Outcome(findings=findings, kept=kept, failed=tuple(failed))


def _predict_case(
    predictor: Predictor, source: Source, folder: Path, facts: dict[str, Any]
) -> list[Finding]:
    started = time.monotonic()
    image = read_image(source)
    findings, mask = predictor.look(source.case, image)
    write_scan(mask, folder / "mask.nii.gz")
    write_findings(findings, folder / "findings.csv", folder / "findings.json")
    seconds = round(time.monotonic() - started, 2)
    notice(f"{source.case}: {len(findings)} findings in {seconds} s", level=2)
    # Last, so that its being there says that the case is whole.
    write_atomic(folder / CASE_FACTS, json.dumps({**facts, "seconds": seconds}))
    return findings


def predicted_by(folder: Path) -> str:
    """The `Bundle.identity` of the model that predicted a case; "" where its folder does not say."""
    try:
        return str(json.loads((folder / CASE_FACTS).read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _key(source: Source, bundle: Bundle, config: PredictConfig) -> str:
    return digest_of([source_stamp(source), bundle.digest, asdict(config)])[:16]


def _done(folder: Path, key: str) -> bool:
    try:
        return bool(json.loads((folder / CASE_FACTS).read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False
