"""Where the lesions are: masks, DICOM SEG and RTSTRUCT, LIDC's readings, LUNA16's spheres.

What a file is is found by content. Everything ends as one mask on the scan's own voxels, and as findings in
patient mm where the source has more to say than a mask can.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from voxelscale.classes import LESION, Classes
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan
from voxelscale.labels.annotation import Labels
from voxelscale.labels.stored import kind_of_stored, stored_in, touching_values, union, warn_of_replaced
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
    classes: Classes = LESION,
    consensus: float = 0.5,
    thickness_mm: float | None = None,
    allow_empty: bool = False,
) -> Labels:
    """The lesions of a scan.

    Args:
        paths: a mask in any format that scans have, a DICOM SEG or RTSTRUCT, LIDC's XML, or a CSV with
            LUNA16's columns; or several of them: what any says is a lesion is one; where classes differ, a
            later file's is taken.
        image: the scan that they belong to, as it was read: what was resampled or turned since no longer
            knows the slices that they were drawn on.
        image_path: where it came from, to be named in a fault.
        series: its SeriesInstanceUID, where it is known; it picks the rows of a CSV, and what names
            another one is refused.
        values: what is the lesion, all others being background: values of a mask, numbers of segments or of
            regions of interest; None: as the classes say.
        classes: what is distinguished. Of one class without values it is all of a mask or a SEG, and of an
            RTSTRUCT what is named or typed as a tumour.
        consensus: of LIDC, the share of a nodule's readers who must have outlined a voxel.
        thickness_mm: of the scan's slices, by which LIDC's readings are grouped; None: as their distance.
        allow_empty: whether masks without a voxel of these values mean a healthy scan.

    Raises:
        VoxelscaleError: the file is unfit, or does not lie on the image.
    """
    from voxelscale.labels import lidc, rtstruct, seg, spheres

    if values is not None:
        classes = LESION
    of_kind: dict[str, list[Path]] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        of_kind.setdefault(kind_of(path), []).append(path)
    if not classes.single and (alone := [*of_kind.get("LIDC", ()), *of_kind.get("spheres", ())]):
        hint = "name one class in reading.labels"
        raise VoxelscaleError(f"{alone[0]}: marks nodules, which are one class of several", hint)
    found: list[Labels] = []
    for kind, read in (("SEG", seg.read), ("RTSTRUCT", rtstruct.read)):
        if kind in of_kind:
            found.append(Labels(mask=read(of_kind[kind], image, values, series, classes)))
    for path in of_kind.get("LIDC", ()):
        found.append(lidc.read(path, image, consensus, series, thickness_mm, image_path))
    for path in of_kind.get("spheres", ()):
        found.append(spheres.read(path, image, series))
    if "mask" in of_kind:
        found.append(_read_masks(of_kind["mask"], image, image_path, values, classes, allow_empty))
    kept = kind_of_stored(classes)
    arrays = [labels.mask.array.astype(kept, copy=False) for labels in found]
    merged, replaced = union(arrays, classes) if len(found) > 1 else (arrays[0], 0)
    warn_of_replaced(", ".join(map(str, of_kind)), replaced)
    findings = tuple(finding for labels in found for finding in labels.findings)
    touching = tuple(sorted({value for labels in found for value in labels.touching}))
    return Labels(mask=Scan(merged, found[0].mask.affine), findings=findings, touching=touching)


def kind_of(path: Path) -> Literal["SEG", "RTSTRUCT", "LIDC", "spheres", "mask"]:
    """What a label file is, by its first bytes; what is none of the others is tried as a mask."""
    head = b""
    if path.is_file():
        with path.open("rb") as handle:
            head = handle.read(HEAD)
    if head[128:132] == b"DICM":
        from voxelscale.labels.dicom import modality_of

        modality = modality_of(path)
        return "SEG" if modality == "SEG" else "RTSTRUCT" if modality == "RTSTRUCT" else "mask"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<") and b"LidcReadMessage" in text:
        return "LIDC"
    # A table with other columns is an error that quotes them, not a mask in an unknown format.
    if path.suffix.lower() in (".csv", ".tsv") or is_table_of(head, ("seriesuid", "coordX")):
        return "spheres"
    return "mask"


def _read_masks(
    paths: Sequence[Path],
    image: Scan,
    image_path: Path | None,
    values: tuple[int, ...] | None,
    classes: Classes,
    allow_empty: bool,
) -> Labels:
    """The union of masks on the image's voxels."""
    from voxelscale.formats import on_lattice
    from voxelscale.geometry import reorient, resample

    turned, masks, held = reorient(image), [], {}
    touching: set[int] = set()
    for path in paths:
        mask, stored = read_mask(path, values, classes)
        touching |= set(touching_values(mask.array, values, classes))
        # The same lattice, perhaps in another order of voxels: the nearest is the very voxel.
        placed = on_lattice(path, stored, image_path or path, turned.grid)
        masks.append(resample(placed, image.grid, "nearest").array)
        held[path] = None if values is None or masks[-1].any() else np.unique(mask.array)[:10]
    if values is not None and not allow_empty and not any(mask.any() for mask in masks):
        for path, numbers in held.items():
            if numbers is not None and numbers.any():
                hint = "choose other reading.labels, or leave them out for all"
                shown = ", ".join(map(str, numbers))
                raise VoxelscaleError(f"{path}: no voxel of the values {values} (it holds {shown})", hint)
    made, replaced = union(masks, classes) if len(masks) > 1 else (masks[0], 0)
    warn_of_replaced(", ".join(map(str, paths)), replaced)
    return Labels(mask=Scan(made, image.affine), touching=tuple(sorted(touching)))


def read_mask(path: Path, values: tuple[int, ...] | None, classes: Classes) -> tuple[Scan, Scan]:
    """The numbers in a mask's file, and its stored labels (both in LPS order).

    Where segments of 3D Slicer overlap, of classes the later one is taken, with a warning; regions may.

    Raises:
        VoxelscaleError: it is no mask, or has values that no class has.
    """
    from voxelscale.formats import read_label, read_segments
    from voxelscale.geometry import reorient
    from voxelscale.labels.drawn import lay

    mask = reorient(read_label(path, values or classes.numbers or None))
    stored = stored_in(path, mask, values, classes)
    made, replaced = np.zeros_like(stored.array), 0
    for number, where in () if values is not None or classes.single else read_segments(path):
        place = reorient(where).array
        alone = Scan(np.full((1, 1, 1), number), mask.affine)
        label = stored_in(path, alone, None, classes).array.item() if place.any() else 0
        replaced += lay(made, place, label, classes) if label else 0
    warn_of_replaced(path, replaced)
    return mask, Scan(made, mask.affine) if made.any() else stored
