from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from voxelscale.config import Config, dump, load
from voxelscale.errors import VoxelscaleError
from voxelscale.model.unet import plan_pooling
from voxelscale.store import Store
from voxelscale.store.spacing import target_spacing
from voxelscale.train.memory import estimate_memory
from voxelscale.train.plan import make_plan, plan_store, plan_text


def test_nearly_isotropic_spacing_is_the_median() -> None:
    spacing, _ = target_spacing([(1, 0.7, 0.7), (2, 0.8, 0.8), (1.5, 0.6, 0.6)])
    assert spacing == (1.5, 0.7, 0.7)


def test_a_coarse_axis_takes_its_tenth_percentile() -> None:
    """Percentiles of 3, 4, 5, 6, 7 by hand: 10 % lies 0.4 of a step from 3."""
    each = [(float(z), 0.7, 0.7) for z in (3, 4, 5, 6, 7)]
    spacing, why = target_spacing(each, [(60, 512, 512)] * 5)
    assert spacing == (3.4, 0.7, 0.7)
    assert "10th percentile" in why
    # As many voxels along z as elsewhere: not treated apart.
    assert target_spacing(each, [(400, 512, 512)] * 5)[0] == (5.0, 0.7, 0.7)


def test_it_fits_and_the_next_does_not(tiny: Config, store: Store, tmp_path: Path) -> None:
    measured: dict[tuple[tuple[int, ...], int, int], int] = {}

    def measure(config: Config) -> int:
        key = (config.data.patch_size, config.model.depth, config.train.batch_size)
        measured[key] = estimate_memory(config, store.spacing, torch.device("cpu"))
        return measured[key]

    small = measure(replace(tiny, data=replace(tiny.data, patch_size=(16, 16, 16))))
    budget = int(small * 1.3)
    measured.clear()
    plan = make_plan(tiny, store, measure, budget)
    assert plan.memory <= 0.9 * budget
    larger = [
        n for (p, _, b), n in measured.items() if b == 2 and math.prod(p) > math.prod(plan.patch_size)
    ]
    assert larger
    assert min(larger) > 0.9 * budget
    assert plan == make_plan(tiny, store, measure, budget)
    pools = np.prod(plan_pooling(plan.patch_size, store.spacing, plan.depth), axis=0)
    assert not np.any(np.asarray(plan.patch_size) % pools)
    (tmp_path / "plan.yaml").write_text(plan_text(plan, tiny))
    loaded = load(tmp_path / "plan.yaml")
    assert loaded.data.patch_size == plan.patch_size
    assert (loaded.model.depth, loaded.train.batch_size) == (plan.depth, plan.batch_size)
    assert loaded.model.filters == tiny.model.filters
    assert all(word in " ".join(plan.reasons) for word in ("Spacing", "Patch", "Depth", "Batch", "Memory"))


def test_too_little_memory_is_told(tiny: Config, store: Store) -> None:
    with pytest.raises(VoxelscaleError, match="no patch fits"):
        make_plan(tiny, store, lambda config: 2, 1)


def test_a_training_takes_the_plan_as_it_is(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = replace(tiny, prepare=replace(tiny.prepare, memory_gib=0.1))
    plan = plan_store(config, store)
    assert plan.memory <= 0.1 * 2**30
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(plan, config))
    (tmp_path / "tiny.yaml").write_text(dump(load(path, (), config)))
    command = [
        sys.executable,
        "-m",
        "voxelscale.cli",
        "-q",
        "train",
        str(store.path),
        str(tmp_path / "run"),
    ]
    command += ["--config", str(tmp_path / "tiny.yaml"), "--set", f"train.samples={plan.batch_size}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
