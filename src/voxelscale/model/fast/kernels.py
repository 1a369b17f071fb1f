"""Whether feature maps go through our Triton kernels: on a GPU that has shown that it runs them right.

PyTorch brings Triton on CUDA machines. Where it is missing, fails to compile or gives other results than
PyTorch, a notice says so once and PyTorch's own kernels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from voxelscale.console import notice

DEVICES = {"cuda", "meta"}
"""Kinds of device whose maps are taken. On `meta` nothing is computed, only shapes and formats follow; a
test adds the CPU, on which Triton's interpreter runs the kernels."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MOST_SAMPLES = 65535
"""Programs that CUDA launches along the second and third axis of a grid."""

_verdicts: dict[tuple[str, torch.device, torch.dtype], bool] = {}


def takes_kernels(x: Tensor, module: str) -> bool:
    """Whether a feature map is for the kernels of `voxelscale.model.fast.<module>`.

    It must be channels last, of a type of `DTYPES` and on a device that passed the module's function
    ``agrees``. That is called once a device and type, and never while a CUDA graph is captured: until
    then the answer is no.

    Args:
        x: ``(batch, channel, ...)``.
    """
    return (
        x.device.type in DEVICES
        # The compiler fuses PyTorch's own formulas by itself.
        and not torch.compiler.is_compiling()
        and type(x) is Tensor  # a fake tensor has no memory to run on
        and x.dtype in DTYPES
        and x.dim() in (4, 5)
        and x.numel() > 0
        and x.shape[0] <= MOST_SAMPLES
        and x.movedim(1, -1).is_contiguous()
        and _trusted(module, x.device, x.dtype)
    )


def _trusted(module: str, device: torch.device, dtype: torch.dtype) -> bool:
    key = module, device, dtype
    if key not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        if device.type == "meta":
            _verdicts[key] = find_spec("triton") is not None
        else:
            _verdicts[key] = _has_triton() and _agrees(module, device, dtype)
    return _verdicts[key]


@cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except Exception as error:  # a broken installation raises anything
        notice(f"Triton: cannot be imported ({_first_line(error)}); using PyTorch's slower kernels")
        return False
    return True


def _agrees(module: str, device: torch.device, dtype: torch.dtype) -> bool:
    check: Callable[[torch.device, torch.dtype], bool]
    off = torch.autocast(device.type, enabled=False)
    try:
        check = import_module(f"voxelscale.model.fast.{module}").agrees
        # Nothing may be recorded: the first map may come from within a checkpointed level.
        with torch.inference_mode(False), torch.no_grad(), off:
            fault = "" if check(device, dtype) else "it disagrees with PyTorch's"
    except Exception as error:  # a compiler, a driver: anything
        fault = _first_line(error)
    if fault:
        name = module.removeprefix("triton_")
        notice(f"{device}: our Triton kernel for {name} in {dtype} is not used ({fault}); using PyTorch's")
    return not fault


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of `like`, whichever is the current one; of `meta` nothing is run.

    Args:
        arguments, constants: the kernel's; `constants` are fixed when it is compiled.
    """
    if like.is_meta:
        return
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        # The default of fused multiply-adds differs between versions of Triton; the results must not.
        kernel[grid](*arguments, **constants, num_warps=8, enable_fp_fusion=True)


def empty_rows(x: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """A map of the same type, batch and channels, channels last, without contents; None: of its size."""
    shape = *x.shape[:2], *(x.shape[2:] if size is None else size)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)


def as_rows(x: Tensor, like: Tensor) -> Tensor:
    """A gradient in the type and channels-last format of its map; itself, if it has them."""
    if x.dtype == like.dtype and x.movedim(1, -1).is_contiguous():
        return x
    return empty_rows(like).copy_(x)


def width_of_tile(channels: int) -> int:
    """Channels of a kernel's tile, a power of two; most divide the channels, so that no lane is idle."""
    divisor = channels & -channels
    if divisor >= 32:
        return min(divisor, 128)
    return min(64, 1 << (channels - 1).bit_length())
