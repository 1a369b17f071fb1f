"""One against two Gloo ranks with one CPU thread each: efficiency, communication, overlap, compression.

    python benchmarks/ddp.py [--out ddp.json] [--rounds 15]

One job of two real ranks takes turns, round by round, so that every ratio is of neighbours in time:

- alone: rank 0 steps, rank 1 waits: one worker.
- together: both step, without communication; what it takes longer than alone is the machine's.
- in step: the same, but after each backward pass each waits for the other, as any synchronous training
  must; what it takes longer than together is waiting for the slower.
- fp32, bf16, fp16: both train under DistributedDataParallel, the gradients sent as they are or
  compressed by a communication hook; what they take longer than in step is exposed communication.
- the all-reduces of the same buckets by themselves, with and without the casts.

Batches are the same size on every rank (weak scaling) and lie in memory: input is not timed here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from voxelscale.config import Config, IntTriple, load
from voxelscale.device import choose_precision, to_channels_last
from voxelscale.model.build import build_model
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.ranks.workers import Workers, compressed, data_parallel, join
from voxelscale.scale.cost import buckets
from voxelscale.train.optim import make_optimizer

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 2
"""Updates of each contender in a round."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network and its micro-batch."""

    name: str
    patch: IntTriple
    batch: int
    depth: int
    filters: int

    def config(self) -> Config:
        config = load()
        model = replace(config.model, depth=self.depth, filters=self.filters, norm="batch")
        data = replace(config.data, patch_size=self.patch)
        return replace(config, model=model, data=data)


SETTINGS = (
    Setting(name="quickstart", patch=(24, 48, 48), batch=2, depth=4, filters=8),
    Setting(name="many weights, small patches", patch=(16, 32, 32), batch=1, depth=4, filters=40),
)


class Contender:
    """A network that steps on one micro-batch, wrapped or not."""

    def __init__(self, setting: Setting, workers: Workers, hook: str | None) -> None:
        config = setting.config()
        torch.manual_seed(0)
        self.model = to_channels_last(build_model(config.model, setting.patch, (1.0, 1.0, 1.0)))
        self.optimizer = make_optimizer(self.model, config.optim)
        self.net: nn.Module = self.model
        self.precision = choose_precision("auto", workers.device)
        if hook is not None:
            self.net = data_parallel(self.model, workers)
            if hook != "fp32":
                assert isinstance(self.net, DistributedDataParallel)
                self.net.register_comm_hook(TYPES[hook], compressed)
        random = torch.Generator().manual_seed(workers.rank)
        shape = (setting.batch, 1, *setting.patch)
        self.image = torch.randn(shape, generator=random).contiguous(memory_format=torch.channels_last_3d)
        self.mask = (torch.rand(shape, generator=random) < 0.01).float()

    def gradients(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision != torch.float32):
            logits = self.net(self.image)
        loss, _ = dice_cross_entropy(logits, self.mask)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, wait: bool = False) -> None:
        self.gradients()
        if wait:
            dist.barrier()
        nn.utils.clip_grad_norm_(self.model.parameters(), 12.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, wait: bool = False) -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            self.step(wait)
        return (time.perf_counter() - started) / STEPS


