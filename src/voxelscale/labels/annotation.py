"""What a source of labels says of a scan: a mask, and its annotations in patient mm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from voxelscale.geometry import Scan


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One mark of the source.

    Attributes:
        kind: ``nodule`` (at least 3 mm, in the mask); ``small`` (a nodule below 3 mm), ``non-nodule``
            and ``excluded`` (LUNA16: neither a hit nor a false positive), which are not in the mask.
        centre: LPS mm (x, y, z).
        diameter_mm: of a sphere of the same volume; None where the source has only a point.
        readers: how many marked it.
    """

    kind: Literal["nodule", "small", "non-nodule", "excluded"]
    centre: tuple[float, float, float]
    diameter_mm: float | None
    readers: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """The truth about a scan.

    Attributes:
        mask: stored labels (`voxelscale.classes`) on the scan's own voxels: uint8 of 0 and 1 of one class,
            else int16.
        findings: empty where the source is only a mask.
        touching: values of a mask that touch each other though all of them are the one class.
    """

    mask: Scan
    findings: tuple[Annotation, ...] = ()
    touching: tuple[int, ...] = ()
