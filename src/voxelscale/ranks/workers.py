"""Who takes part in a training: ranks, and the virtual workers that each of them emulates.

World size W = ranks x virtual workers a rank. A rank computes its virtual workers one after another,
each on its own micro-batch with its own batch statistics, and averages their gradients before the
all-reduce; the update is that of W real ranks.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxelscale.console import count, notice
from voxelscale.device import keep_freed_memory
from voxelscale.errors import VoxelscaleError
from voxelscale.ranks.meeting import meet
from voxelscale.ranks.place import fill

LONGEST_WAIT = timedelta(minutes=30)
"""For a collective; a rank that validates large scans keeps the others waiting. NCCL's default is 10."""

_groups = itertools.count()
"""Number of process groups that this process has made; the same on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process's place among all.

    Attributes:
        rank, ranks: of the process group; 0 of 1 where there is none.
        virtual: workers that each rank emulates.
        device: where this rank computes.
    """

    rank: int
    ranks: int
    virtual: int
    device: torch.device

    @property
    def world(self) -> int:
        """W, the number of workers."""
        return self.ranks * self.virtual

    @property
    def mine(self) -> range:
        """The numbers, among all W, of the workers that this rank emulates."""
        return range(self.rank * self.virtual, (self.rank + 1) * self.virtual)


