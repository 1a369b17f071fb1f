"""A case's image and the truth about it, whatever they are kept in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from voxelscale.config import ReadingConfig
from voxelscale.console import count, notice, warn
from voxelscale.dataset.classes import settled, values_of
from voxelscale.dataset.source import PICTURES, Source
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import SAME_MM, Grid, Scan, Slices, as_lps, reorient
from voxelscale.labels import kind_of, read_labels, read_mask
from voxelscale.labels.annotation import Labels
from voxelscale.labels.stored import kind_of_stored

COVERED, MOST_SAMPLES = 0.99, 50
"""Share of the first channel's volume that another must cover; points along an axis to find it."""


def read_image(source: Source, reading: ReadingConfig) -> Scan:
    """The scan in HU, axes as in its files.

    Raises:
        VoxelscaleError: the case is known to be unfit, or the image is.
    """
    from voxelscale.formats import read_scan

    return read_scan(*_choice(source, reading))


def read_lattice(source: Source, reading: ReadingConfig) -> Grid:
    """The lattice of `read_slices`."""
    return read_slices(source, reading)[0]


def read_slices(source: Source, reading: ReadingConfig) -> tuple[Grid, Slices | None]:
    """The lattice of the scan that `read_image` gives, from the headers alone, and its DICOM slices.

    Raises:
        VoxelscaleError: as `read_image`, but for what only the voxels show.
    """
    from voxelscale.formats import read_slices as slices_in

    return slices_in(*_choice(source, reading))


def read_more(source: Source, reading: ReadingConfig, first: Grid | None = None) -> list[Scan]:
    """The channels after the first, each on its own lattice, axes as in the files.

    A warning says how much of the first channel's volume one of them does not cover.

    Args:
        first: the lattice of the first channel, where it has been read.

    Raises:
        VoxelscaleError: one is missing, unfit, another patient's, or lies elsewhere.
    """
    from voxelscale.formats import read_scan, read_volumes

    first = read_lattice(source, reading) if first is None else first
    if source.volumes > 1:
        return read_volumes(source.image, range(1, source.volumes))
    scans = []
    patient = _patient_of(source.image) if source.more else ""
    for channel, path in zip(source.channels[1:], source.more, strict=True):
        other = _patient_of(path)
        if patient and other and other != patient:
            hint = "give each case the images of one patient"
            raise VoxelscaleError(f"{path}: of another patient than {source.image.name}", hint)
        scan = read_scan(path, "", reading.fill_gaps, (), reading.select)
        _check_place(source, path, channel.name, first, scan.grid)
        scans.append(scan)
    return scans


def _patient_of(path: Path) -> str:
    """The PatientID of a DICOM image; "" where there is none, or it tells nobody apart."""
    from voxelscale.formats.dicom import scan_header

    header = scan_header(path) if path.exists() else None
    return header.patient if header is not None and header.patient != header.study else ""


def _check_place(source: Source, path: Path, name: str, first: Grid, grid: Grid) -> None:
    """Compare the place of a channel with that of the first."""
    if grid.same_as(first, SAME_MM):
        return
    if path.suffix.lower() in PICTURES:
        size, wanted = (" x ".join(map(str, g.shape[:0:-1])) for g in (grid, first))
        hint = "give channels of one size"
        raise VoxelscaleError(f"{path}: {size} pixels, but {source.image.name} has {wanted}", hint)
    if lacking := check_overlap(first, grid, str(path), source.image.name, name):
        warn(lacking)
    spacing = " x ".join(f"{step:g}" for step in grid.spacing)
    text = (
        f"{name} lies on another lattice ({spacing} mm, z, y, x): it is resampled onto the first channel's"
    )
    notice(f"{source.case}: {text}", level=2)


def check_overlap(first: Grid, grid: Grid, what: str, image: str, name: str) -> str:
    """A warning where a channel covers only a part of the first one; "" where it covers it.

    Args:
        what: the channel's file or the like, for messages.
        image: the first channel's.
        name: of the channel.

    Raises:
        VoxelscaleError: they have no voxel in common.
    """
    share = covered(first, grid)
    if not share:
        hint = "check that the channels belong together"
        raise VoxelscaleError(f"{what}: does not overlap with {image}", hint)
    if share >= COVERED:
        return ""
    return f"{what}: covers {100 * share:.1f} % of {image} only; the rest has no {name}"


