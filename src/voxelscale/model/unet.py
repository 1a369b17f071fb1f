"""The U-Net, in two and three dimensions: encoder, bottom, decoder, with a skip at every level.

After Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015, and its 3-D form (Çiçek et al., MICCAI 2016), with padded convolutions
and leaky ReLU as in nnU-Net (Isensee et al., Nature Methods 2021). What makes it fast is
in `voxelscale.model.fast`.

Tensors are ``(batch, channel, z, y, x)`` in 3-D and ``(batch, channel, y, x)`` in 2-D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from voxelscale.model.fast.convolution import Conv2d, Conv3d, Kernel, convolution
from voxelscale.model.fast.join import Stride, join
from voxelscale.model.fast.pool import max_pool
from voxelscale.model.norm import SLOPE, BatchNorm, NoNorm, add_norm, make_norm
from voxelscale.model.resenc import ConvUnit, ResidualBlock, ResidualEncoder

SUPERVISION = "supervision."
"""What the names of the auxiliary heads' weights begin with."""


class UNet(nn.Module):
    """Image to logits of the same size; any size.

    Args:
        dims: 2 or 3. A 2-D network also takes ``(batch, channel, 1, y, x)``.
        in_channels: channels of the image.
        classes: channels of the logits.
        depth: levels, the bottom included.
        filters: channels of the first level; each level below has twice as many, up to `max_filters`.
        kernels: kernel of each level, one edge an axis; None: `kernel_size` throughout.
        strided: whether the plain encoder goes down by strides of convolutions, without pooling.
        blocks: number of residual blocks of each level of a residual encoder (`voxelscale.model.resenc`);
            (): the plain encoder.
        pools: strides between levels; None: 2 along every axis (see `plan_pooling`).
        deep_supervision: whether, while it is trained, decoder levels below the first give logits, too
            (Lee et al., "Deeply-supervised nets", 2015), all but the lowest, as in nnU-Net.
        softmax: whether the logits are those of background and of classes that exclude each other.
        prior: lesion probability that the untrained network answers everywhere, of classes that exclude
            each other their sum. Lesions are rare; a start near their frequency spares the first updates
            (Lin et al., "Focal loss", 2017).
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
        kernels: Sequence[Sequence[int]] | None = None,
        norm: str = "instance",
        residual: bool = False,
        strided: bool = False,
        blocks: Sequence[int] = (),
        pools: Sequence[Stride] | None = None,
        deep_supervision: bool = False,
        softmax: bool = False,
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
        edges = [tuple(k) for k in kernels] if kernels is not None else [(kernel_size,) * dims] * depth
        if len(edges) != depth or any(len(k) != dims for k in edges):
            raise ValueError(f"depth {depth} in {dims}-D needs {depth} kernels of {dims}, not {edges}")
        channels = [min(filters * 2**level, max_filters) for level in range(depth)]
        self.dims, self.deep_supervision = dims, deep_supervision
        self.encode: nn.Module
        if blocks:
            self.encode = ResidualEncoder(
                in_channels, channels, strides, edges, blocks, dims=dims, norm=norm
            )
            self.decode = Decoder(channels, strides, edges, dims=dims, norm=norm, block=ConvUnit)
        else:
            options: dict[str, Any] = {"dims": dims, "norm": norm, "residual": residual}
            self.encode = Encoder(in_channels, channels, strides, edges, strided=strided, **options)
            self.decode = Decoder(channels, strides, edges, **options)
        self.head = convolution(dims, channels[0], classes, 1, bias=True)
        self.apply(_initialise)
        # Drawn last: the other weights begin alike with them and without.
        lower = channels[1 : depth - 2] if deep_supervision else []
        self.supervision = nn.ModuleList(convolution(dims, n, classes, 1, bias=True) for n in lower)
        self.supervision.apply(_initialise)
        for head in (self.head, *self.supervision):
            _start_from(head, prior, softmax)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """``(batch, in_channels, ...)`` to logits ``(batch, classes, ...)`` of the same size.

        In training mode with deep supervision: a list of logits, those of the full size first, then those
        of each lower level of the decoder but the lowest.
        """
        if self.dims == 2 and x.ndim == 5:
            flat = self.forward(x.squeeze(2))
            return [y.unsqueeze(2) for y in flat] if isinstance(flat, list) else flat.unsqueeze(2)
        *skips, bottom = self.encode(x)
        if not (self.training and self.deep_supervision):
            return self.head(self.decode(bottom, skips))  # type: ignore[no-any-return]
        *lower, full = self.decode.levels_of(bottom, skips)
        heads = zip(self.supervision, reversed(lower), strict=False)
        return [self.head(full), *(head(features) for head, features in heads)]


class Encoder(nn.Module):
    """The way down: levels of two convolutions, with max-pooling between them.

    Args:
        in_channels: channels of the image.
        channels: channels of each level, first to bottom.
        pools: strides between the levels, one fewer than levels.
        kernels: of each level.
        strided: whether the strides are those of each level's first convolution, without pooling.
        options: passed to every `ConvBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        pools: Sequence[Stride],
        kernels: Sequence[Kernel],
        *,
        dims: int,
        strided: bool = False,
        **options: object,
    ) -> None:
        super().__init__()
        steps = [(1,) * dims, *(tuple(stride) if strided else (1,) * dims for stride in pools)]
        self.levels = nn.ModuleList(
            ConvBlock(i, o, dims=dims, kernel_size=kernel, stride=step, **options)  # type: ignore[arg-type]
            for (i, o), kernel, step in zip(pairwise([in_channels, *channels]), kernels, steps, strict=True)
        )
        pool = nn.MaxPool2d if dims == 2 else nn.MaxPool3d
        # ceil_mode: a size that does not divide loses no border voxels.
        self.pools = nn.ModuleList(
            nn.Identity() if strided else pool(stride, ceil_mode=True) for stride in pools
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features of every level, first to bottom."""
        features = [self.levels[0](x)]
        for pool, level in zip(self.pools, self.levels[1:], strict=True):
            x = features[-1]
            features.append(level(x if isinstance(pool, nn.Identity) else max_pool(pool, x)))
        return features


class Decoder(nn.Module):
    """The way up: each level upsamples, joins its skip and applies a block of convolutions.

    Args:
        channels, pools, kernels: as the encoder has them.
        options: passed to every `DecoderLevel`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        pools: Sequence[Stride],
        kernels: Sequence[Kernel],
        *,
        dims: int,
        **options: object,
    ) -> None:
        super().__init__()
        steps = zip(pairwise(channels), pools, kernels[:-1], strict=True)
        self.levels = nn.ModuleList(
            DecoderLevel(low, high, pool, dims=dims, kernel_size=kernel, **options)  # type: ignore[arg-type]
            for (high, low), pool, kernel in reversed(list(steps))
        )

    def forward(self, bottom: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """The bottom's features and the skips, first level first, to features at full size."""
        x = bottom
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            x = level(x, skip)
        return x

    def levels_of(self, bottom: Tensor, skips: Sequence[Tensor]) -> list[Tensor]:
        """The same with the features of the bottom and of every level above it, those at full size last."""
        features = [bottom]
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            features.append(level(features[-1], skip))
        return features


class ConvBlock(nn.Module):
    """Two convolutions, each followed by its norm and leaky ReLU.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        dims: 2 or 3.
        kernel_size: odd edge of the kernels, or one an axis; padding keeps the size.
        stride: of the first convolution, one an axis; 1 where it is residual.
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
        kernel_size: int | Kernel = 3,
        stride: int | Stride = 1,
        norm: str = "instance",
        residual: bool = False,
    ) -> None:
        super().__init__()
        # A bias before a norm has a gradient of exactly zero, which adaptive optimisers turn to noise.
        bias = norm == "none"
        self.conv1 = convolution(dims, in_channels, channels, kernel_size, bias, stride)
        self.norm1 = make_norm(norm, channels)
        self.conv2 = convolution(dims, channels, channels, kernel_size, bias)
        self.norm2 = make_norm(norm, channels)
        self.bridge: nn.Module | None = None
        if residual:
            same = in_channels == channels
            self.bridge = nn.Identity() if same else convolution(dims, in_channels, channels, 1, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, ...)`` to ``(batch, channels, ...)`` of the same size but for a stride."""
        y: Tensor = self.conv2(self.norm1(self.conv1(x), SLOPE))
        if self.bridge is None:
            return self.norm2(y, SLOPE)  # type: ignore[no-any-return]
        return add_norm(self.norm2, y, self.bridge(x), SLOPE)


class DecoderLevel(nn.Module):
    """Upsamples by `stride` (a transposed convolution), joins the skip, applies a block of convolutions.

    Args:
        block: makes it, from channels in and out and the options.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: Stride,
        *,
        dims: int,
        block: Callable[..., nn.Module] = ConvBlock,
        **options: object,
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.up = convolution(dims, in_channels, channels * math.prod(stride), 1, bias=True)
        self.level = block(2 * channels, channels, dims=dims, **options)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Coarse ``(batch, in_channels, ...)`` and skip ``(batch, channels, ...)`` to the skip's size."""
        return self.level(join(skip, self.up(x), self.stride))  # type: ignore[no-any-return]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _start_from(head: Conv2d | Conv3d, prior: float, softmax: bool) -> None:
    """Let a head answer the prior everywhere, were the features 0."""
    if head.bias is None:
        return
    head.bias.fill_(math.log(prior / (1 - prior)))
    if softmax:  # background's share is 1 - prior, each class's prior / number of classes
        head.bias[0] = math.log(len(head.bias) - 1)


def without_supervision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights but those of its auxiliary heads, which only a training needs."""
    return {name: value for name, value in state.items() if not name.startswith(SUPERVISION)}


def plan_pooling(
    patch_size: Sequence[int], spacing: Sequence[float], depth: int, smallest: int = 4
) -> tuple[Stride, ...]:
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


def plan_kernels(
    pools: Sequence[Stride], spacing: Sequence[float], kernel_size: int = 3
) -> tuple[Stride, ...]:
    """Kernels of the levels: `kernel_size` along an axis, but 1 while it is coarse.

    As nnU-Net plans: an axis is coarse until its spacing is below twice the finest axis's; the bottom's
    kernel is full.

    Args:
        pools: strides between the levels.
        spacing: mm along each axis, of the first level.
        kernel_size: odd edge.
    """
    step, edges, kernels = list(spacing), [1] * len(spacing), []
    for stride in pools:
        edges = [kernel_size if s / min(step) < 2 else edge for s, edge in zip(step, edges, strict=True)]
        step = [s * k for s, k in zip(step, stride, strict=True)]
        kernels.append(tuple(edges))
    return (*kernels, (kernel_size,) * len(edges))


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> nn.Module:
    """The same network for inference with each batch norm within the convolution before it.

    In evaluation a batch norm scales and shifts every channel, which the convolution's weights and a
    bias can hold. Other norms, which depend on the input, stay. The network is changed in place.
    """
    for level in model.modules():
        if isinstance(level, ConvBlock | ConvUnit | ResidualBlock):
            for name, norm in list(level.named_children()):
                if isinstance(norm, BatchNorm) and norm.running_var is not None:
                    _fold(getattr(level, name.replace("norm", "conv")), norm)
                    setattr(level, name, NoNorm())
    return model


def _fold(conv: Conv2d | Conv3d, norm: BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    conv.weight.mul_(scale.view(-1, *[1] * (conv.weight.dim() - 1)))
    shift = norm.bias - norm.running_mean * scale
    conv.bias = nn.Parameter(shift if conv.bias is None else shift + conv.bias * scale)
