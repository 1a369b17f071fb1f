"""PyTorch's convolutions, kept on their fast ways."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = tuple[int, ...]

SLOW_BELOW = 20480
"""PyTorch leaves oneDNN for one sample where all sizes but the last multiply to at most this, a rule made
for 2-D. In 3-D oneDNN is several times faster."""

FILL_TO = 8
"""Input channels to which a GPU's convolutions of 16-bit maps are filled up with zeros; 0: never.

NVIDIA's "Convolutional Layers User's Guide" asks for channels "divisible by 8 (for FP16)" to run
efficiently on tensor cores (https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional).
cuDNN may fill up by itself; whether this is faster has not been measured."""


def convolution(
    dims: int,
    in_channels: int,
    channels: int,
    kernel: int | Kernel,
    bias: bool,
    stride: int | Kernel = 1,
) -> Conv2d | Conv3d:
    """A convolution whose padding keeps the size, but for its stride.

    Args:
        dims: 2 or 3.
        kernel: odd edge, or one an axis.

    Raises:
        ValueError: an edge is even.
    """
    edges = (kernel,) * dims if isinstance(kernel, int) else tuple(kernel)
    if any(edge % 2 == 0 for edge in edges):
        raise ValueError(f"a kernel's edges must be odd, not {edges}")
    make: Any = Conv2d if dims == 2 else Conv3d
    padding = tuple(edge // 2 for edge in edges)
    conv: Conv2d | Conv3d = make(in_channels, channels, edges, stride, padding=padding, bias=bias)
    return conv


class Conv2d(nn.Conv2d):
    """PyTorch's convolution, kept on its fast ways (see `_convolve`)."""

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in_channels, y, x)`` to ``(batch, channels, y, x)``."""
        return _convolve(self, input)


class Conv3d(nn.Conv3d):
    """PyTorch's convolution, kept on its fast ways (see `_convolve`)."""

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, in_channels, z, y, x)`` to ``(batch, channels, z, y, x)``."""
        return _convolve(self, input)


def _convolve(conv: Conv2d | Conv3d, x: Tensor) -> Tensor:
    """The padded convolution by the way that is fast for its shape and memory format."""
    if max(*conv.kernel_size, *conv.stride) == 1 and x.movedim(1, -1).is_contiguous():
        rows: Tensor = F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias)
        return rows.movedim(-1, 1)
    if _takes_the_slow_way(conv, x):
        return _in_halves(conv, x)
    if _has_few_channels(conv, x):
        return convolve_filled(conv, x)
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
    kernel, step, pad = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    assert isinstance(pad, int)  # noqa: S101 (only PyTorch's "same" is none)
    size = (x.shape[2] + 2 * pad - kernel) // step + 1
    half = -(-size // 2)
    reach = (half - 1) * step + kernel
    framed = F.pad(x, [0, 0, 0, 0, pad, half * step + reach - x.shape[2] - pad])
    both = torch.cat([framed.narrow(2, start, reach) for start in (0, half * step)])
    y = F.conv3d(both, conv.weight, conv.bias, conv.stride, (0, *conv.padding[1:]))
    # Where batch and z lie next to each other in memory, this is a view.
    return y.movedim(1, -1).flatten(0, 1).unsqueeze(0).narrow(1, 0, size).movedim(-1, 1)


def _has_few_channels(conv: Conv2d | Conv3d, x: Tensor) -> bool:
    """Whether a GPU would leave its tensor cores idle."""
    return (
        x.device.type != "cpu"
        and x.shape[1] < FILL_TO
        and max(conv.kernel_size) > 1
        and max(conv.stride) == 1
        and _computed_in(x) in (torch.bfloat16, torch.float16)
        and x.movedim(1, -1).is_contiguous()
    )


def _computed_in(x: Tensor) -> torch.dtype:
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def convolve_filled(conv: Conv2d | Conv3d, x: Tensor) -> Tensor:
    """The same convolution with channels of zeros behind those of the map and of the weight."""
    more, dtype = (0, FILL_TO - x.shape[1]), _computed_in(x)
    x, weight = (F.pad(t.to(dtype).movedim(1, -1), more).movedim(-1, 1) for t in (x, conv.weight))
    return conv._conv_forward(x, weight, conv.bias)  # type: ignore[no-any-return]
