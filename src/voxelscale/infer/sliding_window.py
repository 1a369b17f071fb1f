"""A whole volume through a network that takes patches.

Windows lie on a lattice and go by rows along z, so only the slices that a row covers are being summed at
any time: they are float32 on the network's device, and what no later row reaches is finished and kept
in half the memory. The volume stays as it is (int16, in main memory); windows alone are normalised.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelscale.config import IntTriple

Place = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a volume is cut and how its windows go through the network.

    Attributes:
        patch: voxels (z, y, x) of a window.
        overlap: share of a window that the next one covers again, in [0, 1).
        batch_size: windows per forward pass.
        flips: average over the eight mirrored copies (four in 2-D).
        precision: float32 or bfloat16 autocast.
        threads: batches that go through the network at a time, one thread each, on a CPU; 1: one batch
            at a time, with PyTorch's own threads.
    """

    patch: IntTriple
    overlap: float = 0.5
    batch_size: int = 4
    flips: bool = False
    precision: torch.dtype = torch.float32
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of several processes that predict the same volume with the same network.

    Attributes:
        part, parts: of the windows, every `parts`-th from the `part`-th on is this process's.
        combine: sums a float32 tensor over the processes, in place in the one with part 0. All of them call
            it as often and in the same order.
    """

    part: int
    parts: int
    combine: Callable[[Tensor], None]


@torch.inference_mode()
def predict_volume(
    model: nn.Module,
    volume: Tensor,
    windows: Windows,
    *,
    prepare: Callable[[Tensor], Tensor] = Tensor.float,
    within: Tensor | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    share: Share | None = None,
) -> Tensor:
    """Lesion probability at every voxel, by overlapping windows whose logits are averaged.

    Windows weigh less towards their borders, by a Gaussian with sigma one eighth of the patch
    (Isensee et al., "nnU-Net", 2021). The sums are the same whatever the batch and the threads.

    Args:
        model: ``(batch, 1, z, y, x)`` to logits of the same shape.
        volume: ``(z, y, x)``, any number type.
        prepare: makes float32 network input of a window's values; voxel by voxel, as a normalisation is.
        within: ``(z, y, x)`` bool; elsewhere the probability is 0, and windows that hold none of it are
            left out. What is within is as without it.
        device: where the network is; None: where the volume is.
        dtype: of the result, float32 or float16 (which is exact to 0.0005).
        share: this process's share of the work; None: all of it. Rows are summed over the processes, so
            that it is the same to float32's rounding.

    Returns:
        ``(z, y, x)`` in [0, 1], where the volume is. Of several processes only that with part 0 has it;
        what the others return is not to be used.
    """
    size = volume.shape
    padded = _pad_to(volume, windows.patch)
    low = [(whole - n) // 2 for whole, n in zip(padded.shape, size, strict=True)]
    place = device or volume.device
    starts = [
        window_starts(n, p, windows.overlap) for n, p in zip(padded.shape, windows.patch, strict=True)
    ]
    places: Iterable[Place] = itertools.product(*starts)
    if within is not None:
        framed = _framed(within, padded.shape, low)
        places = (p for p in places if _window(framed, p, windows.patch).any())
    if share is not None:
        places = itertools.islice(places, share.part, None, share.parts)
    logits = _logits(model, padded, windows, prepare, place, places)
    combine = None if share is None else share.combine
    probability = _merge(logits, padded.shape, starts, windows.patch, place, volume.device, dtype, combine)
    result = _window(probability, low, size)
    return result if within is None else result.masked_fill_(~within, 0)


def _logits(
    model: nn.Module,
    volume: Tensor,
    windows: Windows,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    places: Iterable[Place],
) -> Iterator[tuple[Place, Tensor]]:
    """Every window's place and logits (z, y, x), in the order of `places`."""
    axes = flip_axes(windows.patch) if windows.flips else [()]

    def predict(batch: list[Place]) -> Tensor:
        with torch.inference_mode():
            cut = torch.stack([_window(volume, p, windows.patch) for p in batch])[:, None]
            cut = prepare(cut.to(device)).contiguous(memory_format=torch.channels_last_3d)
            return _forward(model, cut, axes, windows.precision)[:, 0]

    batches = _batched(iter(places), windows.batch_size)
    several = device.type == "cpu" and windows.threads > 1
    for batch, logits in (
        _in_threads(predict, batches, windows.threads) if several else _in_turn(predict, batches)
    ):
        yield from zip(batch, logits, strict=True)


