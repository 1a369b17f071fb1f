"""From a probability map to positions of lesions in the patient."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic, write_csv
from voxelscale.geometry import Grid, Triple, sphere_diameter

LEAST_NODULE_MM3 = 14.0
"""Volume of a 3 mm sphere; what is smaller is no nodule (Fleischner Society, Hansell et al. 2008)."""

LUNA16_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One lesion, found or true.

    Attributes:
        case: the scan's name.
        x, y, z: centroid, LPS mm.
        index: centroid as fractional voxel (z, y, x) of the scan.
        diameter_mm: of the sphere of the same volume.
        axial_diameter_mm: greatest extent within one slice, from voxel centre to voxel centre, plus a
            pixel (the RECIST measure, to about a pixel).
        volume_mm3: voxels times the voxel's volume.
        mean_hu: mean of the scan within, or None where no scan was given.
        probability: confidence in [0, 1]; 1 for a true lesion.
    """

    case: str
    x: float
    y: float
    z: float
    index: Triple
    diameter_mm: float
    axial_diameter_mm: float
    volume_mm3: float
    mean_hu: float | None = None
    probability: float = 1.0


def find_lesions(
    case: str,
    probability: NDArray[Any],
    grid: Grid,
    *,
    threshold: float,
    candidates: float | None = None,
    min_volume_mm3: float = 0.0,
    image: NDArray[Any] | None = None,
) -> tuple[list[Finding], NDArray[np.uint8]]:
    """The 26-connected components above `threshold`, and the doubtful ones above `candidates` only.

    A finding's confidence is the mean probability of its most certain 14 mm3, a 3 mm sphere's volume
    and the least that is reported as a nodule; what a smaller component lacks of it counts as 0.

    Args:
        probability: (z, y, x) in [0, 1].
        grid: where its voxels lie; any direction.
        threshold: voxels of at least this probability belong to a lesion.
        candidates: components above this lower probability that hold no voxel above `threshold` are
            findings, too, so that a reader may choose the operating point; None: `threshold`.
        min_volume_mm3: smaller components are dropped.
        image: (z, y, x) HU on the same grid, for the mean density.

    Returns:
        findings, most confident first; and the mask (z, y, x) of those above `threshold`.
    """
    voxel = grid.voxel_mm3
    sure = components(probability >= threshold, min_volume_mm3 / voxel)
    mask = np.zeros(probability.shape, np.uint8)
    for voxels in sure:
        mask[tuple(voxels.T)] = 1
    doubtful = []
    if candidates is not None and candidates < threshold:
        doubtful = [
            voxels
            for voxels in components(probability >= candidates, min_volume_mm3 / voxel)
            if probability[tuple(voxels.T)].max() < threshold
        ]
    count = math.ceil(LEAST_NODULE_MM3 / voxel)
    findings = []
    for voxels in [*sure, *doubtful]:
        best = np.sort(probability[tuple(voxels.T)].astype(np.float64))[-count:]
        findings.append(_describe(case, voxels, grid, float(best.sum() / count), image))
    return sorted(findings, key=lambda f: (-f.probability, f.index)), mask


def lesions_of_mask(case: str, mask: NDArray[Any], grid: Grid) -> list[Finding]:
    """The 26-connected components of a true mask (not 0 is lesion), each with probability 1."""
    return [_describe(case, voxels, grid, 1.0, None) for voxels in components(mask > 0)]


def components(mask: NDArray[np.bool_], least: float = 0.0) -> list[NDArray[np.int64]]:
    """Voxels (n, 3) as (z, y, x) of each 26-connected component of at least `least` voxels."""
    import cc3d

    labels, count = cc3d.connected_components(mask, connectivity=26, return_N=True)
    boxes = cc3d.statistics(labels)["bounding_boxes"][1:] if count else []
    found = []
    for number, box in enumerate(boxes, start=1):
        inside = np.argwhere(labels[box] == number)
        if len(inside) >= least:
            found.append(inside + [axis.start for axis in box])
    return found


def _describe(
    case: str,
    voxels: NDArray[np.int64],
    grid: Grid,
    probability: float,
    image: NDArray[Any] | None,
) -> Finding:
    centre = voxels.mean(axis=0)
    x, y, z = (float(v) for v in grid.index_to_mm(centre))
    volume = len(voxels) * grid.voxel_mm3
    return Finding(
        case=case,
        x=x,
        y=y,
        z=z,
        index=(float(centre[0]), float(centre[1]), float(centre[2])),
        diameter_mm=sphere_diameter(volume),
        axial_diameter_mm=_axial_diameter(voxels, grid),
        volume_mm3=volume,
        mean_hu=None if image is None else float(image[tuple(voxels.T)].mean(dtype=np.float64)),
        probability=probability,
    )


def _axial_diameter(voxels: NDArray[np.int64], grid: Grid) -> float:
    """Greatest distance within one slice (first array axis), mm, plus a pixel."""
    pixel = float(np.mean(grid.spacing[1:]))
    greatest = 0.0
    for number in np.unique(voxels[:, 0]):
        points = voxels[voxels[:, 0] == number]
        hull = grid.index_to_mm(_extreme(points))
        apart = np.linalg.norm(hull[:, None] - hull[None], axis=-1)
        greatest = max(greatest, float(apart.max()))
    return greatest + pixel


def _extreme(points: NDArray[np.int64]) -> NDArray[np.int64]:
    """The points of a slice that can be ends of its greatest distance: each row's first and last."""
    order = np.lexsort((points[:, 2], points[:, 1]))
    points = points[order]
    new_row = np.flatnonzero(np.diff(points[:, 1])) + 1
    ends = np.concatenate([[0], new_row, new_row - 1, [len(points) - 1]])
    extreme: NDArray[np.int64] = points[np.unique(ends)]
    return extreme


def write_findings(findings: Sequence[Finding], csv_path: Path, json_path: Path | None = None) -> None:
    """LUNA16's CSV (``seriesuid,coordX,coordY,coordZ,probability``) and a JSON list of all fields.

    LUNA16's coordinates are LPS mm, as ours.
    """
    rows = [[f.case, f"{f.x:.4f}", f"{f.y:.4f}", f"{f.z:.4f}", f"{f.probability:.6f}"] for f in findings]
    write_csv(csv_path, [LUNA16_COLUMNS, *rows])
    if json_path is not None:
        write_atomic(json_path, json.dumps([asdict(f) for f in findings], indent=1))


def read_findings(path: Path) -> list[Finding]:
    """The findings of a JSON file that `write_findings` wrote.

    Raises:
        VoxelscaleError: it is missing or no such file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Finding(**{**row, "index": tuple(row["index"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VoxelscaleError(
            f"{path}: not a list of findings ({error})", "run voxelscale predict again"
        ) from None
