"""What arithmetic the device does well."""

from __future__ import annotations

import torch
from torch import nn

from voxelscale.errors import VoxelscaleError


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; ``auto`` takes bfloat16 where the device computes in it natively.

    Raises:
        VoxelscaleError: bf16 is asked of a GPU that has none.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not native:
            raise VoxelscaleError(f"{device}: has no bfloat16", "set train.precision=fp32")
    else:
        cpu = torch.cpu
        native = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and native) else torch.float32


def to_channels_last(model: nn.Module) -> nn.Module:
    """The same network with its convolutions' weights channels last in memory, 2-D and 3-D each."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            weight = module.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
            # A weight of one input channel is contiguous in both formats, and PyTorch goes by the
            # channel's stride: with the other format's the output would come channels first.
            strides = [1 if axis == 1 else stride for axis, stride in enumerate(weight.stride())]
            module.weight.data = weight.as_strided(weight.shape, strides)
    return model
