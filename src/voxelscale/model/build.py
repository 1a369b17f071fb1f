"""From the config to a network and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from voxelscale.classes import LESION, Classes
from voxelscale.config import LossConfig, ModelConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.model import registry
from voxelscale.model.losses import deeply_supervised, dice_cross_entropy, regions_dice_cross_entropy
from voxelscale.model.softmax import softmax_dice_cross_entropy
from voxelscale.model.unet import UNet, plan_pooling


def build_model(
    config: ModelConfig,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    channels: int = 1,
    outputs: int = 1,
    *,
    regions: bool = False,
) -> nn.Module:
    """The untrained network for patches of `patch_size` voxels (z, y, x) at `spacing` mm.

    `config.name` is ``unet`` or a network that an installed package has registered (see
    `voxelscale.model.registry`); a name that none has registered is refused and never imported, so that
    a config from an untrusted bundle can choose among installed networks only.

    Args:
        channels: of the image.
        outputs: channels of the logits (`voxelscale.classes.Classes.outputs`).
        regions: whether several outputs are regions, each with a sigmoid of its own. It decides how the
            head's biases begin, nothing else.

    Raises:
        VoxelscaleError: the patch is too small for the depth; no network has that name, or its package
            is at fault.
    """
    if config.name == "unet":
        return _unet(
            config.settled, patch_size, spacing, channels, outputs, softmax=outputs > 1 and not regions
        )
    function = registry.load(config.name)
    more = {} if channels == outputs == 1 else {"channels": channels, "outputs": outputs}
    if more and not _takes(function, config, patch_size, spacing, **more):
        problem = f"its function takes no keywords channels and outputs: here {channels} and {outputs}"
        hint = "add them to its function, or set model.name=unet"
        raise VoxelscaleError(f"model.name {config.name}: {problem}", hint)
    model = function(config, patch_size, spacing, **more)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = "let its function return a torch.nn.Module"
        raise VoxelscaleError(f"model.name {config.name}: made a {kind}, not a network", hint)
    return model


def _takes(function: Callable[..., Any], *arguments: object, **more: object) -> bool:
    try:
        inspect.signature(function).bind(*arguments, **more)
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return True


def build_loss(
    config: LossConfig, classes: Classes = LESION
) -> Callable[[Tensor | Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]:
    """The function from logits and target to the loss and each sample's mean Dice ``(batch,)``.

    Logits are ``(batch, classes.outputs, ...)``: a sigmoid for one class or for each region, otherwise a
    softmax with background first; with deep supervision they are a list, those of the full size first. The
    target is ``(batch, 1, ...)`` float32, 0 or 1, or stored labels where `classes` is not plain. All is
    computed sample by sample, and its mean taken: the same at every number of workers.
    """
    options: dict[str, Any] = {
        "dice": config.dice,
        "cross_entropy": config.cross_entropy,
        "smooth": config.smooth,
        "small": config.small,
        "top_k": config.top_k,
    }
    loss: Callable[..., tuple[Tensor, Tensor]] = partial(dice_cross_entropy, **options)
    if not classes.plain:
        sigmoid = classes.single or classes.regions
        several = regions_dice_cross_entropy if sigmoid else softmax_dice_cross_entropy
        loss = partial(several, ignore=bool(classes.ignore), **options)
    return partial(deeply_supervised, loss=loss)


def _unet(
    config: ModelConfig,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    channels: int,
    outputs: int,
    softmax: bool,
) -> nn.Module:
    size, step = list(patch_size)[-config.dims :], list(spacing)[-config.dims :]
    pools = plan_pooling(size, step, config.depth)
    idle = sum(max(stride) == 1 for stride in pools)
    if idle:
        raise VoxelscaleError(
            f"config: a patch of {'x'.join(map(str, size))} cannot be pooled {config.depth - 1} times",
            f"set model.depth={config.depth - idle} or enlarge data.patch_size",
        )
    for key, values in (("kernels", config.kernels), ("blocks", config.blocks)):
        if len(values) not in (0, config.depth):
            problem = f"config: model.{key} is of {len(values)} levels, model.depth {config.depth}"
            raise VoxelscaleError(problem, f"give model.{key} of {config.depth} levels, or []")
    return UNet(
        dims=config.dims,
        in_channels=channels,
        classes=outputs,
        depth=config.depth,
        filters=config.filters,
        max_filters=config.max_filters,
        kernel_size=config.kernel_size,
        kernels=[kernel[-config.dims :] for kernel in config.kernels] or None,
        norm=config.norm,
        residual=config.residual,
        strided=config.downsampling == "strided",
        blocks=config.blocks,
        pools=pools,
        deep_supervision=config.deep_supervision,
        softmax=softmax,
    )
