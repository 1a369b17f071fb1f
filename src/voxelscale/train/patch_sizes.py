"""Patches that a network's poolings divide, small to large."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from voxelscale.config import Config
from voxelscale.geometry import IntTriple, Triple
from voxelscale.model.unet import plan_pooling

DEEPEST = 6
"""Levels of a planned network at most."""

MOST_VOXELS = 160**3
"""A planned patch is no larger, whatever the memory: a step would take long and see little variety."""

LARGEST = 8
"""A scaled patch is at most this many times as long as the configured one."""


def with_patch(config: Config, patch: IntTriple) -> Config:
    """The config with another patch size."""
    return replace(config, data=replace(config.data, patch_size=patch))


def scaled_patches(
    config: Config, spacing: Triple, limit: Sequence[int] | None = None
) -> Iterator[IntTriple]:
    """Patches of the configured one's proportions.

    Args:
        spacing: of the store, mm (z, y, x), by which pooling is planned.
        limit: voxels (z, y, x) beyond which no axis is to grow, as the scans' shape.
    """
    base, dims, depth = config.data.patch_size, config.model.dims, config.model.depth
    divisors, _ = _pooled(base, spacing, dims, depth)
    longest = max(base)
    last: IntTriple | None = None
    for edge in range(1, LARGEST * longest + 1):
        # An axis of one voxel is a slice's, not a small patch's.
        z, y, x = (
            1 if n == 1 else max(1, round(n * edge / longest / k)) * k
            for n, k in zip(base, divisors, strict=True)
        )
        if limit is not None and any(n > most for n, most in zip((z, y, x), limit, strict=True)):
            return
        own, levels = _pooled((z, y, x), spacing, dims, depth)
        divided = all(n % k == 0 for n, k in zip((z, y, x), own, strict=True))
        if (z, y, x) != last and divided and levels == depth:
            last = (z, y, x)
            yield last


def isotropic_patches(
    shape: Sequence[float],
    spacing: Triple,
    dims: int,
    deepest: int = DEEPEST,
    most_voxels: int = MOST_VOXELS,
) -> Iterator[tuple[IntTriple, int]]:
    """Patches with their depths, as long in mm along every axis as scans of `shape` voxels allow."""
    finest = min(spacing[-dims:])
    largest = 0
    for count in range(8, 513, 4):
        aim = [min(count * finest / s, float(n)) for s, n in zip(spacing, shape, strict=True)]
        sizes = [1 if dims == 2 else max(1, round(aim[0])), *(max(1, round(n)) for n in aim[1:])]
        divisors, depth = _pooled(sizes, spacing, dims, deepest)
        z, y, x = (max(1, n // k) * k for n, k in zip(sizes, divisors, strict=True))
        voxels = z * y * x
        if voxels > largest and (not largest or voxels <= most_voxels):
            largest = voxels
            yield (z, y, x), depth


def _pooled(patch: Sequence[int], spacing: Triple, dims: int, depth: int) -> tuple[list[int], int]:
    """What a patch's poolings divide each axis (z, y, x) by, and how many levels they leave that differ."""
    pools = plan_pooling(patch[-dims:], spacing[-dims:], depth)
    divisors = [1] * (3 - dims) + [math.prod(stride[axis] for stride in pools) for axis in range(dims)]
    return divisors, 1 + sum(max(stride) > 1 for stride in pools)
