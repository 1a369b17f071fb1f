"""What to train with, planned from a data set's fingerprint and the available memory, and why.

The rule for the patch follows Isensee et al., "nnU-Net: a self-configuring method for deep
learning-based biomedical image segmentation" (2021), in its supplementary note on dynamic design choices;
memory is estimated by `voxelscale.train.memory` instead of by a reference network's feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from voxelscale.config import Config, ModelConfig
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.geometry import IntTriple, Triple

if TYPE_CHECKING:
    from voxelscale.store import Store

DEEPEST = 6
MOST_VOXELS = 160**3
"""A patch is no larger even where memory is plenty: a step would take long and see little variety."""
MOST_BATCH = 16
DATA_SHARE = 0.05
"""A batch covers at most this share of the training voxels."""
HEADROOM = 0.1
"""Share of the budget that is left free."""
PLAN_FILE = "plan.yaml"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen.

    Attributes:
        patch_size: voxels (z, y, x), multiples of their poolings.
        depth: levels of the U-Net.
        batch_size: patches a worker and step.
        memory: bytes that a step then needs.
        reasons: one sentence a choice.
    """

    patch_size: IntTriple
    depth: int
    batch_size: int
    memory: int
    reasons: tuple[str, ...]


def make_plan(config: Config, store: Store, measure: Callable[[Config], int], budget: int) -> Plan:
    """The largest patch that the memory takes, its depth and its batch.

    Args:
        config: its model (but the depth), optimiser and precision are what is planned for.
        measure: bytes of a config's training step.
        budget: bytes of one device.

    Raises:
        VoxelscaleError: not even the smallest patch fits.
    """
    cases = store.split("train") or store.cases
    shape = np.median(np.asarray([info.shape for info in cases], np.float64), axis=0)
    room = budget * (1 - HEADROOM)
    ladder = _ladder(shape, store.spacing, config)
    # Each step of the ladder is larger than the one before it, so bisection finds the last that fits.
    low, high = 0, len(ladder)
    while high > low:
        middle = (low + high) // 2
        if measure(_with(config, *ladder[middle], 2)) <= room:
            low = middle + 1
        else:
            high = middle
    if not low:
        least = " x ".join(map(str, ladder[0][0]))
        hint = "raise prepare.memory_gib, or lower model.filters"
        raise VoxelscaleError(f"plan: no patch fits into {_gib(budget)}, not even {least}", hint)
    patch, depth = ladder[low - 1]
    batch = _batch(config, patch, depth, measure, room, sum(math.prod(c.shape) for c in cases))
    memory = measure(_with(config, patch, depth, batch))
    bound = "of the memory" if low < len(ladder) else "it holds the median scan or all that is useful"
    reasons = _reasons(store, config, shape, (patch, depth, batch), (memory, budget), bound)
    return Plan(patch_size=patch, depth=depth, batch_size=batch, memory=memory, reasons=reasons)


def plan_store(config: Config, store: Store) -> Plan:
    """Plan for the memory that `config.prepare.memory_gib` says, and write the store's ``plan.yaml``.

    Loads torch. What is planned for is the device that a training here would use.

    Raises:
        VoxelscaleError: not even the smallest patch fits, or the file cannot be written.
    """
    from voxelscale.device import default_device
    from voxelscale.train.memory import available_memory, estimate_memory

    device = default_device()
    budget = int(config.prepare.memory_gib * 2**30) or available_memory(device)
    plan = make_plan(config, store, lambda c: estimate_memory(c, store.spacing, device), budget)
    write_atomic(store.path / PLAN_FILE, plan_text(plan, config))
    return plan


def tell_plan(config: Config, store: Path, *, unchanged: bool) -> None:
    """Plan for a store that was just prepared and say what came of it, which no fault of it stops.

    Args:
        unchanged: nothing was prepared again, so that an existing plan is kept.
    """
    from voxelscale.console import notice
    from voxelscale.store import open_store

    path = store / PLAN_FILE
    if unchanged and path.is_file():
        return
    try:
        plan = plan_store(config, open_store(store))
    except VoxelscaleError as error:
        notice(f"warning: no plan: {error.message}")
        return
    for line in plan.reasons:
        notice(line)
    notice(f"plan in {path}; to train with it: voxelscale train {store} run/ --config {path}")


