"""DICOM RT Structure Sets: closed planar contours (PS3.3 C.8.8.6)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import LESION, Classes
from voxelscale.console import notice, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom import tags
from voxelscale.formats.dicom.elements import DicomObject
from voxelscale.formats.dicom.header import FARTHEST_MM
from voxelscale.geometry import Scan
from voxelscale.labels.contours import inside
from voxelscale.labels.dicom import check_names, check_series, free_text, read_label_object
from voxelscale.labels.drawn import Lattice, lattice_of, lay, on_scan, warn_outside
from voxelscale.labels.stored import kind_of_stored, labels_by_number, warn_of_replaced

TUMOUR = re.compile(r"gtv|nodul|lesion|tumou?r|metasta", re.IGNORECASE)
"""What regions of interest are called that are lesions."""

BUT_FOR = re.compile(
    r"[-\u2013\u2212]\W*[icp]?gtv|(minus|without|excl\w*|\bnon?\b|\bex\b)[\W_]*([icp]?gtv|nodul|lesion|tumou?r|metasta)",
    re.IGNORECASE,
)
"""What they are called that are something else but for the lesions, such as ``Lungs-GTV`` (AAPM TG-263)."""

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
"""Geometric types of contours that hold an area (PS3.3 C.8.8.6.3)."""

MOST_POINTS = 2**16
"""Of a contour; what a person draws has hundreds, what a program draws thousands."""

SAME_PLANE_MM, SAME_PLANE = 0.2, 0.25
"""Contours this near each other, in mm and in slices, lie in one plane: programs round to 0.1 mm."""

SPARSE, FARTHEST_PLANES_MM = 1.01, 10.0
"""Slices from plane to plane above which some have none, and the distance up to which these have the
nearest plane's contours: hardly a scan to draw on has thicker slices."""


@dataclass(frozen=True, eq=False)
class Region:
    """A region of interest.

    Attributes:
        name: as the structure set calls it.
        tumour: whether it is named or typed as one.
        contours: the closed ones, each (n, 3) LPS mm.
        others: how many contours of each other geometric type it has, which hold no area.
    """

    name: str
    tumour: bool
    contours: list[NDArray[np.float64]]
    others: Counter[str]


Regions = dict[int, Region]

Drawn = TypeVar("Drawn")


def read(
    paths: Sequence[Path],
    image: Scan,
    values: tuple[int, ...] | None,
    series: str = "",
    classes: Classes = LESION,
) -> Scan:
    """The regions of one or several objects as one mask of stored labels: pixels whose centre lies inside.

    A contour belongs to the nearest slice. Several contours of a region in one plane cut holes into each
    other (PS3.3 C.8.8.6.3: XOR).

    Args:
        image: the scan; where it was resampled, the contours are painted on its slices.
        values: numbers of regions, the same for every object; None: those that are named or typed as a
            tumour, or the only one.
        series: the image's SeriesInstanceUID, where it is known.
        classes: by the numbers or the names of regions. Where two overlap, the later class is taken, with a
            warning; classes that are themselves regions may overlap.

    Raises:
        VoxelscaleError: one is damaged, of another series, or drawn on other planes, or it is unclear which
            region is meant.
    """
    sets = {path: _read_set(path, series, image) for path in paths}
    named = values is None and classes.values != ((),)
    labelled = _of_classes(sets, classes) if named else _of_lesion(sets, values)
    lattice, replaced = lattice_of(image), 0
    made = np.zeros(image.array.shape, kind_of_stored(classes) if named else np.uint8)
    for path, labels in labelled.items():
        regions = {number: sets[path][number] for number in labels}
        for number, region in regions.items():
            _warn_of_others(path, number, region)
        contours, outside, drawn_any = sum(len(region.contours) for region in regions.values()), 0, False
        for label in sorted(set(labels.values())):
            drawn = np.zeros(lattice.shape, np.uint8)
            for number, region in regions.items():
                if labels[number] == label and region.contours:
                    outside += _paint(path, region, lattice, drawn)
            drawn_any |= bool(drawn.any())
            replaced += lay(made, on_scan(path, drawn, lattice, image).array > 0, label, classes)
        _check_inside(path, outside, contours, drawn_any)
    warn_of_replaced(", ".join(map(str, paths)), replaced)
    return Scan(made, image.affine)


def _of_classes(sets: dict[Path, Regions], classes: Classes) -> dict[Path, dict[int, int]]:
    """The stored label of each region that is of a class, of every object."""
    names = {path: {number: (r.name,) for number, r in regions.items()} for path, regions in sets.items()}
    check_names(names, "region", classes)
    return {path: labels_by_number(called, classes) for path, called in names.items()}