@contextlib.contextmanager
def join(virtual: int, threads: int) -> Iterator[Workers]:
    """Take part as the environment says: torchrun's variables, or alone.

    NCCL with one GPU a rank where there are as many GPUs as ranks, else Gloo: NCCL refuses two ranks on one
    GPU. A process group that is there already is used, and left.

    Args:
        virtual: virtual workers per rank.
        threads: CPU threads of this rank; 0: the cores shared out over the ranks of this machine.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        fill()
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    cuda = torch.cuda.is_available()
    local, locals_ = local_rank(ranks, torch.cuda.device_count())
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    keep_freed_memory()
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // locals_))
    grouped = ranks > 1 and not dist.is_initialized()
    if grouped:
        store = _store(rank, ranks, locals_)
        nccl = cuda and locals_ <= torch.cuda.device_count()
        if cuda and not nccl and rank == 0:
            gpus = count(torch.cuda.device_count(), "GPU")
            notice(f"{locals_} ranks share {gpus}: gradients are averaged by Gloo, through main memory")
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=LONGEST_WAIT,
            device_id=device if nccl else None,
        )
    try:
        yield Workers(rank=rank, ranks=ranks, virtual=virtual, device=device)
    finally:
        if grouped:
            dist.destroy_process_group()


def local_rank(ranks: int, gpus: int) -> tuple[int, int]:
    """This rank's number among those of its machine, and how many they are; see `ranks.place.fill`.

    Args:
        ranks: of the process group.
        gpus: that this process sees; where it sees one alone, as with ``srun --gpus-per-task=1``, it needs
            no number.

    Raises:
        VoxelscaleError: nothing says which of several GPUs is this rank's.
    """
    given = os.environ.get("LOCAL_RANK", None if ranks > 1 else "0")
    if given is None and gpus > 1:
        hint = "start it with torchrun, or set LOCAL_RANK and LOCAL_WORLD_SIZE in each rank"
        raise VoxelscaleError(f"nothing says which of {gpus} GPUs is that of this rank", hint)
    return int(given or 0), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _store(rank: int, ranks: int, locals_: int) -> Any:
    """Where the ranks exchange their addresses; keys of its own for each group and each restart.

    torchrun's own store outlives the ranks and their groups, and those made again would find the addresses
    of those that are gone (PyTorch issue 135712). Over several machines its agents count restarts
    separately: there ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` gives every start a store of its own.
    """
    group = next(_groups)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = meet(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, ranks)
        store.set_timeout(LONGEST_WAIT)
        return dist.PrefixStore(f"group {group}", store)  # type: ignore[attr-defined]
    if locals_ != ranks:
        return None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(f"restart {restart} group {group}", store)  # type: ignore[attr-defined]


def data_parallel(model: nn.Module, workers: Workers, compress: str = "none") -> nn.Module:
    """The model as it is trained: wrapped so that gradients are averaged over ranks, if there are any.

    With ``compress="bf16"`` gradients travel as bfloat16: half the bytes, rounded to three digits.

    Buffers are not broadcast: `average_buffers` gives every worker's running statistics equal weight
    instead of rank 0's alone.
    """
    if workers.ranks == 1:
        return model
    ids = [workers.device.index] if workers.device.type == "cuda" else None
    # Of 1-wide kernels, whose channels-last strides differ in name only; they are small.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # torch 2.13 renamed the switch; 2.11 does not know the new name.
    names = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {switch: False}
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)
    if compress == "bf16":
        wrapped.register_comm_hook(torch.bfloat16, compressed)
    return wrapped


# Without annotations: DistributedDataParallel wants none, or types rather than their names.
def compressed(kind, bucket):  # type: ignore[no-untyped-def]
    """A communication hook that averages a bucket of gradients as numbers of `kind`.

    PyTorch's own ``bf16_compress_hook`` is refused with Gloo (torch 2.13), though Gloo reduces bf16.
    """
    sent = bucket.buffer().to(kind).div_(dist.get_world_size())
    work = dist.all_reduce(sent, async_op=True)
    return work.get_future().then(lambda landed: bucket.buffer().copy_(landed.value()[0]))


def held_back(model: nn.Module, hold: bool) -> contextlib.AbstractContextManager[None]:
    """Within it a backward pass only adds to the rank's own gradients, if `hold`."""
    if hold and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


class WorkerBuffers:
    """Running statistics of virtual workers: each starts from the same, the mean of them remains.

    Real ranks' statistics evolve separately and are averaged before they are used. As the update is
    linear, averaging after every step gives the same.

    Args:
        model: its buffers.
        virtual: workers that this rank emulates.
        undo: whether a step may have to be taken back.
    """

    def __init__(self, model: nn.Module, virtual: int, undo: bool = False) -> None:
        self._buffers = list(model.buffers()) if virtual > 1 or undo else []
        self._start: list[Tensor] = []
        self._sum: list[Tensor] = []

    def begin_step(self) -> None:
        """Before the first virtual worker."""
        self._start = [buffer.clone() for buffer in self._buffers]
        self._sum = [torch.zeros_like(buffer) for buffer in self._buffers]

    def begin_worker(self) -> None:
        """Before each virtual worker's forward pass."""
        for buffer, start in zip(self._buffers, self._start, strict=True):
            buffer.copy_(start)

    def end_worker(self, weight: float) -> None:
        """After it; the weights of a step's workers sum up to 1."""
        for total, buffer in zip(self._sum, self._buffers, strict=True):
            if buffer.is_floating_point():
                total.add_(buffer, alpha=weight)

    def end_step(self) -> None:
        """After the last; counters, the same in all, keep the last one's."""
        for buffer, total in zip(self._buffers, self._sum, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(total)

    def undo_step(self) -> None:
        """Instead of `end_step`: the statistics as they were before the step."""
        self.begin_worker()


def average_buffers(model: nn.Module, workers: Workers, averaged: Mapping[str, Tensor] = {}) -> None:
    """Give every rank the mean over ranks of the running statistics, which are no counters.

    Args:
        averaged: of their moving average, by their names; it becomes that of all ranks, too.
    """
    if workers.ranks == 1:
        return
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            for own in (buffer, averaged[name]) if name in averaged else (buffer,):
                dist.all_reduce(own)
                own /= workers.ranks


def sum_over_ranks(table: Sequence[Sequence[float]], workers: Workers) -> list[list[float]]:
    """The element-wise sum of a table over all ranks, in float64: exact for counts below 2^53."""
    if workers.ranks == 1:
        return [list(row) for row in table]
    total = torch.tensor(table, dtype=torch.float64, device=workers.device)
    dist.all_reduce(total)
    return [[float(v) for v in row] for row in total.tolist()]
