"""One optimisation step: our U-Net against MONAI's BasicUNet and DynUNet and nnU-Net's PlainConvUNet.

    python benchmarks/train_step.py [--size 64] [--batch 2] [--threads 0] [--compile] [--profile] [--out F]

The same patch, batch, threads and optimiser settings for all; steps taken in turns within one run. Every
network is timed contiguous and channels last, in float32 and in bfloat16 autocast, and stands for itself
with the faster format. Ours has the package's loss and a fused AdamW; the others have Dice and
cross-entropy in plain PyTorch and the AdamW that PyTorch gives by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.device import default_device, keep_freed_memory, seconds_of, to_channels_last
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.model.unet import UNet

Loss = Callable[[Tensor, Tensor], Tensor]
LAST = torch.channels_last_3d
KINDS = {
    "convolution": ("conv", "mm", "bmm"),
    "norm": ("norm",),
    "activation": ("leaky_relu", "relu"),
    "pooling": ("pool",),
    "copies and joins": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_"),
    "optimiser": ("Optimizer", "adam"),
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network by name, how to make it, and what it is trained with."""

    name: str
    make: Callable[[], nn.Module]
    loss: Loss
    fused: bool


def our_loss(logits: Tensor, target: Tensor) -> Tensor:
    return dice_cross_entropy(logits, target)[0]


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of each sample and cross-entropy, written with PyTorch's functions."""
    logits = logits.float()
    probability, flat = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = (probability * flat).sum(1)
    dice = (2 * overlap + 1) / (probability.sum(1) + flat.sum(1) + 1)
    return 1 - dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


