"""Normalise, scale, shift, add and leaky ReLU of a channels-last map on a GPU, in Triton.

PyTorch's instance and group norm copy such a map to channels first and leave the result so
(https://github.com/pytorch/pytorch/issues/59168). Here it is read twice and written once; the backward
pass reads it and the gradient twice and writes once. Kept for it are the map and its moments, not the
result: the sign of the activation is computed again. Only where another map was added it is the result's,
which the next layer keeps anyway.

A map is ``(samples, voxels, channels)`` in memory; batch norm takes the batch as one sample. Sums over
voxels have two stages, and no atomic additions: programs sum chunks of voxels into a small buffer, then
one program a sample and group merges the chunks, in float32. The chunks depend on the shape alone, so
that the same map always has the same result, alone or in a batch.

Moments are numerically safe. A chunk's are taken about the mean of its first tile (shifted two-sum
algorithm; Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American
Statistician 1983). That shift is the mean of at least a `MOST_TILES`-th of the chunk, so its square
distance to the mean is at most `MOST_TILES` times the chunk's variance: the subtraction loses at most
that factor, 64, of float32's precision of 6e-8, however large the mean is. Chunks are merged by their
formula for unions, with the mean first.
"""

# The kernels' arguments are Triton's, not Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from voxelscale.model.fast.kernels import as_rows, empty_rows, launch, width_of_tile

TILE = 4096
"""Numbers of a map that a program reads at once: 16 for each of its 256 threads."""

MOST_TILES = 64
"""That a program sums, one after another."""

PROGRAMS = 1024
"""Into which a large sample is divided: eight for each of the 132 multiprocessors of an H100."""


def kernel_norm(
    x: Tensor,
    norm: Any,
    slope: float,
    *,
    added: Tensor | None = None,
    samples: bool = False,
    groups: int = 0,
) -> tuple[Tensor, Tensor]:
    """The normalised and activated map; and moments ``(3, samples, channels)``.

    Args:
        x: ``(batch, channel, ...)``, as `voxelscale.model.fast.kernels.takes_kernels` takes it.
        norm: has float32 weight and bias, and eps.
        slope: of the leaky ReLU; 1: none.
        added: to the normalised map, before the leaky ReLU; of its shape, type and memory format.
        samples: whether each sample is normalised for itself.
        groups: of channels normalised together; 0: each channel for itself.

    Returns:
        the map, of the type of `x` and channels last; mean, 1 / standard deviation and variance (without
        Bessel's correction), float32, of each sample or, if not `samples`, of the batch.
    """
    result: tuple[Tensor, Tensor] = _KernelNorm.apply(  # type: ignore[no-untyped-call]
        x, norm.weight, norm.bias, added, samples, groups, slope, norm.eps
    )
    return result


class _KernelNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        samples: bool,
        groups: int,
        slope: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        output, kept = normalise(x, weight, bias, added, samples, groups, slope, eps)
        ctx.save_for_backward(x, weight, bias, kept, None if added is None else output)
        ctx.samples, ctx.groups, ctx.slope = samples, groups, slope
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        return output, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        nothing = [None] * 4
        if gradient is None:
            return None, None, None, None, *nothing
        x, weight, bias, kept, output = ctx.saved_tensors
        how = ctx.samples, ctx.groups, ctx.slope
        of_x, of_added, sums = gradients(gradient, x, weight, bias, kept, output, *how)
        return of_x, sums[0], sums[1], of_added, *nothing


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    samples: bool,
    groups: int,
    slope: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `kernel_norm`, without a gradient."""
    split = _Split(x, samples, groups)
    partial = weight.new_empty(2, split.samples, split.chunks, split.channels)
    kept = weight.new_empty(3, split.samples, split.channels)
    output = empty_rows(x)
    launch(_moments, split.chunk_grid, x, x, partial, split.rows, split.tiles, **split.tile)
    launch(_merge_moments, split.group_grid, x, partial, kept, eps, *split.sizes, **split.group)
    more = {"ADDED": added is not None, **split.tile}
    maps = x, x if added is None else added, output, kept, weight, bias
    launch(_apply, split.tile_grid, x, *maps, split.rows, slope, **more)
    return output, kept


def gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kept: Tensor,
    output: Tensor | None,
    samples: bool,
    groups: int,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradient of the map; of what was added to it; of weight and bias, ``(2, channels)`` float32.

    Args:
        output: the forward pass's, if something was added.
    """
    split, gradient = _Split(x, samples, groups), as_rows(gradient, x)
    partial = weight.new_empty(2, split.samples, split.chunks, split.channels)
    sums = weight.new_empty(4, split.samples, split.channels)
    of_x = empty_rows(x)
    of_added = None if output is None else empty_rows(x)
    more = {"ADDED": output is not None, **split.tile}
    maps = x, gradient, x if output is None else output, of_x if of_added is None else of_added
    known = kept, weight, bias
    launch(_sums, split.chunk_grid, x, *maps, *known, partial, split.rows, split.tiles, slope, **more)
    launch(_merge_sums, split.group_grid, x, partial, weight, sums, *split.sizes, **split.group)
    if of_added is not None:  # it has passed the activation
        gradient, slope = of_added, 1.0
    launch(_gradient, split.tile_grid, x, x, gradient, *known, sums, of_x, split.rows, slope, **split.tile)
    return of_x, of_added, sums[:2, 0] if split.samples == 1 else sums[:2].sum(1)


