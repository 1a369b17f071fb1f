"""DICOM RT Structure Sets: closed planar contours (PS3.3 C.8.8.6)."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom.header import FARTHEST_MM
from voxelscale.geometry import Scan
from voxelscale.labels.contours import inside
from voxelscale.labels.dicom import check_series, read_dataset

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

TUMOUR = re.compile(r"gtv|nodul|lesion|tumou?r|metasta", re.IGNORECASE)
"""What regions of interest are called that are lesions."""

MOST_POINTS = 2**16
"""Of a contour; what a person draws has hundreds, what a program draws thousands."""

Contours = dict[int, list[NDArray[np.float64]]]


def read(path: Path, image: Scan, values: tuple[int, ...] | None, series: str = "") -> Scan:
    """The regions as one mask: the pixels whose centre lies inside, on the nearest slice.

    Several contours of a region on one slice cut holes into each other (PS3.3 C.8.8.6.3: XOR).

    Args:
        values: numbers of regions; None: the only one, or those that are named or typed as a tumour.
        series: the image's SeriesInstanceUID, where it is known.

    Raises:
        VoxelscaleError: it is damaged, of another series, drawn on other planes, or it is unclear which
            region is meant.
    """
    data = read_dataset(path)
    check_series(path, data, series)
    try:
        regions = _regions(data)
        chosen = _chosen(path, data, regions, values)
        mask = np.zeros(image.array.shape, np.uint8)
        for number in chosen:
            _paint(path, regions[number], image, mask)
    except VoxelscaleError:
        raise
    except Exception as error:  # elements are decoded when they are asked for, garbled ones in any error
        raise VoxelscaleError(f"{path}: a damaged structure set ({error})", "export it again") from None
    return Scan(mask, image.affine)


def _regions(data: Dataset) -> Contours:
    """Each region's contours, (n, 3) LPS mm."""
    regions: Contours = {}
    for region in data.get("ROIContourSequence") or []:
        contours = []
        for contour in region.get("ContourSequence") or []:
            if str(contour.get("ContourGeometricType", "")).startswith("CLOSED_PLANAR"):
                contours.append(_points(contour))
        regions[int(region.ReferencedROINumber)] = contours
    return {number: contours for number, contours in regions.items() if contours}


def _points(contour: Dataset) -> NDArray[np.float64]:
    """A contour's points (n, 3), LPS mm."""
    # As bytes: of a million numbers pydicom would make a million objects before they could be counted.
    element = contour.get_item("ContourData")
    text = bytes(element.value or b"").strip(b"\0 ") if element is not None else b""
    if not text:
        raise ValueError("a contour without points")
    count = text.count(b"\\") + 1
    if count % 3:
        raise ValueError(f"a contour of {count} coordinates, which is no multiple of 3")
    if count > 3 * MOST_POINTS:
        raise ValueError(f"a contour of {count // 3} points")
    points = np.fromiter(map(float, text.split(b"\\")), np.float64, count).reshape(-1, 3)
    if not (np.abs(points) < FARTHEST_MM).all():
        raise ValueError("a point that is nowhere in a patient")
    return points


def _chosen(path: Path, data: Dataset, regions: Contours, values: tuple[int, ...] | None) -> list[int]:
    names = {int(r.ROINumber): str(r.get("ROIName", "")) for r in data.get("StructureSetROISequence") or []}
    types = {
        int(o.ReferencedROINumber): str(o.get("RTROIInterpretedType", ""))
        for o in data.get("RTROIObservationsSequence") or []
    }
    if values is not None:
        chosen = [number for number in regions if number in values]
    elif len(regions) == 1:
        chosen = list(regions)
    else:
        chosen = [n for n in regions if types.get(n) == "GTV" or TUMOUR.search(names.get(n, ""))]
    if not chosen:
        held = ", ".join(f"{n} {names.get(n, '')}".strip() for n in sorted(regions)) or "none"
        hint = "say which regions are the lesion, as prepare.labels=[1]"
        raise VoxelscaleError(f"{path}: which of its regions is the lesion? It holds: {held}", hint)
    return chosen


def _paint(path: Path, contours: list[NDArray[np.float64]], image: Scan, mask: NDArray[np.uint8]) -> None:
    drawn = [image.grid.mm_to_index(points) for points in contours]
    region = np.zeros_like(mask)
    spread = np.max([np.ptp(points, axis=0) for points in drawn], axis=0)
    axis = int(np.argmin(spread))
    if spread[axis] > 0.5:
        hint = "export it on the planes of this scan"
        raise VoxelscaleError(f"{path}: its contours do not lie in the scan's planes", hint)
    others = [a for a in range(3) if a != axis]
    shape = (mask.shape[others[0]], mask.shape[others[1]])
    planes: dict[float, list[NDArray[np.float64]]] = defaultdict(list)
    for points in drawn:
        place = float(points[:, axis].mean())
        if not -0.5 <= place <= mask.shape[axis] - 0.5:
            hint = "check that the pair belongs together"
            raise VoxelscaleError(f"{path}: a contour outside the scan", hint)
        planes[round(place, 2)].append(points[:, others])
    # Drawn on finer slices than the scan's, several planes are near one slice: the nearest is its.
    nearest: dict[int, float] = {}
    for place in sorted(planes, key=lambda p: -abs(p - np.rint(p))):
        nearest[int(np.clip(np.rint(place), 0, mask.shape[axis] - 1))] = place
    view = np.moveaxis(region, axis, 0)
    for number, place in nearest.items():
        for outline in planes[place]:
            view[number] ^= inside(outline, shape)
    mask |= region