def _of_lesion(sets: dict[Path, Regions], values: tuple[int, ...] | None) -> dict[Path, dict[int, int]]:
    """As `_of_classes`, of the one lesion; those of its regions that hold no area are there, too."""
    labelled: dict[Path, dict[int, int]] = {}
    for path, numbers in _chosen(sets, values).items():
        regions = sets[path]
        called = ", ".join(regions[number].name or str(number) for number in numbers)
        if not numbers:
            notice(f"{path}: none of its regions is the lesion, left out")
        elif values is None and not any(regions[number].tumour for number in numbers):
            notice(f"{path}: its only region, {called}, is taken as the lesion")
        elif values is None and len(numbers) > 1:
            notice(f"{path}: regions {called} together are taken as the lesion")
        meant = [n for n, region in regions.items() if (region.tumour if values is None else n in values)]
        labelled[path] = dict.fromkeys([*numbers, *meant], 1) if numbers else {}
    return labelled


def _warn_of_others(path: Path, number: int, region: Region) -> None:
    if region.others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(region.others.items()))
        what = f"region {number} {region.name}".strip()
        warn(f"{path}: {what} has contours that hold no area, left out: {kinds}")


def _check_inside(path: Path, outside: int, contours: int, drawn: bool) -> None:
    """Raise a VoxelscaleError where a structure set lies outside the scan; warn where a part does."""
    if contours and outside == contours and not drawn:
        hint = "check that the pair belongs together"
        raise VoxelscaleError(f"{path}: it lies outside the scan", hint)
    warn_outside(path, outside, "contour")


def _read_set(path: Path, series: str, image: Scan) -> Regions:
    found = read_label_object(path)
    check_series(found, series, image)
    try:
        return _regions(found)
    except ValueError as error:
        raise VoxelscaleError(f"{path}: a damaged structure set ({error})", "export it again") from None


def _regions(found: DicomObject) -> Regions:
    """The regions that have a contour of any kind, by their numbers."""
    data = found.data
    names = {
        r.whole(tags.REGION_NUMBER): free_text(found, r, tags.REGION_NAME) for r in data.items(tags.REGIONS)
    }
    types = {
        o.whole(tags.REGION_REFERENCE): o.text(tags.REGION_TYPE) for o in data.items(tags.OBSERVATIONS)
    }
    regions: Regions = {}
    for drawn in data.items(tags.DRAWN_REGIONS):
        contours, others, known = [], Counter[str](), set[bytes]()
        for contour in drawn.items(tags.CONTOURS):
            kind = contour.text(tags.CONTOUR_TYPE)
            if kind in CLOSED:
                text = contour.raw(tags.CONTOUR_DATA).strip(b"\0 ")
                if text not in known:  # written twice it would cut itself out
                    contours.append(_points(text))
                    known.add(text)
            else:
                others[kind or "of no type"] += 1
        number = drawn.whole(tags.REGION_REFERENCE)
        if number in regions:
            raise ValueError(f"two regions of number {number}")
        name = names.get(number, "")
        named = TUMOUR.search(name) is not None and BUT_FOR.search(name) is None
        tumour = named or types.get(number) == "GTV"
        if contours or others:
            regions[number] = Region(name, tumour, contours, others)
    return regions


def _points(text: bytes) -> NDArray[np.float64]:
    """A contour's points (n, 3), LPS mm."""
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


def _chosen(sets: dict[Path, Regions], values: tuple[int, ...] | None) -> dict[Path, list[int]]:
    """The regions that are the lesion, of every object; of some perhaps none."""
    closed = {path: [n for n, r in regions.items() if r.contours] for path, regions in sets.items()}
    if values is not None and any(set(numbers) & set(values) for numbers in closed.values()):
        chosen = {path: [n for n in numbers if n in values] for path, numbers in closed.items()}
    else:
        # By their names in all of the objects: one beside a tumour that holds only organs is none.
        chosen = {path: [n for n in numbers if sets[path][n].tumour] for path, numbers in closed.items()}
        if values is not None or not any(chosen.values()):
            single = values is None and all(len(numbers) == 1 for numbers in closed.values())
            chosen = closed if single else {}
    if not any(chosen.values()):
        path, regions = next(iter(sets.items()))
        named = (
            f"{n} {r.name}".strip() + " (no area)" * (not r.contours) for n, r in sorted(regions.items())
        )
        hint = "say which regions are the lesion, as reading.labels=[1] or reading.labels={lesion: GTV}"
        held = ", ".join(named) or "none"
        raise VoxelscaleError(f"{path}: which of its regions is the lesion? It holds: {held}", hint)
    return chosen


