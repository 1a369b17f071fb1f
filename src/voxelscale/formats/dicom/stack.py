"""From the slices of a series, as they come, to one regular lattice that holds them all.

The slices' places are what `ImagePositionPatient` says (PS3.3 C.7.6.2.1.1), never their numbers, their
names or `SliceThickness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxelscale.console import count
from voxelscale.errors import VoxelscaleError
from voxelscale.formats._voxels import check_header
from voxelscale.formats.dicom.header import Frame
from voxelscale.geometry import Grid, Slices

SAME_MM = 0.01
"""Slices nearer to each other lie at one place."""

OFF_MM = 0.1
"""How far a slice may lie off the lattice and count as on it: positions are decimal text, often rounded
to a tenth, and the lattice hangs on its two ends, which are rounded as well."""

TURNED = 1e-3
"""How much the direction cosines of two slices may differ."""

GAP = 1.75
"""A step of so many usual ones is a gap where slices are missing; a lesser one is another spacing."""

MOST_STEP_MM = 20.0
"""Slices further apart are samples, not a volume: the sparsest protocols, which sample the lungs, leave 10
to 20 mm between slices (ACR-STR practice parameter for high-resolution CT of the lungs)."""

STRAIGHT_MM = 1.0
"""Slices shifted sideways in a line, to this much, are those of a tilted gantry."""

FARTHEST = 2.0
"""Slices are shifted by at most so many times their own extent: no gantry tilts by more than 30 degrees."""

NOT_TOGETHER = "export the series again, or give each part a folder of its own"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Slices in order, and the lattice they go to.

    Attributes:
        frames: ascending along the slices' normal.
        grid: the lattice of the whole scan.
        levels: (n,) where on the lattice's z axis each slice lies, in voxels; whole where it is regular.
        shifts: (n, 2) where on the lattice's (y, x) axes each slice's first voxel lies, in voxels.
        notes: what had to be done to them.
    """

    frames: tuple[Frame, ...]
    grid: Grid
    levels: NDArray[np.float64]
    shifts: NDArray[np.float64]
    notes: tuple[str, ...]

    @property
    def slices(self) -> Slices:
        """The slices, on which labels are drawn; the missing ones that are interpolated among them."""
        right, down = (self.grid.affine[:3, axis] for axis in (2, 1))
        levels, uids = self.levels, [(frame.sop_uid, frame.index + 1) for frame in self.frames]
        if np.array_equal(levels, np.rint(levels)):
            there = dict(zip(levels.astype(int).tolist(), uids, strict=True))
            levels = np.arange(self.grid.shape[0], dtype=np.float64)
            uids = [there.get(level, ("", 0)) for level in range(self.grid.shape[0])]
        rows, columns = self.frames[0].pixels.rows, self.frames[0].pixels.columns
        return Slices(
            shape=(len(levels), rows, columns),
            positions=_between(levels, self.levels, _positions(self.frames)),
            down=down,
            right=right,
            levels=levels,
            shifts=_between(levels, self.levels, self.shifts),
            uids=tuple(uids),
            frame_of_reference=self.frames[0].frame_of_reference,
        )


