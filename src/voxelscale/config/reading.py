"""The section `reading` of the config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(Section):
    """How a data set is read, the same in every command."""

    labels: tuple[int, ...] | dict[str, Any] | None = None
    """What the labels distinguish; null: the classes that the data set names, or else every value above 0
    is the lesion. A list: the values (numbers of segments or regions) of the lesion. Classes by name, as
    {liver: 1, tumour: [2, 3], ignore: 255, background: [0, 4]}; values that are texts name SEG segments or
    RTSTRUCT regions. Where values are shared, they are regions that overlap."""
    regions_class_order: tuple[int, ...] = ()
    """Of overlapping regions: the value of each in predicted masks, later ones written over earlier ones;
    []: as the data set says."""
    channels: tuple[str, ...] = ()
    """Names of the image's channels in their order, as [CT, PET]; []: as the data set says, or one CT. A
    name says how a channel is normalised (prepare.normalisation)."""
    consensus: float = 0.5
    """LIDC: share of a nodule's readers who must have outlined a voxel."""
    allow_empty: bool = False
    """Whether a mask without foreground is a healthy case; false: it is an error."""
    fill_gaps: int = 0
    """Maximum number of consecutive slices that may be missing in a DICOM series; they are interpolated."""
    select: tuple[str, ...] = ()
    """Which acquisition or reconstruction to take of a DICOM series with several, such as
    [AcquisitionNumber=2] or [ConvolutionKernel=B30f]; []: such a series is an error."""
    names: Literal["auto", "file", "series", "hash"] = "auto"
    """Names of cases: file names, series UIDs, or a keyed hash; auto: file names, for DICOM the hash."""
    name_key: str = ""
    """File with the key of the hash; "": the variable VOXELSCALE_NAME_KEY, or else the user's own key."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("fill_gaps", self.fill_gaps >= 0, "at least 0"),
            ("select", all(re.fullmatch("[A-Za-z]+ *=.*", s) for s in self.select), "attribute=value each"),
            ("consensus", 0 < self.consensus <= 1, "above 0 and at most 1"),
        ]
