"""From the config to a network and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from voxelscale.config import LossConfig, ModelConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.model import registry
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.model.unet import UNet, plan_pooling


def build_model(config: ModelConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> nn.Module:
    """The untrained network for patches of `patch_size` voxels (z, y, x) at `spacing` mm.

    `config.name` is ``unet`` or a network that an installed package has registered (see
    `voxelscale.model.registry`); a name that none has registered is refused and never imported, so that
    a config from an untrusted bundle can choose among installed networks only.

    Raises:
        VoxelscaleError: the patch is too small for the depth; no network has that name, or its package
            is at fault.
    """
    if config.name == "unet":
        return _unet(config, patch_size, spacing)
    model = registry.load(config.name)(config, patch_size, spacing)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = "let its function return a torch.nn.Module"
        raise VoxelscaleError(f"model.name {config.name}: made a {kind}, not a network", hint)
    return model


def build_loss(config: LossConfig) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function from logits and target to the loss and each sample's Dice."""
    return partial(
        dice_cross_entropy,
        dice=config.dice,
        cross_entropy=config.cross_entropy,
        smooth=config.smooth,
        small=config.small,
        top_k=config.top_k,
    )


def _unet(config: ModelConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> nn.Module:
    size, step = list(patch_size)[-config.dims :], list(spacing)[-config.dims :]
    pools = plan_pooling(size, step, config.depth)
    idle = sum(max(stride) == 1 for stride in pools)
    if idle:
        raise VoxelscaleError(
            f"config: a patch of {'x'.join(map(str, size))} cannot be pooled {config.depth - 1} times",
            f"set model.depth={config.depth - idle} or enlarge data.patch_size",
        )
    return UNet(
        dims=config.dims,
        depth=config.depth,
        filters=config.filters,
        max_filters=config.max_filters,
        kernel_size=config.kernel_size,
        norm=config.norm,
        residual=config.residual,
        pools=pools,
    )
