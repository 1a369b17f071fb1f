"""Which series are answered; the reason where one is not. No header's text is quoted in it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from voxelscale.archive.identity import is_localizer, text_of
from voxelscale.archive.settings import RulesSettings
from voxelscale.console import count

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def against(rules: RulesSettings, header: Dataset, instances: int) -> str:
    """Why a series is not answered; "" where it is.

    Args:
        header: of one of its instances.
        instances: how many it has.
    """
    if text_of(header, "Modality") not in rules.modality:
        return "modality: none of rules.modality"
    if is_localizer(header):
        return "a localizer"
    places = _values(header, "BodyPartExamined") or [""]
    for key, values, patterns in (
        ("body_part", places, rules.body_part),
        ("description", [text_of(header, "SeriesDescription")], rules.description),
        ("kernel", _values(header, "ConvolutionKernel") or [""], rules.kernel),
    ):
        if patterns and not _any(values, patterns):
            return f"{key}: none of rules.{key}"
    if rules.not_description and _any([text_of(header, "SeriesDescription")], rules.not_description):
        return "description: one of rules.not_description"
    thickness = _number(header, "SliceThickness")
    low, high = rules.slice_thickness
    if thickness is not None and not low <= thickness <= high:
        return f"slices of {thickness:g} mm; rules.slice_thickness is {low:g} to {high:g}"
    frames = _number(header, "NumberOfFrames") or 1
    if instances * frames < rules.min_slices:
        return f"{count(int(instances * frames), 'slice')}; rules.min_slices is {rules.min_slices}"
    return ""


def _any(values: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(value.upper(), pattern.upper()) for pattern in patterns for value in values)


def _values(header: Dataset, keyword: str) -> list[str]:
    """The values of an attribute that may have several."""
    value = header.get(keyword)
    several = [value] if value is None or isinstance(value, str) else list(value)
    return [str(one or "").strip() for one in several]


def _number(header: Dataset, keyword: str) -> float | None:
    try:
        return float(text_of(header, keyword))
    except ValueError:
        return None
