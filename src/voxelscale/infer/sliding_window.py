"""A whole volume through a network that takes patches.

Windows lie on a lattice and go by rows along z, so only the slices that a row covers are being summed at
any time: they are float32 on the network's device, and what no later row reaches is finished and handed
out. Of many classes even these would be too large: the volume is then done in parts along y or x. The
volume stays as it is (int16, on a GPU if it fits there); windows alone are normalised. A GPU is waited for
only where a box of results must be there, and then it computes the next one.
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

from voxelscale.config import IntTriple
from voxelscale.console import count, notice
from voxelscale.device import autocast, upload
from voxelscale.errors import VoxelscaleError
from voxelscale.infer.memory import MOST_VOXELS, PassSize, free_memory, with_peak
from voxelscale.infer.transfer import landed, resident

Place = tuple[int, ...]
Box = tuple[slice, slice, slice]
"""(z, y, x)."""

LARGEST_SUMS = 2**32
"""Bytes of sums that are held at a time: a quarter of a machine with 16 GB. 118 classes over 128 slices of
512 x 512 voxels would be 15 GiB; in four parts, windows of 128 voxels that overlap by half are 1.4 times as
many. Logits of windows that wait to be added are half as many bytes at most."""


class WindowTooLarge(VoxelscaleError):
    """A single window needs more memory than there is."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a volume is cut and how its windows go through the network.

    Attributes:
        patch: voxels (z, y, x) of a window.
        overlap: share of a window that the next one covers again, in [0, 1).
        batch_size: windows per forward pass; fewer go from the first pass on that they do not fit.
        grow: whether on a GPU more go after the first pass, up to `MOST_VOXELS`, where they fit; what
            else computes on the GPU is taken for part of a window.
        flips: of the axes "zyx", those along which the copies are mirrored that are averaged; all: eight
            copies (four in 2-D).
        precision: float32 or bfloat16 autocast.
        nnunet: whether windows lie, weigh and are padded exactly as nnU-Net's: weights are a Gaussian about
            the voxel at half the patch, however small, and what is beyond the volume is 0.
        threads: batches that go through the network at a time, one thread each, on a CPU; 1: one batch
            at a time, with PyTorch's own threads.
    """

    patch: IntTriple
    overlap: float = 0.5
    batch_size: int = 4
    grow: bool = False
    flips: str = ""
    precision: torch.dtype = torch.float32
    nnunet: bool = False
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
        model: ``(batch, channel, z, y, x)`` to logits ``(batch, 1, z, y, x)``.
        volume: ``(z, y, x)``, or ``(channel, z, y, x)``, any number type.
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
    result = torch.zeros(volume.shape[-3:], dtype=dtype, device=volume.device)
    boxes = predict_boxes(
        model, volume, windows, prepare=prepare, within=within, device=device, share=share
    )
    if device is not None and device.type != volume.device.type:
        boxes = landed(boxes, dtype)
    for box, probability in boxes:
        result[box] = probability[0].to(dtype)
    return result if within is None else result.masked_fill_(~within, 0)


@torch.inference_mode()
def predict_boxes(
    model: nn.Module,
    volume: Tensor,
    windows: Windows,
    outputs: int = 1,
    finish: Callable[[Tensor], Tensor] = Tensor.sigmoid_,
    *,
    prepare: Callable[[Tensor], Tensor] = Tensor.float,
    within: Tensor | None = None,
    device: torch.device | None = None,
    share: Share | None = None,
    largest: int = LARGEST_SUMS,
) -> Iterator[tuple[Box, Tensor]]:
    """What is made of every voxel's averaged logits, box by box; arguments as of `predict_volume`.

    Boxes are as wide as the volume and come by rising z, but where the sums would take more than `largest`
    bytes: then the volume is done in parts along y or x, one after another, each with all windows that
    reach it. So every voxel's sums, and their order, are those of the undivided volume; windows that reach
    two parts go through the network twice. A part is at least one voxel wide.

    Args:
        outputs: channels of the network's logits.
        finish: makes of logits (outputs, dz, dy, dx), which it may change, what is wanted, voxel by voxel.
        within: where no window reaches the logits are 0.

    Yields:
        the box, and what `finish` made of its logits ``(outputs, dz, dy, dx)`` float32 on the network's
        device; it holds until the next box is asked for.

    Raises:
        VoxelscaleError: the network has another number of outputs.
        WindowTooLarge: a single window does not fit in memory.
    """
    image = volume if volume.ndim == 4 else volume[None]
    padded = _pad_to(image, windows.patch, zero=windows.nnunet)
    shape = padded.shape[1:]
    low = [(whole - n) // 2 for whole, n in zip(shape, image.shape[1:], strict=True)]
    place = device or volume.device
    padded = resident(padded, place)
    framed = None if within is None else _framed(within.cpu(), shape, low, torch.tensor(False))
    each = list(zip(shape, windows.patch, strict=True))
    starts = [window_starts(n, p, windows.overlap, exact=windows.nnunet) for n, p in each]
    lines = [gaussian_profile(p, windows.nnunet) for p in windows.patch]
    # The windows form a lattice and the weight is separable, so its sum over windows is too.
    sums = [upload(_profile_sum(n, s, p), place) for n, s, p in zip(shape, starts, lines, strict=True)]
    profiles = [upload(line, place) for line in lines]
    size, threads = _at_a_time(windows, outputs, largest // 2, place)
    for part in _parts(shape, starts, windows.patch, outputs, largest):
        reaching = [
            [s for s in along if s < side.stop and s + p > side.start]
            for along, p, side in zip(starts, windows.patch, part, strict=True)
        ]
        places: Iterable[Place] = itertools.product(*reaching)
        if framed is not None:
            places = (p for p in places if _window(framed, p, windows.patch).any())
        if share is not None:
            places = itertools.islice(places, share.part, None, share.parts)
        logits = _logits(model, padded, windows, prepare, place, places, outputs, size, threads)
        combine = None if share is None else share.combine
        for rows, complete in _merge(logits, starts[0], part, profiles, outputs, combine):
            box = (rows, *part[1:])
            z, y, x = (total[side] for total, side in zip(sums, box, strict=True))
            finished = finish(complete.div_(z[:, None, None] * (y[:, None] * x)))
            yield from _unpadded(box, finished, low, image.shape[1:])


def _unpadded(
    box: Box, finished: Tensor, low: Sequence[int], size: Sequence[int]
) -> Iterator[tuple[Box, Tensor]]:
    """A box of the padded volume as one of the volume; nothing where it is padding alone."""
    inside = [
        slice(max(0, side.start - first), min(n, side.stop - first))
        for side, first, n in zip(box, low, size, strict=True)
    ]
    if all(side.stop > side.start for side in inside):
        z, y, x = inside
        cut = [
            side.start + first - whole.start for side, first, whole in zip(inside, low, box, strict=True)
        ]
        yield (z, y, x), _window(finished, cut, [side.stop - side.start for side in inside])


def _parts(
    shape: Sequence[int], starts: Sequence[list[int]], patch: IntTriple, outputs: int, largest: int
) -> list[Box]:
    """The volume, or parts of it whose sums take at most `largest` bytes.

    It is cut along the axis where the fewest windows reach two parts.
    """
    whole = slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
    plane = outputs * patch[0] * 4
    if plane * shape[1] * shape[2] <= largest:
        return [whole]
    each: list[tuple[float, list[Box]]] = []
    for axis in (1, 2):
        most = max(1, largest // (plane * shape[3 - axis]))
        sides = _cut(shape[axis], starts[axis], most)
        done = sum(
            1 for side in sides for s in starts[axis] if s < side.stop and s + patch[axis] > side.start
        )
        boxes: list[Box] = [
            (whole[0], side, whole[2]) if axis == 1 else (whole[0], whole[1], side) for side in sides
        ]
        each.append((done / len(starts[axis]), boxes))
    times, parts = min(each, key=lambda choice: choice[0])
    notice(
        f"the sums of {count(outputs, 'output')} are held for {len(parts)} parts of the volume in turn; "
        f"{times:.1f} times as many windows",
        level=2,
    )
    return parts


def _cut(size: int, starts: Sequence[int], most: int) -> list[slice]:
    """An axis in parts of at most `most` voxels.

    It is cut where a window begins, if that is possible: the fewest windows then lie on both sides.
    """
    sides, first = [], 0
    while first < size:
        end = min(size, first + most)
        if end < size:
            end = max((s for s in starts if first < s <= end), default=end)
        sides.append(slice(first, end))
        first = end
    return sides


def _logits(
    model: nn.Module,
    volume: Tensor,
    windows: Windows,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    places: Iterable[Place],
    outputs: int,
    size: PassSize,
    threads: int,
) -> Iterator[tuple[Place, Tensor]]:
    """Every window's place and logits (outputs, z, y, x), in the order of `places`."""
    axes = flip_axes(windows.patch, windows.flips)

    def predict(batch: list[Place]) -> Tensor:
        try:
            if size.now == size.most:
                return forward(batch)
            logits, peak = with_peak(partial(forward, batch), device)
            size.grow(peak // len(batch), free_memory(device))
            return logits
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                edges = " x ".join(map(str, windows.patch))
                problem = f"a window of {edges} voxels needs more memory than {device} has"
                raise WindowTooLarge(problem, "lower predict.patch_size") from None
        # Here what the attempt held is free; a window's logits do not depend on its batch.
        size.halve(len(batch))
        done, left = [], batch
        while left:
            done.append(predict(left[: size.now]))
            left = left[len(done[-1]) :]
        return torch.cat(done)

    def forward(batch: list[Place]) -> Tensor:
        with torch.inference_mode():
            cut = torch.stack([_window(volume, p, windows.patch) for p in batch])
            cut = prepare(upload(cut, device)).contiguous(memory_format=torch.channels_last_3d)
            logits = _forward(model, cut, axes, windows.precision)
        if logits.shape[1] != outputs:
            hint = "give predict a model whose network is as its classes say"
            raise VoxelscaleError(f"the network has {logits.shape[1]} outputs instead of {outputs}", hint)
        return logits

    left = iter(places)
    batches = iter(lambda: list(itertools.islice(left, size.now)), [])
    each: Iterator[tuple[list[Place], Tensor]]
    if threads > 1:
        each = _in_threads(predict, batches, threads, windows.threads // threads)
    else:
        each = ((batch, predict(batch)) for batch in batches)
    for group, logits in each:
        yield from zip(group, logits, strict=True)


def _at_a_time(windows: Windows, outputs: int, largest: int, device: torch.device) -> tuple[PassSize, int]:
    """Windows per pass, and passes side by side.

    Args:
        largest: bytes of logits of several outputs that wait at a time, unless a window has more.
    """
    batch, threads = windows.batch_size, windows.threads if device.type == "cpu" else 1
    most, voxels = batch, math.prod(windows.patch)
    if windows.grow and device.type != "cpu":
        most = max(batch, MOST_VOXELS // voxels)
    if outputs > 1:
        held = max(1, largest // (outputs * voxels * 4))
        batch, most, threads = min(batch, held), min(most, held), min(threads, held)
    return PassSize(now=batch, most=most), threads


def _in_threads(
    predict: Callable[[list[Place]], Tensor], batches: Iterator[list[Place]], threads: int, cores: int
) -> Iterator[tuple[list[Place], Tensor]]:
    """Batches side by side, on cores of their own: none waits at the end of every layer for the others."""
    before = torch.get_num_threads()
    waiting: deque[tuple[list[Place], Future[Tensor]]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, cores)) as pool:
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
    rows: Sequence[int],
    part: Box,
    profiles: Sequence[Tensor],
    outputs: int,
    combine: Callable[[Tensor], None] | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of a part, and their sums (outputs, dz, dy, dx), from windows that come by rows along z.

    While a row of windows is added, only the slices that it covers are held: a slab as thick as a window.
    Its slices before the next row's first are then complete, as no later window reaches them.
    """
    weight = _outer(profiles)
    deep, _, _ = weight.shape
    _, y, x = part
    # By slices first, so that what is complete lies together.
    slab = torch.zeros((deep, outputs, y.stop - y.start, x.stop - x.start), device=weight.device)
    following = next(logits, None)
    for row, next_row in itertools.pairwise([*rows, part[0].stop]):
        while following is not None and following[0][0] == row:
            place, window = following
            _add(slab.transpose(0, 1), part, place, window, weight)
            following = next(logits, None)
        complete = slab[: next_row - row]
        if combine is not None:
            combine(complete)
        yield slice(row, next_row), complete.transpose(0, 1)
        moved = len(complete)
        rest = deep - moved
        for first in range(0, rest, moved):  # so many at a time do not lie over each other
            last = min(first + moved, rest)
            slab[first:last].copy_(slab[first + moved : last + moved])
        slab[rest:].zero_()


def _add(slab: Tensor, part: Box, place: Place, window: Tensor, weight: Tensor) -> None:
    """Add a window's weighted logits to the slab of a part, as far as they lie in it."""
    there: list[slice] = [slice(None), slice(None)]
    own: list[slice] = [slice(None), slice(None)]
    for side, first, n in zip(part[1:], place[1:], weight.shape[1:], strict=True):
        start, stop = max(side.start, first), min(side.stop, first + n)
        there.append(slice(start - side.start, stop - side.start))
        own.append(slice(start - first, stop - first))
    slab[tuple(there)].addcmul_(window[tuple(own)], weight[tuple(own[1:])])


def window_starts(size: int, patch: int, overlap: float, *, exact: bool = False) -> list[int]:
    """First voxels of the windows along an axis: evenly spread, at least `overlap`, none outside.

    Args:
        exact: whether a step may be fractional before the windows are rounded to voxels, as nnU-Net's.
    """
    if size <= patch:
        return [0]
    step = max(1, patch * (1 - overlap) if exact else int(patch * (1 - overlap)))
    count = math.ceil((size - patch) / step) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


@lru_cache(maxsize=32)
def gaussian_profile(patch: int, nnunet: bool = False) -> Tensor:
    """Weights (patch,) along one axis, 1 in the middle, never below 1e-2 of it at the faces.

    Args:
        nnunet: as nnU-Net's: 1 at voxel ``patch // 2``, and not bounded.
    """
    if nnunet:
        offsets = torch.arange(patch, dtype=torch.float32) - patch // 2
        return torch.exp(-0.5 * (offsets / (patch / 8)) ** 2)
    offsets = torch.arange(patch, dtype=torch.float32) - (patch - 1) / 2
    return torch.exp(-0.5 * (offsets / (patch / 8)) ** 2).clamp_min(1e-2)


def flip_axes(patch: Sequence[int], flips: str = "zyx") -> list[tuple[int, ...]]:
    """Every set of axes of ``(batch, 1, z, y, x)`` along which a patch is mirrored, the empty one first."""
    usable = [
        axis + 2 for axis, (name, n) in enumerate(zip("zyx", patch, strict=True)) if name in flips and n > 1
    ]
    return [c for count in range(len(usable) + 1) for c in itertools.combinations(usable, count)]


def _forward(
    model: nn.Module, windows: Tensor, axes: Sequence[tuple[int, ...]], precision: torch.dtype
) -> Tensor:
    """The logits (batch, output, z, y, x) float32, averaged over the mirrored copies."""
    copies: list[Tensor] = []
    for flipped in axes:
        with autocast(windows.device, precision):
            logits = model(windows.flip(flipped) if flipped else windows).float()
        logits = logits.flip(flipped) if flipped else logits
        if copies and logits.shape[1] > 1:  # eight copies of many classes would not fit
            copies[0] = copies[0] + logits
        else:
            copies.append(logits)
    if len(copies) < len(axes):
        return copies[0].div_(len(axes))
    return copies[0] if len(copies) == 1 else torch.stack(copies).mean(0)


def _pad_to(volume: Tensor, patch: IntTriple, *, zero: bool) -> Tensor:
    """Pad (channel, z, y, x) to at least the patch, evenly, each channel with its minimum (air), or 0."""
    shape = [max(p, n) for n, p in zip(volume.shape[1:], patch, strict=True)]
    if shape == list(volume.shape[1:]):
        return volume
    low = [(whole - n) // 2 for whole, n in zip(shape, volume.shape[1:], strict=True)]
    fill = volume.new_zeros(len(volume)) if zero else volume.flatten(1).amin(1)
    return _framed(volume, shape, low, fill[:, None, None, None])


def _framed(inner: Tensor, shape: Sequence[int], low: Sequence[int], fill: Tensor) -> Tensor:
    """(..., z, y, x) within a larger volume of `shape`, where it begins at `low`; `fill` around it."""
    framed = fill.expand(*inner.shape[:-3], *shape).clone()
    _window(framed, low, inner.shape[-3:]).copy_(inner)
    return framed


def _window(volume: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    z, y, x = (slice(s, s + n) for s, n in zip(start, size, strict=True))
    return volume[..., z, y, x]


def _profile_sum(size: int, starts: Sequence[int], profile: Tensor) -> Tensor:
    total = profile.new_zeros(size)
    for start in starts:
        total[start : start + len(profile)] += profile
    return total


def _outer(profiles: Sequence[Tensor]) -> Tensor:
    z, y, x = profiles
    return z[:, None, None] * y[:, None] * x
