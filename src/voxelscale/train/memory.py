"""Memory of a training step: what it needs, and what there is.

A step is simulated on tensors without contents (PyTorch's fake tensors), which takes about a second
and no memory, and every storage's birth and death is counted; what a GPU really used is measured.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, Triple
from voxelscale.device import autocast, choose_precision, keep_freed_memory, to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_loss, build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.train.optim import make_optimizer
from voxelscale.train.patch_sizes import scaled_patches, with_patch

RESIDENT, FIXED = 1.32, 8 * 2**20
"""What a process on CPUs grows by over the tensors that are alive at the peak, as a factor and in bytes:
holes in the C library's heap, and the convolutions' own copies. Chosen on 23 networks of fp32 and bf16;
on 16 others the estimate was 0.87 to 1.15 of what was measured (`benchmarks/feasible.py`), with one thread.
In bf16 oneDNN copies both maps for every thread: with 8 threads a small network took 1.3 times as much."""

RESERVED = 1.15
"""What a GPU's allocator takes over the tensors that are alive at the peak: holes between them, and cuDNN's
work spaces. A guess that no GPU has been measured for yet; `benchmarks/gpu.py` measures it."""

MAPS_OF_WINDOW = 6
"""Float32 maps of the first level that the prediction of a window holds at most: its skip, the decoder's
map, both joined, and what two convolutions give."""

REGION = 3
"""Times the patch's voxels in the region that is read for a patch that is rotated and zoomed, at most."""

MADE_AHEAD = 3
"""Micro-batches that are on a GPU at a time: the one trained on and those made ahead."""

MOST_SIMULATED = 3
"""Maximum batch that is simulated directly."""

MAPS = 60
"""Float32 maps of a level that a step keeps at most; the default network keeps about 30."""

MAPS_OF_BLOCK = 10
"""The same of each residual block of a level of a residual encoder."""

MAPS_OF_LOGITS = 16
"""Float32 maps of each output that a step keeps at most, of all resolutions, with their target and loss."""

WIDEST_KERNELS = 6
"""All kernels of a network together have fewer weights than this many of its widest kernels."""

BYTES_PER_WEIGHT = 24
"""Weight, gradient, and up to four moments and copies that an update makes, in float32."""

OWN = 2**30
"""Bytes for all that grows with neither patch nor network."""


class TooLarge(VoxelscaleError):
    """A training step needs more memory than there is."""


def _shapes_of_statistics(
    x: Tensor, mean: Tensor, variance: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=mean.dtype), x.new_empty(x.shape[1], dtype=mean.dtype)


# A fake tensor's operation runs a kernel that computes shapes alone ("Meta"). PyTorch has none for the
# statistics that `voxelscale.model.fast.norm` takes, and would compute them on real memory instead.
_LIBRARY = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::batch_norm_update_stats", "Meta"):
    _LIBRARY.impl("batch_norm_update_stats", _shapes_of_statistics, "Meta")  # type: ignore[no-untyped-call]