def contenders(filters: int, depth: int) -> list[Contender]:
    """Ours with instance norm, as the others have; then ours with batch norm."""
    widths = [filters * 2**level for level in range(depth)]
    strides = [1] + [2] * (depth - 1)

    def ours(norm: str) -> Contender:
        make = lambda: UNet(depth=depth, filters=filters, norm=norm)  # noqa: E731
        return Contender(name=f"ours, {norm} norm", make=make, loss=our_loss, fused=True)

    def plain_conv() -> nn.Module:
        norm, act = {"eps": 1e-5, "affine": True}, {"inplace": True}
        encoder = (1, depth, widths, nn.Conv3d, 3, strides, 2)
        options = (True, nn.InstanceNorm3d, norm, None, None, nn.LeakyReLU, act)
        network: nn.Module = PlainConvUNet(*encoder, 1, 2, *options)
        return network

    def dyn() -> nn.Module:
        network: nn.Module = DynUNet(3, 1, 1, [3] * depth, strides, strides[1:], filters=widths)
        return network

    def basic() -> nn.Module:
        # Its depth is fixed at 5 levels; these widths come nearest in parameters and in FLOPs together.
        network: nn.Module = BasicUNet(3, 1, 1, features=tuple(filters * w // 16 for w in BASIC))
        return network

    foreign = {"MONAI BasicUNet": basic, "MONAI DynUNet": dyn, "nnU-Net PlainConvUNet": plain_conv}
    others = [Contender(name=n, make=m, loss=plain_loss, fused=False) for n, m in foreign.items()]
    return [ours("instance"), ours("batch"), *others]


BASIC = (16, 32, 48, 64, 96, 16)


def size_of(contender: Contender, shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and floating-point operations of a forward and backward pass."""
    with torch.device("meta"):
        model = contender.make()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(shape)).sum().backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def make_step(
    contender: Contender,
    shape: tuple[int, ...],
    device: torch.device,
    way: tuple[str, bool],
    compiled: bool,
) -> Callable[[], None]:
    """A step of a fresh network; the same image, mask and settings for every contender."""
    precision, last = way
    torch.manual_seed(0)
    model = contender.make().to(device)
    image = torch.randn(shape).to(device)
    target = (torch.rand(shape) > 0.95).float().to(device)
    if last:
        # Ours knows how to mark a weight of one input channel; the others get what PyTorch offers.
        model = to_channels_last(model) if contender.fused else model.to(memory_format=LAST)  # type: ignore[call-overload]
        image = image.contiguous(memory_format=LAST)
    if compiled:
        model.compile()
    fused = True if contender.fused else None
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, fused=fused)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(image)
        contender.loss(logits, target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def peak(device: torch.device, precision: str) -> float:
    """The most FLOP/s of a large matrix product and a large convolution, measured here."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(2, 64, 32, 32, 32, device=device, dtype=dtype).contiguous(memory_format=LAST)
    w = torch.randn(64, 64, 3, 3, 3, device=device, dtype=dtype).contiguous(memory_format=LAST)
    work: list[tuple[Callable[[], Tensor], float]] = [
        (lambda: a @ b, 2.0 * side**3),
        (lambda: F.conv3d(x, w, padding=1), 2.0 * 2 * 32**3 * 27 * 64**2),
    ]
    return max(flop / min(seconds_of(call, device) for _ in range(3)) for call, flop in work)


def measure(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """For each contender and precision the faster memory format's times; rounds are taken in turns."""
    shape = (arguments.batch, 1, *[arguments.size] * 3)
    rows = []
    for precision in arguments.precisions:
        steps = {
            (contender.name, last): make_step(
                contender, shape, device, (precision, last), arguments.compile
            )
            for contender in contenders(arguments.filters, arguments.depth)
            for last in (True, False)
        }
        trial: dict[tuple[str, bool], float] = {}
        for key, step in steps.items():
            step()
            trial[key] = 1e3 * seconds_of(step, device)
        formats = {name: trial[name, True] <= trial[name, False] for name, _ in steps}
        times: dict[str, list[float]] = {name: [] for name in formats}
        for _ in range(arguments.rounds):
            for name, last in formats.items():
                times[name].append(1e3 * seconds_of(steps[name, last], device))
        del steps
        most = peak(device, precision)
        for contender in contenders(arguments.filters, arguments.depth):
            best = formats[contender.name]
            median = statistics.median(times[contender.name])
            parameters, flop = size_of(contender, shape)
            rows.append(
                {
                    "network": contender.name,
                    "foreign": not contender.fused,
                    "precision": precision,
                    "channels_last": best,
                    "times_ms": times[contender.name],
                    "other_format_ms": trial[contender.name, not best],
                    "ms": median,
                    "parameters": parameters,
                    "gflop": flop / 1e9,
                    "mvoxel_per_s": shape[0] * arguments.size**3 / median / 1e3,
                    "gflop_per_s": flop / 1e6 / median,
                    "share_of_peak": flop * 1e3 / median / most,
                }
            )
    return compare(rows)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how many times faster each is than the fastest foreign network, by medians of paired rounds."""
    for row in rows:
        rivals = [r for r in rows if r["foreign"] and r["precision"] == row["precision"]]
        for name, pool in (("ratio", rivals), ("ratio_of_bests", [r for r in rows if r["foreign"]])):
            fastest = min(pool, key=lambda r: r["ms"])
            row[name] = statistics.median(
                theirs / mine for theirs, mine in zip(fastest["times_ms"], row["times_ms"], strict=True)
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    reference = rows[0]
    print(
        f"{'network':24}{'arith.':7}{'format':11}{'ms':>8} {'range':>17}{'x':>6}{'x best':>7}"
        f"{'Mvox/s':>8}{'GFLOP/s':>9}{'of peak':>8}{'param.':>8}{'FLOP':>7}"
    )
    for r in rows:
        spread = f"{min(r['times_ms']):.0f} to {max(r['times_ms']):.0f}"
        kind = "last" if r["channels_last"] else "contiguous"
        print(
            f"{r['network']:24}{r['precision']:7}{kind:11}{r['ms']:8.1f} {spread:>17}{r['ratio']:6.2f}"
            f"{r['ratio_of_bests']:7.2f}{r['mvoxel_per_s']:8.2f}{r['gflop_per_s']:9.0f}"
            f"{100 * r['share_of_peak']:7.0f}%"
            f"{100 * (r['parameters'] / reference['parameters'] - 1):+7.0f}%"
            f"{100 * (r['gflop'] / reference['gflop'] - 1):+6.0f}%"
        )
    print("x: times as fast as the fastest foreign network in this arithmetic; x best: in its best one.")
    print("param., FLOP: more or less than the first row's.")


def profile(arguments: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Share of a bf16 step's time by kind of operation, of every contender, channels last."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    shape = (arguments.batch, 1, *[arguments.size] * 3)
    precision = arguments.precisions[-1]
    tables = {}
    for contender in contenders(arguments.filters, arguments.depth):
        step = make_step(contender, shape, device, (precision, True), arguments.compile)
        step()
        kinds = dict.fromkeys([*KINDS, "other"], 0.0)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with record(activities=activities) as seen:
            step()
        for event in seen.key_averages():
            spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            matches = (k for k, words in KINDS.items() if any(word in event.key for word in words))
            kinds[next(matches, "other")] += spent
        total = sum(kinds.values())
        tables[contender.name] = {kind: spent / total for kind, spent in kinds.items()}
        print(
            f"{contender.name:24}"
            + "  ".join(f"{k} {100 * v:.0f} %" for k, v in tables[contender.name].items())
        )
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=64, help="edge of the patch, voxels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--filters", type=int, default=16, help="of the first level")
    parser.add_argument("--depth", type=int, default=4, help="levels of all but BasicUNet, which has 5")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile every network")
    parser.add_argument("--profile", action="store_true", help="show where the time goes, too")
    parser.add_argument("--plain-memory", action="store_true", help="leave the C library's settings alone")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    kept = not arguments.plain_memory and keep_freed_memory()
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    print(f"{device.type} {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"batch {arguments.batch} x {arguments.size}^3, freed memory kept for all: {kept}")
    rows = measure(arguments, device)
    show(rows)
    shares = profile(arguments, device) if arguments.profile else {}
    if arguments.out:
        facts = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        settings = {k: str(v) for k, v in vars(arguments).items()}
        record = {**facts, "settings": settings, "rows": rows, "profile": shares}
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
