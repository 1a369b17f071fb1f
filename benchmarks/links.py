"""The time model of `voxelscale scale` against real Gloo ranks over a network that is really slow.

    python benchmarks/links.py links/                      about ten minutes; as root, with ip and tc
    python benchmarks/links.py links/ --only 2x1,4x1       some of the layouts (nodes x ranks)
    python benchmarks/links.py links/ --rate 100           Mbit/s of each node's link

Each node is a network namespace of this machine. Its link to the bridge between them lets out no more than
the rate (``tc tbf``). Ranks of a node share its namespace and talk through its loopback. Arithmetic is
replaced by sleep, so that two cores suffice for 16 ranks: what takes time is the network.

1. alpha and beta of the link and of the loopback are measured between two ranks (``links.json``).
2. Every layout is predicted from them (``predictions.json``, with the time of writing): single all-reduces,
   and updates in which buckets of gradients become ready during the backward pass and are averaged
   asynchronously, as DistributedDataParallel does it.
3. Every layout is measured (one JSON file each), and the errors of the predictions are stated.

What is in the folder is not done again. All namespaces and links belong to processes of this script and end
with them, however it ends. They are not visible outside.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from voxelscale.scale.cost import (
    Interconnect,
    StepCost,
    all_reduce_seconds,
    buckets,
    update_time,
)
from voxelscale.scale.links import Link, fit_link

MIB = 2**20
SEGMENT = MIB
"""Most bytes of a message of Gloo's all-reduce (gloo/allreduce.h, kMaxSegmentSize)."""
LINK_SIZES = tuple(4**power for power in range(5, 13))
"""Bytes of the all-reduces that alpha and beta are fitted to: 1 KiB to 16 MiB."""
SIZES = (4096, 65536, MIB, 8 * MIB)
"""Bytes of the all-reduces of each layout."""
MTU, BURST = 9000, 20_000
"""Bytes of a frame, and what a link lets out at once after a pause."""
PORT = 29500
INSIDE = "VOXELSCALE_LINKS_INSIDE"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`nodes` namespaces with `per_node` ranks each."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def name(self) -> str:
        return f"{self.nodes}x{self.per_node}"


LAYOUTS = {
    layout.name: layout
    for layout in (
        *(Layout(nodes=n, per_node=1) for n in (2, 4, 8, 16)),
        Layout(nodes=2, per_node=4),
        Layout(nodes=1, per_node=16),
    )
}
"""The last shows what 16 ranks take on two cores without any slow link."""

