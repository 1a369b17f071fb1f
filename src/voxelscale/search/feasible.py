"""What a training will cost, known before it costs anything: memory, arithmetic, parameters.

One micro-batch goes forward and backward on tensors without contents (`voxelscale.train.memory`), which
takes half a second and no memory, and every storage's birth and death is noted. On a GPU the allocator
holds about what is alive. On CPUs the C library's heap grows by up to a half more, and that heap is
played, too, as its sources say. `benchmarks/feasible.py` holds it against processes that train.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from voxelscale.config import Config, DataConfig, OptimConfig, TrainConfig, Triple
from voxelscale.device import choose_precision
from voxelscale.model.unet import plan_pooling
from voxelscale.train.memory import (
    Storages,
    make_network,
    moments_kept,
    play,
    seen_at_once,
    without_contents,
)

STEPS = 3
"""Steps played on the heap, which hardly grows after the second."""

GAP = 96
"""Bytes that glibc's `posix_memalign` wants a free block to have beyond a tensor's own: PyTorch's
alignment of 64 and the smallest block's 32 (malloc/malloc.c, `_int_memalign`)."""

SMALL = 4096
"""Bytes below which a block finds its place between the large ones."""

LANES = 16
"""Channels of a block of oneDNN's AVX-512 kernels: 512 bits of float32."""

KEPT = {False: 40_000, True: 500_000}
"""Bytes that oneDNN 3.12 keeps of a convolution's kernel and of a bfloat16 matrix product's; counted."""

SLACK = 1.06
"""Resident memory over the played heap: what the process's small objects keep apart besides. The one
number here that was fitted, to eight configs none of which `benchmarks/feasible.py` has."""

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
PRODUCTS = (aten.mm.default, aten.addmm.default)
NORMS = (aten.native_batch_norm.default, aten.native_group_norm.default)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training takes.

    Attributes:
        memory: bytes at the peak of a step, on one device: on a GPU what PyTorch's allocator counts,
            without cuDNN's work space; on CPUs what a process grows by, beyond what its libraries take.
        flop: floating-point operations of the convolutions and matrix products, forward and backward, of
            all samples; a multiplication and an addition are two. Validations are not in it.
        parameters: of the network.
    """

    memory: int
    flop: float
    parameters: int


def cost_of(config: Config, spacing: Triple, device: str, *, threads: int = 0) -> Cost:
    """Memory, arithmetic and parameters of a training, without running it.

    It takes half a second; configs that differ in nothing that counts (rate, seed, ...) share one answer.
    On a GPU ``precision=auto`` is taken as bfloat16, because asking the device would initialise it.

    Args:
        spacing: of the store, mm (z, y, x), by which pooling is planned.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of a rank; 0: `train.threads`, or the cores shared out.

    Raises:
        VoxelscaleError: the patch is too small for the depth, or there is no such network.
    """
    threads = threads or config.train.threads or max(1, (os.cpu_count() or 1) // max(1, config.train.ranks))
    shared = threads if device == "cpu" else 0
    cost = _step_cost(_what_counts(config, device), tuple(spacing), device, shared)
    return replace(cost, flop=cost.flop * config.train.samples)


def constraints(
    config: Config, spacing: Triple, device: str, available: int, *, threads: int = 0
) -> dict[str, float]:
    """How far a training is from what can run: feasible where every number is 0 or less.

    ``memory`` is needed / available - 1. ``pooling`` counts the levels whose pooling would halve no axis
    of the patch; memory is then that of the network without them.

    Args:
        available: bytes on one device.
        spacing, device, threads: as for `cost_of`.

    Raises:
        VoxelscaleError: there is no such network.
    """
    dims, depth = config.model.dims, config.model.depth
    pools = plan_pooling(config.data.patch_size[-dims:], spacing[-dims:], depth)
    # An idle pooling leaves everything as it is, so those below it are idle, too.
    idle = sum(max(stride) == 1 for stride in pools) if config.model.name == "unet" else 0
    able = replace(config, model=replace(config.model, depth=depth - idle))
    needed = cost_of(able, spacing, device, threads=threads).memory
    return {"memory": needed / max(1, available) - 1, "pooling": float(idle)}


def _what_counts(config: Config, device: str) -> Config:
    """A config with what changes a step's memory or arithmetic, all else by default."""
    train, optim = config.train, config.optim
    precision = train.precision
    if precision == "auto":
        native = device != "cpu" or choose_precision("auto", torch.device("cpu")) == torch.bfloat16
        precision = "bf16" if native else "fp32"
    return Config(
        data=DataConfig(patch_size=config.data.patch_size),
        model=config.model,
        optim=OptimConfig(
            name=optim.name, momentum=0.9 * (optim.momentum > 0), average=0.1 * (optim.average > 0)
        ),
        train=TrainConfig(
            batch_size=train.batch_size,
            ranks=min(train.ranks, 2),
            virtual_workers=train.virtual_workers,
            precision=precision,
            channels_last=train.formatted,
            checkpoint_activations=train.checkpoint_activations,
        ),
    )


