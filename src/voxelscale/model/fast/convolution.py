"""PyTorch's convolutions and pooling, kept on their fast ways on a processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOW_BELOW = 20480
"""PyTorch leaves oneDNN for one sample where all sizes but the last multiply to at most this, a rule made
for 2-D. In 3-D oneDNN is several times faster."""


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
    if _takes_the_slow_way(conv, x):
        return _in_halves(conv, x)
    return conv._conv_forward(x, conv.weight, conv.bias)  # type: ignore[no-any-return]


def _takes_the_slow_way(conv: Conv2d | Conv3d, x: Tensor) -> bool:
    """Whether PyTorch would take its slow convolution: float32 on a CPU, one sample, a small map."""
    return (
        x.device.type == "cpu"
        and x.shape[0] == 1
        and x.dim() == 5
        and x.shape[2] > 1
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and max(conv.kernel_size) == 3
        and math.prod(x.shape[:4]) <= SLOW_BELOW
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


def max_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """Max-pooling in the map's own precision: autocast on CPUs would make it, and its gradient, float32."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return pool(x)  # type: ignore[no-any-return]
    return pool(x)  # type: ignore[no-any-return]
