"""A case's image and the truth about it, whatever they are kept in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from voxelscale.config import ReadingConfig
from voxelscale.dataset.source import Source
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Grid, Scan, as_lps, reorient
from voxelscale.labels import kind_of, lesion_in, read_labels
from voxelscale.labels.annotation import Labels


def read_image(source: Source, reading: ReadingConfig) -> Scan:
    """The scan in HU, axes as in its files.

    Raises:
        VoxelscaleError: the case is known to be unfit, or the image is.
    """
    from voxelscale.formats import read_scan

    return read_scan(source.image, _series_of(source), reading.fill_gaps, source.files, reading.select)


def read_lattice(source: Source, reading: ReadingConfig) -> Grid:
    """The lattice of the scan that `read_image` gives, from the headers alone.

    Raises:
        VoxelscaleError: as `read_image`, but for what only the voxels show.
    """
    from voxelscale.formats import read_grid

    return read_grid(source.image, _series_of(source), reading.fill_gaps, source.files, reading.select)


def _series_of(source: Source) -> str:
    """Which of the image's series is meant, of a case that is not known to be unfit."""
    if source.fault:
        raise VoxelscaleError(
            f"{source.image}: {source.fault}", "keep the right one only, or name it in a CSV"
        )
    # A folder that a table names is to hold one series; which of a tree's is meant, the listing knows.
    return source.series if source.files else ""


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
        return image, Labels(mask=Scan(np.zeros(image.array.shape, np.uint8), image.affine))
    # Labels speak of the pixels that were drawn on: they are read before anything is turned.
    drawn = labels_of(source, raw, reading)
    labels = replace(drawn, mask=reorient(drawn.mask))
    # A reading that found nothing is an answer; a mask without a voxel is more likely a mistake.
    kinds = {kind_of(label) for label in source.labels}
    answered = "LIDC" in kinds or ("spheres" in kinds and (source.surveyed or bool(labels.findings)))
    if not (labels.mask.array.any() or answered or empty):
        hint = "check the mask, or set reading.allow_empty=true if healthy scans are expected"
        what = (
            "no row belongs to this scan" if kinds == {"spheres"} else "an empty mask: no voxel of a lesion"
        )
        raise VoxelscaleError(f"{source.label_names}: {what}", hint)
    return image, labels


def read_truth(source: Source, reading: ReadingConfig) -> Scan:
    """The mask alone, uint8 of 0 and 1 (LPS order); see `read_truth_labels`."""
    return read_truth_labels(source, reading).mask


def read_truth_labels(source: Source, reading: ReadingConfig) -> Labels:
    """The labels of a case on its image's lattice (LPS order); voxels are read only where labels need them.

    A case without a label is healthy where `reading.allow_empty` says so.

    Raises:
        VoxelscaleError: as `read_case`; but an empty mask is an answer, too.
    """
    from voxelscale.formats import on_lattice, read_label

    if not source.labels:
        if not reading.allow_empty:
            hint = "add its mask, or set reading.allow_empty=true if scans without one are healthy"
            raise VoxelscaleError(f"{source.image}: has no mask", hint)
        grid = as_lps(read_lattice(source, reading))[2]
        return Labels(mask=Scan(np.zeros(grid.shape, np.uint8), grid.affine))
    if [kind_of(label) for label in source.labels] == ["mask"]:
        values = _values(source, reading)
        mask = reorient(read_label(source.labels[0], values))
        if source.image.exists():  # a mask may be cropped to what is drawn in it
            lattice = as_lps(read_lattice(source, reading))[2]
            mask = on_lattice(source.labels[0], mask, source.image, lattice)
        lesion = lesion_in(mask, values)
        if mask.array.any() and not lesion.any() and not reading.allow_empty:
            shown = ", ".join(map(str, values or ()))
            raise VoxelscaleError(
                f"{source.label_names}: no voxel of the values {shown}",
                "choose other reading.labels, or set reading.allow_empty=true if such scans are healthy",
            )
        return Labels(mask=Scan(lesion.astype(np.uint8), mask.affine))
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
        values=_values(source, reading),
        consensus=reading.consensus,
        thickness_mm=thickness,
        allow_empty=reading.allow_empty,
    )


def _values(source: Source, reading: ReadingConfig) -> tuple[int, ...] | None:
    """What the user calls the lesion, or else the data set."""
    return reading.labels or source.values
