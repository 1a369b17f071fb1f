"""Where the lesions are: masks, DICOM SEG and RTSTRUCT, LIDC's readings, LUNA16's spheres.

What a file is is found by content. Everything ends as one mask on the scan's own voxels, and as findings in
patient mm where the source has more to say than a mask can.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan
from voxelscale.labels.annotation import Labels
from voxelscale.tables import is_table_of

HEAD = 4096
"""Bytes by which the kind of a file is known."""


def read_labels(
    paths: Path | Sequence[Path],
    image: Scan,
    *,
    image_path: Path | None = None,
    series: str = "",
    values: tuple[int, ...] | None = None,
    consensus: float = 0.5,
    thickness_mm: float | None = None,
    allow_empty: bool = False,
) -> Labels:
    """The lesions of a scan.

    Args:
        paths: a mask in any format that scans have, a DICOM SEG or RTSTRUCT, LIDC's XML, or a CSV with
            LUNA16's columns; or several of them: what any says is a lesion is one.
        image: the scan that they belong to, as it was read: what was resampled or turned since no longer
            knows the slices that they were drawn on.
        image_path: where it came from, to be named in a fault.
        series: its SeriesInstanceUID, where it is known; it picks the rows of a CSV, and what names
            another one is refused.
        values: what is the lesion: values of a mask, numbers of segments or of regions of interest;
            None: all of a mask or a SEG, and of an RTSTRUCT what is named or typed as a tumour.
        consensus: of LIDC, the share of a nodule's readers who must have outlined a voxel.
        thickness_mm: of the scan's slices, by which LIDC's readings are grouped; None: as their distance.
        allow_empty: whether masks without a voxel of these values mean a healthy scan.

    Raises:
        VoxelscaleError: the file is unfit, or does not lie on the image.
    """
    from voxelscale.labels import lidc, rtstruct, seg, spheres

    of_kind: dict[str, list[Path]] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        of_kind.setdefault(kind_of(path), []).append(path)
    found: list[Labels] = []
    for kind, read in (("SEG", seg.read), ("RTSTRUCT", rtstruct.read)):
        if kind in of_kind:
            found.append(Labels(mask=read(of_kind[kind], image, values, series)))
    for path in of_kind.get("LIDC", ()):
        found.append(lidc.read(path, image, consensus, series, thickness_mm, image_path))
    for path in of_kind.get("spheres", ()):
        found.append(spheres.read(path, image, series))
    if "mask" in of_kind:
        found.append(Labels(mask=_read_masks(of_kind["mask"], image, image_path, values, allow_empty)))
    return found[0] if len(found) == 1 else _merged(found)


def _merged(found: Sequence[Labels]) -> Labels:
    mask = np.logical_or.reduce([labels.mask.array > 0 for labels in found]).astype(np.uint8)
    findings = tuple(finding for labels in found for finding in labels.findings)
    return Labels(mask=Scan(mask, found[0].mask.affine), findings=findings)


def lesion_in(mask: Scan, values: tuple[int, ...] | None) -> NDArray[np.bool_]:
    """Where a mask has one of these values; None: any above 0."""
    return np.asarray(mask.array > 0 if values is None else np.isin(mask.array, values))


def kind_of(path: Path) -> Literal["SEG", "RTSTRUCT", "LIDC", "spheres", "mask"]:
    """What a label file is, by its first bytes; what is none of the others is tried as a mask."""
    head = b""
    if path.is_file():
        with path.open("rb") as handle:
            head = handle.read(HEAD)
    if head[128:132] == b"DICM":
        return _dicom_kind(path)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<") and b"LidcReadMessage" in text:
        return "LIDC"
    # A table with other columns is an error that quotes them, not a mask in an unknown format.
    if path.suffix.lower() in (".csv", ".tsv") or is_table_of(head, ("seriesuid", "coordX")):
        return "spheres"
    return "mask"


def _dicom_kind(path: Path) -> Literal["SEG", "RTSTRUCT", "mask"]:
    from voxelscale.labels.dicom import modality_of

    modality = modality_of(path)
    return "SEG" if modality == "SEG" else "RTSTRUCT" if modality == "RTSTRUCT" else "mask"


def _read_masks(
    paths: Sequence[Path],
    image: Scan,
    image_path: Path | None,
    values: tuple[int, ...] | None,
    allow_empty: bool,
) -> Scan:
    """The union of masks on the image's voxels."""
    from voxelscale.formats import on_lattice, read_label
    from voxelscale.geometry import reorient, resample

    turned, masks, held = reorient(image), [], {}
    for path in paths:
        mask = on_lattice(path, reorient(read_label(path, values)), image_path or path, turned.grid)
        # The same lattice, perhaps in another order of voxels: the nearest is the very voxel.
        placed = Scan(lesion_in(mask, values).astype(np.uint8), turned.affine)
        masks.append(resample(placed, image.grid, "nearest").array)
        held[path] = None if values is None or masks[-1].any() else np.unique(mask.array)[:10]
    if values is not None and not allow_empty and not any(mask.any() for mask in masks):
        for path, numbers in held.items():
            if numbers is not None and numbers.any():
                hint = "choose other reading.labels, or leave them out for all"
                shown = ", ".join(map(str, numbers))
                raise VoxelscaleError(f"{path}: no voxel of the values {values} (it holds {shown})", hint)
    return Scan(np.maximum.reduce(masks), image.affine)
