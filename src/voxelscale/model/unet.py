"""The U-Net, in two and three dimensions.

After Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015, and its 3-D form (Çiçek et al., MICCAI 2016), with padded convolutions
and leaky ReLU as in nnU-Net (Isensee et al., Nature Methods 2021). Two convolutions of one level are
one model (`UNetEncodeModel`), the levels with their pooling another (`EncodeModel`); so do
`UNetDecodeModel` and `DecodeModel`, which upsamples and joins the skip.

Tensors are ``(batch, channel, z, y, x)`` in 3-D and ``(batch, channel, y, x)`` in 2-D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from voxelscale.model.norm import BatchNorm, NoNorm, leaky_relu_, make_norm

Pool = tuple[int, ...]
SLOPE = 0.01
"""Of the leaky ReLU below zero."""


def plan_pooling(
    patch_size: Sequence[int], spacing: Sequence[float], depth: int, smallest: int = 4
) -> tuple[Pool, ...]:
    """Strides of the ``depth - 1`` poolings for a patch: 2 along an axis where it can be, else 1.

    An axis is pooled while it keeps at least `smallest` voxels and its spacing is below twice the
    finest axis's, so that anisotropic patches are pooled towards isotropy first (as nnU-Net plans).

    Args:
        patch_size: voxels along each axis.
        spacing: mm along each axis.
        depth: levels of the network, the bottom included.
    """
    size, step = list(patch_size), list(spacing)
    strides = []
    for _ in range(depth - 1):
        poolable = [n >= 2 * smallest for n in size]
        finest = min((s for s, can in zip(step, poolable, strict=True) if can), default=0.0)
        stride = tuple(2 if can and s < 2 * finest else 1 for can, s in zip(poolable, step, strict=True))
        size = [math.ceil(n / k) for n, k in zip(size, stride, strict=True)]
        step = [s * k for s, k in zip(step, stride, strict=True)]
        strides.append(stride)
    return tuple(strides)


class UNetEncodeModel(nn.Module):
    """Two convolutions, each followed by its norm and leaky ReLU; one level of the encoder.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        dims: 2 or 3.
        kernel_size: odd edge of the kernels; padding keeps the size.
        norm: as `voxelscale.model.norm.make_norm`.
        residual: adds the input (through a 1-wide convolution where channels differ) before the
            last activation.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        dims: int = 3,
        kernel_size: int = 3,
        norm: str = "instance",
        residual: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {kernel_size}")
        # A bias before a norm has a gradient of exactly zero, which adaptive optimisers turn to noise.
        bias = norm == "none"
        self.conv1 = _conv(dims, in_channels, channels, kernel_size, bias)
        self.norm1 = make_norm(norm, channels, dims)
        self.conv2 = _conv(dims, channels, channels, kernel_size, bias)
        self.norm2 = make_norm(norm, channels, dims)
        self.bridge: nn.Module | None = None
        if residual:
            same = in_channels == channels
            self.bridge = nn.Identity() if same else _conv(dims, in_channels, channels, 1, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, ...)`` to ``(batch, channels, ...)`` of the same size."""
        y: Tensor = self.conv2(self.norm1(self.conv1(x), SLOPE))
        if self.bridge is None:
            return self.norm2(y, SLOPE)  # type: ignore[no-any-return]
        return leaky_relu_(self.norm2(y) + self.bridge(x), SLOPE)


class EncodeModel(nn.Module):
    """The levels of the encoder with max-pooling between them.

    Args:
        in_channels: channels of the image.
        channels: channels of each level, first to bottom.
        pools: strides between the levels, one fewer than levels.
        options: passed to every `UNetEncodeModel`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        pools: Sequence[Pool],
        *,
        dims: int,
        **options: object,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *channels[:-1]]
        self.levels = nn.ModuleList(
            UNetEncodeModel(i, o, dims=dims, **options)  # type: ignore[arg-type]
            for i, o in zip(inputs, channels, strict=True)
        )
        pool = nn.MaxPool2d if dims == 2 else nn.MaxPool3d
        # ceil_mode: a size that does not divide loses no border voxels.
        self.pools = nn.ModuleList(pool(stride, ceil_mode=True) for stride in pools)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features of every level, first to bottom."""
        features = [self.levels[0](x)]
        for pool, level in zip(self.pools, self.levels[1:], strict=True):
            features.append(level(_pool(pool, features[-1])))
        return features


class UNetDecodeModel(nn.Module):
    """Upsamples by `stride`, joins the skip, and applies a level's two convolutions.

    The upsampling is a transposed convolution whose kernel equals its stride, computed as a 1-wide
    convolution and a rearrangement: the same function, several times faster on CPUs than the
    library's general transposed convolution.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: Pool, *, dims: int, norm: str, **options: object
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.channels = channels
        self.up = _conv(dims, in_channels, channels * math.prod(stride), 1, bias=True)
        self.level = UNetEncodeModel(2 * channels, channels, dims=dims, norm=norm, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Coarse ``(batch, in_channels, ...)`` and skip ``(batch, channels, ...)`` to the skip's size."""
        return self.level(_join(skip, self.up(x), self.stride))  # type: ignore[no-any-return]


class DecodeModel(nn.Module):
    """The levels of the decoder, bottom to first."""

    def __init__(
        self, channels: Sequence[int], pools: Sequence[Pool], *, dims: int, **options: object
    ) -> None:
        super().__init__()
        steps = zip(pairwise(channels), pools, strict=True)
        self.levels = nn.ModuleList(
            UNetDecodeModel(low, high, pool, dims=dims, **options)  # type: ignore[arg-type]
            for (high, low), pool in reversed(list(steps))
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The encoder's features, first to bottom, to ``(batch, channels[0], ...)`` at full size."""
        x = features[-1]
        for level, skip in zip(self.levels, reversed(features[:-1]), strict=True):
            x = level(x, skip)
        return x


class UNet(nn.Module):
    """Image to logits of the same size; any size.

    Args:
        dims: 2 or 3. A 2-D network also takes ``(batch, channel, 1, y, x)``.
        in_channels: channels of the image.
        classes: channels of the logits.
        depth: levels, the bottom included.
        filters: channels of the first level; each level below has twice as many, up to `max_filters`.
        pools: strides between levels; None: 2 along every axis (see `plan_pooling`).
        prior: lesion probability that the untrained network answers everywhere. Lesions are rare; a
            start near their frequency spares the first updates (Lin et al., "Focal loss", 2017).
    """

    def __init__(
        self,
        *,
        dims: int = 3,
        in_channels: int = 1,
        classes: int = 1,
        depth: int = 4,
        filters: int = 16,
        max_filters: int = 320,
        kernel_size: int = 3,
        norm: str = "instance",
        residual: bool = False,
        pools: Sequence[Pool] | None = None,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"dims must be 2 or 3, not {dims}")
        strides = [tuple(p) for p in pools] if pools is not None else [(2,) * dims] * (depth - 1)
        if len(strides) != depth - 1 or any(len(s) != dims for s in strides):
            raise ValueError(
                f"depth {depth} in {dims}-D needs {depth - 1} strides of {dims}, not {strides}"
            )
        channels = [min(filters * 2**level, max_filters) for level in range(depth)]
        options = {"kernel_size": kernel_size, "norm": norm, "residual": residual}
        self.dims = dims
        self.encode = EncodeModel(in_channels, channels, strides, dims=dims, **options)
        self.decode = DecodeModel(channels, strides, dims=dims, **options)
        self.head = _conv(dims, channels[0], classes, 1, bias=True)
        self.apply(_initialise)
        if self.head.bias is not None:
            nn.init.constant_(self.head.bias, math.log(prior / (1 - prior)))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, ...)`` to logits ``(batch, classes, ...)`` of the same size."""
        if self.dims == 2 and x.ndim == 5:
            return self.forward(x.squeeze(2)).unsqueeze(2)
        return self.head(self.decode(self.encode(x)))  # type: ignore[no-any-return]


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> nn.Module:
    """The same network for inference with each batch norm within the convolution before it.

    In evaluation a batch norm scales and shifts every channel, which the convolution's weights and a
    bias can hold. Other norms, which depend on the input, stay. The network is changed in place.
    """
    for level in model.modules():
        if isinstance(level, UNetEncodeModel):
            for conv, name in ((level.conv1, "norm1"), (level.conv2, "norm2")):
                norm = getattr(level, name)
                if isinstance(norm, BatchNorm) and norm.running_var is not None:
                    _fold(conv, norm)
                    setattr(level, name, NoNorm())
    return model


def _fold(conv: Conv2d | Conv3d, norm: BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    conv.weight.mul_(scale.view(-1, *[1] * (conv.weight.dim() - 1)))
    shift = norm.bias - norm.running_mean * scale
    conv.bias = nn.Parameter(shift if conv.bias is None else shift + conv.bias * scale)


def unpack_strides(x: Tensor, stride: Pool) -> Tensor:
    """``(batch, prod(stride) * c, *size)`` to ``(batch, c, *(size * stride))``, channels last in memory."""
    size = x.shape[2:]
    dims = len(size)
    channels = x.shape[1] // math.prod(stride)
    blocks = x.movedim(1, -1).reshape(x.shape[0], *size, *stride, channels)
    order = [0, *(axis for i in range(dims) for axis in (1 + i, 1 + dims + i)), 1 + 2 * dims]
    full = blocks.permute(order).reshape(
        x.shape[0], *(n * s for n, s in zip(size, stride, strict=True)), channels
    )
    return full.movedim(-1, 1)


def _pool(pool: nn.Module, x: Tensor) -> Tensor:
    """Max-pooling in the map's own precision: autocast on CPUs would make it, and its gradient, float32."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return pool(x)  # type: ignore[no-any-return]
    return pool(x)  # type: ignore[no-any-return]


def _join(skip: Tensor, packed: Tensor, stride: Pool) -> Tensor:
    """The skip's channels, then those of `packed`, unpacked by `unpack_strides` and cut to its size."""
    whole = all(n == p * s for n, p, s in zip(skip.shape[2:], packed.shape[2:], stride, strict=True))
    last = skip.movedim(1, -1).is_contiguous() and packed.movedim(1, -1).is_contiguous()
    if whole and last and skip.dtype == packed.dtype and not torch.compiler.is_compiling():
        return _Join.apply(skip, packed, stride)  # type: ignore[no-any-return, no-untyped-call]
    up = unpack_strides(packed, stride)
    for axis, size in enumerate(skip.shape[2:], start=2):
        if up.shape[axis] != size:
            up = up.narrow(axis, 0, size)
    return torch.cat([skip, up.to(skip.dtype)], dim=1)


class _Join(torch.autograd.Function):
    """Unpacking and concatenation of channels-last maps with one copy of each, forward and backward."""

    @staticmethod
    def forward(ctx: Any, skip: Tensor, packed: Tensor, stride: Pool) -> Tensor:
        ctx.stride, ctx.channels = stride, skip.shape[1]
        size, channels = packed.shape[2:], packed.shape[1] // math.prod(stride)
        joined = skip.new_empty(skip.shape[0], *skip.shape[2:], skip.shape[1] + channels)
        joined[..., : skip.shape[1]].copy_(skip.movedim(1, -1))
        blocks = packed.movedim(1, -1).view(-1, *size, *stride, channels)
        _blocks(joined[..., skip.shape[1] :], stride).copy_(blocks)
        return joined.movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows = gradient.movedim(1, -1)
        packed = _blocks(rows[..., ctx.channels :], ctx.stride).flatten(1 + len(ctx.stride)).movedim(-1, 1)
        return rows[..., : ctx.channels].movedim(-1, 1), packed, None


def _blocks(rows: Tensor, stride: Pool) -> Tensor:
    """View of ``(batch, *(size * stride), channels)`` as ``(batch, *size, *stride, channels)``."""
    for axis, step in enumerate(stride):
        rows = rows.unflatten(1 + 2 * axis, (-1, step))  # type: ignore[no-untyped-call]
    dims = len(stride)
    return rows.permute(0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)


class Conv2d(nn.Conv2d):
    """PyTorch's convolution, kept on its fast ways (see `_convolve`)."""

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in_channels, y, x)`` to ``(batch, channels, y, x)`` of the same size."""
        return _convolve(self, input)


class Conv3d(nn.Conv3d):
    """PyTorch's convolution, kept on its fast ways (see `_convolve`)."""

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in_channels, z, y, x)`` to ``(batch, channels, z, y, x)`` of the same size."""
        return _convolve(self, input)


def _convolve(conv: Conv2d | Conv3d, x: Tensor) -> Tensor:
    """The padded convolution of stride 1, by the way that is fast for its shape and memory format."""
    if max(conv.kernel_size) == 1 and x.movedim(1, -1).is_contiguous():
        rows: Tensor = F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias)
        return rows.movedim(-1, 1)
    if _falls_off(conv, x):
        return _in_halves(conv, x)
    return conv._conv_forward(x, conv.weight, conv.bias)  # type: ignore[no-any-return]


def _falls_off(conv: Conv2d | Conv3d, x: Tensor) -> bool:
    """Whether PyTorch would take its slow convolution: float32 on a CPU, one sample, a small map.

    Its rule compares all sizes but the last with 20480 and was made for 2-D; oneDNN is several times
    faster in 3-D.
    """
    return (
        x.device.type == "cpu"
        and x.shape[0] == 1
        and x.dim() == 5
        and x.shape[2] > 1
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and max(conv.kernel_size) == 3
        and math.prod(x.shape[:4]) <= 20480
    )


def _in_halves(conv: Conv2d | Conv3d, x: Tensor) -> Tensor:
    """The convolution of one sample as that of two, its overlapping halves along z."""
    pad, size = conv.kernel_size[0] // 2, x.shape[2]
    half = -(-size // 2)
    framed = F.pad(x, [0, 0, 0, 0, pad, 2 * half - size + pad])
    both = torch.cat([framed.narrow(2, start, half + 2 * pad) for start in (0, half)])
    y = F.conv3d(both, conv.weight, conv.bias, padding=(0, pad, pad))
    # Where batch and z lie next to each other in memory, this is a view.
    return y.movedim(1, -1).flatten(0, 1).unsqueeze(0).narrow(1, 0, size).movedim(-1, 1)


def _conv(dims: int, in_channels: int, channels: int, kernel_size: int, bias: bool) -> Conv2d | Conv3d:
    make = Conv2d if dims == 2 else Conv3d
    return make(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
