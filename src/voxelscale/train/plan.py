"""What to train with for the memory at hand: `prepare`'s plan, and the patch of ``--fit-memory``.

The plan's patch follows Isensee et al., "nnU-Net: a self-configuring method for deep learning-based
biomedical image segmentation" (2021), in its supplementary note on dynamic design choices; but a step's
memory is estimated by `voxelscale.train.memory`, not by a reference network's feature maps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, ModelConfig
from voxelscale.config.renamed import with_first_names
from voxelscale.console import notice
from voxelscale.device import default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic
from voxelscale.geometry import IntTriple, Triple
from voxelscale.model.unet import plan_kernels, plan_pooling
from voxelscale.ranks.place import fill
from voxelscale.store import PLAN_FILE, Store, open_store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.memory import available_memory, estimate_memory, gib, step_memory, too_much
from voxelscale.train.patch_sizes import isotropic_patches, scaled_patches, with_patch

LEAST_BATCH, MOST_BATCH = 2, 16
CPU_VOXELS = 48**3
"""Voxels of a patch on a CPU at most (measured: docs/benchmarks.md, "Patches on a CPU")."""
DATA_SHARE = 0.05
"""A batch covers at most this share of the training voxels."""
PRESET_GIB = {"resenc_m": 8, "resenc_l": 24, "resenc_xl": 40}
"""Memory that the presets' patches are planned for (``gpu_memory_target_in_gb`` of nnU-Net's planners)."""
PRESET_DEEPEST, PRESET_VOXELS = 9, 512**3
"""Levels of a preset's network and voxels of its patch at most: nnU-Net bounds them by the memory alone."""
HEADROOM = 0.1
"""Share of the memory that no step is planned to use: allocators do not fill it to the last."""

Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen.

    Attributes:
        patch_size: voxels (z, y, x), multiples of their poolings.
        depth: levels of the U-Net.
        kernels: kernel of each level; () where they are all the configured one.
        batch_size: patches a worker and step.
        memory: bytes that a step then needs.
        reasons: one sentence a choice.
    """

    patch_size: IntTriple
    depth: int
    kernels: tuple[IntTriple, ...] = ()
    batch_size: int
    memory: int
    reasons: tuple[str, ...]


def make_plan(
    config: Config,
    store: Store,
    measure: Callable[[Config], int],
    budget: int,
    *,
    on_cpu: bool = False,
) -> Plan:
    """The largest patch that the memory takes, its depth and its batch.

    Args:
        config: its model (but the depth), optimiser and precision are what is planned for.
        measure: bytes of a config's training step.
        budget: bytes of one device.
        on_cpu: what is planned for is a CPU. It takes as long for a patch in a batch as alone, and seconds
            for a large one, so the batch is the smallest and the patch has at most `CPU_VOXELS`.

    Raises:
        VoxelscaleError: not even the smallest patch fits.
    """
    measure = cache(measure)  # the chosen step is asked for again
    cases = store.split("train") or store.cases
    shape = np.median(np.asarray([info.shape for info in cases], np.float64), axis=0)
    usable = budget * (1 - HEADROOM)
    bounds = (PRESET_DEEPEST, PRESET_VOXELS) if config.model.preset in PRESET_GIB else ()
    useful = list(isotropic_patches(shape.tolist(), store.spacing, config.model.dims, *bounds))
    ladder = [c for c in useful if math.prod(c[0]) <= CPU_VOXELS] if on_cpu else useful

    def planned(patch: IntTriple, depth: int, batch: int) -> Config:
        return _with(config, store.spacing, patch, depth, batch)

    fitting = _fitting(ladder, lambda choice: measure(planned(*choice, LEAST_BATCH)) <= usable)
    if not fitting:
        smallest = " x ".join(map(str, ladder[0][0]))
        narrower = "" if config.model.preset in PRESET_GIB else ", or lower model.filters"
        hint = f"raise prepare.memory_gib{narrower}"
        raise VoxelscaleError(f"plan: no patch fits into {gib(budget)}, not even {smallest}", hint)
    patch, depth = fitting[-1]
    voxels = sum(math.prod(c.shape) for c in cases)
    most = LEAST_BATCH if on_cpu else min(MOST_BATCH, int(DATA_SHARE * voxels / math.prod(patch)))
    batch = _batch(most, lambda n: measure(planned(patch, depth, n)), usable)
    chosen = planned(patch, depth, batch)
    memory = measure(chosen)
    bound = "it holds the median scan or all that is useful"
    if len(ladder) < len(useful):
        bound = "a CPU takes seconds for a larger one and would make few updates"
    if len(fitting) < len(ladder):
        bound = "of the memory"
    return Plan(
        patch_size=patch,
        depth=depth,
        kernels=chosen.model.kernels,
        batch_size=batch,
        memory=memory,
        reasons=_reasons(store, chosen, shape, (memory, budget), bound),
    )


def plan_store(config: Config, store: Store) -> Plan:
    """Plan for the memory that `config.prepare.memory_gib` says, and write the store's ``plan.yaml``.

    Where that is 0, it is the preset's, or else what the device has that a training here would use: where
    that is a CPU, patch and batch are small.

    Raises:
        VoxelscaleError: not even the smallest patch fits, or the file cannot be written.
    """
    device, given = default_device(), _given_gib(config)
    budget = int(given * 2**30) or available_memory(device)
    measure = partial(
        estimate_memory,
        spacing=store.spacing,
        device=device,
        channels=len(store.channels),
        classes=store.classes,
    )
    plan = make_plan(config, store, measure, budget, on_cpu=not given and device.type == "cpu")
    said = plan_text(plan, config)
    _put_aside(store.path / PLAN_FILE, said)
    text = said + _made_for(config, store)
    write_atomic(store.path / PLAN_FILE, text + _as_written(text))
    return plan


def _given_gib(config: Config) -> float:
    """The memory to plan for, as somebody says it; 0: nobody does, it is this machine's device's."""
    return config.prepare.memory_gib or PRESET_GIB.get(config.model.preset, 0)


def _made_for(config: Config, store: Store) -> str:
    """How the line begins by which a plan is known to be of this data, config and device (its memory)."""
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sections = with_first_names(
        {n: asdict(getattr(config, n)) for n in ("data", "model", "optim", "train")}
    )
    cases = [[info.case, info.split, info.key] for info in store.cases]
    of = [sections, _given_gib(config) or name, store.spacing, cases]
    return f"# Made for {digest_of(of)[:16]}"


def _as_written(text: str) -> str:
    """How the line ends, by which a plan is known that nobody has changed."""
    words = "prepare replaces it where data, settings or the device have changed"
    return f" as {digest_of(text)[:16]}; {words}.\n"


def _put_aside(path: Path, new: str = "") -> None:
    """Keep a plan that is about to go under another name, unless it is as it was written, or as the new."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    before, found, _ = text.rpartition(" as ")
    if text != new and not (found and text == before + _as_written(before)):
        aside = path.with_stem(f"{path.stem}.before")
        path.replace(aside)
        notice(f"{path}: the previous one was edited, or made by an earlier version; kept as {aside.name}")


