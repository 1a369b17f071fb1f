"""LUNA16's tables: nodules as spheres, and the excluded findings.

Setio et al., "Validation, comparison, and combination of algorithms for automatic detection of pulmonary
nodules in CT images: the LUNA16 challenge", Medical Image Analysis 42 (2017).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid, Scan
from voxelscale.labels.annotation import Annotation, Labels
from voxelscale.tables import read_table

EXCLUDED = "annotations_excluded.csv"
"""Beside the nodules' table."""

COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
LARGEST_MM = 500.0


def read(path: Path, image: Scan, series: str) -> Labels:
    """The spheres of one series, painted, and its excluded findings.

    Raises:
        VoxelscaleError: no series is named, the table is damaged, or a nodule lies outside the scan.
    """
    if not series:
        hint = "name the series in a column seriesuid of the CSV that lists the images"
        raise VoxelscaleError(f"{path}: a table of many series, and this scan's is not known", hint)
    mask = np.zeros(image.array.shape, np.uint8)
    findings = []
    nodules = list(dict.fromkeys(by_series(path).get(series, ())))  # a repeated line is one nodule
    for *centre, diameter in nodules:
        if paint(mask, image.grid, np.asarray(centre), diameter, path):
            findings.append(
                Annotation(kind="nodule", centre=_triple(centre), diameter_mm=diameter, readers=3)
            )  # LUNA16 keeps what at least 3 of 4 readers accepted
    if nodules and not findings:
        hint = "give LPS mm: x grows to the patient's left, y to the back, z to the head"
        raise VoxelscaleError(f"{path}: none of its {len(nodules)} nodules of this scan lies in it", hint)
    beside = path.with_name(EXCLUDED)
    for *centre, diameter in by_series(beside).get(series, ()) if beside.is_file() else ():
        known = diameter if 0 < diameter <= LARGEST_MM else None
        findings.append(Annotation(kind="excluded", centre=_triple(centre), diameter_mm=known, readers=1))
    return Labels(mask=Scan(mask, image.affine), findings=tuple(findings))


def by_series(path: Path) -> dict[str, list[tuple[float, ...]]]:
    """Of each series in a table x, y, z (LPS mm) and diameter (mm) of its spheres.

    Raises:
        VoxelscaleError: the table is damaged, or its first line does not name the columns.
    """
    stamp = path.stat() if path.is_file() else None
    return _by_series(path, stamp and (stamp.st_size, stamp.st_mtime_ns))


@lru_cache(maxsize=4)
def _by_series(path: Path, stamp: tuple[int, int] | None) -> dict[str, list[tuple[float, ...]]]:
    """`by_series`, once for all scans of a table that has not changed."""
    table = read_table(path, COLUMNS)
    found: dict[str, list[tuple[float, ...]]] = {}
    for number, cells in table.rows():
        uid = table.word(cells, COLUMNS[0])
        if not uid:
            raise VoxelscaleError(f"{path}: line {number} names no series", "correct or drop the line")
        found.setdefault(uid, []).append(table.numbers(number, cells, COLUMNS[1:]))
    return found


def _triple(centre: list[float]) -> tuple[float, float, float]:
    x, y, z = centre
    return x, y, z


def paint(
    mask: NDArray[np.uint8], grid: Grid, centre: NDArray[np.float64], diameter: float, path: Path
) -> bool:
    """Set the voxels whose centre lies within the sphere, and at least the nearest one; False: outside."""
    if not 0 < diameter <= LARGEST_MM:
        raise VoxelscaleError(f"{path}: a nodule of {diameter:g} mm", "correct its diameter_mm")
    index = grid.mm_to_index(centre)
    nearest = np.rint(index).astype(int)
    if (nearest < 0).any() or (nearest >= mask.shape).any():
        shown = ", ".join(f"{v:.1f}" for v in centre)
        warn(f"{path}: the nodule at ({shown}) mm lies outside the scan and is left out")
        return False
    # A sphere's box in index space: each row of the inverse affine bounds one axis.
    reach = diameter / 2 * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    low = np.maximum(np.floor(index - reach), 0).astype(int)
    high = np.minimum(np.ceil(index + reach) + 1, mask.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    places = np.moveaxis(np.indices(high - low), 0, -1) + low
    apart = np.linalg.norm(grid.index_to_mm(places) - centre, axis=-1)
    mask[box] |= apart <= diameter / 2
    mask[tuple(nearest)] = 1
    return True