def covered(first: Grid, other: Grid) -> float:
    """Share of a lattice's voxels that lie in the volume of another one's, by a coarse sample of them."""
    axes = [np.unique(np.linspace(0, n - 1, min(n, MOST_SAMPLES)).round()) for n in first.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    index = other.mm_to_index(first.index_to_mm(points))
    reach = 0.5 + 1e-3
    inside = ((index >= -reach) & (index <= np.asarray(other.shape) - 1 + reach)).all(axis=1)
    return float(inside.mean())


def _check_volumes(source: Source) -> None:
    """Raise a VoxelscaleError where a file does not hold as many channels as are named."""
    from voxelscale.formats import volumes_of

    if source.volumes > 1 and source.image.exists():
        held = volumes_of(source.image)
        if held != source.volumes:
            names = ", ".join(channel.name for channel in source.channels)
            what = f"holds {count(held, 'channel')}, but {source.volumes} are named ({names})"
            raise VoxelscaleError(f"{source.image}: {what}", "correct dataset.json or reading.channels")


def _choice(
    source: Source, reading: ReadingConfig
) -> tuple[Path, str, int, tuple[Path, ...], tuple[str, ...], int | None]:
    """Which image of a case's files is read: the arguments of `read_scan` and `read_slices`."""
    if source.fault:
        remedy = source.remedy or "keep the right one only, or name it in a CSV"
        raise VoxelscaleError(f"{source.image}: {source.fault}", remedy)
    _check_volumes(source)
    volume = 0 if source.volumes > 1 else None
    # A folder that a table names is to hold one series; which of a tree's is meant, the listing knows.
    series = source.series if source.files else ""
    return source.image, series, reading.fill_gaps, source.files, reading.select, volume


def read_case(
    source: Source, reading: ReadingConfig, image: Scan | None = None, *, empty: bool = False
) -> tuple[Scan, Labels]:
    """The scan (LPS order) and its lesions on the same voxels.

    Args:
        image: what `read_image` gave, where it has been read.
        empty: whether a case without a label or with an empty one is taken as it is.

    Raises:
        VoxelscaleError: one of them is unfit, they do not belong together, or there is no lesion where
            neither `empty` nor `reading.allow_empty` allows it.
    """
    empty = empty or reading.allow_empty
    raw = read_image(source, reading) if image is None else image
    image = reorient(raw)
    if not source.labels:
        if not empty:
            hint = "add its mask, or set reading.allow_empty=true if scans without one are healthy"
            raise VoxelscaleError(f"{source.image}: has no mask", hint)
        return image, _healthy(image.grid, source, reading)
    # Labels speak of the pixels that were drawn on: they are read before anything is turned.
    drawn = labels_of(source, raw, reading)
    labels = replace(drawn, mask=reorient(drawn.mask))
    # A reading that found nothing is an answer; a mask without a voxel is more likely a mistake.
    kinds = {kind_of(label) for label in source.labels}
    answered = "LIDC" in kinds or ("spheres" in kinds and (source.surveyed or bool(labels.findings)))
    if not ((labels.mask.array > 0).any() or answered or empty):
        hint = "check the mask, or set reading.allow_empty=true if healthy scans are expected"
        what = (
            "no row belongs to this scan" if kinds == {"spheres"} else "an empty mask: no voxel of a lesion"
        )
        raise VoxelscaleError(f"{source.label_names}: {what}", hint)
    return image, labels


def read_truth(source: Source, reading: ReadingConfig) -> Scan:
    """The mask alone, as stored labels (LPS order); see `read_truth_labels`."""
    return read_truth_labels(source, reading).mask


def read_truth_labels(source: Source, reading: ReadingConfig) -> Labels:
    """The labels of a case on its image's lattice (LPS order); voxels are read only where labels need them.

    A case without a label is healthy where `reading.allow_empty` says so.

    Raises:
        VoxelscaleError: as `read_case`; but an empty mask is an answer, too.
    """
    from voxelscale.formats import on_lattice

    if not source.labels:
        if not reading.allow_empty:
            hint = "add its mask, or set reading.allow_empty=true if scans without one are healthy"
            raise VoxelscaleError(f"{source.image}: has no mask", hint)
        grid = as_lps(read_lattice(source, reading))[2]
        return _healthy(grid, source, reading)
    if [kind_of(label) for label in source.labels] == ["mask"]:
        values, classes = values_of(reading), settled(source.classes, reading)
        mask, stored = read_mask(source.labels[0], values, classes)
        if source.image.exists():  # a mask may be cropped to what is drawn in it
            lattice = as_lps(read_lattice(source, reading))[2]
            stored = on_lattice(source.labels[0], stored, source.image, lattice)
        shown = ", ".join(map(str, values or classes.numbers))
        # Of one class a mask that holds other values only is more likely a mistake.
        if (
            shown
            and classes.single
            and mask.array.any()
            and not stored.array.any()
            and not reading.allow_empty
        ):
            raise VoxelscaleError(
                f"{source.label_names}: no voxel of the values {shown}",
                "choose other reading.labels, or set reading.allow_empty=true if such scans are healthy",
            )
        return Labels(mask=stored)
    empty = all(kind_of(label) != "spheres" for label in source.labels)
    return read_case(source, reading, empty=empty)[1]


def labels_of(source: Source, image: Scan, reading: ReadingConfig) -> Labels:
    """The lesions of an image, on its own voxels.

    Args:
        image: what `read_image` gave, its axes as in its files.
    """
    from voxelscale.formats.dicom import thickness_of

    thickness = None
    if any(kind_of(label) == "LIDC" for label in source.labels):
        # Who agrees with whom goes by what only a DICOM header knows.
        thickness = thickness_of(source.files[0] if source.files else source.image)
    return read_labels(
        source.labels,
        image,
        image_path=source.image,
        series=source.series,
        values=values_of(reading),
        classes=settled(source.classes, reading),
        consensus=reading.consensus,
        thickness_mm=thickness,
        allow_empty=reading.allow_empty,
    )


def _healthy(grid: Grid, source: Source, reading: ReadingConfig) -> Labels:
    """Labels without a voxel."""
    kind = kind_of_stored(settled(source.classes, reading))
    return Labels(mask=Scan(np.zeros(grid.shape, kind), grid.affine))