def plan_text(plan: Plan, config: Config) -> str:
    """The plan as YAML that `voxelscale train --config` takes, the reasons as comments."""
    default = ModelConfig()
    model = {f.name: getattr(config.model, f.name) for f in fields(ModelConfig)}
    model = {name: value for name, value in model.items() if value != getattr(default, name)}
    tree = {
        "data": {"patch_size": list(plan.patch_size)},
        "model": {**model, "depth": plan.depth},
        "train": {"batch_size": plan.batch_size},
    }
    comments = "".join(f"# {line}\n" for line in plan.reasons)
    return comments + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def _ladder(
    shape: Sequence[float] | np.ndarray, spacing: Triple, config: Config
) -> list[tuple[IntTriple, int]]:
    """Patches with their depths, small to large: as long in mm along every axis as the scans allow."""
    found: list[tuple[IntTriple, int]] = []
    finest = min(spacing[-config.model.dims :])
    for count in range(8, 513, 4):
        aim = [min(count * finest / s, float(n)) for s, n in zip(spacing, shape, strict=True)]
        if config.model.dims == 2:
            aim[0] = 1.0
        patch, depth = _rounded(aim, spacing, config.model.dims)
        larger = not found or math.prod(patch) > math.prod(found[-1][0])
        if larger and (not found or math.prod(patch) <= MOST_VOXELS):
            found.append((patch, depth))
    return found


def _rounded(aim: Sequence[float], spacing: Triple, dims: int) -> tuple[IntTriple, int]:
    """A patch near `aim` that its poolings divide, and the depth to which every pooling halves one."""
    from voxelscale.model.unet import plan_pooling

    sizes = [max(1, round(n)) for n in aim]
    pools = plan_pooling(sizes[-dims:], spacing[-dims:], DEEPEST)
    depth = 1 + sum(max(stride) > 1 for stride in pools)
    whole = [1] * (3 - dims) + [math.prod(stride[axis] for stride in pools) for axis in range(dims)]
    z, y, x = (max(1, n // k) * k for n, k in zip(sizes, whole, strict=True))
    return (z, y, x), depth


def _batch(
    config: Config, patch: IntTriple, depth: int, measure: Callable[[Config], int], room: float, voxels: int
) -> int:
    """Two patches at least; more where memory is left and the data set is large enough for them."""
    most = int(min(MOST_BATCH, max(2, DATA_SHARE * voxels / math.prod(patch))))
    if most == 2:
        return 2
    two, three = (measure(_with(config, patch, depth, n)) for n in (2, 3))
    # Everything but weights is proportional to the batch.
    return max(2, min(most, 2 + int((room - two) / max(1, three - two))))


def _with(config: Config, patch: IntTriple, depth: int, batch: int) -> Config:
    return replace(
        config,
        data=replace(config.data, patch_size=patch),
        model=replace(config.model, depth=depth),
        train=replace(config.train, batch_size=batch),
    )


def _reasons(
    store: Store,
    config: Config,
    shape: np.ndarray,
    chosen: tuple[IntTriple, int, int],
    memory: tuple[int, int],
    bound: str,
) -> tuple[str, ...]:
    patch, depth, batch = chosen
    mm = " x ".join(f"{n * s:.0f}" for n, s in zip(patch, store.spacing, strict=True))
    whole = " x ".join(f"{n:.0f}" for n in shape)
    least = min(n for n in patch if n > 1)
    return (
        f"Spacing {' x '.join(f'{s:g}' for s in store.spacing)} mm (z, y, x): as the store has it.",
        f"Patch {' x '.join(map(str, patch))} voxels = {mm} mm: as long in mm along every axis as scans of "
        f"{whole} voxels (median) allow; not larger because {bound}.",
        f"Depth {depth}: pooled while every level still halves an axis to 4 voxels or more, coarse axes "
        f"later (shortest edge {least}).",
        f"Batch {batch}: patch before batch; at least 2, at most {DATA_SHARE:.0%} of the training voxels.",
        f"Memory: a step needs {_gib(memory[0])} of {_gib(memory[1])}, with {config.model.filters} filters "
        f"and {config.optim.name}.",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
