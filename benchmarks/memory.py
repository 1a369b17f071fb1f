"""What activation checkpointing costs and spares: a training step's time and peak memory with and without.

    python benchmarks/memory.py [--out memory.json] [--device cuda] [--patches 64 96] [--precision fp32]

Both networks have the same weights and see the same batch of one patch; their steps take turns in one
process. Peak memory is measured apart (`voxelscale.train.memory.step_memory`: a GPU's allocator, or the
resident memory of a process of its own), and held against the estimate made without running a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from voxelscale.config import Config, from_dict
from voxelscale.device import choose_precision, to_channels_last
from voxelscale.model.build import build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.train.memory import estimate_memory, step_memory
from voxelscale.train.optim import make_optimizer

SPACING = (1.0, 1.0, 1.0)
ROUNDS = 5


def make_step(config: Config, device: torch.device, checkpointing: bool) -> Callable[[], None]:
    """One training step of the default network as a function without arguments."""
    torch.manual_seed(0)
    model = to_channels_last(build_model(config.model, config.data.patch_size, SPACING).to(device))
    if checkpointing:
        checkpoint_activations(model)
    optimizer = make_optimizer(model, config.optim)
    precision = choose_precision(config.train.precision, device)
    shape = (config.train.batch_size, 1, *config.data.patch_size)
    image = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last_3d)
    mask = (image > 1).float()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != torch.float32):
            logits = model(image)
        loss, _ = dice_cross_entropy(logits, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def step_times(config: Config, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds a step without and with checkpointing, round by round."""
    steps = [make_step(config, device, checkpointing) for checkpointing in (False, True)]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for step, taken in zip(steps, times, strict=True):
            started = time.perf_counter()
            step()
            if number:  # the first warms up
                taken.append(time.perf_counter() - started)
    return times


def measure(edge: int, precision: str, device: torch.device) -> dict[str, Any]:
    config = from_dict(
        {
            "data": {"patch_size": [edge] * 3},
            "train": {"batch_size": 1, "precision": precision},
        }
    )
    plain, light = step_times(config, device)
    ratios = [b / a for a, b in zip(plain, light, strict=True)]
    both = [replace(config, train=replace(config.train, checkpoint_activations=c)) for c in (False, True)]
    measured = [step_memory(config, SPACING, device) for config in both]
    estimated = [estimate_memory(config, SPACING, device) for config in both]
    return {
        "patch": edge,
        "precision": precision,
        "seconds": [round(statistics.median(t), 4) for t in (plain, light)],
        "time_ratio": round(statistics.median(ratios), 3),
        "least_time_ratio": round(min(ratios), 3),
        "greatest_time_ratio": round(max(ratios), 3),
        "measured_bytes": measured,
        "memory_ratio": round(measured[1] / measured[0], 3),
        "estimated_bytes": estimated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 96], help="edges in voxels")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()
    rows = [measure(edge, arguments.precision, arguments.device) for edge in arguments.patches]
    print(f"default network, batch 1, {arguments.precision}, {ROUNDS} rounds; memory in MiB")
    print(f"{'patch':>6} {'s/step':>14} {'time ratio':>24} {'peak':>14} {'ratio':>6} {'estimate':>14}")
    for r in rows:
        seconds = " -> ".join(f"{s:.2f}" for s in r["seconds"])
        ratio = f"{r['time_ratio']:.2f} ({r['least_time_ratio']:.2f} to {r['greatest_time_ratio']:.2f})"
        peak, estimate = (
            " -> ".join(f"{n / 2**20:.0f}" for n in r[f"{kind}_bytes"])
            for kind in ("measured", "estimated")
        )
        print(
            f"{r['patch']:4}^3 {seconds:>14} {ratio:>24} {peak:>14} {r['memory_ratio']:6.2f} {estimate:>14}"
        )
    if arguments.out:
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(arguments.device),
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
