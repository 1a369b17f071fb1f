"""Normalisation layers by name, each with the leaky ReLU that may follow it in one piece.

The layers keep the parameters, buffers and results of PyTorch's own; `SyncBatchNorm` is a batch norm
over all ranks that also runs on CPUs. A channels-last map goes through `voxelscale.model.fast.norm` on
CPUs, if it is large, and through `voxelscale.model.fast.triton_norm` on GPUs, everything else through
PyTorch's kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from voxelscale.model.fast.kernels import takes_kernels
from voxelscale.model.fast.norm import leaky_relu_, rows_norm, takes_rows

SLOPE = 0.01
"""Of the networks' leaky ReLU below zero."""


def make_norm(name: str, channels: int) -> nn.Module:
    """A norm over `channels` of a feature map; its forward takes the map and a slope.

    ``instance`` (Ulyanov et al. 2016), ``group`` (Wu and He 2018; groups of at least 4 channels, at
    most 8 groups), ``batch`` (Ioffe and Szegedy 2015), ``sync_batch`` (batch statistics over all
    ranks), ``none``. The slope is that of the leaky ReLU which follows; 1, the default, is none.
    """
    if name == "none":
        return NoNorm()
    if name == "instance":
        return InstanceNorm(channels)
    if name == "group":
        return GroupNorm(math.gcd(8, max(1, channels // 4)), channels)
    if name == "batch":
        return BatchNorm(channels)
    if name == "sync_batch":
        return SyncBatchNorm(channels)
    raise ValueError(f"unknown norm {name!r}")


class NoNorm(nn.Module):
    """No norm: the activation alone."""

    def forward(self, input: Tensor, slope: float = 1.0) -> Tensor:
        """The input, which may be changed in place."""
        return leaky_relu_(input, slope)


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

    def forward(self, input: Tensor, slope: float = 1.0) -> Tensor:
        """``(batch, channel, ...)``, each channel of each sample normalised over its voxels."""
        if (done := _by_kernel(self, input, slope)) is not None:
            return done
        if math.prod(input.shape[2:]) == 1:
            shape = [1, -1, *[1] * (input.dim() - 2)]
            return leaky_relu_(0 * input * self.weight.view(shape) + self.bias.view(shape), slope)
        if takes_rows(input, self.weight, samples=True):
            return rows_norm(input, self, slope, samples=True)[0]
        output = F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)
        if input.device.type == "cpu":
            return leaky_relu_(output, slope)
        # The output is a view; changed in place, autograd would copy it twice and clone its gradient.
        return output if slope == 1 else F.leaky_relu(output, slope)


class GroupNorm(nn.GroupNorm):
    """Group norm; PyTorch's, in one piece with the activation."""

    def forward(self, input: Tensor, slope: float = 1.0) -> Tensor:
        """``(batch, channel, ...)``, each group of channels of each sample normalised over its voxels."""
        if (done := _by_kernel(self, input, slope)) is not None:
            return done
        if takes_rows(input, self.weight, samples=True):
            return rows_norm(input, self, slope, samples=True, groups=self.num_groups)[0]
        return leaky_relu_(super().forward(input), slope)


class BatchNorm(_BatchNorm):
    """Batch norm in any number of dimensions; PyTorch's, in one piece with the activation."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least (batch, channel), got {input.dim()} axes")

    def forward(self, input: Tensor, slope: float = 1.0) -> Tensor:
        """``(batch, channel, ...)``, each channel normalised over the batch and its voxels."""
        self._check_input_dim(input)
        if (done := _by_kernel(self, input, slope)) is not None:
            return done
        if self.training and takes_rows(input, self.weight, samples=False):
            output, moments = rows_norm(input, self, slope)
            self._track(moments[0, 0], moments[1, 0], input.numel() // input.shape[1])
            return output
        return leaky_relu_(super().forward(input), slope)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # As PyTorch's: without a momentum the plain mean of all batches.
        share: Any = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked if self.num_batches_tracked is not None else 1.0
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / (count - 1)), share)


class SyncBatchNorm(BatchNorm):
    """Batch norm whose statistics are those of the global batch of all ranks.

    PyTorch's own refuses CPU tensors; this one uses whatever process group is there, and none where
    there is none. Moments are gathered with one all-reduce of 2 x channels + 1 numbers.

    Attributes:
        alone: whether to leave the other ranks out, as a copy must that is used beside the training.
    """

    alone = False

    @property
    def grouped(self) -> bool:
        """Whether there are other ranks to ask."""
        return not self.alone and dist.is_initialized() and dist.get_world_size() > 1

    def forward(self, input: Tensor, slope: float = 1.0) -> Tensor:
        """``(batch, channel, ...)``, normalised by the global batch's mean and variance."""
        if not (self.training and self.grouped):
            return super().forward(input, slope)
        self._check_input_dim(input)
        axes = [0, *range(2, input.dim())]
        variance, mean = torch.var_mean(input.float(), axes, correction=0)
        count = input.numel() // input.shape[1]
        moments = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_full((1,), count)])
        moments = _AllReduceSum.apply(moments)  # type: ignore[no-untyped-call]
        total = moments[-1].detach()
        mean, square = (moments[:-1] / total).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        self._track(mean.detach(), variance.detach(), total)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        shape = [1, -1, *[1] * (input.dim() - 2)]
        normalised: Tensor = input * scale.view(shape) + shift.view(shape)
        return leaky_relu_(normalised.to(input.dtype), slope)


def add_norm(norm: nn.Module, input: Tensor, added: Tensor, slope: float) -> Tensor:
    """Leaky ReLU of the normalised map plus another of its shape, on GPUs in one piece."""
    if isinstance(norm, InstanceNorm | GroupNorm | BatchNorm):
        done = _by_kernel(norm, input, slope, added)
        if done is not None:
            return done
    return leaky_relu_(norm(input) + added, slope)


def _by_kernel(
    norm: InstanceNorm | GroupNorm | BatchNorm, input: Tensor, slope: float, added: Tensor | None = None
) -> Tensor | None:
    """As `add_norm`, where a GPU's kernel takes the maps; elsewhere None."""
    batch, count = isinstance(norm, BatchNorm), input.numel() // input.shape[1]
    if batch and (not norm.training or count == 1 or (isinstance(norm, SyncBatchNorm) and norm.grouped)):
        return None
    if norm.weight.dtype != torch.float32 or not takes_kernels(input, "triton_norm"):
        return None
    if added is not None and not (added.dtype == input.dtype and added.movedim(1, -1).is_contiguous()):
        return None
    # Where there is no GPU, Triton is never imported.
    from voxelscale.model.fast.triton_norm import kernel_norm

    groups = norm.num_groups if isinstance(norm, GroupNorm) else 0
    output, moments = kernel_norm(input, norm, slope, added=added, samples=not batch, groups=groups)
    if isinstance(norm, BatchNorm):
        norm._track(moments[0, 0], moments[2, 0], count)
    return output


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
