"""One SeriesInstanceUID, several scans: acquisitions, contrast phases, kernels or time points.

The standard wants a series of its own for each, and many scanners and archives do not care. A scan of
several acquisitions that lie one above the other is one scan. Two that cover the same region are not:
stacked by their places they give a lattice of the wrong step whose slices alternate between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.formats.dicom.header import MARKS, Frame
from voxelscale.formats.dicom.stack import GAP, SAME_MM, TURNED

SMALLEST_STACK = 3
"""Slices from which a usual step can be known."""

REGULAR = 0.3
"""How much a step of a scan may differ from its usual one, and how many of its steps may differ more."""

ONE_BY_ONE = ("AcquisitionDateTime", "AcquisitionTime", "ContentTime", "InstanceNumber")
"""Attributes that may differ from slice to slice of one scan: they part a series only into whole scans."""

PASSES = ("AcquisitionNumber", *ONE_BY_ONE)
"""Attributes that may differ between the passes of one scan, the second filling the gaps of the first."""

SHAPES = ("ImageOrientationPatient", "Size")

LISTED = 6
"""So many parts a message names."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Slices of a series that are one scan.

    Attributes:
        marks: attributes, with their values, that tell it from the other parts.
    """

    marks: tuple[tuple[str, str], ...]
    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        marks = ", ".join(f"{name} {value or 'missing'}" for name, value in self.marks)
        return f"{marks} ({len(self.frames)} slices, as {self.frames[0].pixels.path.name})"


def separate(frames: Sequence[Frame]) -> list[Part]:
    """The scans that a series holds, mostly one, distinguished by what their headers say.

    Args:
        frames: all with a position and an orientation.
    """
    for name, groups in _shapes(frames):
        if len(groups) > 1 and all(len(group) >= SMALLEST_STACK for group in groups.values()):
            return _parts(name, groups)
    for name in MARKS:
        groups = _by_mark(frames, name)
        if len(groups) > 1 and _side_by_side(name, list(groups.values())):
            return _parts(name, groups)
    for name in ONE_BY_ONE:
        runs = _runs(frames, name)
        if len(runs) > 1 and _side_by_side(name, list(runs.values())):
            return _parts(name, runs)
    return [Part(marks=(), frames=tuple(frames))]


def choose(
    path: Path, parts: Sequence[Part], select: Sequence[str] = (), file: Path | None = None
) -> Part | None:
    """The part that is asked for; None where nothing is.

    Args:
        path: what messages name.
        select: ``attribute=value`` each.
        file: one of the files of the part.

    Raises:
        VoxelscaleError: no part is so, more than one is, or an attribute is not known.
    """
    wanted = [tuple(map(str.strip, text.partition("=")[::2])) for text in select]
    if unknown := [name for name, _ in wanted if name not in (*MARKS, *SHAPES)]:
        hint = f"use one of {', '.join([*MARKS, *SHAPES])}, as in reading.select=[AcquisitionNumber=1]"
        raise VoxelscaleError(f"reading.select: {unknown[0]!r} cannot tell images apart", hint)
    left = [part for part in parts if all(_is_so(part, name, value) for name, value in wanted)]
    if file is not None:
        left = [part for part in left if any(f.pixels.path.name == file.name for f in part.frames)]
    if len(left) == 1:
        return left[0]
    if select:
        raise several(path, left or parts, f"reading.select takes {len(left)} of ")
    return None


def several(path: Path, parts: Sequence[Part], how: str = "") -> VoxelscaleError:
    """The error that says what a series holds, and how to ask for one of it.

    Args:
        how: what the message says first.
    """
    listed = "; ".join(map(str, parts[:LISTED]))
    more = f"; and {len(parts) - LISTED} more" if len(parts) > LISTED else ""
    names = ", ".join(dict.fromkeys(name for part in parts for name, _ in part.marks))
    wanted = ",".join(f"{name}={value}" for name, value in parts[0].marks)
    hint = (
        f"they differ in {names}: name a file of one as the image (also in a CSV), "
        f"or say reading.select=[{wanted}]"
    )
    what = f"{how}{len(parts)} acquisitions or reconstructions in one series"
    return VoxelscaleError(f"{path}: {what}: {listed}{more}", hint)


def _is_so(part: Part, name: str, value: str) -> bool:
    own = dict(part.marks).get(name)
    if own is None:
        own, *others = {dict(frame.marks).get(name, "") for frame in part.frames}
        if others:
            return False
    return own == value


def _shapes(frames: Sequence[Frame]) -> Iterator[tuple[str, dict[str, list[Frame]]]]:
    """The slices by what those of one scan have in common, whatever else their headers say."""
    known: list[tuple[float, ...]] = []

    def direction(frame: Frame) -> str:
        own = frame.orientation or ()
        alike = (k for k in known if np.abs(np.subtract(k, own)).max() <= TURNED)
        if (first := next(alike, None)) is None:
            known.append(first := own)
        return ",".join(f"{v:g}" for v in first)

    yield SHAPES[0], _grouped(frames, direction)
    yield SHAPES[1], _grouped(frames, lambda frame: f"{frame.pixels.columns} x {frame.pixels.rows}")


def _grouped(frames: Iterable[Frame], key: Callable[[Frame], str]) -> dict[str, list[Frame]]:
    groups: dict[str, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(key(frame), []).append(frame)
    return groups


def _by_mark(frames: Iterable[Frame], name: str) -> dict[str, list[Frame]]:
    return _grouped(frames, lambda frame: dict(frame.marks).get(name, ""))


def _parts(name: str, groups: dict[str, list[Frame]]) -> list[Part]:
    return [
        Part(marks=((name, value), *inner.marks), frames=inner.frames)
        for value, group in groups.items()
        for inner in separate(group)
    ]


def _heights(frames: Sequence[Frame]) -> NDArray[np.float64]:
    right, down = np.asarray(frames[0].orientation).reshape(2, 3)
    heights: NDArray[np.float64] = np.asarray([f.position for f in frames]) @ np.cross(right, down)
    return heights


def _side_by_side(name: str, groups: Sequence[Sequence[Frame]]) -> bool:
    """Whether some of the groups are whole scans of one region rather than pieces of one scan.

    A slice of another group lies on, or between, two neighbours of a scan that has no gap there.
    """
    table = _heights([frame for group in groups for frame in group])
    each = np.split(table, np.cumsum([len(group) for group in groups])[:-1])
    usual = [_usual_step(heights) for heights in each]
    if name in ONE_BY_ONE and not all(usual):
        return False
    found = False
    for here, step in enumerate(usual):
        if not step:
            continue
        own = np.unique(each[here])
        others = np.concatenate([h for there, h in enumerate(each) if there != here])
        others = others[(others > own[0] - SAME_MM) & (others < own[-1] + SAME_MM)]
        above = np.clip(np.searchsorted(own, others), 1, len(own) - 1)
        low, high = own[above - 1], own[above]
        on_one = np.minimum(np.abs(others - low), np.abs(others - high)) <= SAME_MM
        found = found or bool((on_one | (high - low <= GAP * step)).any())
    return found and not (name in PASSES and _fill_gaps(groups, table, max(usual)))


def _usual_step(heights: NDArray[np.float64]) -> float:
    """The step of a whole scan in mm; 0 where it is none."""
    steps = np.diff(np.sort(heights))
    if len(heights) < SMALLEST_STACK or np.median(steps) <= SAME_MM:
        return 0.0
    usual = float(np.median(steps))
    even = np.abs(steps - usual) <= REGULAR * usual
    return usual if even.mean() >= 1 - REGULAR else 0.0


def _fill_gaps(groups: Sequence[Sequence[Frame]], table: NDArray[np.float64], step: float) -> bool:
    """Whether the groups are passes of one scan: each leaves gaps between its slices, and together they
    lie as close as they are thick."""
    steps = np.diff(np.sort(table))
    together = float(np.median(steps))
    thickness = float(np.median([frame.thickness for group in groups for frame in group]))
    even = bool((np.abs(steps - together) <= REGULAR * together).all()) and together > SAME_MM
    return even and abs(thickness - together) <= REGULAR * together and step >= GAP * thickness


def _runs(frames: Sequence[Frame], name: str) -> dict[str, list[Frame]]:
    """The slices in the order of an attribute, parted where they come back over where they have been."""
    values = [dict(frame.marks).get(name, "") for frame in frames]
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return {}
    heights = _heights(frames)
    runs: list[list[int]] = []
    for i in sorted(range(len(frames)), key=lambda i: (numbers[i], heights[i])):
        covered = heights[runs[-1]] if runs else heights[:0]
        within = len(covered) > 0 and covered.min() - SAME_MM <= heights[i] <= covered.max() + SAME_MM
        if within or not runs:
            runs.append([])
        runs[-1].append(i)
    named = {f"{values[run[0]]} to {values[run[-1]]}": [frames[i] for i in run] for run in runs}
    return named if len(named) == len(runs) else {}
