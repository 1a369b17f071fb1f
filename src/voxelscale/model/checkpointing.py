"""Activation checkpointing: less memory for more arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from voxelscale.model.resenc import ConvUnit, ResidualBlock
from voxelscale.model.unet import ConvBlock, DecoderLevel

LEVELS = ConvBlock | ConvUnit | ResidualBlock | DecoderLevel


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """Let every level of the U-Net drop its inner activations and compute them again when needed.

    (Chen et al., "Training deep nets with sublinear memory cost", 2016.) Names and values of parameters
    stay as they are, and so do gradients; running statistics are updated by the first pass alone. It
    works under DistributedDataParallel, static graph or not. The model is changed in place.

    Args:
        model: holds modules of `LEVELS`, as `voxelscale.model.unet.UNet` does.

    Returns:
        the same model.
    """
    inner = {id(m.level) for m in model.modules() if isinstance(m, DecoderLevel)}
    for module in model.modules():
        level = isinstance(module, LEVELS) and id(module) not in inner
        if level and not isinstance(module.forward, partial):  # once is enough
            module.forward = partial(_recomputed, module, module.forward)
    return model


def _recomputed(module: nn.Module, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts = partial(_passes, module)
    # Nothing in a level is random, so no generator's state needs keeping.
    out: Tensor = checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return out


def _passes(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _unmoved_statistics(module)


@contextmanager
def _unmoved_statistics(module: nn.Module) -> Iterator[None]:
    """Within it a batch norm normalises by the batch but leaves its running statistics.

    They are not taken away, which would save other tensors for the backward pass than the first time.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    kept = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
