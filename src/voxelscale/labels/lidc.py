"""LIDC-IDRI's readings: up to four radiologists' outlines of nodules, and their marks of other things.

Armato et al., "The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative (IDRI)",
Medical Physics 38 (2011). An outline runs through the first pixels outside a nodule, not part of it.
Which readers' outlines are one nodule, and which voxels are its consensus, is as in pylidc (Hancock and
Magnan, Journal of Medical Imaging 3 (2016)): outlines belong together that come as near, counted in voxels,
as a slice is thick in mm; where more than four come together the distance is shortened by tenths. In one
third of LIDC's scans slices overlap: they are thicker than their distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid, Scan, Slices, as_lps, resample, sphere_diameter
from voxelscale.labels.annotation import Annotation, Labels
from voxelscale.labels.contours import inside
from voxelscale.labels.drawn import Lattice, on_scan

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

LARGEST = 2**23
"""Bytes of an XML; the largest of LIDC has 2 MB."""

MOST_OUTLINED, MOST_READINGS, MOST_POINTS = 200, 2000, 2**12
"""Outlined nodules and readings of any kind of one scan, and points of an outline: time and memory go by
their squares. LIDC has at most 49 outlined nodules in a scan, and 311 points in an outline."""

MOST_VOXELS = 2**25
"""Of the box about what is one nodule: that of LIDC's highest is 88 slices, however wide."""

READERS = 4
SHRINK, LEAST = 0.9, 0.1
"""By what, and down to what, the distance is shortened where more than four outlines come together."""

SAME_MM = 3.0
"""How near two readers' points are that mark one thing: it is smaller than that."""

FARTHEST = 10_000
"""Slices from the scan's first to any outline; farther ones are damage."""

OFF_SLICE = 0.25
"""Of the distance of two slices, that an outline's position may differ from its slice's."""


@dataclass(frozen=True, eq=False)
class Outline:
    """One contour.

    Attributes:
        z_mm: of its slice.
        points: (n, 2) whole pixels, (row, column).
        inclusion: whether it bounds the nodule rather than a hole in it.
    """

    z_mm: float
    points: NDArray[np.int64]
    inclusion: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """What one reader said of one place: a nodule's outlines, or a point (one outline of one point)."""

    outlines: tuple[Outline, ...]
    nodule: bool

    @property
    def outlined(self) -> bool:
        """Whether it is a nodule of at least 3 mm: smaller ones and non-nodules are one point."""
        return self.nodule and any(len(outline.points) > 1 for outline in self.outlines)


UPRIGHT = 0.7
"""Least cosine between the slices' normal and the patient's axis: outlines say no more than their z."""

AS_STORED = (".mha", ".mhd", ".nrrd", ".nhdr")
"""Files whose rows and columns are those of the DICOM slices: what wrote them (ITK) turns nothing."""


def read(
    path: Path,
    image: Scan,
    consensus: float,
    series: str = "",
    thickness_mm: float | None = None,
    image_path: Path | None = None,
) -> Labels:
    """The nodules of at least 3 mm as a mask; these, smaller ones and non-nodules as findings.

    Outlines count the rows and columns of the DICOM slices, whichever way these run, and name a slice by
    its z. A scan that is only a part of what was read keeps of each nodule what lies in it; who agrees with
    whom is settled on the whole, and so are centre and diameter.

    Args:
        image: the scan, its axes as in its files.
        thickness_mm: of the scan's slices, as its header says; None: as their distance.
        image_path: where the scan came from.

    Raises:
        VoxelscaleError: the XML is damaged, says too much, or is of another series; or the scan's pixels
            are not LIDC's.
    """
    lattice = _lattice(path, image, image_path)
    said, readings = read_xml(path)
    _check_counts(path, readings)
    if series and said and series != said:
        hint = "give each scan the XML that names its SeriesInstanceUID"
        raise VoxelscaleError(f"{path}: the readings of another series", hint)
    _check_places(path, readings, lattice)
    mask = np.zeros(lattice.shape, np.uint8)
    findings, outside, cut = [], 0, 0
    for group in cluster([reading for reading in readings if reading.outlined], lattice, thickness_mm):
        _check_size(path, group, lattice)
        agreed, corner = agree(group, lattice, consensus)
        nodule = _nodule(agreed, corner, group, lattice)
        there = _put(mask, agreed, corner)
        if there or (not agreed.any() and _lies_in(nodule, lattice)):
            findings.append(nodule)
            cut += there < int(np.count_nonzero(agreed))
        else:
            outside += 1
    for mark in _marks([reading for reading in readings if not reading.outlined], lattice):
        if _lies_in(mark, lattice):
            findings.append(mark)
        else:
            outside += 1
    if outside:
        warn(f"{path}: {outside} findings on slices that are not in the scan")
    if cut:
        warn(f"{path}: of {cut} nodules a part lies on slices that are not in the scan")
    return Labels(mask=_on_scan(path, mask, lattice, image), findings=tuple(findings))