UPDATES = {
    "large": StepCost(
        forward_seconds=0.2,
        backward_seconds=2.0,
        update_seconds=0.05,
        input_seconds=0.0,
        batch_seconds=(),
        gradients=tuple((i / 16, 2 * MIB) for i in range(1, 17)),
    ),
    "small": StepCost(
        forward_seconds=0.1,
        backward_seconds=0.4,
        update_seconds=0.02,
        input_seconds=0.0,
        batch_seconds=(),
        gradients=tuple((i / 8, MIB // 2) for i in range(1, 9)),
    ),
    "synchronised": StepCost(
        forward_seconds=0.1,
        backward_seconds=0.4,
        update_seconds=0.02,
        input_seconds=0.0,
        batch_seconds=(),
        gradients=tuple((i / 8, MIB // 2) for i in range(1, 9)),
        blocking_bytes=(516,) * 16,
    ),
}
"""32 MiB of gradients, mostly not hidden; 4 MiB; the same with 16 all-reduces that the forward pass waits
for, as of batch norm's statistics."""


def gloo_ring_seconds(link: Link, workers: int, size: float) -> float:
    """All-reduce as Gloo does it: a ring of segments, two of them in flight.

    The buffer is cut into segments of at most 1 MiB, at least two a rank. In each of two phases
    (reduce-scatter, all-gather) a rank sends all segments but those of one rank, one after another; a
    segment leaves when the one before has left and the last but one from the neighbour has arrived, which
    takes alpha after it has left. So alpha is hidden where a segment takes longer than it to send:
    ``2 (N-1)/N S/beta + 2 alpha`` for large S, ``2 (N-1) alpha`` for small (Gloo, gloo/allreduce.cc,
    ``ring``, the algorithm where none is chosen, as in PyTorch's ProcessGroupGloo).
    """
    segments = workers * math.ceil(max(math.ceil(size / SEGMENT), 2 * workers) / workers)
    wire = size / segments / link.beta_bytes_per_second
    left, arrived = -wire, [0.0, 0.0]
    for _ in range(segments - segments // workers):
        left = max(left + wire, arrived[-2])
        arrived.append(left + wire + link.alpha_seconds)
    return 2 * arrived[-1]


def gloo_seconds(network: Interconnect, workers: int, size: float) -> float:
    """Gloo's ring over all ranks, in the order of their numbers, whatever node they are of.

    Between nodes it crosses their link once in each direction: the ring is as fast as its slowest hop, and
    alpha is the mean of its hops.
    """
    if network.between is None or workers <= network.per_node:
        return gloo_ring_seconds(network.within, workers, size)
    nodes = workers // network.per_node
    alpha = network.within.alpha_seconds
    alpha += nodes / workers * (network.between.alpha_seconds - alpha)
    return gloo_ring_seconds(replace(network.between, alpha_seconds=alpha), workers, size)


def gloo_update_seconds(step: StepCost, network: Interconnect, workers: int) -> float:
    """An update as `update_time` has it, with Gloo's all-reduce instead of NCCL's."""
    end = 0.0
    for ready, size in buckets(step.gradients):
        end = max(end, ready * step.backward_seconds) + gloo_seconds(network, workers, size)
    blocking = sum(gloo_seconds(network, workers, size) for size in step.blocking_bytes)
    return step.forward_seconds + blocking + max(end, step.backward_seconds) + step.update_seconds


def network_of(layout: Layout, within: Link, between: Link) -> Interconnect:
    if layout.nodes == 1:
        return Interconnect(within=within)
    if layout.per_node == 1:
        return Interconnect(within=between)
    return Interconnect(within=within, between=between, per_node=layout.per_node)


def predict(layout: Layout, links: dict[str, Link], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds of each all-reduce and update: by the model, by Gloo's ring, with large messages' beta."""
    fitted = network_of(layout, links["within"], links["between"])
    large = network_of(layout, links["within large"], links["between large"])
    n = layout.ranks
    rows: list[dict[str, Any]] = [
        {
            "what": f"all-reduce {size}",
            "model": all_reduce_seconds(fitted, n, size),
            "gloo": gloo_seconds(fitted, n, size),
            "large": gloo_seconds(large, n, size),
        }
        for size in sizes
    ]
    rows += [
        {
            "what": f"update {name}",
            "model": update_time(step, fitted, n).total,
            "gloo": gloo_update_seconds(step, fitted, n),
            "large": gloo_update_seconds(step, large, n),
        }
        for name, step in UPDATES.items()
    ]
    return [{"layout": layout.name, **row} for row in rows]


# Namespaces


def unavailable() -> str | None:
    """Why namespaces with limited links cannot be made here; None where they can."""
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    trial = (
        "ip link add dev hub type bridge && ip link add dev left type veth peer name right"
        f" && tc qdisc add dev left root tbf rate 8mbit burst {BURST} limit 1mb"
    )
    done = subprocess.run(["unshare", "--net", "sh", "-c", trial], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip() or "namespaces cannot be made"


def isolate() -> None:
    """Start this script again in a network namespace of its own, which ends with it."""
    if INSIDE not in os.environ:
        os.execvpe("unshare", ["unshare", "--net", sys.executable, *sys.argv], {**os.environ, INSIDE: "1"})
    _run("ip", "link", "set", "lo", "up")


@contextlib.contextmanager
def namespaces(layout: Layout, rate: float) -> Iterator[list[int]]:
    """A bridge with `layout.nodes` nodes at it, each a process that holds a namespace; their ids.

    Args:
        rate: Mbit/s that each node's link lets out; 0: no limit.
    """
    holders: list[subprocess.Popen[bytes]] = []
    try:
        _run("ip", "link", "add", "dev", "hub", "type", "bridge")
        _run("ip", "link", "set", "dev", "hub", "mtu", str(MTU), "up")
        for node in range(layout.nodes):
            holder = _start(["unshare", "--net", "sleep", "infinity"])
            holders.append(holder)
            _wait_for_namespace(holder.pid)
            _connect(node, holder.pid, rate)
        yield [holder.pid for holder in holders]
    finally:
        # The kernel removes a namespace's links some time after its last process: these go now.
        for name in (*(f"node{node}" for node in range(len(holders))), "hub"):
            subprocess.run(["ip", "link", "delete", "dev", name], check=False, stderr=subprocess.DEVNULL)
        _end(holders)


def _connect(node: int, holder: int, rate: float) -> None:
    end, inside = f"node{node}", ("nsenter", f"--net=/proc/{holder}/ns/net")
    _run("ip", "link", "add", "dev", end, "type", "veth", "peer", "name", "eth0", "netns", str(holder))
    _run("ip", "link", "set", end, "mtu", str(MTU), "master", "hub", "up")
    _run(*inside, "ip", "link", "set", "lo", "up")
    _run(*inside, "ip", "link", "set", "eth0", "mtu", str(MTU), "up")
    _run(*inside, "ip", "address", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
    if rate:
        limit = ("rate", f"{rate}mbit", "burst", str(BURST), "limit", "64mb")
        _run(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)


def _wait_for_namespace(pid: int) -> None:
    ours = os.readlink("/proc/self/ns/net")
    for _ in range(1000):
        if os.readlink(f"/proc/{pid}/ns/net") != ours:
            return
        time.sleep(0.01)
    raise RuntimeError("a namespace was not made within 10 seconds")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _end_with(parent: int) -> None:
    """The kernel kills this process when its parent ends, even by SIGKILL (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked for
        os._exit(1)


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    ends = partial(_end_with, os.getpid())
    return subprocess.Popen(command, preexec_fn=ends, start_new_session=True, **options)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


# Ranks


def run_ranks(layout: Layout, rate: float, task: dict[str, Any], out: Path) -> dict[str, Any]:
    """Do `task` in all ranks of `layout`; what rank 0 found."""
    found, log = out / f".{layout.name}.json", out / f"{layout.name}.log"
    found.unlink(missing_ok=True)
    with namespaces(layout, rate) as holders, log.open("wb") as text:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(layout.ranks):
                inside = ["nsenter", f"--net=/proc/{holders[rank // layout.per_node]}/ns/net"]
                command = [*inside, sys.executable, __file__, "rank", json.dumps(task), str(found)]
                environment = {
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(layout.ranks),
                    "MASTER_ADDR": "10.77.0.1",
                    "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1",
                }
                ranks.append(_start(command, env=environment, stdout=text, stderr=text))
            _wait(ranks, log)
        finally:
            _end(ranks)
    result: dict[str, Any] = json.loads(found.read_text())
    found.unlink()
    return result


def _wait(ranks: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Until all have ended; the first that fails ends it."""
    while any(rank.poll() is None for rank in ranks):
        if any(rank.returncode for rank in ranks):
            break
        time.sleep(0.05)
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"a rank failed, see {log}:\n{log.read_text()[-2000:]}")


def rank(task: dict[str, Any], found: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # So that other work here delays it less; Gloo's threads inherit it.
    os.setpriority(os.PRIO_PROCESS, 0, -10)
    dist.init_process_group("gloo")
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, float] = {}
    for size in task["sizes"]:
        tensor = torch.zeros(size // 4)
        what, repeats = f"all-reduce {size}", max(1, min(20, MIB // size))
        timed = partial(_all_reduce, tensor, repeats)
        seconds[what], cpu[what] = _timed(timed, task["rounds"], repeats)
    for name in task["updates"]:
        step = UPDATES[name]
        sent = [(ready, torch.zeros(size // 4)) for ready, size in buckets(step.gradients)]
        blocking = [torch.zeros(size // 4) for size in step.blocking_bytes]
        what = f"update {name}"
        seconds[what], cpu[what] = _timed(partial(_update, step, sent, blocking), task["steps"], 1)
    if dist.get_rank() == 0:
        found.write_text(json.dumps({"seconds": seconds, "cpu": cpu}))
    dist.barrier()
    dist.destroy_process_group()


def _timed(timed: Callable[[], float], rounds: int, repeats: int) -> tuple[list[float], float]:
    """Seconds of each of `rounds`, after one to warm up; processor time of all ranks for one operation."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.process_time()
    seconds = [timed() for _ in range(rounds + 1)][1:]
    used = torch.tensor(time.process_time() - started, dtype=torch.float64)
    dist.all_reduce(used)
    return seconds, float(used) / (rounds + 1) / repeats


def _all_reduce(tensor: Any, repeats: int) -> float:
    """Seconds of one, the mean of several."""
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    return (time.perf_counter() - started) / repeats


def _update(step: StepCost, sent: Sequence[tuple[float, Any]], blocking: Sequence[Any]) -> float:
    """Seconds of an update whose arithmetic sleeps; not less than that for the all-reduces."""
    import torch.distributed as dist

    started = time.perf_counter()
    _sleep_until(started + step.forward_seconds)
    for tensor in blocking:
        dist.all_reduce(tensor)
    backward, works = time.perf_counter(), []
    for ready, tensor in sent:
        _sleep_until(backward + ready * step.backward_seconds)
        works.append(dist.all_reduce(tensor, async_op=True))
    _sleep_until(backward + step.backward_seconds)
    for work in works:
        work.wait()
    time.sleep(step.update_seconds)
    return time.perf_counter() - started


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


# The three parts


def measure_links(out: Path, rate: float, rounds: int) -> dict[str, Link]:
    """Within a node and between nodes, each between two ranks only; read where they were measured.

    As `fit_link` has them, and, called large, with the beta that the two largest messages have between
    them: the fit weighs every size alike, so that small ones, of which a link lets out some at once, raise
    beta.
    """
    path = out / "links.json"
    if not path.exists():
        task = {"sizes": LINK_SIZES, "rounds": rounds, "updates": [], "steps": 0}
        links: dict[str, Any] = {}
        times: dict[str, Any] = {}
        for name, layout in (
            ("within", Layout(nodes=1, per_node=2)),
            ("between", Layout(nodes=2, per_node=1)),
        ):
            found = run_ranks(layout, rate, task, out)
            # The minimum: other load on the machine only ever adds.
            seconds = [min(found["seconds"][f"all-reduce {size}"]) for size in LINK_SIZES]
            source = f"all-reduces of {LINK_SIZES[0]} to {LINK_SIZES[-1]} bytes by two Gloo ranks"
            link = fit_link(name, 2, LINK_SIZES, seconds, source)
            beta = (LINK_SIZES[-1] - LINK_SIZES[-2]) / (seconds[-1] - seconds[-2])
            links |= {
                name: asdict(link),
                f"{name} large": asdict(replace(link, beta_bytes_per_second=beta)),
            }
            times[name] = dict(zip(map(str, LINK_SIZES), seconds, strict=True))
        facts = {"time": _now(), "rate_mbit": rate, "load": os.getloadavg(), "cores": os.cpu_count()}
        _write(path, {**facts, "links": links, "seconds": times})
    kept = json.loads(path.read_text())
    if kept["rate_mbit"] != rate:
        problem = f"{path} was measured at {kept['rate_mbit']} Mbit/s"
        raise SystemExit(f"error: {problem}\nhint: --rate {kept['rate_mbit']}, or another folder")
    return {name: Link(**link) for name, link in kept["links"].items()}


def measure(layout: Layout, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each all-reduce and update of a layout; read where it was measured."""
    path = out / f"{layout.name}.json"
    if not path.exists():
        task = {"sizes": SIZES, "updates": arguments.updates.split(",")}
        task |= {"rounds": arguments.rounds, "steps": arguments.steps}
        started, load = _now(), os.getloadavg()
        times = run_ranks(layout, arguments.rate, task, out)
        _write(path, {"time": started, "load": load, **times})
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def compare(predicted: Sequence[dict[str, Any]], measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Each prediction with the median, least and greatest measured seconds, and its errors in percent.

    ``busy`` is the share of this machine's processor time that the ranks used meanwhile.
    """
    rows = []
    for row in predicted:
        if row["what"] not in measured["seconds"]:
            continue
        times = measured["seconds"][row["what"]]
        middle = statistics.median(times)
        errors = {f"{how}_percent": 100 * (row[how] / middle - 1) for how in ("model", "gloo", "large")}
        busy = measured["cpu"][row["what"]] / statistics.mean(times) / (os.cpu_count() or 1)
        spread = {"measured": middle, "least": min(times), "greatest": max(times)}
        rows.append({**row, **spread, **errors, "busy": busy})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    print("Predicted, ms, and the error: by the model, with Gloo's ring, and with beta of large messages")
    print(f"{'':7} {'':21} {'measured, ms':>24} {'model':>15} {'Gloo':>15} {'large':>15} {'busy':>6}")
    for r in rows:
        measured = f"{1e3 * r['measured']:.1f} ({1e3 * r['least']:.1f} to {1e3 * r['greatest']:.1f})"
        each = [f"{1e3 * r[how]:.1f} {r[how + '_percent']:+.1f} %" for how in ("model", "gloo", "large")]
        columns = " ".join(f"{text:>15}" for text in each)
        print(f"{r['layout']:7} {r['what']:21} {measured:>24} {columns} {100 * r['busy']:4.0f} %")


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, facts: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1))
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the figures")
    parser.add_argument("--rate", type=float, default=200.0, help="Mbit/s of a node's link")
    parser.add_argument("--only", default=",".join(LAYOUTS), help="layouts, nodes x ranks")
    parser.add_argument("--updates", default=",".join(UPDATES), help="kinds of updates to measure")
    parser.add_argument("--rounds", type=int, default=7, help="all-reduces of each size")
    parser.add_argument("--steps", type=int, default=6, help="updates of each kind")
    arguments = parser.parse_args()
    for given, known in ((arguments.only, LAYOUTS), (arguments.updates, UPDATES)):
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"unknown: {unknown.pop()}; there are {', '.join(known)}")
    if INSIDE not in os.environ and (reason := unavailable()):
        raise SystemExit(f"error: {reason}\nhint: run it as root on Linux, with iproute2 and util-linux")
    isolate()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    links = measure_links(out, arguments.rate, arguments.rounds)
    layouts = [LAYOUTS[name] for name in arguments.only.split(",")]
    path = out / "predictions.json"
    if not path.exists():
        rows = [row for layout in LAYOUTS.values() for row in predict(layout, links, SIZES)]
        _write(path, {"time": _now(), "rows": rows})
    predictions = json.loads(path.read_text())
    compared: list[dict[str, Any]] = []
    times: dict[str, str] = {}
    for layout in layouts:
        mine = [row for row in predictions["rows"] if row["layout"] == layout.name]
        measured = measure(layout, out, arguments)
        times[layout.name] = measured["time"]
        compared += compare(mine, measured)
    facts = {"cores": os.cpu_count(), "rate_mbit": arguments.rate, "predicted": predictions["time"]}
    facts |= {"measured": times, "links": {name: asdict(link) for name, link in links.items()}}
    _write(out / "compared.json", {**facts, "rows": [_rounded(row) for row in compared]})
    show(compared)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