def report_plan(config: Config, store: Path) -> None:
    """Plan for a store that was just prepared and report it; where that fails, it is only a warning.

    A plan that was made for the same data, config and device stays as it is.
    """
    path, opened = store / PLAN_FILE, open_store(store)
    if path.is_file() and _made_for(config, opened).encode() in path.read_bytes():
        return
    try:
        plan = plan_store(config, opened)
    except VoxelscaleError as error:
        notice(f"warning: no plan: {error.message}")
        _put_aside(path)
        path.unlink(missing_ok=True)  # another's, of before
        return
    for line in plan.reasons:
        notice(line)
    notice(f"plan in {path}; to train with it: voxelscale train {store} run/ --config {path}")


def fit_to_memory(config: Config, store: Path) -> Config:
    """The config with the largest patch, of its own patch's proportions, whose training fits here.

    Raises:
        VoxelscaleError: none fits, or this is one of several ranks, which could find different ones.
    """
    fill()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise VoxelscaleError(
            "--fit-memory: cannot be found by several processes at once",
            "find it with one process, then give torchrun --set data.patch_size=...",
        )
    opened, device = open_fold(store, config.data.fold), default_device()
    shapes = np.asarray([info.shape for info in opened.split("train") or opened.cases])
    limit = [round(float(n)) for n in np.median(shapes, axis=0)]
    sharers = 1 if device.type == "cuda" else max(1, config.train.ranks)
    patch = fit_patch(
        config,
        opened.spacing,
        device,
        sharers=sharers,
        limit=limit,
        channels=len(opened.channels),
        classes=opened.classes,
    )
    notice(f"the largest patch that fits: {' x '.join(map(str, patch))} voxels")
    return with_patch(config, patch)


def fit_patch(
    config: Config,
    spacing: Triple,
    device: torch.device,
    *,
    sharers: int = 1,
    limit: Sequence[int] | None = None,
    available: int | None = None,
    verify: bool = True,
    channels: int = 1,
    classes: Classes = LESION,
) -> IntTriple:
    """The largest patch, of the configured one's proportions, whose training step fits in the memory.

    Every axis is a multiple of its pooling strides. Found by bisection on `estimate_memory`, then tried.

    Args:
        sharers: ranks that share the device's memory.
        limit: voxels (z, y, x) beyond which no axis is to grow, as the scans' shape.
        available: bytes; None: `available_memory`.
        verify: whether to run real steps and to shrink until they fit.
        channels: of the images.
        classes: of the labels.

    Raises:
        VoxelscaleError: not even the smallest patch fits.
    """
    share = (available_memory(device) if available is None else available) // sharers
    budget = int(share * (1 - HEADROOM))
    kind: dict[str, Any] = {"channels": channels, "classes": classes}

    def estimated(patch: IntTriple) -> bool:
        return estimate_memory(with_patch(config, patch), spacing, device, **kind) <= budget

    def tried(patch: IntTriple) -> bool:
        try:
            return step_memory(with_patch(config, patch), spacing, device, **kind) <= share
        except VoxelscaleError:
            return False

    ladder = list(scaled_patches(config, spacing, limit))
    for patch in reversed(_fitting(ladder, estimated)):
        if not verify or tried(patch):
            return patch
    smallest = with_patch(config, ladder[0]) if ladder else config
    raise too_much(smallest, estimate_memory(smallest, spacing, device, **kind), share)


