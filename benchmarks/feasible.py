"""What a search believes a training costs, against what it costs: memory, floating-point operations.

    python benchmarks/feasible.py [--out feasible.json] [--repeats 3] [--threads 1]

For each of varied configs: the model's memory (`voxelscale.search.feasible.cost_of`, made without running
anything) and the growth of a fresh process's resident memory over ten training steps
(`voxelscale.train.memory.step_memory`), the median of some processes, because the heap's layout differs
between them; and the model's FLOP against `torch.utils.flop_counter` on a real pass. None of these configs
served to choose the model's constants.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.config import Config, Triple, from_dict
from voxelscale.search.feasible import cost_of
from voxelscale.train.memory import forward_backward, make_network, seen_at_once, step_memory

CPU = torch.device("cpu")
STEPS = 10
CUBIC: Triple = (1.0, 1.0, 1.0)
FLAT: Triple = (2.5, 1.0, 1.0)

# patch, depth, filters, kernel, batch, norm, precision, optimiser, spacing, more of the config's keys
Row = tuple[tuple[int, int, int], int, int, int, int, str, str, str, Triple, dict[str, Any]]
ROWS: tuple[Row, ...] = (
    ((24, 24, 24), 2, 16, 5, 4, "instance", "fp32", "adamw", CUBIC, {}),
    ((32, 32, 32), 3, 32, 3, 3, "batch", "fp32", "adamw", CUBIC, {}),
    ((36, 36, 36), 2, 24, 3, 2, "group", "bf16", "sgd", CUBIC, {}),
    ((40, 40, 40), 4, 16, 3, 2, "batch", "bf16", "adamw", CUBIC, {}),
    ((48, 48, 48), 3, 8, 5, 4, "instance", "fp32", "sgd", CUBIC, {}),
    ((56, 56, 56), 3, 16, 3, 1, "group", "fp32", "adamw", CUBIC, {}),
    ((64, 64, 64), 2, 8, 3, 2, "instance", "bf16", "adamw", CUBIC, {}),
    ((64, 64, 64), 4, 24, 3, 1, "batch", "fp32", "sgd", CUBIC, {}),
    ((72, 72, 72), 4, 16, 3, 2, "group", "bf16", "adamw", CUBIC, {}),
    ((80, 80, 80), 3, 8, 3, 3, "instance", "fp32", "adamw", CUBIC, {}),
    ((96, 96, 96), 5, 8, 3, 2, "batch", "bf16", "adamw", CUBIC, {}),
    ((24, 72, 72), 3, 24, 3, 2, "instance", "bf16", "sgd", FLAT, {}),
    ((16, 96, 96), 4, 8, 3, 4, "group", "fp32", "adamw", FLAT, {}),
    ((32, 64, 96), 5, 32, 3, 1, "batch", "bf16", "adamw", FLAT, {}),
    ((32, 32, 32), 4, 24, 3, 1, "instance", "fp32", "lamb", CUBIC, {}),
    ((48, 48, 48), 4, 16, 3, 2, "instance", "fp32", "adamw", CUBIC, {"checkpoint_activations": True}),
)


def config_of(row: Row) -> Config:
    """The training of a row."""
    patch, depth, filters, kernel, batch, norm, precision, optimiser, _, more = row
    return from_dict(
        {
            "data": {"patch_size": list(patch)},
            "model": {"depth": depth, "filters": filters, "kernel_size": kernel, "norm": norm},
            "train": {"batch_size": batch, "precision": precision, **more},
            "optim": {"name": optimiser},
        }
    )


def name_of(row: Row) -> str:
    """In one line."""
    patch, depth, filters, kernel, batch, norm, precision, optimiser, _, more = row
    shape = f"{batch} x {'x'.join(map(str, patch))}"
    return (
        f"{shape:14} d{depth} f{filters:<2} k{kernel} {norm:8} {precision} {optimiser:5}"
        + " ckpt" * len(more)
    )


def counted_flop(config: Config, spacing: Triple) -> float:
    """FLOP of a real pass over one sample, by PyTorch's own counter."""
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = make_network(config, spacing, CPU)
    with FlopCounterMode(display=False) as counter:
        forward_backward(model, config, CPU, precision)
    return float(counter.get_total_flops()) / seen_at_once(config)


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Model and measurements of one config."""
    config, spacing = config_of(row), row[8]
    started = time.perf_counter()
    cost = cost_of(config, spacing, "cpu")
    seconds = time.perf_counter() - started
    grown = [step_memory(config, spacing, CPU, steps=STEPS) for _ in range(repeats)]
    counted = counted_flop(config, spacing) * config.train.samples
    return {
        "config": name_of(row),
        "model_bytes": cost.memory,
        "measured_bytes": grown,
        "ratio": round(cost.memory / statistics.median(grown), 3),
        "model_flop": cost.flop,
        "flop_ratio": round(cost.flop / counted, 4),
        "seconds": round(seconds, 2),
    }


def show(row: dict[str, Any]) -> None:
    """A line of the table; memory in MiB."""
    grown = [size / 2**20 for size in row["measured_bytes"]]
    measured = f"{statistics.median(grown):.0f} ({min(grown):.0f} to {max(grown):.0f})"
    print(
        f"{row['config']:54} {row['model_bytes'] / 2**20:6.0f} {measured:>20} {row['ratio']:6.2f}"
        f" {row['model_flop']:9.3e} {row['flop_ratio']:7.4f} {row['seconds']:5.2f}",
        flush=True,
    )


def spread(ratios: Sequence[float]) -> str:
    """Mean, and least to greatest."""
    return f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("feasible.json"), help="file to write")
    parser.add_argument("--repeats", type=int, default=3, help="processes per config")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'MiB':54} {'model':>6} {'measured':>20} {'ratio':>6} {'FLOP':>9} {'ratio':>7} {'s':>5}")
    cost_of(config_of(ROWS[0]), CUBIC, "cpu")  # the first one loads the library's parts
    rows = []
    for row in ROWS:
        rows.append(measure(row, arguments.repeats))
        show(rows[-1])
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "steps": STEPS,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(facts, indent=1))
    for key, name in (("ratio", "memory"), ("flop_ratio", "FLOP")):
        print(f"{name}: {spread([row[key] for row in rows])}")


if __name__ == "__main__":
    main()
