"""The section `export` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from voxelscale.config.section import Rule, Section

MOST_CODE, MOST_SCHEME, MOST_MEANING = 16, 16, 64
"""Characters of a code's value, scheme and meaning (PS3.5, 6.2: SH and LO)."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Section):
    """What `predict --dicom-out` and `export-dicom` write."""

    segments: Literal["finding", "class"] = "finding"
    """Segments of a SEG and regions of an RTSTRUCT: one a finding, or one a class."""
    codes: dict[str, Any] = field(default_factory=dict, hash=False)
    """Codes of classes, as {vessel: [SCT, 59820001, Blood vessel]}: scheme, value, meaning. Without one a
    class that is named as a DICOM concept (nodule, liver, ...) has that one's, any other a lesion's."""
    patient_names: bool = False
    """Whether the one-page report of a case shows the patient's name, ID and birth date."""

    def rules(self) -> Sequence[Rule]:
        wanted = "[scheme, value, meaning] of each class, in quotes, at most 16, 16 and 64 characters"
        return [("codes", all(map(_is_code, self.codes.values())), wanted)]


def _is_code(value: object) -> bool:
    # What YAML takes for another number or for true is another code: 162.30 would be 162.3.
    if not isinstance(value, list | tuple) or [type(w) in (str, int) for w in value] != [True] * 3:
        return False
    texts = [str(word).strip() for word in value]
    limits = (MOST_SCHEME, MOST_CODE, MOST_MEANING)
    return all(
        0 < len(text) <= most and text.isprintable() and "\\" not in text
        for text, most in zip(texts, limits, strict=True)
    )
