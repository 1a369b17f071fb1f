"""LUNA16's tables: nodules as spheres, and the findings that neither count nor hurt.

Setio et al., "Validation, comparison, and combination of algorithms for automatic detection of pulmonary
nodules in CT images: the LUNA16 challenge", Medical Image Analysis 42 (2017).
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid, Scan
from voxelscale.labels import Finding, Labels

EXCLUDED = "annotations_excluded.csv"
"""Beside the nodules' table."""

COLUMNS = ("coordX", "coordY", "coordZ", "diameter_mm")
LARGEST_MM = 500.0


def read(path: Path, image: Scan, series: str) -> Labels:
    """The spheres of one series, painted, and its excluded findings.

    Raises:
        VoxelscaleError: no series is named, the table is damaged, or a nodule lies outside the scan.
    """
    if not series:
        hint = "name the image by its SeriesInstanceUID, as LUNA16 does"
        raise VoxelscaleError(f"{path}: a table of many series, and this scan's is not known", hint)
    mask = np.zeros(image.array.shape, np.uint8)
    findings = []
    for *centre, diameter in _rows(path, series):
        paint(mask, image.grid, np.asarray(centre), diameter, path)
        findings.append(
            Finding(kind="nodule", centre=_triple(centre), diameter_mm=diameter, readers=3)
        )  # LUNA16 keeps what at least 3 of 4 readers accepted
    beside = path.with_name(EXCLUDED)
    for *centre, diameter in _rows(beside, series) if beside.is_file() else []:
        known = diameter if 0 < diameter <= LARGEST_MM else None
        findings.append(Finding(kind="excluded", centre=_triple(centre), diameter_mm=known, readers=1))
    return Labels(mask=Scan(mask, image.affine), findings=tuple(findings))


def _triple(centre: list[float]) -> tuple[float, float, float]:
    x, y, z = centre
    return x, y, z


def _rows(path: Path, series: str) -> list[list[float]]:
    """x, y, z and diameter of a series' rows."""
    found = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            for number, row in enumerate(csv.DictReader(handle), start=2):
                if (row.get("seriesuid") or "").strip() != series:
                    continue
                numbers = [float(row[column]) for column in COLUMNS]
                if not all(map(math.isfinite, numbers)):
                    raise ValueError(f"line {number} is not finite")
                found.append(numbers)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError) as error:
        hint = "its columns must be seriesuid,coordX,coordY,coordZ,diameter_mm"
        raise VoxelscaleError(f"{path}: not readable as LUNA16's table ({error})", hint) from None
    return found


def paint(
    mask: NDArray[np.uint8], grid: Grid, centre: NDArray[np.float64], diameter: float, path: Path
) -> None:
    """Set the voxels whose centre lies within the sphere, and at least the nearest one."""
    if not 0 < diameter <= LARGEST_MM:
        raise VoxelscaleError(f"{path}: a nodule of {diameter:g} mm", "correct its diameter_mm")
    index = grid.mm_to_index(centre)
    nearest = np.rint(index).astype(int)
    if (nearest < 0).any() or (nearest >= mask.shape).any():
        shown = ", ".join(f"{v:.1f}" for v in centre)
        notice(f"{path}: the nodule at ({shown}) mm lies outside the scan and is left out")
        return
    # A sphere's box in index space: each row of the inverse affine bounds one axis.
    reach = diameter / 2 * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    low = np.maximum(np.floor(index - reach), 0).astype(int)
    high = np.minimum(np.ceil(index + reach) + 1, mask.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    places = np.moveaxis(np.indices(high - low), 0, -1) + low
    apart = np.linalg.norm(grid.index_to_mm(places) - centre, axis=-1)
    mask[box] |= apart <= diameter / 2
    mask[tuple(nearest)] = 1
