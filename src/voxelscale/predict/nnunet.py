"""A scan as nnU-Net's preprocessor gives it to a network, and the logits back on the scan's own voxels.

Read for the rules: ``DefaultPreprocessor``, ``default_resampling`` and ``export_prediction`` of
``nnunetv2`` 2.8. A scan stays as its file has it, whatever way it lies; it is cropped to what is not 0,
normalised, then resampled by cubic splines. Logits go back linearly. Where an axis is more than three times
as coarse as another it is resampled by itself, to the nearest voxel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelscale.channels import Channel
from voxelscale.errors import VoxelscaleError
from voxelscale.findings.regions import box_of
from voxelscale.geometry import SAME_MM, Grid, IntTriple, Scan, Triple, as_lps
from voxelscale.infer.sliding_window import Box
from voxelscale.model.bundle import Bundle
from voxelscale.model.nnunet import NnunetRules
from voxelscale.samples.batch import Normalisation

COARSE = 3.0
"""How many times coarser than another an axis must be to be resampled by itself."""

LEAST_STD = 1e-8

ROUNDING = 4e-7
"""Relative, of a spacing that is the length of three float32."""

SLAB = 2**26
"""Voxels, times classes, that logits are resampled to at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A scan as a network from nnU-Net takes it.

    Attributes:
        values: (channel, *axes of the network) float32, cropped, normalised and resampled.
        axes: the network's axes, by their number in the scan.
        flipped: those of the network's axes that run the other way than the scan's.
        box: what was cropped, along the network's axes.
        coarse: the network's axis along which its logits are resampled by themselves; None: none is. On
            the way to the network it may be another: nnU-Net asks first of the spacing that it begins with.
        grid: of the scan.
    """

    values: NDArray[np.float32]
    axes: IntTriple
    flipped: tuple[int, ...]
    box: Box
    coarse: int | None
    grid: Grid


def prepare(images: Sequence[Scan], bundle: Bundle) -> Prepared:
    """Crop, normalise and resample the channels of a case.

    Raises:
        VoxelscaleError: its channels lie on different lattices.
    """
    rules = bundle.nnunet
    if rules is None:
        raise ValueError("a model that is not from nnU-Net")
    turns = [_turn(image.grid, rules) for image in images]
    axes, flipped, grid = turns[0]
    for channel, (_, _, other) in zip(bundle.channels, turns, strict=True):
        if not other.same_as(grid, SAME_MM):
            problem = f"the channel {channel.name} lies on another lattice than {bundle.channels[0].name}"
            raise VoxelscaleError(
                problem, "resample it to the first channel: nnU-Net's models take no other"
            )
    arrays = [
        np.flip(image.array.transpose(order), backwards)
        for image, (order, backwards, _) in zip(images, turns, strict=True)
    ]
    steps = images[0].grid.spacing
    spacing = as_written(steps[axes[0]]), as_written(steps[axes[1]]), as_written(steps[axes[2]])
    target = (spacing[0], *bundle.spacing[1:]) if bundle.config.model.dims == 2 else bundle.spacing
    body = _body(arrays)
    box = box_of(body if body.any() else np.ones_like(body))
    body = body[box]
    shape = tuple(round(old / new * n) for n, old, new in zip(body.shape, spacing, target, strict=True))
    if not all(shape):
        raise VoxelscaleError(f"the scan is thinner than a voxel of {target} mm", "give a whole scan")
    coarse = coarse_axis(spacing, target)
    values = np.empty((len(arrays), *shape), np.float32)
    for at, (channel, array) in enumerate(zip(bundle.channels, arrays, strict=True)):
        given = array[box].astype(np.float32)
        within = body if rules.masked[at] else None
        values[at] = _cubic(_normalised(given, channel, bundle.normalisation_at(at), within), shape, coarse)
    return Prepared(
        values=values,
        axes=axes,
        flipped=flipped,
        box=box,
        coarse=coarse_axis(target, spacing),
        grid=images[0].grid,
    )


def on_scan(logits: Tensor, prepared: Prepared) -> Iterator[tuple[Box, Tensor]]:
    """Logits (output, *the network's axes), resampled to the voxels of the scan, slab by slab.

    Yields:
        a box of the scan and the logits (output, dz, dy, dx) float32 in it; together they are the crop.
    """
    shape = [side.stop - side.start for side in prepared.box]
    lines = [
        _line(old, new, nearest=axis == prepared.coarse)
        for axis, (old, new) in enumerate(zip(logits.shape[1:], shape, strict=True))
    ]
    step = max(1, SLAB // (len(logits) * shape[1] * shape[2]))
    back = [prepared.axes.index(axis) for axis in range(3)]
    for first in range(0, shape[0], step):
        slab = logits
        last = min(first + step, shape[0])
        for axis, (low, high, weight) in enumerate(lines):
            rows = slice(first, last) if axis == 0 else slice(None)
            slab = _between(slab, axis + 1, low[rows], high[rows], weight[rows])
        sides = list(prepared.box)
        sides[0] = slice(sides[0].start + first, sides[0].start + last)
        for axis in prepared.flipped:
            n = prepared.grid.shape[prepared.axes[axis]]
            sides[axis] = slice(n - sides[axis].stop, n - sides[axis].start)
        slab = slab.flip([1 + axis for axis in prepared.flipped])
        z, y, x = (sides[axis] for axis in back)
        yield (z, y, x), slab.permute(0, *(1 + axis for axis in back))


def as_written(step: float) -> float:
    """A spacing as its file gives it, which nnU-Net goes by: the float32 nearest to a number of few digits.

    That of a rotated scan comes from its affine, where what is 5 mm may be 4.9999998 along one axis and
    5.0000004 along another. Which is coarser, and rounding to voxels, must not hang on that.
    """
    short = round(step, 5)
    return float(np.float32(short)) if 0 < abs(step - short) <= ROUNDING * step else step


def coarse_axis(spacing: Triple, target: Triple) -> int | None:
    """The axis that is resampled by itself, if it is one alone: by the spacing before, or that after."""
    for each in (spacing, target):
        if max(each) > COARSE * min(each):
            worst = [axis for axis, step in enumerate(each) if step == max(each)]
            return worst[0] if len(worst) == 1 else None
    return None


def _turn(grid: Grid, rules: NnunetRules) -> tuple[IntTriple, tuple[int, ...], Grid]:
    """Which axes of a scan are the network's, which of these run the other way, and the lattice, turned to
    LPS where scans are turned at all, by which channels are compared."""
    if not rules.ras:
        return rules.axes, (), grid
    order, flipped, upright = as_lps(grid)
    backwards = {1, 2} ^ set(flipped)  # RAS runs the other way than LPS along y and x
    z, y, x = (order[axis] for axis in rules.axes)
    return (z, y, x), tuple(at for at, axis in enumerate(rules.axes) if axis in backwards), upright


def _body(arrays: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Where any channel is not 0, with holes filled."""
    from scipy.ndimage import binary_fill_holes

    there = arrays[0] != 0
    for array in arrays[1:]:
        there |= array != 0
    filled: NDArray[np.bool_] = there if there.all() else binary_fill_holes(there)
    return filled


def _normalised(
    values: NDArray[np.float32],
    channel: Channel,
    of_ct: Normalisation | None,
    within: NDArray[np.bool_] | None,
) -> NDArray[np.float32]:
    """A channel's values, which are changed, normalised by nnU-Net's scheme."""
    if channel.scheme == "ct" and of_ct is not None:
        np.clip(values, of_ct.low, of_ct.high, out=values)
        values -= of_ct.mean
        values /= max(of_ct.std, LEAST_STD)
    elif channel.scheme == "zscore":
        there = slice(None) if within is None else within
        some = values[there]
        values[there] = (some - some.mean()) / max(some.std(), LEAST_STD)
    elif channel.scheme == "minmax":
        values -= values.min()
        values /= max(values.max(), LEAST_STD)
    elif channel.scheme == "rgb":
        values /= 255.0
    return values


def _cubic(values: NDArray[np.float32], shape: Sequence[int], coarse: int | None) -> NDArray[Any]:
    """Resampled by cubic splines, never beyond the values that there were."""
    from scipy.ndimage import zoom

    if values.shape == tuple(shape):
        return values

    def resized(part: NDArray[Any], size: Sequence[int]) -> NDArray[Any]:
        if part.shape == tuple(size):
            return part
        factors = [new / old for new, old in zip(size, part.shape, strict=True)]
        wide = part.astype(np.float64)
        out = zoom(wide, factors, order=3, mode="nearest", grid_mode=True)
        return np.asarray(np.clip(out, wide.min(), wide.max()))

    if coarse is None:
        return resized(values, shape)
    flat = [n for axis, n in enumerate(shape) if axis != coarse]
    slices = np.stack([resized(part, flat) for part in np.moveaxis(values, coarse, 0)])
    low, _, _ = _line(len(slices), shape[coarse], nearest=True)
    return np.moveaxis(slices[low.numpy()], 0, coarse)


def _line(old: int, new: int, *, nearest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Along an axis, whose ends stay: the two voxels about each new one, and the weight of the second."""
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    if nearest:
        low = (places + 0.5).floor().long().clamp(max=old - 1)
        return low, low, torch.zeros(new)
    low = places.floor().long()
    return low, (low + 1).clamp(max=old - 1), (places - low).float()


def _between(values: Tensor, axis: int, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    """Values float32 along one axis at the places of `_line`."""
    low, high, weight = (part.to(values.device) for part in (low, high, weight))
    first = values.index_select(axis, low).float()
    if not weight.any():
        return first
    shape = [-1 if at == axis else 1 for at in range(values.ndim)]
    return first.lerp(values.index_select(axis, high).float(), weight.view(shape))