def _fitting(ladder: Sequence[Choice], fits: Callable[[Choice], bool]) -> Sequence[Choice]:
    """The choices that fit, of a ladder from small to large.

    By doubling, then bisection: what is far too large takes long to simulate.
    """
    low, high = 0, 1
    while high <= len(ladder) and fits(ladder[high - 1]):
        low, high = high, high * 2
    high = min(high, len(ladder) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(ladder[middle - 1]) else (low, middle)
    return ladder[:low]


def plan_text(plan: Plan, config: Config) -> str:
    """The plan as YAML that `voxelscale train --config` takes, the reasons as comments."""
    default = ModelConfig()
    model = {f.name: getattr(config.model, f.name) for f in fields(ModelConfig)}
    model = {name: value for name, value in model.items() if value != getattr(default, name)}
    levels = config.model.of_depth(plan.depth)
    lists = {"kernels": [list(kernel) for kernel in plan.kernels], "blocks": list(levels.blocks)}
    model |= {name: value for name, value in lists.items() if value or name in model}
    tree = {
        "data": {"patch_size": list(plan.patch_size)},
        "model": {**model, "depth": plan.depth},
        "train": {"batch_size": plan.batch_size},
    }
    comments = "".join(f"# {line}\n" for line in plan.reasons)
    return comments + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def _batch(most: int, measure: Callable[[int], int], usable: float) -> int:
    """The smallest one at least; more where memory is left."""
    if most <= LEAST_BATCH:
        return LEAST_BATCH
    least, next_one = measure(LEAST_BATCH), measure(LEAST_BATCH + 1)
    # Everything but weights is proportional to the batch.
    more = int((usable - least) / max(1, next_one - least))
    return max(LEAST_BATCH, min(most, LEAST_BATCH + more))


def _with(config: Config, spacing: Triple, patch: IntTriple, depth: int, batch: int) -> Config:
    model = config.model.of_depth(depth)
    return replace(
        config,
        data=replace(config.data, patch_size=patch),
        model=replace(model, kernels=_kernels(config.model, spacing, patch, depth)),
        train=replace(config.train, batch_size=batch),
    )


def _kernels(model: ModelConfig, spacing: Triple, patch: IntTriple, depth: int) -> tuple[IntTriple, ...]:
    """Kernel (z, y, x) of each level; () where they are all the configured one."""
    dims, edge = model.dims, model.kernel_size
    pools = plan_pooling(patch[-dims:], spacing[-dims:], depth)
    kernels = plan_kernels(pools, spacing[-dims:], edge)
    if all(kernel == (edge,) * dims for kernel in kernels):
        return ()
    return tuple((edge, *kernel) if dims == 2 else kernel for kernel in kernels)  # type: ignore[misc]


def _reasons(
    store: Store, chosen: Config, shape: np.ndarray, memory: tuple[int, int], bound: str
) -> tuple[str, ...]:
    patch, model, batch = chosen.data.patch_size, chosen.model, chosen.train.batch_size
    mm = " x ".join(f"{n * s:.0f}" for n, s in zip(patch, store.spacing, strict=True))
    whole = " x ".join(f"{n:.0f}" for n in shape)
    shortest = min(n for n in patch if n > 1)
    coarse = [" x ".join(map(str, kernel)) for kernel in model.kernels]
    flat = (
        f"Kernels {', '.join(coarse)}: 1 along an axis until it is less than twice as coarse as the finest."
    )
    return (
        f"Spacing {' x '.join(f'{s:g}' for s in store.spacing)} mm (z, y, x): as the store has it.",
        f"Patch {' x '.join(map(str, patch))} voxels = {mm} mm: as long in mm along every axis as scans of "
        f"{whole} voxels (median) allow; not larger because {bound}.",
        f"Depth {model.depth}: pooled while every level still halves an axis to 4 voxels or more, coarse "
        f"axes later (shortest edge {shortest}).",
        *([flat] if coarse else []),
        f"Batch {batch}: patch before batch; at least {LEAST_BATCH}, at most {DATA_SHARE:.0%} of the "
        f"training voxels; {LEAST_BATCH} on CPUs, where a larger batch only makes fewer updates.",
        f"Memory: a step needs {gib(memory[0])} of {gib(memory[1])}, with {model.settled.filters} "
        f"filters and {chosen.optim.name}.",
    )
