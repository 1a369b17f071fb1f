"""nnU-Net's residual encoder: the way down of ResEnc M, L and XL.

Isensee et al., "nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation",
MICCAI 2024; the network is ``ResidualEncoderUNet`` of ``dynamic-network-architectures``::

    image ─ stem ─ stage 1 ───────────────────── skip ── one convolution ─ head ─ logits
                      └ stage 2 (half the size) ─ skip ── one convolution
                           └ stage 3 ──────────── skip ── one convolution
                                └ ...

    stage: residual blocks, of which the first halves the size
    block: convolution ─ norm ─ leaky ReLU ─ convolution ─ norm ─ + ─ leaky ReLU
           └ mean pooling, 1-wide convolution, norm where they are needed ┘

The skip is that of ResNet-D (He et al., "Bag of tricks for image classification", CVPR 2019). The way up is
`voxelscale.model.unet.Decoder` with one convolution a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from voxelscale.model.fast.convolution import Conv2d, Conv3d, Kernel, convolution
from voxelscale.model.fast.join import Stride, mean_pool
from voxelscale.model.norm import SLOPE, add_norm, make_norm


class ResidualEncoder(nn.Module):
    """The way down: a stem, then stages of residual blocks.

    Args:
        in_channels: channels of the image.
        channels: channels of each stage, first to bottom.
        strides: between the stages, one fewer than stages.
        kernels: of each stage; the stem has the first's.
        blocks: residual blocks of each stage.
        dims: 2 or 3.
        norm: as `voxelscale.model.norm.make_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[Stride],
        kernels: Sequence[Kernel],
        blocks: Sequence[int],
        *,
        dims: int,
        norm: str,
    ) -> None:
        super().__init__()
        self.stem = ConvUnit(in_channels, channels[0], dims=dims, kernel_size=kernels[0], norm=norm)
        stages = zip(
            pairwise([channels[0], *channels]), [(1,) * dims, *strides], kernels, blocks, strict=True
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(i, o, kernel, stride, dims=dims, norm=norm),
                *(ResidualBlock(o, o, kernel, (1,) * dims, dims=dims, norm=norm) for _ in range(count - 1)),
            )
            for (i, o), stride, kernel, count in stages
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features of every stage, first to bottom."""
        x, features = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class ConvUnit(nn.Module):
    """A convolution, its norm and leaky ReLU."""

    def __init__(
        self, in_channels: int, channels: int, *, dims: int, kernel_size: int | Kernel, norm: str
    ) -> None:
        super().__init__()
        self.conv1 = convolution(dims, in_channels, channels, kernel_size, bias=True)
        self.norm1 = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, ...)`` to ``(batch, channels, ...)`` of the same size."""
        return self.norm1(self.conv1(x), SLOPE)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions, the first with a stride, and a skip around them (``BasicBlockD``).

    It begins as its skip alone: the last norm's scale is 0, as in nnU-Net.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        kernel: one odd edge an axis.
        stride: one an axis.
        dims: 2 or 3.
        norm: as `voxelscale.model.norm.make_norm`.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: Kernel, stride: Stride, *, dims: int, norm: str
    ) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = convolution(dims, in_channels, channels, kernel, bias=True, stride=stride)
        self.norm1 = make_norm(norm, channels)
        self.conv2 = convolution(dims, channels, channels, kernel, bias=True)
        self.norm2 = make_norm(norm, channels)
        if norm != "none":
            nn.init.zeros_(self.norm2.weight)  # type: ignore[arg-type]
        self.conv3: Conv2d | Conv3d | nn.Identity = nn.Identity()
        self.norm3: nn.Module | None = None
        if in_channels != channels:
            self.conv3 = convolution(dims, in_channels, channels, 1, bias=False)
            self.norm3 = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, *size)`` to ``(batch, channels, *(size / stride, rounded up))``."""
        y = self.conv2(self.norm1(self.conv1(x), SLOPE))
        skip = self.conv3(mean_pool(x, self.stride))
        return add_norm(self.norm2, y, skip if self.norm3 is None else self.norm3(skip), SLOPE)