@lru_cache(maxsize=4096)
def _step_cost(config: Config, spacing: Triple, device: str, threads: int) -> Cost:
    """The cost of a training of one sample."""
    cpu, bf16 = torch.device("cpu"), config.train.precision == "bf16"
    with without_contents(), _Recorder(threads) as seen:
        model = make_network(config, spacing, cpu, config.train.checkpoint_activations)
        built = len(seen.events)
        play(model, config, cpu, torch.bfloat16 if bf16 else torch.float32)
        events = list(seen.events)
        weights = [p.numel() for p in model.parameters()]
    heap = _Heap()
    _play_steps(heap, events[:built], events[built:], weights, config)
    return Cost(
        memory=int(SLACK * heap.top) if device == "cpu" else heap.peak,
        flop=seen.flop / seen_at_once(config),
        parameters=sum(weights),
    )


class _Event(NamedTuple):
    """A storage's birth or, with a size of -1, its death.

    `pinned`: something small that stays is put behind it; `kept`: bytes that oneDNN keeps from then on.
    """

    storage: int
    size: int
    pinned: bool = False
    kept: int = 0


class _Recorder(Storages):  # type: ignore[no-untyped-call]
    """The births and deaths of all storages, in order, and the floating-point operations.

    Args:
        threads: that share a convolution on a CPU; 0 on a GPU.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.events: list[_Event] = []
        self.flop = 0.0
        self._threads = threads
        self._kernels: set[Any] = set()
        self._pinned, self._kept = False, 0
        self._numbers: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._kept = self._new_kernel(func, args)
        # The statistics of PyTorch's own norms stay until the backward pass.
        self._pinned = self._kept > 0 or func in NORMS
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        if self._threads and func in CONVOLUTIONS:
            self._pinned, self._kept = False, 0
            if func is aten.convolution.default:
                self._died(self._born(args[1].nbytes))
            else:
                self._note_work(args[0], args[1], args[2])
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = storage._cdata in self._known
        super()._add(storage)
        if not known:
            self._numbers[storage._cdata] = self._born(storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        super()._remove(key, size)
        self._died(self._numbers.pop(key))

    def _born(self, size: int) -> int:
        self._count += 1
        self.events.append(_Event(self._count, size, self._pinned, self._kept))
        return self._count

    def _new_kernel(self, func: Any, args: Sequence[Any]) -> int:
        """Bytes that oneDNN keeps of it: of each shape's first convolution or product of bfloat16 matrices.

        (Products of float32 matrices are MKL's.)
        """
        tensors = [a for a in args if isinstance(a, Tensor)]
        product = func in PRODUCTS and tensors[0].dtype == torch.bfloat16
        if not (self._threads and (product or func in CONVOLUTIONS)):
            return 0
        key = (func, *((t.dtype, tuple(t.shape), t.stride()) for t in tensors))
        new = key not in self._kernels
        self._kernels.add(key)
        return KEPT[product] if new else 0

    def _note_work(self, gradient: Tensor, image: Tensor, kernel: Tensor) -> None:
        """oneDNN's of a backward pass, in its order: the weights' own gradient is the last to find a place.

        Weights are reordered into blocks for the image's gradient, and their gradient from blocks.
        """
        last = len(self.events) - 1
        while last > 0 and self.events[last].size != kernel.nbytes:
            last -= 1
        result = self.events.pop(last)
        self._died(self._born(kernel.nbytes))
        blocked = self._born(kernel.nbytes)
        self._died(self._born(_copies(gradient, image, kernel, self._threads)))
        reordered = self._born(kernel.nbytes)
        self.events.append(result)
        self._died(reordered)
        self._died(blocked)

    def _died(self, number: int) -> None:
        self.events.append(_Event(number, -1))


def _copies(gradient: Tensor, image: Tensor, kernel: Tensor, threads: int) -> int:
    """Bytes of what oneDNN copies, in bfloat16 alone, for the gradient of a convolution's weights.

    Both maps of a sample are transposed, their channels filled up to blocks of `LANES` and their rows to
    the kernel's reach; not so an image of one channel. Threads that share out samples and planes have
    copies of their own, those that share out blocks of channels do not. (Counted with oneDNN 3.12, 1 to 64
    threads.)
    """
    if image.dtype != torch.bfloat16:
        return 0
    blocks = [-(-t.shape[1] // LANES) for t in (gradient, image)]
    copied = LANES * (blocks[0] + (blocks[1] if image.shape[1] > 1 else 0))
    copies = threads if max(blocks) == 1 else max(min(threads, 2), threads // 2)
    voxels = image[0, 0].numel() * (1 + kernel.shape[-1] / image.shape[-1])
    return int(copies * copied * voxels * image.element_size())


class _Heap:
    """The heap of glibc's malloc as a training has it (`voxelscale.device.keep_freed_memory`).

    One heap that only grows; the smallest free block that is large enough is taken, free neighbours are
    joined. What PyTorch's alignment leaves behind a block, `GAP` bytes, goes to the next small object.
    Where that stays, as part of a kernel that oneDNN keeps, the block is pinned: once free it will never
    be joined with the one after it, and lacks just these bytes to hold another tensor of its own size.

    Attributes:
        top: bytes of the heap at its largest.
        live, peak: bytes in use, now and at the most.
    """

    def __init__(self) -> None:
        self.top = self.live = self.peak = 0
        self._end = 0
        self._free: list[tuple[int, int]] = []
        self._by_start: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._used: dict[int, int] = {}

    def take(self, size: int, pinned: bool = False) -> int:
        """The address of a new block."""
        size = -(-size // 64) * 64
        self.live += size
        self.peak = max(self.peak, self.live)
        wanted = size + GAP
        place = bisect.bisect_left(self._free, (wanted, 0))
        if place < len(self._free):
            room, address = self._free[place]
            self._unlist(address, room)
        else:
            room, address = wanted, self._end
            self._end += wanted
            self.top = max(self.top, self._end)
        kept = wanted if pinned else size
        self._used[address] = size
        self._release(address + kept, room - kept)
        return address

    def give(self, address: int) -> None:
        """Free a block."""
        size = self._used.pop(address)
        self.live -= size
        self._release(address, size)

    def _release(self, address: int, size: int) -> None:
        """Join it with its free neighbours, or with the end of the heap."""
        if not size:
            return
        if before := self._by_end.get(address):
            self._unlist(address - before, before)
            address, size = address - before, size + before
        if after := self._by_start.get(address + size):
            self._unlist(address + size, after)
            size += after
        if address + size == self._end:
            self._end = address
        else:
            bisect.insort(self._free, (size, address))
            self._by_start[address] = self._by_end[address + size] = size

    def _unlist(self, address: int, size: int) -> None:
        del self._free[bisect.bisect_left(self._free, (size, address))]
        del self._by_start[address], self._by_end[address + size]


def _play_steps(
    heap: _Heap, built: Sequence[_Event], step: Sequence[_Event], weights: Sequence[int], config: Config
) -> None:
    """The network is built, then come the steps; the optimiser's state appears after the first.

    Gradients are freed before the next step, unless further workers' are added to them or they lie in
    DistributedDataParallel's buckets.
    """
    float32 = 4
    places: dict[int, int] = {}
    _replay(heap, built, places)
    network = set(places)
    for size in weights if config.optim.average else []:
        heap.take(float32 * size)
    together = config.model.norm == "sync_batch"
    held = config.train.ranks > 1 or (config.train.virtual_workers > 1 and not together)
    for number in range(STEPS):
        _replay(heap, step, places)
        gradients = places.keys() - network
        if number == 0:
            for size in weights:
                for _ in range(moments_kept(config)):
                    heap.take(float32 * size)
            step = [event._replace(pinned=False, kept=0) for event in step]
            if held:
                step = [event for event in step if event.storage not in gradients]
        if not held:
            for storage in gradients:
                heap.give(places.pop(storage))


def _replay(heap: _Heap, events: Sequence[_Event], places: dict[int, int]) -> None:
    """Give every large block its place, from its birth to its death."""
    for storage, size, pinned, kept in events:
        if size >= SMALL:
            places[storage] = heap.take(size, pinned)
            if kept:
                heap.take(kept)
        elif size < 0 and storage in places:
            heap.give(places.pop(storage))