def estimate_memory(
    config: Config,
    spacing: Triple,
    device: torch.device,
    *,
    channels: int = 1,
    classes: Classes = LESION,
) -> int:
    """Bytes at the peak of a training step of `config`, without running it.

    Counted are weights, gradients, the optimiser's state, the batch and every tensor of the forward and
    backward pass. A device takes more (`needed`).

    Args:
        config: its patch size, micro-batch, model, loss, optimiser, precision and activation checkpointing
            count.
        spacing: of the store, mm (z, y, x), by which pooling is planned.
        device: decides what the precision ``auto`` means.
        channels: of the image.
        classes: of the labels, by which there are outputs and a loss.
    """
    precision = choose_precision(config.train.precision, device)
    step = simulate(config, spacing, precision, channels=channels, classes=classes)
    return needed(step, device.type, config, channels)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A training step that was simulated on tensors without contents.

    Attributes:
        alive: bytes of all tensors at the peak, the optimiser's state among them.
        flop: floating-point operations of convolutions and matrix products, forward and backward; a
            multiplication and an addition are two.
        parameters: of the network.
    """

    alive: int
    flop: float
    parameters: int


def simulate(
    config: Config,
    spacing: Triple,
    precision: torch.dtype,
    *,
    channels: int = 1,
    classes: Classes = LESION,
) -> Simulation:
    """Simulate one training step; about a second, and no memory.

    Everything but weights is proportional to the batch. A large one is extrapolated from two small ones,
    because some operations are simulated sample by sample.
    """
    if (batch := config.train.batch_size) > MOST_SIMULATED:
        two, three = (
            simulate(_with_batch(config, n), spacing, precision, channels=channels, classes=classes)
            for n in (MOST_SIMULATED - 1, MOST_SIMULATED)
        )
        more = batch - MOST_SIMULATED
        alive, flop = three.alive + more * (three.alive - two.alive), three.flop * batch / MOST_SIMULATED
        return Simulation(alive=alive, flop=flop, parameters=three.parameters)
    cpu = torch.device("cpu")
    with FakeTensorMode(), Storages() as storages:
        model = make_network(config, spacing, cpu, channels=channels, classes=classes)
        forward_backward(model, config, cpu, precision, channels=channels, classes=classes)
        parameters = sum(p.numel() for p in model.parameters())
        weights = sum(p.nbytes for p in model.parameters())
    state = (_moments(config) + (config.optim.ema > 0)) * weights
    # When the weights are updated, the activations are gone.
    update = (2 + _copies_of_an_update(config)) * weights
    return Simulation(alive=max(storages.peak, update) + state, flop=storages.flop, parameters=parameters)


def _with_batch(config: Config, batch_size: int) -> Config:
    return replace(config, train=replace(config.train, batch_size=batch_size))


def needed(step: Simulation, device: str, config: Config, channels: int = 1) -> int:
    """Bytes that a device of this type (``cpu``, ``cuda``) must have for it.

    On a GPU the batches that are made ahead and a validation beside the training are there, too. What a
    processor needs for those is small beside a step.
    """
    if device == "cpu":
        return int(RESIDENT * step.alive) + FIXED
    voxels, predict = math.prod(config.data.patch_size), config.predict
    window = math.prod(predict.patch_size or config.data.patch_size)
    ahead = MADE_AHEAD * seen_at_once(config) * (channels + 1) * 4 * voxels
    region = REGION * (channels + 1) * (2 + 4) * voxels  # of one sample at a time, int16 and float32
    validation = predict.batch_size * MAPS_OF_WINDOW * config.model.settled.filters * 4 * window
    return int(RESERVED * step.alive) + ahead + region + validation


def step_memory(
    config: Config,
    spacing: Triple,
    device: torch.device,
    *,
    steps: int = 2,
    channels: int = 1,
    classes: Classes = LESION,
) -> int:
    """Bytes that real training steps of `config` took at their peak, the memory of weights included.

    On a GPU by its allocator's own count; on CPUs as the growth of the resident memory of a process
    that does nothing else and keeps freed memory as a training does (it costs a start and the steps).
    There it still grows by up to a tenth over the first ten steps.

    Raises:
        VoxelscaleError: it does not fit.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            _steps(config, spacing, device, steps, channels, classes)
            return torch.cuda.max_memory_allocated(device) - before
        except torch.OutOfMemoryError:
            raise too_much(config, None, available_memory(device)) from None
        finally:
            torch.cuda.empty_cache()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, config, spacing, steps, torch.get_num_threads(), channels, classes)
    child = context.Process(target=_measure, args=arguments, daemon=True)
    child.start()
    theirs.close()
    try:
        return int(ours.recv())
    except EOFError:
        raise too_much(config, None, available_memory(device)) from None
    finally:
        child.join()


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device.

    On a GPU what is free there and what this process's allocator holds unused; on CPUs the system's
    available memory or, where that is less, what the control groups (containers, Slurm) leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    bounds = [_system_available(), *_group_bounds()]
    return max(0, min(bounds))


def require_memory(
    config: Config,
    spacing: Triple,
    device: torch.device,
    *,
    sharers: int = 1,
    channels: int = 1,
    classes: Classes = LESION,
) -> int:
    """Refuse, before the first step, a training that will not fit.

    Args:
        sharers: ranks that share the device's memory.
        channels, classes: as for `estimate_memory`.

    Returns:
        bytes that a step needs; a bound above them where that is far below what there is.

    Raises:
        TooLarge: more than there is; the message names both, the batch and the patch. On a GPU only where
            the tensors alone are more: a step that then does not fit ends with the same message.
    """
    available = available_memory(device) // sharers
    rough = _rough_bound(config, channels, classes)
    if rough < available:
        return rough
    precision = choose_precision(config.train.precision, device)
    step = simulate(config, spacing, precision, channels=channels, classes=classes)
    least = needed(step, "cpu", config, channels) if device.type == "cpu" else step.alive
    if least > available:
        raise too_much(config, least, available)
    return least


def ran_out(config: Config, device: torch.device) -> TooLarge:
    """The error if a training that seemed to fit did not."""
    available = available_memory(device)
    if device.type == "cuda":
        available += torch.cuda.memory_allocated(device)  # most of it is what the step itself took
    return too_much(config, None, available)


def _rough_bound(config: Config, channels: int, classes: Classes) -> int:
    """Bytes that a step surely does not need, so that a small training need not be simulated."""
    model = config.model.settled
    voxels = seen_at_once(config) * math.prod(config.data.patch_size)
    # A level has twice the channels of the one above and 1 / 2^dims of its voxels: all levels' maps are
    # together at most this many of the first level's, the limit of a geometric series.
    levels = 2**model.dims / (2**model.dims - 1)
    maps = (MAPS + MAPS_OF_BLOCK * max(model.blocks, default=0)) * 4 * voxels * model.filters * levels
    more = MAPS_OF_LOGITS * 4 * voxels * (channels + classes.outputs - 2)
    widest = min(model.filters * 2 ** (model.depth - 1), model.max_filters)
    edge = max((edge for kernel in model.kernels for edge in kernel), default=model.kernel_size)
    kernels = (WIDEST_KERNELS + 2 * sum(model.blocks)) * edge**model.dims * widest**2
    return int(maps + more + BYTES_PER_WEIGHT * kernels) + OWN


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages made within it, now and at the peak, and the arithmetic."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.flop = 0.0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, storage.nbytes()).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def untrained(config: Config, spacing: Triple, channels: int, classes: Classes) -> nn.Module:
    """The network of a training before it, on the CPU, in PyTorch's own memory format."""
    patch, outputs = config.data.patch_size, classes.outputs
    model = build_model(config.model, patch, spacing, channels, outputs, regions=classes.regions)
    return checkpoint_activations(model) if config.train.checkpoint_activations else model


