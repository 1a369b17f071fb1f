"""Probability maps of many classes, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelscale.classes import Classes
from voxelscale.device import upload
from voxelscale.findings.regions import box_of
from voxelscale.geometry import SAME_MM, Grid, IntTriple, Scan, resample
from voxelscale.infer.sliding_window import Box
from voxelscale.infer.transfer import to_host

WAITING = 4
"""Classes of a box that wait to be compressed while a GPU goes on: each takes 3 bytes a voxel."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What is kept of a class in a box.

    Attributes:
        start, shape: of the smallest box that holds all of it.
        there: Blosc2-compressed bits of the voxels that are kept.
        values: their probabilities, compressed float16.
        count: of them.
    """

    start: IntTriple
    shape: IntTriple
    there: bytes
    values: bytes
    count: int

    @property
    def box(self) -> Box:
        z, y, x = (slice(s, s + n) for s, n in zip(self.start, self.shape, strict=True))
        return z, y, x


class OnLattice(Protocol):
    """Probabilities of each output on a lattice, as `on_grid` takes them."""

    @property
    def grid(self) -> Grid:
        """Where the voxels lie."""

    def box(self, at: int) -> Box | None:
        """A box that holds all of an output's probabilities above 0; None where there are none."""

    def within(self, at: int, box: Box) -> NDArray[np.float32]:
        """An output's probabilities in such a box."""


class Maps:
    """Probabilities of each class on a network's lattice; small ones count as 0.

    Kept are probabilities of at least `least`, and of classes that exclude each other each voxel's largest,
    as float16, and a bit for each class and voxel, all compressed. Of classes whose probabilities sum to 1
    at most ``1 / least`` reach `least`, so K outputs take at most ``K / 8 + 2 * min(K, 1 / least + 1)``
    bytes a voxel: of 118 and 0.025 that is 95 bytes, 7.5 GB of 512 x 512 x 300 voxels, where all of them in
    float16 would be 18.6 GB. In a trained network's maps, where hardly more than one class is probable at a
    voxel, it is a twentieth of that.

    Args:
        classes: what the network's outputs are.
        grid: its lattice.
        least: in (0, 1).
    """

    def __init__(self, classes: Classes, grid: Grid, least: float) -> None:
        self.grid, self._classes, self._least = grid, classes, least
        self._pieces: list[list[_Piece]] = [[] for _ in range(classes.outputs)]
        self._packer, self._packing = ThreadPoolExecutor(1), deque[tuple[int, Future[_Piece]]]()

    @torch.inference_mode()
    def add(self, box: Box, probability: Tensor, within: Tensor | None = None) -> None:
        """The probabilities (output, dz, dy, dx) of a box; each box comes once.

        They are compressed by a thread, while a GPU computes the next ones.

        Args:
            within: of the whole lattice, bool; elsewhere all is background.
        """
        classes = self._classes
        outside = None if within is None else upload(~within[box], probability.device)
        # Slice by slice: across 100 classes torch copies all of what it looks at.
        first = None
        if not classes.regions:
            planes = [probability[:, z].argmax(0).to(torch.int16) for z in range(probability.shape[1])]
            first = torch.stack(planes)

        def kept(at: int) -> tuple[Tensor, Tensor]:
            values = probability[at]
            there = values >= self._least
            if first is not None:
                there |= first == at
            if outside is not None:
                there = there & ~outside
                if at == 0 and not classes.regions:  # background
                    values, there = torch.where(outside, 1.0, values), there | outside
            return values, there

        # All at once, as a GPU is waited for; then once more of those that are there, as all would not fit.
        found = torch.stack([kept(at)[1].any() for at in range(classes.outputs)]).tolist()
        for at in range(classes.outputs):
            if found[at]:
                values, there = kept(at)
                arriving = to_host(values[there], torch.float16), to_host(there, torch.bool)
                self._packing.append((at, self._packer.submit(_piece, box, *arriving)))
                self._packed(0 if probability.device.type == "cpu" else WAITING)

    def _packed(self, but: int = 0) -> list[list[_Piece]]:
        """The pieces of each class, but for so many at most that are still being compressed."""
        while len(self._packing) > but:
            at, piece = self._packing.popleft()
            self._pieces[at].append(piece.result())
        return self._pieces

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(len(piece.there) + len(piece.values) for of in self._packed() for piece in of)

    def box(self, at: int) -> Box | None:
        """The smallest box that holds all of an output's probabilities above 0."""
        pieces = self._packed()[at]
        if not pieces:
            return None
        low = np.min([piece.start for piece in pieces], axis=0)
        high = np.max([np.add(piece.start, piece.shape) for piece in pieces], axis=0)
        z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return z, y, x

    def within(self, at: int, box: Box) -> NDArray[np.float32]:
        """An output's probabilities in a box that holds all that are above 0."""
        out = np.zeros([side.stop - side.start for side in box], np.float32)
        for piece in self._packed()[at]:
            z, y, x = (
                slice(a.start - b.start, a.stop - b.start) for a, b in zip(piece.box, box, strict=True)
            )
            _unpack(piece, out[z, y, x])
        return out


