"""From a probability map to positions of lesions in the patient."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.geometry import Grid, Triple

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
    min_volume_mm3: float = 0.0,
    image: NDArray[Any] | None = None,
) -> list[Finding]:
    """The 26-connected components above `threshold`, most confident first.

    A finding's confidence is the mean over its voxels of the lesion probability, times the share that
    is certain in size: a component of a few voxels that barely passes ranks below a large, clear one.
    Precisely ``mean(p) * v / (v + 14)`` with v its volume in mm3 and 14 mm3 a 3 mm sphere's, the least
    nodule that is reported at all (Fleischner Society 2017 counts from 3 mm and up as measurable).

    Args:
        probability: (z, y, x) in [0, 1]; or a mask of 0 and 1.
        grid: where its voxels lie; any direction.
        threshold: voxels of at least this probability belong to a lesion.
        min_volume_mm3: smaller components are dropped.
        image: (z, y, x) HU on the same grid, for the mean density.
    """
    import cc3d

    voxel = abs(float(np.linalg.det(grid.affine[:3, :3])))
    labels, count = cc3d.connected_components(probability >= threshold, connectivity=26, return_N=True)
    boxes = cc3d.statistics(labels)["bounding_boxes"][1:] if count else []
    findings = []
    for number, box in enumerate(boxes, start=1):
        inside = np.argwhere(labels[box] == number)
        volume = len(inside) * voxel
        if volume < min_volume_mm3:
            continue
        voxels = inside + [axis.start for axis in box]
        rows = tuple(voxels.T)
        mean_p = float(probability[rows].mean(dtype=np.float64))
        findings.append(
            _finding(case, voxels, grid, volume, mean_p * volume / (volume + 14.0), image, rows)
        )
    return sorted(findings, key=lambda f: (-f.probability, f.index))


def lesions_of_mask(case: str, mask: NDArray[Any], grid: Grid) -> list[Finding]:
    """The 26-connected components of a true mask, each with probability 1."""
    from dataclasses import replace

    return [replace(f, probability=1.0) for f in find_lesions(case, mask > 0, grid, threshold=0.5)]


def _finding(
    case: str,
    voxels: NDArray[np.int64],
    grid: Grid,
    volume: float,
    probability: float,
    image: NDArray[Any] | None,
    rows: tuple[NDArray[np.int64], ...],
) -> Finding:
    centre = voxels.mean(axis=0)
    x, y, z = (float(v) for v in grid.index_to_mm(centre))
    return Finding(
        case=case,
        x=x,
        y=y,
        z=z,
        index=(float(centre[0]), float(centre[1]), float(centre[2])),
        diameter_mm=(6 * volume / np.pi) ** (1 / 3),
        axial_diameter_mm=_axial_diameter(voxels, grid),
        volume_mm3=volume,
        mean_hu=None if image is None else float(image[rows].mean(dtype=np.float64)),
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


def write_findings(findings: Sequence[Finding], csv_path: Path, json_path: Path) -> None:
    """LUNA16's CSV (``seriesuid,coordX,coordY,coordZ,probability``) and a JSON list of all fields.

    LUNA16's coordinates are LPS mm, as ours.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(LUNA16_COLUMNS)
    for f in findings:
        table.writerow([f.case, f"{f.x:.4f}", f"{f.y:.4f}", f"{f.z:.4f}", f"{f.probability:.6f}"])
    write_atomic(csv_path, text.getvalue())
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
