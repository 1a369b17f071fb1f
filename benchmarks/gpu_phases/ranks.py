"""Several ranks: what one card can show of them, and weak scaling on several."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from benchmarks import gpu
from benchmarks.gpu_phases.common import Record, Setting, plain, relative
from benchmarks.gpu_phases.steps import Contender, make_step, shape_of_step
from benchmarks.gpu_phases.subject import apart, make_store, run_engine, shape_of, small_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxelscale.config import Config
from voxelscale.device import policy, seconds_of
from voxelscale.model.unet import UNet
from voxelscale.ranks.workers import Workers, compressed, join

RANKS = 2
STEPS = 6
SAME = 1e-5
"""Largest difference between the weights of two ranks and those of two virtual workers."""
HALF = 2.0**-8
"""Of a gradient that was sent as bf16: half a unit in its last place, twice."""


def ranks(setting: Setting, record: Record) -> None:
    """A group of one, by NCCL on a GPU; two ranks on the one device against two virtual workers."""
    record.put(**alone(setting, record))
    store, weights = setting.out / "store", setting.out / "ranks.pt"
    make_store(store, shape_of(setting))
    _, virtual = run_engine(config_of(setting, RANKS), store, None)
    outcome = two_ranks(setting)
    record.put(two_ranks=outcome)
    if any(each["status"] != "ok" for each in outcome) or not weights.exists():
        record.wrong.append(f"two ranks: {[each.get('why') or each['status'] for each in outcome]}")
        return
    difference = apart(torch.load(weights), virtual)
    record.put(two_ranks_against_virtual=difference)
    record.check("two ranks against two virtual workers", difference, SAME)
    backend = outcome[0]["figures"]["backend"]
    record.says = f"two ranks by {backend}: {difference:.1e} from two virtual workers"


def config_of(setting: Setting, virtual: int) -> Config:
    """By SGD: an update of AdamW can turn about with the sign of a gradient that is all but 0."""
    train = {"samples": 2 * RANKS * STEPS, "virtual_workers": virtual}
    optim = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    return small_config(setting, train=train, optim=optim)


def alone(setting: Setting, record: Record) -> dict[str, Any]:
    """A process group of one rank: an all-reduce, and gradients through it, as they are and as bf16."""
    backend = "nccl" if setting.cuda else "gloo"
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(setting.out / "group of one"), 1),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
        device_id=setting.device if setting.cuda else None,
    )
    try:
        one = torch.ones(1000, device=setting.device)
        dist.all_reduce(one)
        found = {name: gradient(setting, name) for name in ("plain", "wrapped", "bf16")}
    finally:
        dist.destroy_process_group()
    record.check(f"{backend} of one: sum", float((one - 1).abs().max()), 0.0)
    differences = {name: relative(found[name], found["plain"]) for name in ("wrapped", "bf16")}
    record.check(f"{backend} of one: gradient", differences["wrapped"], SAME)
    record.check(f"{backend} of one: gradient as bf16", differences["bf16"], HALF)
    return {"group_of_one": {"backend": backend, **differences}}


def gradient(setting: Setting, way: str) -> Tensor:
    """A small network's gradient: by itself, wrapped, or wrapped and compressed."""
    torch.manual_seed(0)
    model: nn.Module = UNet(depth=2, filters=4, prior=0.5).to(setting.device)
    image = torch.randn(2, 1, 12, 12, 12).to(setting.device)
    wrapped = model
    if way != "plain":
        wrapped = wrap(model, setting.device, None, way)
    with policy(setting.device):
        wrapped(image).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def wrap(model: nn.Module, device: torch.device, group: Any, compress: str) -> nn.Module:
    """As `voxelscale.ranks.workers.data_parallel`, which leaves one rank alone and knows no other group."""
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(
        model, device_ids=ids, process_group=group, gradient_as_bucket_view=True
    )
    if compress == "bf16":
        wrapped.register_comm_hook(torch.bfloat16, compressed)
    return wrapped