def _piece(box: Box, arriving: Callable[[], Tensor], there: Callable[[], Tensor]) -> _Piece:
    """What is kept of a box, float16, and where it is, once both have come from the device."""
    import blosc2

    kept, mask = arriving().numpy(), there().numpy()
    smallest = box_of(mask)
    bits = np.packbits(mask[smallest])
    z, y, x = (outer.start + inner.start for outer, inner in zip(box, smallest, strict=True))
    deep, high, wide = (side.stop - side.start for side in smallest)
    return _Piece(
        start=(z, y, x),
        shape=(deep, high, wide),
        there=blosc2.compress(bits, typesize=1, clevel=5, codec=blosc2.Codec.LZ4),
        values=blosc2.compress(kept, typesize=2, clevel=5, codec=blosc2.Codec.LZ4),
        count=len(kept),
    )


def _unpack(piece: _Piece, out: NDArray[np.float32]) -> None:
    """Write a piece's probabilities where it lies."""
    import blosc2

    bits = np.frombuffer(blosc2.decompress(piece.there), np.uint8)
    mask = np.unpackbits(bits, count=int(np.prod(piece.shape))).view(bool).reshape(piece.shape)
    out[mask] = np.frombuffer(blosc2.decompress(piece.values), np.float16)[: piece.count]


def on_grid(each: Sequence[OnLattice], at: int, grid: Grid) -> tuple[Box, NDArray[np.float32]] | None:
    """An output's mean probability over several networks, on another lattice, by linear interpolation.

    Returns:
        a box of `grid` beyond which it is 0, and the probabilities in it; None where it is 0 everywhere.
    """
    parts = [part for maps in each if (part := _interpolated(maps, at, grid)) is not None]
    if not parts:
        return None
    if len(parts) == len(each) == 1:
        return parts[0]
    low = np.min([[side.start for side in box] for box, _ in parts], axis=0)
    high = np.max([[side.stop for side in box] for box, _ in parts], axis=0)
    total = np.zeros(high - low, np.float32)
    for box, values in parts:
        z, y, x = (slice(s.start - a, s.stop - a) for s, a in zip(box, low.tolist(), strict=True))
        total[z, y, x] += values
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    total /= len(each)
    return (z, y, x), total


def _interpolated(maps: OnLattice, at: int, grid: Grid) -> tuple[Box, NDArray[np.float32]] | None:
    box = maps.box(at)
    if box is None:
        return None
    if maps.grid.same_as(grid, SAME_MM):
        return box, maps.within(at, box)
    # A voxel of zeros around it, which interpolation falls off to.
    low = np.maximum([side.start - 1 for side in box], 0)
    high = np.minimum([side.stop + 1 for side in box], maps.grid.shape)
    z, y, x = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    part = Scan(maps.within(at, (z, y, x)), maps.grid.window(low.tolist(), (high - low).tolist()).affine)
    corners = np.indices((2, 2, 2)).reshape(3, -1).T * (high - low) + low - 0.5
    places = grid.mm_to_index(maps.grid.index_to_mm(corners))
    first = np.clip(np.floor(places.min(axis=0)), 0, np.asarray(grid.shape) - 1).astype(int)
    last = np.clip(np.ceil(places.max(axis=0)), 0, np.asarray(grid.shape) - 1).astype(int)
    window = grid.window(first.tolist(), (last - first + 1).tolist())
    values = np.asarray(resample(part, window, "linear", fill=0.0).array, np.float32)
    z, y, x = (slice(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True))
    return (z, y, x), values
