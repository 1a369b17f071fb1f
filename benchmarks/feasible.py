"""What a search believes a training costs, against what it costs: memory, floating-point operations.

    python benchmarks/feasible.py [--out feasible.json] [--repeats 3] [--threads 1] [--only 2 5]

For each of varied configs: the cost model's memory (`voxelscale.search.feasible.cost_of`, made without
running anything) and the growth of a fresh process's resident memory over ten training steps
(`voxelscale.train.memory.step_memory`), the median of some processes, because the heap's layout differs
between them; the bytes that PyTorch's profiler sees allocated, against the model's count of what is alive;
and the model's FLOP against `torch.utils.flop_counter` on a real step. None of these configs served to
choose the model's constants.
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
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.config import Config, Triple, from_dict
from voxelscale.search import feasible
from voxelscale.search.feasible import cost_of
from voxelscale.train.memory import make_network, play, seen_at_once, step_memory
from voxelscale.train.optim import make_optimizer

CPU = torch.device("cpu")
STEPS = 10
CUBIC: Triple = (1.0, 1.0, 1.0)
FLAT: Triple = (2.5, 1.0, 1.0)

# patch, depth, filters, kernel, batch, norm, precision, optimiser, spacing, more of the config's keys
Row = tuple[tuple[int, int, int], int, int, int, int, str, str, str, Triple, dict[str, Any]]
ROWS: tuple[Row, ...] = (
    ((24, 24, 24), 2, 32, 3, 4, "instance", "fp32", "adamw", CUBIC, {}),
    ((32, 32, 32), 3, 24, 5, 2, "batch", "fp32", "sgd", CUBIC, {}),
    ((40, 40, 40), 3, 16, 3, 3, "group", "bf16", "adamw", CUBIC, {}),
    ((48, 48, 48), 4, 24, 3, 2, "instance", "bf16", "sgd", CUBIC, {}),
    ((48, 48, 48), 2, 16, 5, 1, "batch", "bf16", "adamw", CUBIC, {}),
    ((56, 56, 56), 3, 20, 3, 2, "batch", "fp32", "adamw", CUBIC, {}),
    ((64, 64, 64), 4, 32, 3, 1, "instance", "bf16", "adamw", CUBIC, {}),
    ((64, 64, 64), 5, 8, 3, 4, "group", "fp32", "sgd", CUBIC, {}),
    ((72, 72, 72), 3, 12, 3, 2, "instance", "bf16", "adamw", CUBIC, {}),
    ((80, 80, 80), 5, 16, 3, 1, "batch", "fp32", "adamw", CUBIC, {}),
    ((96, 96, 96), 4, 16, 3, 1, "group", "bf16", "sgd", CUBIC, {}),
    ((24, 64, 64), 4, 16, 3, 4, "batch", "bf16", "adamw", FLAT, {}),
    ((32, 80, 80), 5, 32, 3, 1, "instance", "fp32", "adamw", FLAT, {}),
    ((20, 48, 80), 3, 8, 5, 3, "group", "fp32", "adamw", FLAT, {}),
    ((64, 64, 64), 4, 16, 3, 2, "instance", "bf16", "adamw", CUBIC, {"checkpoint_activations": True}),
    ((32, 32, 32), 5, 32, 3, 2, "group", "bf16", "lamb", CUBIC, {}),
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


def real_step(config: Config, spacing: Triple) -> tuple[int, float]:
    """Bytes that PyTorch allocates at the peak of two steps, and FLOP of one pass, by its own tools."""
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = make_network(config, spacing, CPU, config.train.checkpoint_activations)
        optimizer = make_optimizer(model, config.optim)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            play(model, config, CPU, precision)
            optimizer.step()
    with FlopCounterMode(display=False) as counter:
        play(model, config, CPU, precision)
    return peak_of(seen), float(counter.get_total_flops())


def peak_of(seen: profile) -> int:
    """Bytes allocated at the peak within the profile."""
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    found: list[tuple[int, int]] = []
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if isinstance(event.extra_fields, _ExtraFields_Allocation):
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(found, key=lambda pair: pair[0]):
        live += size
        peak = max(peak, live)
    return peak


def measure(row: Row, repeats: int, threads: int) -> dict[str, Any]:
    """Model and measurements of one config."""
    config, spacing = config_of(row), row[8]
    feasible._step_cost.cache_clear()
    started = time.perf_counter()
    cost = cost_of(config, spacing, "cpu", threads=threads)
    seconds = time.perf_counter() - started
    checkpointing = config.train.checkpoint_activations
    grown = [
        step_memory(config, spacing, CPU, checkpointing=checkpointing, steps=STEPS) for _ in range(repeats)
    ]
    allocated, flop = real_step(config, spacing)
    alive = cost_of(config, spacing, "cuda").memory
    counted = flop / seen_at_once(config) * config.train.samples
    return {
        "config": name_of(row),
        "model_bytes": cost.memory,
        "measured_bytes": grown,
        "ratio": round(cost.memory / statistics.median(grown), 3),
        "alive_bytes": alive,
        "allocated_bytes": allocated,
        "alive_ratio": round(alive / allocated, 3),
        "model_flop": cost.flop,
        "counted_flop": counted,
        "flop_ratio": round(cost.flop / counted, 4),
        "seconds": round(seconds, 2),
    }


def show(row: dict[str, Any]) -> None:
    """A line of the table; memory in MiB."""
    model, alive, allocated = (row[f"{kind}_bytes"] / 2**20 for kind in ("model", "alive", "allocated"))
    grown = [size / 2**20 for size in row["measured_bytes"]]
    measured = f"{statistics.median(grown):.0f} ({min(grown):.0f} to {max(grown):.0f})"
    print(
        f"{row['config']:54} {model:6.0f} {measured:>20} {row['ratio']:6.2f}"
        f" {alive:6.0f} {allocated:6.0f} {row['alive_ratio']:6.2f}"
        f" {row['model_flop']:9.3e} {row['flop_ratio']:7.4f} {row['seconds']:5.2f}",
        flush=True,
    )


def spread(ratios: Sequence[float]) -> str:
    """Mean, and least to greatest."""
    return f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=3, help="processes per config")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of rows, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = ROWS if arguments.only is None else [ROWS[number] for number in arguments.only]
    print(
        f"{'MiB':54} {'model':>6} {'measured':>20} {'ratio':>6} {'alive':>6} {'alloc.':>6} {'ratio':>6}",
        end="",
    )
    print(f" {'FLOP':>9} {'ratio':>7} {'s':>5}")
    cost_of(config_of(ROWS[0]), CUBIC, "cpu")  # the first one loads the library's parts
    rows = []
    for row in chosen:
        rows.append(measure(row, arguments.repeats, arguments.threads))
        show(rows[-1])
        if arguments.out:
            facts = {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": arguments.threads,
                "capability": torch.backends.cpu.get_cpu_capability(),
                "steps": STEPS,
                "rows": rows,
            }
            arguments.out.write_text(json.dumps(facts, indent=1))
    for key, name in (("ratio", "memory"), ("alive_ratio", "alive"), ("flop_ratio", "FLOP")):
        print(f"{name}: {spread([row[key] for row in rows])}")


if __name__ == "__main__":
    main()
