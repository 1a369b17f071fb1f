"""A whole volume through a network that takes patches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelscale.config import IntTriple


@torch.inference_mode()
def predict_volume(
    model: nn.Module,
    volume: Tensor,
    patch: IntTriple,
    *,
    overlap: float = 0.5,
    batch_size: int = 4,
    flips: bool = False,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Lesion probability at every voxel, by overlapping windows whose logits are averaged.

    Windows weigh less towards their borders, by a Gaussian with sigma one eighth of the patch
    (Isensee et al., "nnU-Net", 2021).

    Args:
        model: ``(batch, 1, z, y, x)`` to logits of the same shape; on the volume's device.
        volume: ``(z, y, x)`` float32, normalised.
        patch: voxels of a window.
        overlap: share of a window that the next one covers again, in [0, 1).
        batch_size: windows per forward pass.
        flips: average over the eight mirrored copies (four in 2-D).
        precision: float32 or bfloat16 autocast.

    Returns:
        ``(z, y, x)`` float32 in [0, 1], on the volume's device.
    """
    size = volume.shape
    padded = _pad_to(volume, patch)
    starts = [window_starts(n, p, overlap) for n, p in zip(padded.shape, patch, strict=True)]
    profiles = [gaussian_profile(p).to(volume.device) for p in patch]
    weight = _outer(profiles)
    total = torch.zeros_like(padded)
    axes = flip_axes(patch) if flips else [()]
    for places in _batched(itertools.product(*starts), batch_size):
        windows = torch.stack([_window(padded, place, patch) for place in places])[:, None]
        windows = windows.contiguous(memory_format=torch.channels_last_3d)
        logits = _forward(model, windows, axes, precision)[:, 0]
        for place, part in zip(places, logits, strict=True):
            _window(total, place, patch).addcmul_(part, weight)
    # The windows form a lattice and the weight is separable, so its sum over windows is too.
    sums = [_profile_sum(n, s, p) for n, s, p in zip(padded.shape, starts, profiles, strict=True)]
    probability = total.div_(_outer(sums)).sigmoid_()
    low = [(whole - n) // 2 for whole, n in zip(padded.shape, size, strict=True)]
    return _window(probability, low, size)


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis: evenly spread, at least `overlap`, none outside."""
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    count = math.ceil((size - patch) / step) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


@lru_cache(maxsize=32)
def gaussian_profile(patch: int) -> Tensor:
    """Weights (patch,) along one axis, 1 in the middle, never below 1e-2 of it at the faces."""
    offsets = torch.arange(patch, dtype=torch.float32) - (patch - 1) / 2
    return torch.exp(-0.5 * (offsets / (patch / 8)) ** 2).clamp_min(1e-2)


def flip_axes(patch: Sequence[int]) -> list[tuple[int, ...]]:
    """Every set of axes of ``(batch, 1, z, y, x)`` along which a patch can be mirrored."""
    usable = [axis + 2 for axis, n in enumerate(patch) if n > 1]
    return [c for count in range(len(usable) + 1) for c in itertools.combinations(usable, count)]


def _forward(
    model: nn.Module, windows: Tensor, axes: Sequence[tuple[int, ...]], precision: torch.dtype
) -> Tensor:
    total = torch.zeros((), device=windows.device)
    mixed = precision != torch.float32
    for flipped in axes:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=mixed):
            logits = model(windows.flip(flipped) if flipped else windows)
        logits = logits.float()
        total = total + (logits.flip(flipped) if flipped else logits)
    return total / len(axes)


def _pad_to(volume: Tensor, patch: IntTriple) -> Tensor:
    """Pad to at least the patch, evenly, with the volume's least value (air)."""
    missing = [max(0, p - n) for n, p in zip(volume.shape, patch, strict=True)]
    if not any(missing):
        return volume
    pad = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
    return F.pad(volume, pad, value=float(volume.min()))


def _window(volume: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    z, y, x = (slice(s, s + n) for s, n in zip(start, size, strict=True))
    return volume[z, y, x]


def _profile_sum(size: int, starts: Sequence[int], profile: Tensor) -> Tensor:
    total = profile.new_zeros(size)
    for start in starts:
        total[start : start + len(profile)] += profile
    return total


def _outer(profiles: Sequence[Tensor]) -> Tensor:
    z, y, x = profiles
    return z[:, None, None] * y[:, None] * x


def _batched(places: Iterator[tuple[int, ...]], count: int) -> Iterator[list[tuple[int, ...]]]:
    while batch := list(itertools.islice(places, count)):
        yield batch