def _between(
    levels: NDArray[np.float64], known: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Columns of values at `known` levels, interpolated linearly to others."""
    return np.stack([np.interp(levels, known, column) for column in values.T], axis=1)


def stack(path: Path, frames: Sequence[Frame], fill_gaps: int = 0) -> Stack:
    """Order the slices of a series, and find the lattice they lie on or have to be brought to.

    Args:
        path: what messages name.
        frames: two or more, each at a place of its own (see `at_one_place`).
        fill_gaps: how many slices in a row may be missing and are to be interpolated.

    Raises:
        VoxelscaleError: sizes or directions differ, slices are missing, or the lattice is too large.
    """
    rows, columns = _common_size(path, frames)
    spacing = _common_spacing(path, frames)
    right, down = _axes(path, frames)
    normal = np.cross(right, down)
    heights = _positions(frames) @ normal
    order = np.argsort(heights, kind="stable")
    frames, heights = [frames[i] for i in order], heights[order]
    positions = _positions(frames)
    step, levels, notes = _levels(path, frames, heights, positions, fill_gaps)
    sideways = (positions - positions[0]) @ np.stack([down, right], axis=1)
    shifts, origin, shape = np.zeros((len(frames), 2)), positions[0], (rows, columns)
    if np.abs(sideways - np.median(sideways, axis=0)).max() > OFF_MM:
        least = sideways.min(axis=0)
        farthest = float((sideways.max(axis=0) - least).max())
        if farthest > FARTHEST * max(rows * spacing[0], columns * spacing[1]):
            what = f"{path}: its slices are shifted by up to {farthest:.0f} mm along the image"
            raise VoxelscaleError(what, NOT_TOGETHER)
        origin = origin + least @ np.stack([down, right])
        shifts = (sideways - least) / spacing
        extra = np.ceil(shifts.max(axis=0) - 1e-3)
        shape = (int(rows + extra[0]), int(columns + extra[1]))
        notes.append(_tilt(heights, sideways))
    affine = np.eye(4)
    affine[:3] = np.stack([normal * step, down * spacing[0], right * spacing[1], origin], axis=1)
    size = (round(float(levels[-1])) + 1, *shape)
    check_header(path, size[::-1], 1)
    return Stack(
        frames=tuple(frames), grid=Grid(size, affine), levels=levels, shifts=shifts, notes=tuple(notes)
    )


def at_one_place(frames: Sequence[Frame]) -> list[list[Frame]]:
    """The slices, grouped by height along the first one's normal; in each group mostly one."""
    right, down = np.asarray(frames[0].orientation).reshape(2, 3)
    heights = _positions(frames) @ np.cross(right, down)
    order = np.argsort(heights, kind="stable")
    cuts = np.flatnonzero(np.diff(heights[order]) > SAME_MM) + 1
    return [[frames[i] for i in group] for group in np.split(order, cuts)]


def are_parallel(frames: Sequence[Frame]) -> bool:
    """Whether the slices look the same way; two scouts at right angles do not."""
    table = np.asarray([frame.orientation for frame in frames])
    return bool(np.abs(table - table[0]).max() <= TURNED)


def _positions(frames: Sequence[Frame]) -> NDArray[np.float64]:
    return np.asarray([frame.position for frame in frames], dtype=np.float64)


def _common_size(path: Path, frames: Sequence[Frame]) -> tuple[int, int]:
    sizes = {(frame.pixels.rows, frame.pixels.columns) for frame in frames}
    if len(sizes) > 1:
        shown = " and ".join(f"{columns} x {rows}" for rows, columns in sorted(sizes)[:3])
        raise VoxelscaleError(f"{path}: its slices have different sizes ({shown})", NOT_TOGETHER)
    rows, columns = sizes.pop()
    check_header(path, (columns, rows, len(frames)), 1)
    return rows, columns


def _common_spacing(path: Path, frames: Sequence[Frame]) -> NDArray[np.float64]:
    if any(frame.spacing is None for frame in frames):
        raise VoxelscaleError(f"{path}: slices without a pixel spacing", "export the series again")
    table = np.asarray([frame.spacing for frame in frames], dtype=np.float64)
    if table.min() <= 0:
        raise VoxelscaleError(f"{path}: a pixel spacing of {table.min():g} mm", "export the series again")
    rows, columns = frames[0].pixels.rows, frames[0].pixels.columns
    if (np.abs(table - table[0]) * (rows, columns)).max() > OFF_MM:
        shown = f"{table.min():g} to {table.max():g} mm"
        raise VoxelscaleError(f"{path}: its slices have different pixel sizes ({shown})", NOT_TOGETHER)
    spacing: NDArray[np.float64] = table[0]
    return spacing


def _axes(path: Path, frames: Sequence[Frame]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit directions of the rows and of the columns, at right angles."""
    if not are_parallel(frames):
        raise VoxelscaleError(f"{path}: its slices are turned against each other", NOT_TOGETHER)
    pair = np.asarray(frames[0].orientation).reshape(2, 3)
    if np.abs(pair @ pair.T - np.eye(2)).max() > 0.01:
        hint = "export the series again"
        raise VoxelscaleError(f"{path}: its rows and columns are not at right angles", hint)
    # Rounded cosines are not quite a rotation; the polar factor is the nearest that is.
    left, _, rest = np.linalg.svd(pair, full_matrices=False)
    right, down = left @ rest
    return right, down


def _levels(
    path: Path,
    frames: Sequence[Frame],
    heights: NDArray[np.float64],
    positions: NDArray[np.float64],
    fill_gaps: int,
) -> tuple[float, NDArray[np.float64], list[str]]:
    """The lattice's step in mm, each slice's level in voxels, and what is to be reported."""
    steps = np.diff(heights)
    usual = _usual(steps)
    if usual > MOST_STEP_MM:
        raise _too_far(path, steps)
    gaps = (steps > GAP * usual) & ~_by_design(frames, steps, usual)
    missing = np.where(gaps, np.maximum(np.rint(steps / usual) - 1, 1), 0).astype(np.int64)
    notes = []
    if missing.any():
        if missing.max() > fill_gaps or steps.max() > MOST_STEP_MM:
            raise _are_missing(path, positions, missing, steps, usual)
        notes.append(f"{count(int(missing.sum()), 'missing slice')} interpolated")
    counts = np.concatenate([[0], np.cumsum(1 + missing)])
    span = float(heights[-1] - heights[0])
    step = span / int(counts[-1])
    off = np.abs(heights - heights[0] - counts * step).max()
    if off <= min(OFF_MM, 0.2 * step):
        return step, counts.astype(np.float64), notes
    notes.append(f"slices {steps.min():.3f} to {steps.max():.3f} mm apart, resampled to {usual:.3f} mm")
    return usual, (heights - heights[0]) / usual, notes


def _usual(steps: NDArray[np.float64]) -> float:
    """The smallest step that is no exception: a tenth of all, and two at least, are like it."""
    ascending = np.sort(steps)
    for least in ascending:
        alike = steps[np.abs(steps - least) <= 0.01 * least + OFF_MM / 2]
        if len(alike) >= max(2, len(steps) / 10):
            return float(np.median(alike))
    return float(ascending[(len(ascending) - 1) // 2])


def _by_design(frames: Sequence[Frame], steps: NDArray[np.float64], usual: float) -> NDArray[np.bool_]:
    """Which wide steps lie beside a slice that is as much thicker as they are wider."""
    thickness = np.asarray([frame.thickness for frame in frames])
    normal = np.abs(steps - usual) <= 0.01 * usual + OFF_MM / 2
    usual_thickness = np.median(thickness[:-1][normal]) if normal.any() else 0.0
    beside = np.maximum(thickness[:-1], thickness[1:])
    wider = (usual_thickness > 0) & (beside >= 0.9 * usual_thickness * steps / usual)
    # One thickness throughout says nothing: slices may overlap.
    return np.asarray(wider & (beside > 1.5 * usual_thickness))


def _too_far(path: Path, steps: NDArray[np.float64]) -> VoxelscaleError:
    apart = f"{steps.min():.3f} to {steps.max():.3f} mm" if len(steps) > 1 else f"{steps[0]:.3f} mm"
    what = f"{path}: its {len(steps) + 1} slices are {apart} apart: no volume"
    hint = f"give the folder with the whole series; slices may be up to {MOST_STEP_MM:g} mm apart"
    return VoxelscaleError(what, hint)


def _are_missing(
    path: Path,
    positions: NDArray[np.float64],
    missing: NDArray[np.int64],
    steps: NDArray[np.float64],
    usual: float,
) -> VoxelscaleError:
    axis = int(np.argmax(np.abs(positions[-1] - positions[0])))
    where = []
    for i in np.flatnonzero(missing)[:3]:
        low, high = sorted((positions[i, axis], positions[i + 1, axis]))
        where.append(f"{missing[i]} between {'xyz'[axis]} = {low:.2f} and {high:.2f} mm")
    places = int(np.count_nonzero(missing))
    if places > 3:
        where.append(f"and at {places - 3} more places")
    most = int(missing.max())
    apart = f"slices up to {steps.max():.3f} mm apart instead of {usual:.3f}"
    what = f"{count(int(missing.sum()), 'slice')} missing: {', '.join(where)} ({apart})"
    hint = "export the series again"
    if steps.max() <= MOST_STEP_MM:
        hint += f", or let up to {most} in a row be interpolated: reading.fill_gaps={most}"
    else:
        hint += f": a gap of more than {MOST_STEP_MM:g} mm is never filled"
    return VoxelscaleError(f"{path}: {what}", hint)


def _tilt(heights: NDArray[np.float64], sideways: NDArray[np.float64]) -> str:
    """What is said of slices whose first voxels do not lie above each other."""
    slope, start = np.polyfit(heights, sideways, 1)
    if np.abs(sideways - np.outer(heights, slope) - start).max() <= STRAIGHT_MM:
        angle = np.degrees(np.arctan(np.linalg.norm(slope)))
        return f"gantry tilt of {angle:.1f} degrees, resampled to upright slices"
    return f"slices shifted by up to {np.ptp(sideways, axis=0).max():.2f} mm along the image, resampled"
