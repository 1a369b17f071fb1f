"""From a model's config to a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from voxelscale.config import ModelConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.model.unet import UNet, plan_pooling


def build_model(config: ModelConfig, patch_size: Sequence[int], spacing: Sequence[float]) -> nn.Module:
    """The untrained network for patches of `patch_size` voxels (z, y, x) at `spacing` mm.

    Raises:
        VoxelscaleError: the patch is too small for the depth.
    """
    return _REGISTRY[config.name](config, patch_size, spacing)


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


_REGISTRY: dict[str, Callable[[ModelConfig, Sequence[int], Sequence[float]], nn.Module]] = {"unet": _unet}
