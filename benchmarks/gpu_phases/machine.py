"""The machine, and what it could do: facts, ceilings, and each convolution against them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from benchmarks.gpu_phases.common import Record, Setting, channels_last, per_call
from benchmarks.machine import processor
from torch import Tensor, nn

from voxelscale.device import to_channels_last
from voxelscale.model.fast.convolution import convolution
from voxelscale.model.unet import UNet

PACKAGES = (
    *("numpy", "PyYAML", "rich", "triton", "blosc2", "SimpleITK", "monai"),
    *("dynamic-network-architectures", "nnunetv2"),
)


def facts(setting: Setting, record: Record) -> None:
    """What machine and what software this is."""
    record.put(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count(),
        usable_cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        processor_flags=processor()[1],
        torch=torch.__version__,
        packages={name: _version(name) for name in PACKAGES},
    )
    record.says = f"processor, torch {torch.__version__}"
    if setting.cuda:
        cudnn: Any = torch.backends.cudnn
        nccl: Any = torch.cuda.nccl
        gpu = torch.cuda.get_device_properties(setting.device)
        record.put(
            gpu=gpu.name,
            gpus=torch.cuda.device_count(),
            gpu_memory_gib=gpu.total_memory / 2**30,
            gpu_free_gib=torch.cuda.mem_get_info(setting.device)[0] / 2**30,
            multiprocessors=gpu.multi_processor_count,
            capability=f"{gpu.major}.{gpu.minor}",
            driver=_driver(),
            cuda=torch.version.cuda,
            cudnn=cudnn.version(),
            nccl=".".join(map(str, nccl.version())),
        )
        record.says = f"{gpu.name}, torch {torch.__version__}, cuDNN {cudnn.version()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"
    return done.stdout.split("\n")[0].strip()


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device reaches: bytes/s copied (read and written both counted), FLOP/s of bf16 products."""

    bandwidth: float
    flops: float


def measure_ceilings(setting: Setting) -> Ceilings:
    device = setting.device
    size = 2**24 if setting.tiny else 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    copied = per_call(lambda: target.copy_(source), device, 0.3)
    side = 512 if setting.tiny else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(bandwidth=2 * size / copied, flops=2 * side**3 / per_call(lambda: a @ b, device, 0.3))


def ceilings(setting: Setting, record: Record) -> None:
    """Copies and matrix products, and the way from main memory, pinned and not."""
    found = measure_ceilings(setting)
    record.put(copy_gb_per_s=found.bandwidth / 1e9, bf16_tflops=found.flops / 1e12)
    record.says = f"{found.bandwidth / 1e9:.0f} GB/s copied, {found.flops / 1e12:.3g} TFLOP/s in bf16"
    if setting.cuda:
        host = torch.empty(2**28, dtype=torch.uint8).fill_(1)
        pinned, there = host.pin_memory(), torch.empty(2**28, dtype=torch.uint8, device=setting.device)
        rates = {
            f"upload_{name}_gb_per_s": 2**28
            / 1e9
            / per_call(lambda s=s: there.copy_(s), setting.device, 0.3)  # type: ignore[misc]
            for name, s in (("pageable", host), ("pinned", pinned))
        }
        record.put(**rates)


@dataclass(frozen=True)
class Layer:
    """A convolution as it occurs in a network; `first`: its input needs no gradient."""

    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: bool
    first: bool

    @property
    def label(self) -> str:
        return f"{self.inputs} to {self.outputs}, kernel {self.kernel[0]}, {self.size[0]}^3"


def layers_of(model: Callable[[], nn.Module], batch: int, size: Sequence[int]) -> Counter[Layer]:
    """A network's convolutions, by a pass without contents."""
    found: Counter[Layer] = Counter()

    def note(conv: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[
            Layer(
                conv.in_channels,
                conv.out_channels,
                tuple(inputs[0].shape[2:]),
                conv.kernel_size,
                conv.bias is not None,
                not inputs[0].requires_grad,
            )
        ] += 1

    with torch.device("meta"):
        network = model()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.register_forward_hook(note)
        network(torch.empty(batch, 1, *size))
    return found


def limit_of(layer: Layer, batch: int, found: Ceilings) -> float:
    """Seconds that a convolution's forward and backward pass take at least, in bf16.

    Three operations (output, gradient of the input, gradient of the weights), each of which takes as many
    multiplications, reads two of the three tensors and writes the third.
    """
    voxels = batch * prod(layer.size)
    weights = layer.inputs * layer.outputs * prod(layer.kernel)
    flop = 2.0 * voxels * weights
    moved = 2.0 * (voxels * (layer.inputs + layer.outputs) + weights)
    return (2 if layer.first else 3) * max(flop / found.flops, moved / found.bandwidth)


def convolutions(setting: Setting, record: Record) -> None:
    """Each convolution of the U-Net of depth 6, forward and backward in bf16, against the ceilings."""
    batch, edge, depth, filters = (1, 16, 3, 4) if setting.tiny else (2, 128, 6, 32)
    found = measure_ceilings(setting)
    counts = layers_of(lambda: UNet(depth=depth, filters=filters), batch, (edge,) * 3)
    budget = 0.005 if setting.tiny else 0.06
    ways = {"channels last": (True, False), "contiguous": (False, False)}
    if setting.cuda:
        ways["channels last, cudnn.benchmark"] = (True, True)
    rows: list[dict[str, Any]] = [
        {"layer": layer.label, "count": count, "limit_ms": 1e3 * limit_of(layer, batch, found)}
        for layer, count in counts.items()
    ]
    for way, (last, benchmark) in ways.items():
        torch.backends.cudnn.benchmark = benchmark
        for row, layer in zip(rows, counts, strict=True):
            row[way] = 1e3 * per_call(_pass_of(layer, batch, setting.device, last), setting.device, budget)
        record.put(layers=rows)
    limit = sum(row["limit_ms"] * row["count"] for row in rows)
    sums = {way: sum(row[way] * row["count"] for row in rows) for way in ways}
    best = sum(min(row[way] for way in ways) * row["count"] for row in rows)
    shares = {way: limit / spent for way, spent in {**sums, "best of each": best}.items()}
    record.put(limit_ms=limit, total_ms=sums, best_ms=best, share_of_limit=shares)
    record.says = (
        f"limit {limit:.3g} ms, channels last {sums['channels last']:.3g} ms, best of each {best:.3g} ms"
    )


def _pass_of(layer: Layer, batch: int, device: torch.device, last: bool) -> Callable[[], object]:
    """A forward and backward pass of a convolution by itself."""
    conv = convolution(len(layer.size), layer.inputs, layer.outputs, layer.kernel, layer.bias)
    conv.to(device, torch.bfloat16)
    x = torch.randn(batch, layer.inputs, *layer.size, device=device, dtype=torch.bfloat16)
    slope = torch.randn(batch, layer.outputs, *layer.size, device=device, dtype=torch.bfloat16)
    if last:
        to_channels_last(conv)
        x, slope = channels_last(x), channels_last(slope)
    wanted = [conv.weight] if layer.first else [x.requires_grad_(), conv.weight]
    return lambda: torch.autograd.grad(conv(x), wanted, slope)