def _paint(path: Path, wanted: Region, lattice: Lattice, mask: NDArray[np.uint8]) -> int:
    """Set a region's voxels; how many of its contours reach beyond the scan."""
    drawn = [lattice.mm_to_index(points) for points in wanted.contours]
    spread = np.max([np.ptp(points, axis=0) for points in drawn], axis=0)
    axis = int(np.argmin(spread))
    if spread[axis] > 0.5:
        hint = "export it on the planes of this scan"
        raise VoxelscaleError(f"{path}: its contours do not lie in the scan's planes", hint)
    others = [a for a in range(3) if a != axis]
    last = np.asarray(mask.shape) - 0.5
    there = [((points >= -0.5) & (points <= last)).all(axis=1) for points in drawn]
    placed = [(float(points[:, axis].mean()), points[:, others]) for points in drawn]
    step = min(SAME_PLANE, SAME_PLANE_MM / lattice.spacing[axis])
    reach = _reach(f"{path}: {wanted.name}".rstrip(": "), placed, step, lattice.spacing[axis])
    slices: dict[int, list[tuple[float, NDArray[np.float64]]]] = {}
    for place, points in placed:
        if -0.5 <= place <= last[axis]:
            # From less than `reach` below the plane to `reach` above it: midway between slices it is one's.
            first, end = (int(np.floor(place + d)) + 1 for d in (-reach, reach))
            for number in {min(max(n, 0), mask.shape[axis] - 1) for n in range(first, end)}:
                slices.setdefault(number, []).append((place, points))
    region = np.zeros_like(mask)
    view = np.moveaxis(region, axis, 0)
    for number, near in slices.items():
        _fill(view[number], number, near, step)
    mask |= region
    return sum(not within.all() for within in there)


def _reach(
    what: str, placed: Sequence[tuple[float, NDArray[np.float64]]], step: float, spacing: float
) -> float:
    """How many slices to either side of its plane a contour holds for: half a slice.

    More, with a warning, where a region is drawn on some slices only, as on every third one or on a scan of
    thicker slices: else it would fall into as many lesions as planes.

    Args:
        what: for the warning.
        placed: each contour's place among the slices, and its points in pixels.
        step: of the places, up to which contours lie in one plane.
        spacing: of the slices, mm.
    """
    planes = _planes([(place, (p.min(axis=0), p.max(axis=0))) for place, p in placed], step)
    # Only from planes whose contours lie over each other: others are of another lesion.
    apart = [
        b[0][0] - a[0][0]
        for a, b in pairwise(planes)
        if any((c[0] <= d[1]).all() and (d[0] <= c[1]).all() for _, c in a for _, d in b)
    ]
    gap = float(np.median(apart)) if apart else 0.0
    if gap <= SPARSE:
        return 0.5
    told = f"{what}: drawn on every {gap:.2g} slices ({gap * spacing:.3g} mm)"
    if gap * spacing > FARTHEST_PLANES_MM:
        warn(f"{told}; the slices between are left empty")
        return 0.5
    warn(f"{told}; the slices between are given the nearest contour")
    return gap / 2


def _fill(
    plane: NDArray[np.uint8], number: int, placed: list[tuple[float, NDArray[np.float64]]], step: float
) -> None:
    """Set the pixels of a slice that its contours hold.

    Drawn on finer slices than the scan's, several planes are near one slice: the nearest is its. Of the
    others counts only what the nearer ones do not have, such as another lesion.

    Args:
        placed: each contour's place among the slices, and its points in pixels.
        step: of the places, up to which contours lie in one plane.
    """
    planes = _planes(placed, step)
    taken = np.zeros(plane.shape, np.bool_)
    for contours in sorted(planes, key=lambda pairs: abs(np.mean([p for p, _ in pairs]) - number)):
        shape = plane.shape[0], plane.shape[1]
        filled = [inside(outline, shape, uncut=True) for outline in _unlike(contours)]
        new = [area for area in filled if not (area & taken).any()]
        for area in new:
            plane ^= area
        taken |= np.logical_or.reduce(filled)


def _planes(placed: Sequence[tuple[float, Drawn]], step: float) -> list[list[tuple[float, Drawn]]]:
    """What was drawn, with its place among the slices, by plane; `step` is the most within one."""
    ordered = sorted(placed, key=lambda pair: pair[0])
    cuts = np.flatnonzero(np.diff([place for place, _ in ordered]) > step) + 1
    return [ordered[a:b] for a, b in zip([0, *cuts], [*cuts, len(ordered)], strict=True)]


def _unlike(contours: Sequence[tuple[float, NDArray[np.float64]]]) -> list[NDArray[np.float64]]:
    """The outlines, one that is there twice only once: it would cut itself out."""
    kept: dict[bytes, NDArray[np.float64]] = {}
    for _, outline in contours:
        kept.setdefault(np.rint(outline * 100).astype(np.int64).tobytes(), outline)
    return list(kept.values())
