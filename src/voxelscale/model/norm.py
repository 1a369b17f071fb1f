"""Normalisation layers by name, among them a batch norm over all ranks that also runs on CPUs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def make_norm(name: str, channels: int, dims: int) -> nn.Module:
    """A norm over `channels` of a `dims`-D feature map.

    ``instance`` (Ulyanov et al. 2016), ``group`` (Wu and He 2018; groups of at least 4 channels, at
    most 8 groups), ``batch`` (Ioffe and Szegedy 2015), ``sync_batch`` (batch statistics over all
    ranks), ``none``.
    """
    if name == "none":
        return nn.Identity()
    if name == "instance":
        return InstanceNorm(channels)
    if name == "group":
        return nn.GroupNorm(math.gcd(8, max(1, channels // 4)), channels)
    if name == "batch":
        return nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm3d(channels)
    if name == "sync_batch":
        return SyncBatchNorm(channels)
    raise ValueError(f"unknown norm {name!r}")


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift, in any number of dimensions and at any size.

    PyTorch's own refuses a feature map of one voxel, as a small volume has at the bottom of a deep
    network; less its mean it is 0, so what remains is the shift.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, channel, ...)``, each channel of each sample normalised over its voxels."""
        if math.prod(input.shape[2:]) == 1:
            shape = [1, -1, *[1] * (input.dim() - 2)]
            return 0 * input * self.weight.view(shape) + self.bias.view(shape)
        return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the global batch of all ranks.

    PyTorch's own refuses CPU tensors; this one uses whatever process group is there, and none where
    there is none. Moments are gathered with one all-reduce of 2 x channels + 1 numbers.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least (batch, channel), got {input.dim()} axes")

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, channel, ...)``, normalised by the global batch's mean and variance."""
        self._check_input_dim(input)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        variance, mean = torch.var_mean(input.float(), axes, correction=0)
        count = input.numel() // input.shape[1]
        moments = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_tensor([count])])
        moments = _AllReduceSum.apply(moments)  # type: ignore[no-untyped-call]
        total = moments[-1].detach()
        mean, square = (moments[:-1] / total).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        self._track(mean.detach(), variance.detach(), total)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        shape = [1, -1, *[1] * (input.dim() - 2)]
        normalised: Tensor = input * scale.view(shape) + shift.view(shape)
        return normalised.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            return
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum that every rank uses is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