def two_ranks(setting: Setting) -> list[dict[str, Any]]:
    """Start them as torchrun would, each with a record of its own; those that hang are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, gpu.__file__, "--phase", "rank", "--out", str(setting.out)]
    command += ["--tiny"] * setting.tiny
    children = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(RANKS)
    ]
    for child in children:
        try:
            child.wait(40)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
    found = [gpu.read_record(setting.out / f"rank{n}.json") for n in range(RANKS)]
    codes = [child.returncode for child in children]
    return [{"status": "no record", **each, "code": code} for each, code in zip(found, codes, strict=True)]


def rank(setting: Setting, record: Record) -> None:
    """One of two: trains its share; the first keeps the weights."""
    store = setting.out / "store"
    make_store(store, shape_of(setting))
    with join(1, 0):
        record.put(backend=dist.get_backend())
        _, weights = run_engine(config_of(setting, 1), store, None)
        if dist.get_rank() == 0:
            torch.save(weights, setting.out / "ranks.pt")


def nodes(setting: Setting, record: Record) -> None:
    """Weak scaling under torchrun: the same batch on each of 1, 2, 4, ... GPUs of all that take part."""
    with join(1, 0) as workers:
        total = workers.ranks
        if not dist.is_initialized():
            raise RuntimeError("--nodes needs torchrun and two ranks or more; see benchmarks/gpu.py --help")
        counts = [n for n in (2**power for power in range(20)) if n < total] + [total]
        rows: list[dict[str, Any]] = []
        for count in counts:
            for compress in ("none", "bf16") if count > 1 else ("none",):
                group = dist.new_group(list(range(count)))  # by all, also those that only wait
                figures = measured(setting, workers, group, count, compress) if workers.rank < count else {}
                dist.barrier()
                rows.append(figures)
                if workers.rank == 0:
                    write_row(setting, figures, rows[0])
        record.says = f"{total} ranks by {dist.get_backend()}"


def write_row(setting: Setting, figures: dict[str, Any], single: dict[str, Any]) -> None:
    """A line of the results, and one for the reader."""
    figures["efficiency"] = figures["patches_per_second"] / (
        figures["ranks"] * single["patches_per_second"]
    )
    text = f"{figures['ranks']} ranks, gradients {figures['compress']}: "
    text += f"{figures['patches_per_second']:.3g} patches/s, efficiency {figures['efficiency']:.2f}"
    row = gpu.row_of("nodes", "ok", "", figures["seconds"], plain(figures), text)
    with open(setting.out / "results.jsonl", "a", encoding="utf-8") as results:
        results.write(json.dumps(row) + "\n")
    print(text, flush=True)


def measured(setting: Setting, workers: Workers, group: Any, count: int, compress: str) -> dict[str, Any]:
    """Steps of `count` ranks, what the same steps take without the gradients' sum, and the sum alone."""
    device, rounds = workers.device, 3 if setting.tiny else 20
    shape, depth, filters = shape_of_step(setting)
    make = lambda: UNet(depth=depth, filters=filters)  # noqa: E731
    contender = Contender(name="ours", make=make)
    step, model = make_step(contender, shape, device)
    if count > 1:
        step, model = make_step(
            contender, shape, device, wrap=lambda model: wrap(model, device, group, compress)
        )
    kind = torch.bfloat16 if compress == "bf16" else torch.float32
    bucket = torch.zeros(sum(p.numel() for p in model.parameters()), device=device, dtype=kind)
    reduce: Callable[[], object] = lambda: dist.all_reduce(bucket, group=group)  # noqa: E731
    for _ in range(3):
        step()
        reduce()

    def steps() -> None:
        for _ in range(rounds):
            step()

    seconds = seconds_of(steps, device) / rounds
    reduced = statistics.median(seconds_of(reduce, device) for _ in range(10))
    size = bucket.numel() * bucket.element_size()
    return {
        "ranks": count,
        "compress": compress,
        "backend": dist.get_backend(),
        "seconds": seconds * rounds,
        "step_ms": 1e3 * seconds,
        "patches_per_second": count * shape[0] / seconds,
        "gradient_mb": size / 1e6,
        "all_reduce_ms": 1e3 * reduced,
        # As NCCL's tests count it: what each link carries of a ring's all-reduce.
        "bus_gb_per_s": 2 * (count - 1) / count * size / reduced / 1e9,
    }