def all_reduces(sizes: Sequence[int], kind: torch.dtype, casts: bool) -> Callable[[], float]:
    """Seconds of the all-reduces of buckets of so many fp32 bytes, sent as `kind`."""
    whole = [torch.zeros(size // 4) for size in sizes]
    small = [tensor.to(kind) for tensor in whole]

    def run() -> float:
        started = time.perf_counter()
        for full, sent in zip(whole, small, strict=True):
            if casts:
                sent.copy_(full).div_(2)
            dist.all_reduce(sent)
            if casts:
                full.copy_(sent)
        return time.perf_counter() - started

    return run


def measure(setting: Setting, workers: Workers, rounds: int) -> dict[str, Any]:
    """Seconds of everything in each round, and what the gradients lose by compression."""
    plain = Contender(setting, workers, None)
    trained = {name: Contender(setting, workers, name) for name in TYPES}
    parts = [(0.0, 4 * p.numel()) for p in reversed(list(plain.model.parameters()))]
    sizes = [size for _, size in buckets(parts)]
    lost = compression_error(trained)
    turns: dict[str, Callable[[], float]] = {
        "alone": lambda: plain.seconds() if workers.rank == 0 else 0.0,
        "together": plain.seconds,
        "in step": lambda: plain.seconds(wait=True),
    }
    turns |= {name: contender.seconds for name, contender in trained.items()}
    for name, kind in TYPES.items():
        turns[f"all-reduce {name}"] = all_reduces(sizes, kind, casts=False)
    for name in ("bf16", "fp16"):
        turns[f"all-reduce {name} with casts"] = all_reduces(sizes, TYPES[name], casts=True)
    times: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for turn in range(rounds + 1):
        names.append(names.pop(0))  # so that nobody always comes after the same
        for name in names:
            dist.barrier()
            seconds = turns[name]()
            if turn:  # the first warms up
                times[name].append(seconds)
    dist.barrier()
    return {
        "setting": setting.name,
        "gradient_bytes": sum(sizes),
        "buckets": sizes,
        "relative_gradient_error": lost,
        "seconds": times,
    }


def compression_error(trained: dict[str, Contender]) -> dict[str, float]:
    """||compressed - fp32|| / ||fp32|| of the averaged gradient of the first step."""
    found = {}
    for name, contender in trained.items():
        contender.gradients()
        found[name] = torch.cat(
            [p.grad.flatten() for p in contender.model.parameters() if p.grad is not None]
        )
        contender.optimizer.zero_grad(set_to_none=True)
    whole = found["fp32"]
    return {name: float((g - whole).norm() / whole.norm()) for name, g in found.items() if name != "fp32"}


def summarise(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians and quartiles of each round's ratios and differences."""
    seconds = found["seconds"]

    def row(what: str, values: Sequence[float], unit: str) -> dict[str, Any]:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return {"what": what, "median": middle, "low": low, "high": high, "unit": unit}

    def each(*names: str) -> zip[tuple[float, ...]]:
        return zip(*(seconds[name] for name in names), strict=True)

    rows = [row(name, [1e3 * s for s in values], "ms") for name, values in seconds.items()]
    rows.append(row("the machine: alone / together", [a / t for a, t in each("alone", "together")], ""))
    waits = [1e3 * (i - t) for i, t in each("in step", "together")]
    rows.append(row("waiting for the slower: in step - together", waits, "ms"))
    for name in TYPES:
        four = list(each("alone", "in step", name, f"all-reduce {name}"))
        rows += [
            row(f"{name}: efficiency, alone / step", [a / s for a, _, s, _ in four], ""),
            row(f"{name}: efficiency, in step / step", [t / s for _, t, s, _ in four], ""),
            row(f"{name}: all-reduce / step", [r / s for _, _, s, r in four], ""),
            row(f"{name}: exposed communication", [1e3 * (s - t) for _, t, s, _ in four], "ms"),
            row(f"{name}: exposed / all-reduce", [(s - t) / r for _, t, s, r in four], ""),
        ]
    for name in ("bf16", "fp16"):
        rows.append(row(f"{name} / fp32: step", [a / b for a, b in each(name, "fp32")], ""))
        pairs = each(f"all-reduce {name} with casts", "all-reduce fp32")
        rows.append(row(f"{name} / fp32: all-reduce with casts", [a / b for a, b in pairs], ""))
    return rows


def run_ranks(arguments: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [__file__, "--rounds", str(arguments.rounds), "--out", str(out)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def rank(rounds: int, out: Path) -> None:
    with join(1, 1) as workers:
        found = [measure(setting, workers, rounds) for setting in SETTINGS]
        if workers.rank == 0:
            out.write_text(json.dumps(found))
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments.rounds, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(arguments, Path(folder) / "found.json")
    for result in found:
        result["rows"] = summarise(result)
        size = result["gradient_bytes"] / 1e6
        print(f"\n{result['setting']}: {size:.1f} MB of gradients, {len(result['buckets'])} buckets")
        print(f"{'':44} {'median':>8} {'quartiles':>20}")
        for r in result["rows"]:
            spread = f"{r['low']:.3f} to {r['high']:.3f}"
            print(f"{r['what']:44} {r['median']:8.3f} {spread:>20} {r['unit']}")
        for name, error in result["relative_gradient_error"].items():
            print(f"{name + ': relative error of the gradient':44} {error:8.1e}")
    if arguments.out:
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "rounds": arguments.rounds,
            "steps": STEPS,
            "results": found,
        }
        arguments.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