def _lattice(path: Path, image: Scan, image_path: Path | None) -> Lattice:
    """What the outlines' pixels are those of.

    DICOM says it. Other files do not: rows that run to the front are turned, as converters to NIfTI turn
    them. Columns that run to the right were so in the slices of a patient who lay face down, or were turned
    by what wrote the file: only of MetaImage and NRRD is it known.
    """
    if image.slices is not None:
        normal = np.cross(image.slices.right, image.slices.down)
        if abs(normal[2]) / np.linalg.norm(normal) > UPRIGHT:
            return image.slices
    else:
        _, flipped, turned = as_lps(image.grid)
        stored = image_path is not None and image_path.suffix.lower() in AS_STORED
        if stored and (1 in flipped) == (2 in flipped):
            turned, flipped = image.grid, []
        upright = np.abs(np.abs(turned.direction) - np.eye(3)).max() < 1e-3
        if upright and 2 not in flipped:  # of the axes z, y, x
            return turned
    hint = "give the DICOM slices as LIDC-IDRI has them"
    raise VoxelscaleError(f"{path}: outlines in pixels of an axial scan, and this one is turned", hint)


def _on_scan(path: Path, mask: NDArray[np.uint8], lattice: Lattice, image: Scan) -> Scan:
    if isinstance(lattice, Slices):
        return on_scan(path, mask, lattice, image)
    # The same lattice, perhaps in another order of voxels: the nearest is the very voxel.
    return resample(Scan(mask, lattice.affine), image.grid, "nearest")


def _put(mask: NDArray[np.uint8], agreed: NDArray[np.bool_], corner: tuple[int, int, int]) -> int:
    """Set what of the voxels lies in the scan; how many do."""
    low = max(0, corner[0])
    high = min(mask.shape[0], corner[0] + agreed.shape[0])
    there = agreed[max(0, low - corner[0]) : max(0, high - corner[0])]
    if there.any():
        box = tuple(slice(c, c + n) for c, n in zip((low, *corner[1:]), there.shape, strict=True))
        mask[box] |= there
    return int(np.count_nonzero(there))


def _lies_in(finding: Annotation, lattice: Lattice) -> bool:
    """Whether its centre does, by slices: in-plane everything does."""
    return bool(-0.5 <= lattice.mm_to_index(finding.centre)[0] <= lattice.shape[0] - 0.5)


def read_xml(path: Path) -> tuple[str, list[Reading]]:
    """The SeriesInstanceUID ("" where it is not said), and everything that the readers said.

    Raises:
        VoxelscaleError: the file is damaged or declares entities.
    """
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        root = fromstring(path.read_bytes(), forbid_dtd=True)
        series, readings = "", []
        for element in root.iter():
            name = _local(element)
            if name.lower() == "seriesinstanceuid":
                series = series or (element.text or "").strip()
            elif name == "unblindedReadNodule":
                readings.append(_nodule_of(element))
            elif name == "nonNodule":
                readings.append(_point_of(element))
        return series, readings
    except (
        OSError,
        ParseError,
        DefusedXmlException,
        ValueError,
        LookupError,  # an encoding that nobody knows
        OverflowError,
        RecursionError,
    ) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VoxelscaleError(f"{path}: not readable as LIDC's XML ({problem})", "copy it again") from None


