"""Our U-Net of PyTorch's own layers alone, as other programs and exporters know them.

The same weights and results as `voxelscale.model.unet`, without the ways of `voxelscale.model.fast`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from voxelscale.model.norm import SLOPE, GroupNorm, InstanceNorm, NoNorm
from voxelscale.model.resenc import ConvUnit, ResidualBlock, ResidualEncoder
from voxelscale.model.unet import ConvBlock, Encoder, UNet


class PlainUNet(nn.Module):
    """A trained `UNet` for inference; a 2-D one takes ``(batch, channel, y, x)`` alone."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        encode: Any = model.encode
        self.stem: nn.Module = nn.Identity()
        if isinstance(encode, ResidualEncoder):
            self.stem = _block(encode.stem)
            stages: Any = encode.stages
            self.down = nn.ModuleList(nn.Sequential(*map(_residual, stage)) for stage in stages)
        else:
            self.down = _levels(encode)
        levels: Any = model.decode.levels
        self.up = nn.ModuleList(_Up(level.up, level.stride) for level in levels)
        self.join = nn.ModuleList(_block(level.level) for level in levels)
        self.head = _convolution(model.head)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channel, ...)`` to logits of the same size."""
        x = self.stem(x)
        skips: list[Tensor] = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            skip, x = skips.pop(), up(x)
            # Where a size did not divide, what goes up is larger than what came down.
            for axis in range(2, skip.ndim):
                x = x.narrow(axis, 0, skip.shape[axis])
            x = join(torch.cat([skip, x], 1))
        logits: Tensor = self.head(x)
        return logits


class _Residual(nn.Module):
    """Leaky ReLU of a body's map plus the input's, which may be pooled and convolved."""

    def __init__(self, body: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip, self.act = body, skip, nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.body(x) + self.skip(x))
        return out


def _levels(encode: Encoder) -> nn.ModuleList:
    first, *others = map(_block, encode.levels)
    pooled = (
        level if isinstance(pool, nn.Identity) else nn.Sequential(copy.deepcopy(pool), level)
        for pool, level in zip(encode.pools, others, strict=True)
    )
    return nn.ModuleList([first, *pooled])


def _block(block: Any) -> nn.Module:
    if isinstance(block, ConvUnit):
        return _unit(block.conv1, block.norm1)
    if not isinstance(block, ConvBlock):
        raise TypeError(f"no block of ours: {type(block).__name__}")
    first = _unit(block.conv1, block.norm1)
    if block.bridge is None:
        return nn.Sequential(first, _unit(block.conv2, block.norm2))
    body = nn.Sequential(first, _convolution(block.conv2), _norm(block.norm2, block.conv2))
    bridge = block.bridge
    return _Residual(body, bridge if isinstance(bridge, nn.Identity) else _convolution(bridge))


def _residual(block: Any) -> nn.Module:
    if not isinstance(block, ResidualBlock):
        raise TypeError(f"no block of ours: {type(block).__name__}")
    skip: list[nn.Module] = []
    if max(block.stride) > 1:
        pool: Any = nn.AvgPool2d if len(block.stride) == 2 else nn.AvgPool3d
        skip.append(pool(block.stride, ceil_mode=True))
    if block.norm3 is not None:
        skip += [_convolution(block.conv3), _norm(block.norm3, block.conv3)]
    body = nn.Sequential(
        _unit(block.conv1, block.norm1), _convolution(block.conv2), _norm(block.norm2, block.conv2)
    )
    return _Residual(body, nn.Sequential(*skip))


def _unit(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(_convolution(conv), _norm(norm, conv), nn.LeakyReLU(SLOPE))


def _convolution(ours: Any) -> nn.Module:
    make: Any = nn.Conv2d if len(ours.kernel_size) == 2 else nn.Conv3d
    options = {"stride": ours.stride, "padding": ours.padding, "bias": ours.bias is not None}
    conv: nn.Module = make(ours.in_channels, ours.out_channels, ours.kernel_size, **options)
    return _with(conv, ours.weight, ours.bias)


class _Up(nn.Module):
    """A transposed convolution whose bias is another at each voxel of a block: the weights of ones."""

    def __init__(self, up: Any, stride: tuple[int, ...]) -> None:
        super().__init__()
        make: Any = nn.ConvTranspose2d if len(stride) == 2 else nn.ConvTranspose3d
        channels = up.out_channels // math.prod(stride)
        rows = torch.cat([up.weight.flatten(1), up.bias[:, None]], 1)
        weight = rows.view(*stride, channels, -1).movedim((-1, -2), (0, 1))
        conv = make(up.in_channels + 1, channels, stride, stride, bias=False)
        self.conv = _with(conv, weight, None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat([x, torch.ones_like(x[:, :1])], 1))
        return out


def _norm(ours: nn.Module, conv: Any) -> nn.Module:
    """Batch norms must have been folded into their convolutions."""
    dims = len(conv.kernel_size)
    if isinstance(ours, NoNorm):
        return nn.Identity()
    if isinstance(ours, InstanceNorm):
        make: Any = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
        return _with(make(conv.out_channels, ours.eps, affine=True), ours.weight, ours.bias)
    if isinstance(ours, GroupNorm):
        group = nn.GroupNorm(ours.num_groups, ours.num_channels, ours.eps)
        return _with(group, ours.weight, ours.bias)
    raise TypeError(f"no norm of an inference network: {type(ours).__name__}")


def _with(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module with weights, contiguous copies of those given."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            kept = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(module, name, nn.Parameter(kept, requires_grad=False))
    return module