def make_network(
    config: Config,
    spacing: Triple,
    device: torch.device,
    *,
    channels: int = 1,
    classes: Classes = LESION,
) -> nn.Module:
    """The network as a training has it, in its memory format."""
    model = untrained(config, spacing, channels, classes)
    if device.type != "cpu":
        model.to(device)
    return to_channels_last(model) if config.train.formatted else model


def seen_at_once(config: Config) -> int:
    """Samples of a forward pass: with ``sync_batch`` those of all of a rank's virtual workers."""
    whole = config.model.norm == "sync_batch"
    return config.train.batch_size * (config.train.virtual_workers if whole else 1)


def forward_backward(
    model: nn.Module,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    *,
    channels: int = 1,
    classes: Classes = LESION,
) -> None:
    """One forward and backward pass, with the configured loss, on an empty micro-batch."""
    image = torch.zeros((seen_at_once(config), channels, *config.data.patch_size), device=device)
    target = torch.zeros_like(image[:, :1])
    if config.train.formatted:
        image = image.contiguous(memory_format=torch.channels_last_3d)
    with autocast(device, precision):
        logits = model(image)
    loss, _ = build_loss(config.loss, classes)(logits, target)
    del logits
    loss.backward()  # type: ignore[no-untyped-call]


def _steps(
    config: Config, spacing: Triple, device: torch.device, steps: int, channels: int, classes: Classes
) -> None:
    """Steps, two or more: the optimiser's state is there from the end of the first on."""
    precision = choose_precision(config.train.precision, device)
    model = make_network(config, spacing, device, channels=channels, classes=classes)
    optimizer = make_optimizer(model, config.optim)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        forward_backward(model, config, device, precision, channels=channels, classes=classes)
        optimizer.step()


def _measure(
    pipe: Any,
    config: Config,
    spacing: Triple,
    steps: int,
    threads: int,
    channels: int,
    classes: Classes,
) -> None:
    """In a process of its own: send the growth of its peak resident memory over the steps."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    # A first tiny step loads the library's parts, whose memory belongs to no patch.
    smallest = next(scaled_patches(config, spacing), config.data.patch_size)
    cpu = torch.device("cpu")
    _steps(with_patch(config, smallest), spacing, cpu, 2, channels, classes)
    _give_back()
    before, _ = _resident()
    _steps(config, spacing, cpu, steps, channels, classes)
    pipe.send(_resident()[1] - before)


def _give_back() -> None:
    """Let the C library give back what is free: a small step's would hide some of a large one's."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> tuple[int, int]:
    """Resident bytes of this process, now and at their peak."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        sizes = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        return int(sizes["VmRSS"][0]) * 1024, int(sizes["VmHWM"][0]) * 1024
    except (OSError, KeyError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        return peak, peak


def _moments(config: Config) -> int:
    """Copies of the weights that the optimiser keeps."""
    if config.optim.name == "sgd":
        return int(config.optim.used.momentum > 0)
    return 1 if config.optim.name in ("lars", "muon") else 2


def _copies_of_an_update(config: Config) -> int:
    """Copies of the weights that an update makes and drops: none where it is fused, as AdamW's."""
    return {"adamw": 0, "muon": 3}.get(config.optim.name, 2)


def too_much(config: Config, needed: int | None, available: int) -> TooLarge:
    """The error that a step needs more than there is; None: nobody knows how much."""
    patch = "x".join(map(str, config.data.patch_size))
    step = f"a step of {config.train.batch_size} patches of {patch} voxels"
    need = f"needs {gib(needed)}" if needed is not None else "does not fit"
    more = ", or set train.checkpoint_activations=true (activation checkpointing)"
    more = "" if config.train.checkpoint_activations else more
    hint = f"lower train.batch_size or data.patch_size, let --fit-memory choose the patch{more}"
    return TooLarge(f"{step} {need}; {gib(available)} are available", hint)


def gib(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.2f} GiB"


def _system_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bounds(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each memory control group above this process leaves, bytes; of version 2 and 1."""
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    bounds = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        here = top / path.strip("/")
        # In a container the path may be the host's and only the top be seen.
        for folder in [here, *here.parents]:
            if folder.is_relative_to(top):
                bounds += _left(folder / limit, folder / usage, folder / "memory.stat")
    return bounds


def _left(limit: Path, usage: Path, stat: Path) -> list[int]:
    """The limit less what is used and cannot be dropped, as pages of files can; [] without a limit."""
    try:
        most, used = int(limit.read_text()), int(usage.read_text())
        counts = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return []
    dropped = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    return [most - used + dropped]
