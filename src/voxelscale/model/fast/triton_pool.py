"""The kernels of `voxelscale.model.fast.pool` for channels-last maps on a GPU, in Triton.

A program takes windows along x for one place along z and y. Forward every voxel is read once and every
window written once; backward every window is read once and every voxel written once, by one program: the
result is always the same. Maps are 3-D; in 2-D z has one voxel.
"""

# The kernels' arguments are Triton's, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from voxelscale.model.fast.kernels import empty_rows, launch, width_of_tile

WINDOWS = 2048
"""Times channels, that a program takes at most."""


def largest(x: Tensor, output: Tensor, places: Tensor, stride: tuple[int, ...]) -> None:
    """Write each window's maximum and its place in scan order (uint8): the first of several, or a NaN.

    Args:
        x: ``(batch, channel, ...)``; all maps are channels last.
        output, places: of the windows, of which the last along an axis may be incomplete.
    """
    _run(_largest, x, output, places, stride)


def spread(gradient: Tensor, places: Tensor, result: Tensor, stride: tuple[int, ...]) -> None:
    """Write each window's gradient to the place of its maximum, and 0 to its other voxels."""
    _run(_spread, result, gradient, places, stride)


def _run(kernel: object, voxels: Tensor, windows: Tensor, places: Tensor, stride: tuple[int, ...]) -> None:
    channels, width = voxels.shape[1], width_of_tile(voxels.shape[1])
    flat = (1,) * (5 - voxels.dim())
    size, count = (*flat, *voxels.shape[2:]), (*flat, *windows.shape[2:])
    length = min(WINDOWS // width, triton.next_power_of_2(count[2]))
    grid = voxels.shape[0] * count[0] * count[1], -(-count[2] // length), -(-channels // width)
    z, y, x = (*flat, *stride)
    constants = {"C": channels, "Z": z, "Y": y, "X": x, "LENGTH": length, "WIDTH": width}
    launch(kernel, grid, voxels, voxels, windows, places, *size, *count, **constants)


@triton.jit
def _windows(count_x, C: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Of a program its line of windows, the first place in it, and its windows, places and channels."""
    line = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * LENGTH
    local = tl.arange(0, LENGTH)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    start = (line * count_x + first) * C
    mask = (local[:, None] < count_x - first) & (channel[None, :] < C)
    return line, first, local, channel, start, mask


@triton.jit(do_not_specialize=["size_z", "size_y", "size_x", "count_z", "count_y", "count_x"])
def _largest(
    voxels,
    windows,
    places,
    size_z,
    size_y,
    size_x,
    count_z,
    count_y,
    count_x,
    C: tl.constexpr,
    Z: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, first, local, channel, start, mask = _windows(count_x, C, LENGTH, WIDTH)
    at_y = (line % count_y) * Y
    at_z = (line // count_y % count_z) * Z
    corner = line // count_y // count_z * size_z + at_z
    best = tl.full([LENGTH, WIDTH], float("-inf"), tl.float32)
    place = tl.zeros([LENGTH, WIDTH], tl.int32)
    for number in tl.static_range(Z * Y * X):
        z, y, x = number // (Y * X), number // X % Y, number % X
        left = tl.where((at_z + z < size_z) & (at_y + y < size_y), size_x - first * X - x, 0)
        there = mask & (local[:, None] * X < left)
        row = ((corner + z) * size_y + at_y + y) * size_x + first * X + x
        source = voxels + row * C + local[:, None] * (X * C) + channel[None, :]
        value = tl.load(source, mask=there, other=0.0).to(tl.float32)
        better = there & ((value > best) | (value != value))
        best = tl.where(better, value, best)
        place = tl.where(better, number, place)
    target = start + local[:, None] * C + channel[None, :]
    tl.store(windows + target, best.to(windows.dtype.element_ty), mask=mask)
    tl.store(places + target, place.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["size_z", "size_y", "size_x", "count_z", "count_y", "count_x"])
def _spread(
    voxels,
    windows,
    places,
    size_z,
    size_y,
    size_x,
    count_z,
    count_y,
    count_x,
    C: tl.constexpr,
    Z: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line, first, local, channel, start, mask = _windows(count_x, C, LENGTH, WIDTH)
    at_y = (line % count_y) * Y
    at_z = (line // count_y % count_z) * Z
    corner = line // count_y // count_z * size_z + at_z
    source = start + local[:, None] * C + channel[None, :]
    gradient = tl.load(windows + source, mask=mask, other=0.0)
    place = tl.load(places + source, mask=mask, other=0).to(tl.int32)
    nothing = tl.zeros([LENGTH, WIDTH], voxels.dtype.element_ty)
    for number in tl.static_range(Z * Y * X):
        z, y, x = number // (Y * X), number // X % Y, number % X
        left = tl.where((at_z + z < size_z) & (at_y + y < size_y), size_x - first * X - x, 0)
        there = mask & (local[:, None] * X < left)
        row = ((corner + z) * size_y + at_y + y) * size_x + first * X + x
        target = voxels + row * C + local[:, None] * (X * C) + channel[None, :]
        tl.store(target, tl.where(place == number, gradient, nothing), mask=there)


def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give exactly what PyTorch does on a small random map of a device."""
    draw = torch.Generator().manual_seed(0)
    # Few values, so that many are equal.
    x = torch.randint(5, (2, 5, 6, 7, 8), generator=draw).movedim(-1, 1).to(device, dtype)
    wanted, indices = F.max_pool3d(x, 2, ceil_mode=True, return_indices=True)
    output = empty_rows(x, wanted.shape[2:])
    places = torch.empty_like(output, dtype=torch.uint8)
    largest(x, output, places, (2, 2, 2))
    result = empty_rows(x)
    spread(output, places, result, (2, 2, 2))
    spots = torch.zeros_like(x).flatten(2).scatter(2, indices.flatten(2), wanted.flatten(2)).view_as(x)
    return bool(((output == wanted).all() & (result == spots).all()).item())