def _in_turn(
    predict: Callable[[list[Place]], Tensor], batches: Iterator[list[Place]]
) -> Iterator[tuple[list[Place], Tensor]]:
    for batch in batches:
        yield batch, predict(batch)


def _in_threads(
    predict: Callable[[list[Place]], Tensor], batches: Iterator[list[Place]], threads: int
) -> Iterator[tuple[list[Place], Tensor]]:
    """Batches side by side, a core each: no core waits at the end of every layer for the others."""
    before = torch.get_num_threads()
    waiting: deque[tuple[list[Place], Future[Tensor]]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            for batch in batches:
                waiting.append((batch, pool.submit(predict, batch)))
                if len(waiting) > threads:
                    done, logits = waiting.popleft()
                    yield done, logits.result()
            while waiting:
                done, logits = waiting.popleft()
                yield done, logits.result()
    finally:
        # MKL's number of threads is the process's.
        torch.set_num_threads(before)


def _merge(
    logits: Iterator[tuple[Place, Tensor]],
    shape: Sequence[int],
    starts: Sequence[list[int]],
    patch: IntTriple,
    device: torch.device,
    home: torch.device,
    dtype: torch.dtype,
    combine: Callable[[Tensor], None] | None,
) -> Tensor:
    """Probabilities, on `home`, from the windows' logits, which come by rows along z.

    While a row of windows is added, only the slices that it covers are held: a slab as thick as a window.
    Its slices before the next row's first are then complete, as no later window reaches them.
    """
    profiles = [gaussian_profile(p).to(device) for p in patch]
    weight = _outer(profiles)
    # The windows form a lattice and the weight is separable, so its sum over windows is too.
    along_z, along_y, along_x = (
        _profile_sum(n, s, p) for n, s, p in zip(shape, starts, profiles, strict=True)
    )
    plane = along_y[:, None] * along_x
    result = torch.zeros(tuple(shape), dtype=dtype, device=home)
    slab = torch.zeros((patch[0], *shape[1:]), device=device)
    following = next(logits, None)
    for row, next_row in itertools.pairwise([*starts[0], shape[0]]):
        while following is not None and following[0][0] == row:
            place, part = following
            _window(slab, (0, *place[1:]), patch).addcmul_(part, weight)
            following = next(logits, None)
        complete = slab[: next_row - row]
        if combine is not None:
            combine(complete)
        weights = along_z[row:next_row, None, None] * plane
        result[row:next_row] = (complete / weights).sigmoid_().to(home, dtype)
        slab = torch.cat([slab[len(complete) :], torch.zeros_like(complete)])
    return result


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
    """The logits (batch, 1, z, y, x) float32, averaged over the mirrored copies."""
    copies = []
    for flipped in axes:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=precision != torch.float32):
            logits = model(windows.flip(flipped) if flipped else windows).float()
        copies.append(logits.flip(flipped) if flipped else logits)
    return copies[0] if len(copies) == 1 else torch.stack(copies).mean(0)


def _pad_to(volume: Tensor, patch: IntTriple) -> Tensor:
    """Pad to at least the patch, evenly, with the volume's minimum (air)."""
    missing = [max(0, p - n) for n, p in zip(volume.shape, patch, strict=True)]
    if not any(missing):
        return volume
    pad = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
    return F.pad(volume, pad, value=volume.min().item())


def _framed(within: Tensor, shape: Sequence[int], low: Sequence[int]) -> Tensor:
    """The mask as the volume was padded."""
    if within.shape == tuple(shape):
        return within
    framed = within.new_zeros(tuple(shape))
    _window(framed, low, within.shape).copy_(within)
    return framed


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