def _local(element: Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _text(element: Element, name: str) -> str:
    for child in element:
        if _local(child) == name:
            return (child.text or "").strip()
    raise ValueError(f"{_local(element)} without {name}")


def _pixel(element: Element) -> tuple[int, int]:
    return int(_text(element, "yCoord")), int(_text(element, "xCoord"))


def _nodule_of(element: Element) -> Reading:
    outlines = []
    for roi in element:
        if _local(roi) == "roi":
            points = np.array([_pixel(edge) for edge in roi if _local(edge) == "edgeMap"], np.int64)
            if not len(points):
                raise ValueError("an outline without points")
            if len(points) > MOST_POINTS:
                raise ValueError(f"an outline of {len(points)} points")
            inclusion = _text(roi, "inclusion").upper() == "TRUE"
            outlines.append(Outline(_finite(_text(roi, "imageZposition")), points, inclusion))
    return Reading(tuple(outlines), nodule=True)


def _point_of(element: Element) -> Reading:
    for locus in element:
        if _local(locus) == "locus":
            points = np.array([_pixel(locus)], np.int64)
            return Reading(
                (Outline(_finite(_text(element, "imageZposition")), points, True),), nodule=False
            )
    raise ValueError("a non-nodule without a place")


def _finite(text: str) -> float:
    number = float(text)
    if not np.isfinite(number):
        raise ValueError("a position that is not finite")
    return number


def _check_counts(path: Path, readings: Sequence[Reading]) -> None:
    outlined = sum(reading.outlined for reading in readings)
    for count, most, what in (
        (outlined, MOST_OUTLINED, "outlined nodules"),
        (len(readings), MOST_READINGS, "readings"),
    ):
        if count > most:
            hint = f"give the XML of one scan: at most {most} are taken"
            raise VoxelscaleError(f"{path}: {count} {what} in one scan", hint)


def _check_places(path: Path, readings: Sequence[Reading], lattice: Lattice) -> None:
    """Raise a VoxelscaleError where outlines cannot be of this scan's pixels and slices."""
    hint = "give the slices as LIDC-IDRI has them, neither cropped nor resampled"
    for outline in (outline for reading in readings for outline in reading.outlines):
        place = _place(outline, lattice)
        if abs(place - round(place)) > OFF_SLICE or abs(place) > FARTHEST:
            raise VoxelscaleError(f"{path}: an outline at {outline.z_mm:g} mm, between the slices", hint)
        if (outline.points < 0).any() or (outline.points >= lattice.shape[1:]).any():
            raise VoxelscaleError(f"{path}: an outline beyond the scan's rows and columns", hint)


def _check_size(path: Path, group: Sequence[Reading], lattice: Lattice) -> None:
    """Raise a VoxelscaleError where outlines that hang together are no nodule: memory goes by their box."""
    points = np.concatenate([_points(reading, lattice) for reading in group])
    size = np.ptp(points, axis=0).astype(int) + 1
    if size.prod() > MOST_VOXELS:
        shown = " x ".join(map(str, size[::-1]))
        hint = "is the XML of this scan, and whole?"
        raise VoxelscaleError(f"{path}: a nodule of {shown} voxels", hint)


def slice_of(outline: Outline, lattice: Lattice) -> int:
    """The slice that an outline lies on; beyond the outermost ones they are counted on."""
    return round(_place(outline, lattice))


def _place(outline: Outline, lattice: Lattice) -> float:
    """Where among the slices an outline lies, by what these say of their own z."""
    if isinstance(lattice, Grid):
        return float((outline.z_mm - lattice.origin[2]) / lattice.affine[2, 0])
    z = lattice.positions[:, 2]
    up = 1 if z[-1] > z[0] else -1
    below = int(np.clip(np.searchsorted(up * z, up * outline.z_mm) - 1, 0, len(z) - 2))
    return float(below + (outline.z_mm - z[below]) / (z[below + 1] - z[below]))


def cluster(
    readings: Sequence[Reading], lattice: Lattice, thickness_mm: float | None = None
) -> list[list[Reading]]:
    """The readings by nodule, from the feet up.

    Args:
        thickness_mm: of the scan's slices; None: as their distance.
    """
    from scipy.sparse.csgraph import connected_components

    if not readings:
        return []
    tolerance = lattice.spacing[0] if thickness_mm is None else thickness_mm
    clouds = [_points(reading, lattice) for reading in readings]
    apart = _distances(clouds, tolerance)
    while True:
        count, owner = connected_components(apart <= tolerance, directed=False)
        if np.bincount(owner).max() <= READERS or tolerance * SHRINK < LEAST:
            break
        tolerance *= SHRINK
    groups = [[r for r, o in zip(readings, owner, strict=True) if o == k] for k in range(count)]
    return sorted(
        groups, key=lambda group: float(np.mean([_points(r, lattice)[:, 0].mean() for r in group]))
    )


def _distances(clouds: Sequence[NDArray[np.float64]], farthest: float) -> NDArray[np.float64]:
    """(n, n) how near clouds of points come to each other; infinite where it is clearly beyond `farthest`.

    Boxes tell most pairs apart, trees measure the others: memory does not grow with the points' product.
    """
    from scipy.spatial import cKDTree

    apart = np.full((len(clouds), len(clouds)), np.inf)
    np.fill_diagonal(apart, 0)
    unique = [np.unique(cloud, axis=0) for cloud in clouds]
    low, high = (np.array([end(cloud, axis=0) for cloud in unique]) for end in (np.min, np.max))
    trees = [cKDTree(cloud) for cloud in unique]
    for i in range(len(clouds) - 1):
        between = np.maximum(0, np.maximum(low[i] - high[i + 1 :], low[i + 1 :] - high[i]))
        for j in i + 1 + np.flatnonzero(np.linalg.norm(between, axis=1) <= farthest + 1):
            one, other = sorted((i, int(j)), key=lambda k: len(unique[k]))
            nearest, _ = trees[other].query(unique[one], distance_upper_bound=farthest + 1)
            apart[i, j] = apart[j, i] = nearest.min()
    return apart


def _points(reading: Reading, lattice: Lattice) -> NDArray[np.float64]:
    """(n, 3) voxels (z, y, x) of all its outlines."""
    return np.concatenate(
        [np.insert(o.points.astype(np.float64), 0, slice_of(o, lattice), axis=1) for o in reading.outlines]
    )


def agree(
    group: Sequence[Reading], lattice: Lattice, consensus: float
) -> tuple[NDArray[np.bool_], tuple[int, int, int]]:
    """The voxels that at least this share of the readers outlined, and the first voxel of their box."""
    points = np.concatenate([_points(reading, lattice) for reading in group])
    low, high = points.min(axis=0).astype(int), points.max(axis=0).astype(int)
    votes = np.zeros(tuple(high - low + 1), np.uint16)
    for reading in group:
        votes += fill(reading, lattice, low, high)
    return votes / len(group) >= consensus, (int(low[0]), int(low[1]), int(low[2]))


def fill(
    reading: Reading, lattice: Lattice, low: NDArray[np.int64], high: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The voxels (z, y, x) between two corners, both included, that one reader outlined."""
    mask = np.zeros(tuple(high - low + 1), np.bool_)
    for outline in sorted(reading.outlines, key=lambda o: not o.inclusion):
        z = slice_of(outline, lattice) - int(low[0])
        points = outline.points - low[1:]
        filled = inside(points, (mask.shape[1], mask.shape[2]))
        if outline.inclusion:
            mask[z] |= filled
        else:
            mask[z] &= ~filled
        mask[z, points[:, 0], points[:, 1]] = False
    return mask


def _nodule(
    agreed: NDArray[np.bool_], corner: tuple[int, int, int], group: Sequence[Reading], lattice: Lattice
) -> Annotation:
    """Centre of the consensus, or where it is empty of the outlines."""
    voxels = np.argwhere(agreed) + corner
    places = voxels if len(voxels) else np.concatenate([_points(reading, lattice) for reading in group])
    volume = _volume(voxels, lattice)
    diameter = sphere_diameter(volume) if volume else None
    return Annotation(
        kind="nodule", centre=_mm(places.mean(axis=0), lattice), diameter_mm=diameter, readers=len(group)
    )


def _volume(voxels: NDArray[np.int64], lattice: Lattice) -> float:
    """In mm3; of slices in uneven steps each is as thick as half its distance to both neighbours."""
    if isinstance(lattice, Grid):
        return len(voxels) * lattice.voxel_mm3
    steps = np.diff(lattice.heights)
    thick = (np.concatenate([steps[:1], steps]) + np.concatenate([steps, steps[-1:]])) / 2
    there = np.clip(voxels[:, 0], 0, len(thick) - 1)
    return float(thick[there].sum() * np.prod(lattice.spacing[1:]))


def _marks(points: Sequence[Reading], lattice: Lattice) -> list[Annotation]:
    """Small nodules and non-nodules; marks of one kind within `SAME_MM` are of one thing."""
    from scipy.cluster.hierarchy import fcluster, linkage

    found: list[Annotation] = []
    kinds: tuple[Literal["small", "non-nodule"], ...] = ("small", "non-nodule")
    for kind in kinds:
        places = np.array(
            [
                _mm(_points(r, lattice).mean(axis=0), lattice)
                for r in points
                if r.nodule == (kind == "small")
            ]
        )
        if not len(places):
            continue
        owner = np.ones(1, int) if len(places) == 1 else fcluster(linkage(places), SAME_MM, "distance")
        for group in np.unique(owner):
            x, y, z = places[owner == group].mean(axis=0)
            count = min(READERS, int((owner == group).sum()))
            centre = (float(x), float(y), float(z))
            found.append(Annotation(kind=kind, centre=centre, diameter_mm=None, readers=count))
    return found


def _mm(index: NDArray[np.float64], lattice: Lattice) -> tuple[float, float, float]:
    x, y, z = lattice.index_to_mm(index)
    return float(x), float(y), float(z)