class _Split:
    """How a map is divided among programs.

    Attributes:
        rows: voxels of a sample.
        tiles: that a program sums, one after another: a chunk.
        chunks: of a sample.
        chunk_grid, tile_grid, group_grid: programs, one a chunk, tile or group of channels, of each sample.
        tile, group: sizes that a kernel is compiled for.
        sizes: rows, rows of a chunk, chunks.
    """

    def __init__(self, x: Tensor, samples: bool, groups: int) -> None:
        self.samples, self.channels = x.shape[0] if samples else 1, x.shape[1]
        self.rows = x.numel() // (self.samples * self.channels)
        width = width_of_tile(self.channels)
        height, blocks = TILE // width, _divide(self.channels, width)
        tiles = _divide(self.rows, height)
        self.tiles = min(_divide(tiles * blocks, PROGRAMS), MOST_TILES)
        self.chunks = _divide(tiles, self.tiles)
        self.sizes = self.rows, self.tiles * height, self.chunks
        together = self.channels // groups if groups else 1
        wide = triton.next_power_of_2(together)
        self.chunk_grid = self.chunks, blocks, self.samples
        self.tile_grid = tiles, blocks, self.samples
        self.group_grid = self.channels // together, self.samples
        self.tile = {"C": self.channels, "HEIGHT": height, "WIDTH": width}
        self.group = {"C": self.channels, "GROUP": together, "WIDE": wide, "MANY": max(1, 1024 // wide)}


def _divide(number: int, by: int) -> int:
    return -(-number // by)


# The kernels. Places in a map are int64 where a tile begins and int32 within a chunk.


@triton.jit(do_not_specialize=["rows", "tiles"])
def _moments(x, partial, rows, tiles, C: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of each chunk of a sample, the mean and the sum of squared distances to it, by channel."""
    chunk, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk.to(tl.int64) * tiles * HEIGHT
    count = tl.minimum(rows - first, tiles * HEIGHT).to(tl.int32)
    start = x + (sample * rows + first) * C
    local, channel = tl.arange(0, HEIGHT), block * WIDTH + tl.arange(0, WIDTH)
    place, there = local[:, None] * C + channel[None, :], channel[None, :] < C
    mask = (local[:, None] < count) & there
    head = tl.load(start + place, mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(head, 0) / tl.minimum(count, HEIGHT).to(tl.float32)
    once = tl.zeros([HEIGHT, WIDTH], tl.float32)
    twice = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for begin in range(0, count, HEIGHT):
        mask = (local[:, None] + begin < count) & there
        value = tl.load(start + begin * C + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - shift[None, :], 0.0)
        once += value
        twice += value * value
    total = tl.sum(once, 0)
    distance = total / count.to(tl.float32)
    squares = tl.sum(twice, 0) - total * distance
    out = partial + (sample * tl.num_programs(0) + chunk) * C + channel
    size = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * C
    tl.store(out, shift + distance, mask=channel < C)
    # NaN stays: it must not become a variance of 0.
    tl.store(out + size, tl.where(squares < 0, 0.0, squares), mask=channel < C)


@triton.jit(do_not_specialize=["rows", "height", "chunks"])
def _merge_moments(
    partial,
    kept,
    eps,
    rows,
    height,
    chunks,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    MANY: tl.constexpr,
):
    """Mean, 1 / standard deviation and variance of each group of channels, written for each channel."""
    group, sample, samples = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = tl.arange(0, WIDE)
    channel = group * GROUP + inside
    means = partial + sample * chunks * C
    squares = means + samples.to(tl.int64) * chunks * C
    size = rows.to(tl.float32) * GROUP
    # About the first chunk's mean, so that a large mean costs no digits.
    origin = tl.load(means + group * GROUP)
    total = tl.zeros([MANY, WIDE], tl.float32)
    for begin in range(0, chunks, MANY):
        place = begin + tl.arange(0, MANY)
        mask = (place[:, None] < chunks) & (inside[None, :] < GROUP)
        count = tl.minimum(rows - place.to(tl.int64) * height, height).to(tl.float32)
        mean = tl.load(means + place[:, None] * C + channel[None, :], mask=mask, other=0.0)
        total += tl.where(mask, (mean - origin) * count[:, None], 0.0)
    centre = origin + tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([MANY, WIDE], tl.float32)
    for begin in range(0, chunks, MANY):
        place = begin + tl.arange(0, MANY)
        mask = (place[:, None] < chunks) & (inside[None, :] < GROUP)
        count = tl.minimum(rows - place.to(tl.int64) * height, height).to(tl.float32)
        mean = tl.load(means + place[:, None] * C + channel[None, :], mask=mask, other=0.0)
        within = tl.load(squares + place[:, None] * C + channel[None, :], mask=mask, other=0.0)
        away = mean - centre
        total += tl.where(mask, within + away * away * count[:, None], 0.0)
    variance = tl.sum(tl.sum(total, 1), 0) / size
    filled = tl.zeros([WIDE], tl.float32)
    out = kept + sample * C + channel
    tl.store(out, filled + centre, mask=inside < GROUP)
    tl.store(out + samples * C, filled + 1.0 / tl.sqrt(variance + eps), mask=inside < GROUP)
    tl.store(out + 2 * samples * C, filled + variance, mask=inside < GROUP)


@triton.jit
def _channels(kept, weight, bias, sample, samples, channel, C: tl.constexpr):
    """Mean, 1 / standard deviation, scale and shift of a tile's channels, as rows."""
    there = channel < C
    mean = tl.load(kept + sample * C + channel, mask=there, other=0.0)
    inverse = tl.load(kept + (samples + sample) * C + channel, mask=there, other=0.0)
    scale = tl.load(weight + channel, mask=there, other=0.0)
    shift = tl.load(bias + channel, mask=there, other=0.0)
    return mean[None, :], inverse[None, :], scale[None, :], shift[None, :]


@triton.jit(do_not_specialize=["rows"])
def _apply(
    x,
    added,
    out,
    kept,
    weight,
    bias,
    rows,
    slope,
    ADDED: tl.constexpr,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The map, normalised, scaled, shifted, added to another and activated."""
    block, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * HEIGHT
    start = (sample * rows + first) * C
    local, channel = tl.arange(0, HEIGHT), block * WIDTH + tl.arange(0, WIDTH)
    place = local[:, None] * C + channel[None, :]
    count = tl.minimum(rows - first, HEIGHT).to(tl.int32)
    mask = (local[:, None] < count) & (channel[None, :] < C)
    mean, inverse, scale, shift = _channels(kept, weight, bias, sample, tl.num_programs(2), channel, C)
    value = tl.load(x + start + place, mask=mask, other=0.0).to(tl.float32)
    value = (value - mean) * inverse * scale + shift
    if ADDED:
        value += tl.load(added + start + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(value > 0, value, value * slope)
    tl.store(out + start + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _sums(
    x,
    gradient,
    output,
    of_added,
    kept,
    weight,
    bias,
    partial,
    rows,
    tiles,
    slope,
    ADDED: tl.constexpr,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of each chunk of a sample, the sums of gradient x normalised map and of the gradient, by channel."""
    chunk, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = chunk.to(tl.int64) * tiles * HEIGHT
    count = tl.minimum(rows - first, tiles * HEIGHT).to(tl.int32)
    start = (sample * rows + first) * C
    local, channel = tl.arange(0, HEIGHT), block * WIDTH + tl.arange(0, WIDTH)
    place, there = local[:, None] * C + channel[None, :], channel[None, :] < C
    mean, inverse, scale, shift = _channels(kept, weight, bias, sample, tl.num_programs(2), channel, C)
    of_scale = tl.zeros([HEIGHT, WIDTH], tl.float32)
    of_shift = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for begin in range(0, count, HEIGHT):
        mask = (local[:, None] + begin < count) & there
        value = tl.load(x + start + begin * C + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(gradient + start + begin * C + place, mask=mask, other=0.0).to(tl.float32)
        value = (value - mean) * inverse
        if ADDED:
            sign = tl.load(output + start + begin * C + place, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(sign > 0, grad, grad * slope)
            passed = grad.to(of_added.dtype.element_ty)
            tl.store(of_added + start + begin * C + place, passed, mask=mask)
            grad = passed.to(tl.float32)  # as `_gradient` will read it
        else:
            grad = tl.where(value * scale + shift > 0, grad, grad * slope)
        of_scale += tl.where(mask, grad * value, 0.0)
        of_shift += grad
    out = partial + (sample * tl.num_programs(0) + chunk) * C + channel
    size = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * C
    tl.store(out, tl.sum(of_scale, 0), mask=channel < C)
    tl.store(out + size, tl.sum(of_shift, 0), mask=channel < C)


@triton.jit(do_not_specialize=["rows", "height", "chunks"])
def _merge_sums(
    partial,
    weight,
    sums,
    rows,
    height,
    chunks,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    MANY: tl.constexpr,
):
    """Both sums of each channel; and the means over each group of both, times the scale."""
    group, sample, samples = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    inside = tl.arange(0, WIDE)
    channel = group * GROUP + inside
    there = inside < GROUP
    of_scales = partial + sample * chunks * C
    of_shifts = of_scales + samples.to(tl.int64) * chunks * C
    of_scale = tl.zeros([MANY, WIDE], tl.float32)
    of_shift = tl.zeros([MANY, WIDE], tl.float32)
    for begin in range(0, chunks, MANY):
        place = begin + tl.arange(0, MANY)
        mask = (place[:, None] < chunks) & there[None, :]
        of_scale += tl.load(of_scales + place[:, None] * C + channel[None, :], mask=mask, other=0.0)
        of_shift += tl.load(of_shifts + place[:, None] * C + channel[None, :], mask=mask, other=0.0)
    one, other = tl.sum(of_scale, 0), tl.sum(of_shift, 0)
    scale = tl.load(weight + channel, mask=there, other=0.0) / (rows.to(tl.float32) * GROUP)
    filled = tl.zeros([WIDE], tl.float32)
    out = sums + sample * C + channel
    tl.store(out, one, mask=there)
    tl.store(out + samples * C, other, mask=there)
    tl.store(out + 2 * samples * C, filled + tl.sum(one * scale, 0), mask=there)
    tl.store(out + 3 * samples * C, filled + tl.sum(other * scale, 0), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _gradient(
    x,
    gradient,
    kept,
    weight,
    bias,
    sums,
    out,
    rows,
    slope,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradient of the map."""
    block, sample, samples = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    first = tl.program_id(0).to(tl.int64) * HEIGHT
    start = (sample * rows + first) * C
    local, channel = tl.arange(0, HEIGHT), block * WIDTH + tl.arange(0, WIDTH)
    place = local[:, None] * C + channel[None, :]
    count = tl.minimum(rows - first, HEIGHT).to(tl.int32)
    mask = (local[:, None] < count) & (channel[None, :] < C)
    mean, inverse, scale, shift = _channels(kept, weight, bias, sample, samples, channel, C)
    along = tl.load(sums + (2 * samples + sample) * C + channel, mask=channel < C, other=0.0)[None, :]
    even = tl.load(sums + (3 * samples + sample) * C + channel, mask=channel < C, other=0.0)[None, :]
    value = tl.load(x + start + place, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(gradient + start + place, mask=mask, other=0.0).to(tl.float32)
    value = (value - mean) * inverse
    grad = tl.where(value * scale + shift > 0, grad, grad * slope)
    result = (grad * scale - even - value * along) * inverse
    tl.store(out + start + place, result.to(out.dtype.element_ty), mask=mask)


def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give what PyTorch does, in float64, on a small random map of a device."""
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 9, 700, 8, generator=draw).movedim(-1, 1).to(device, dtype) for _ in range(3)]
    x, gradient, added = maps[0] + 3, maps[1], maps[2]
    weight, bias = (torch.rand(8, generator=draw).to(device) for _ in range(2))
    errors = []
    for more in (None, added):
        output, kept = normalise(x, weight, bias, more, True, 0, 0.1, 1e-5)
        sign = None if more is None else output
        found = output, *gradients(gradient, x, weight, bias, kept, sign, True, 0, 0.1)
        wide = [t.double() for t in (gradient, x, weight, bias, added if more is added else 0 * added)]
        pairs = zip(found, _by_pytorch(wide, 0.1, 1e-5), strict=True)
        errors += [(a - b).abs().amax() / b.abs().amax() for a, b in pairs if a is not None]
    return bool(torch.stack(errors).amax() < (1e-4 if dtype == torch.float32 else 2e-2))


def _by_pytorch(tensors: list[Tensor], slope: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Instance norm, sum and leaky ReLU of a 2-D map by their definition; output and gradients."""
    gradient, x, weight, bias, added = tensors
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    inverse = (variance + eps).rsqrt()
    value, scale = (x - mean) * inverse, weight.view(1, -1, 1, 1)
    output = value * scale + bias.view(1, -1, 1, 1) + added
    grad = torch.where(output > 0, gradient, gradient * slope)
    sums = torch.stack([(grad * value).sum((0, 2, 3)), grad.sum((0, 2, 3))])
    even, along = grad.mean((2, 3), keepdim=True), (grad * value).mean((2, 3), keepdim=True)
    of_x = (grad - even - value * along) * scale * inverse
    return torch.where(output > 0, output, output * slope), of_x, grad, sums
