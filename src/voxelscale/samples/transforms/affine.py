"""Rotation and zoom, nnU-Net's ``SpatialTransform``: patients lie differently and differ in size.

A larger region is read around the patch, so that what is turned in from outside is real anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from voxelscale.config import AugmentConfig, IntTriple, Triple
from voxelscale.samples.draws import Draws

COIN, ANGLES, ZOOMS = 0, slice(0, 3), slice(3, 6)
"""Its places in the shared stream."""

Matrix = NDArray[np.float64]
"""(3, 3), offset from the patch's centre to offset from the region's, in voxels (z, y, x)."""

Box = tuple[slice, slice, slice]


def draw(config: AugmentConfig, draws: Draws, spacing: Triple, dims: int) -> Matrix | None:
    """Angles about x, y, z within `rotate_deg`, a zoom for each axis; None where it is left out."""
    if draws.coins[COIN] >= config.strength * config.p_affine:
        return None
    angles = (2 * draws.amounts[ANGLES] - 1) * np.radians(config.rotate_deg)
    zooms = config.scale[0] * (config.scale[1] / config.scale[0]) ** draws.amounts[ZOOMS]
    if dims == 2:
        angles[:2], zooms[0] = 0.0, 1.0
    return _matrix(angles, zooms, spacing)


def _matrix(angles: NDArray[np.float64], zooms: NDArray[np.float64], spacing: Triple) -> Matrix:
    """Rotation about x, y, z (radians) after zooming, in mm, expressed in voxels (z, y, x)."""
    matrix = np.diag(1 / zooms)
    for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    step = np.asarray(spacing)
    return np.asarray(matrix * step / step[:, None], dtype=np.float64)


def region_of(matrix: Matrix | None, patch: IntTriple) -> IntTriple:
    """Voxels of the smallest centred region that holds the transformed patch and a border of one.

    It is larger than the patch by an even number along each axis, so that both have one centre; an
    axis along which nothing moves keeps its size.
    """
    if matrix is None:
        return patch
    reach = np.abs(matrix) @ (np.asarray(patch) - 1)
    sizes = []
    for needed, n, row, axis in zip(reach, patch, matrix, range(3), strict=True):
        if n == 1 and np.allclose(row, np.eye(3)[axis]):
            sizes.append(1)
        else:
            margin = max(0, math.ceil((needed + 3 - n) / 2))
            sizes.append(n + 2 * margin)
    return sizes[0], sizes[1], sizes[2]


def warp(region: Tensor, matrix: Matrix, patch: Sequence[int], box: Box | None = None) -> Tensor:
    """A box of the patch (all of it: None) interpolated trilinearly in the region around it.

    Args:
        region: (z, y, x) float32, which holds everything that `matrix` reaches.
        patch: voxels (z, y, x).
        box: of the patch.
    """
    lines = []
    for axis, n in enumerate(patch):
        line = torch.arange(n, dtype=torch.float32, device=region.device) - (n - 1) / 2
        lines.append(line[box[axis]] if box else line)
    sample = by_planes if region.device.type == "cpu" else by_voxels
    return sample(region, lines, matrix)


class Reaching(NamedTuple):
    """A label in a region around a patch.

    Attributes:
        value: not 0.
        box: of the patch, outside which the transformed label is 0; empty where it does not reach it.
    """

    value: int
    box: Box


def reaching(region: NDArray[np.int16], matrix: Matrix | None, patch: IntTriple) -> tuple[Reaching, ...]:
    """The labels in a region (z, y, x), by rising value.

    Args:
        matrix: None where the region is the patch; every label's box is then all of it.
    """
    there = region != 0
    if not there.any():
        return ()
    values = [int(value) for value in np.unique(region[there])]
    if matrix is None:
        whole = slice(0, patch[0]), slice(0, patch[1]), slice(0, patch[2])
        return tuple(Reaching(value, whole) for value in values)
    if len(values) == 1:
        return (Reaching(values[0], _reach(there, matrix, patch)),)
    return tuple(Reaching(value, _reach(region == value, matrix, patch)) for value in values)


def warp_labels(region: Tensor, labels: Sequence[Reaching], matrix: Matrix, out: Tensor) -> None:
    """Write the transformed labels into `out`, all zeros.

    A voxel gets the label, 0 among them, of which the trilinear interpolation has the largest share; of one
    label that is where its share is at least one half. Lesions are small: only the box of the patch that a
    label's box in the region can reach is computed.

    Args:
        region: (z, y, x), on the device of `out`.
        labels: what `reaching` found in it.
    """
    near = (
        (value, box, warp((region == value).float(), matrix, out.shape, box))
        for value, box in labels
        if all(side.start < side.stop for side in box)
    )
    if len(labels) == 1:
        for value, box, share in near:
            out[box] = (share >= 0.5).float() * float(value)
        return
    # Where two labels meet neither may have a half.
    best, background = torch.zeros_like(out), torch.ones_like(out)
    for value, box, share in near:
        background[box] -= share
        larger = share > best[box]
        out[box] = torch.where(larger, float(value), out[box])
        best[box] = torch.maximum(best[box], share)
    out.masked_fill_(background > best, 0)


def _reach(region: NDArray[np.bool_], matrix: Matrix, patch: Sequence[int]) -> Box:
    """The box of the patch outside which a transformed mask is 0."""
    rows = np.asarray(region.any(axis=2))
    zs, ys = np.flatnonzero(rows.any(axis=1)), np.flatnonzero(rows.any(axis=0))
    xs = np.flatnonzero(region[zs[0] : zs[-1] + 1, ys[0] : ys[-1] + 1].any(axis=(0, 1)))
    middle = (np.asarray(region.shape) - 1) / 2
    # Linear interpolation carries a voxel less than one voxel further.
    sides = [(found[0] - 1, found[-1] + 1) for found in (zs, ys, xs)]
    corners = (np.array(list(product(*sides))) - middle) @ np.linalg.inv(matrix).T
    places = corners + (np.asarray(patch) - 1) / 2
    low = np.maximum(np.floor(places.min(axis=0)), 0).astype(int)
    high = np.minimum(np.ceil(places.max(axis=0)) + 1, patch).astype(int)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return z, y, x


def _offsets(lines: Sequence[Tensor], row: NDArray[np.float64]) -> Tensor:
    """``row @ (z, y, x)`` for every voxel of the grid of three lines of offsets."""
    z, y, x = (line * float(weight) for line, weight in zip(lines, row, strict=True))
    return z[:, None, None] + (y[:, None] + x)


def by_voxels(region: Tensor, lines: Sequence[Tensor], matrix: Matrix) -> Tensor:
    """As `warp`, by PyTorch's 3-D sampling: one kernel on GPUs, slow on CPUs.

    Args:
        lines: offsets from the patch's centre along z, y, x.
    """
    # grid_sample counts in half-extents, from -1 to 1 between the outermost voxel centres; x, y, z.
    scale = 2 / np.maximum(np.asarray(region.shape) - 1, 1)
    grid = torch.stack([_offsets(lines, matrix[axis] * scale[axis]) for axis in (2, 1, 0)], dim=-1)
    return F.grid_sample(region[None, None], grid[None], padding_mode="border", align_corners=True)[0, 0]


def by_planes(region: Tensor, lines: Sequence[Tensor], matrix: Matrix) -> Tensor:
    """As `by_voxels`, by PyTorch's 2-D sampling, which is vectorised on CPUs where the 3-D is not.

    The region's planes are read as one tall image, each below the one before it. Its second channel is the
    same memory one plane further on, so that one look-up gives the values in both planes around a point;
    interpolating between the two is the third dimension. In float32 a row of the tall image is
    exact to about 1e-7 of its height: 0.001 voxel for 128^3.
    """
    depth, height, width = region.shape
    channels = min(depth, 2)
    rows = (depth - channels + 1) * height
    tall = region.contiguous().as_strided((1, channels, rows, width), (0, height * width, width, 1))
    z = _offsets(lines, matrix[0]).add_((depth - 1) / 2)
    plane = z.floor()
    # In grid_sample's half-extents, which count from the middle of the tall image.
    per_row, per_column = 2 / max(rows - 1, 1), 2 / max(width - 1, 1)
    first_plane = ((height - 1) - (rows - 1)) / 2 * per_row
    y = _offsets(lines, matrix[1] * per_row).add_(first_plane).add_(plane, alpha=height * per_row)
    x = _offsets(lines, matrix[2] * per_column)
    # Pairs (x, y) as the parts of a complex number: one copy instead of a stack's two.
    grid = torch.view_as_real(torch.complex(x, y)).view(1, -1, x.shape[2], 2)
    found = F.grid_sample(tall, grid, padding_mode="border", align_corners=True)
    found = found.view(channels, *x.shape)
    return found[0].lerp_(found[-1], z.sub_(plane))
