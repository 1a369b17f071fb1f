"""The section `reading` of the config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(Section):
    """How a data set is read, the same in every command."""

    labels: tuple[int, ...] | None = None
    """Mask values (segment numbers, region numbers) of the lesion; null: every value above 0, or those that
    the data set names as the lesion."""
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
