from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from voxelscale.channels import Channel
from voxelscale.classes import Classes
from voxelscale.config import Config, dump, from_dict, load
from voxelscale.errors import VoxelscaleError
from voxelscale.model.unet import plan_pooling
from voxelscale.store import CaseInfo, Store, write_table
from voxelscale.store.spacing import target_spacing
from voxelscale.train.memory import estimate_memory
from voxelscale.train.plan import fit_to_memory, make_plan, plan_store, plan_text, report_plan


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


def test_too_little_memory_is_reported(tiny: Config, store: Store) -> None:
    with pytest.raises(VoxelscaleError, match="no patch fits"):
        make_plan(tiny, store, lambda config: 2, 1)


def test_a_training_takes_the_plan_as_it_is(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = replace(tiny, prepare=replace(tiny.prepare, memory_gib=0.05))
    plan = plan_store(config, store)
    assert plan.memory <= 0.05 * 2**30
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


# Kernels, presets, channels and classes


def store_of(shape: tuple[int, int, int], spacing: tuple[float, float, float], **kind: Any) -> Store:
    """A store's table of ten scans."""
    info = CaseInfo(
        case="a",
        patient="a",
        split="train",
        shape=shape,
        affine=tuple(map(tuple, np.eye(4))),
        source_spacing=spacing,
        lesion_volumes_mm3=(),
        intensities={},
        key="",
    )
    return Store(path=Path(), spacing=spacing, fingerprint={}, cases=(info,) * 10, **kind)


def memory_of_maps(config: Config) -> int:
    """Bytes that grow with patch and batch alone."""
    return 400 * config.train.batch_size * math.prod(config.data.patch_size)


def test_coarse_axes_have_flat_kernels_at_first(tmp_path: Path) -> None:
    """As nnU-Net plans for its prostate scans; nearly isotropic ones keep the one kernel."""
    config = Config()
    plan = make_plan(config, store_of((20, 320, 320), (3.6, 0.625, 0.625)), memory_of_maps, 2**31)
    assert plan.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert len(plan.kernels) == plan.depth
    assert any(line.startswith("Kernels 1 x 3 x 3, 1 x 3 x 3, 3 x 3 x 3") for line in plan.reasons)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(plan, config))
    assert load(path).model.kernels == plan.kernels
    near = make_plan(config, store_of((120, 160, 160), (1.25, 0.7, 0.7)), memory_of_maps, 2**31)
    assert near.kernels == ()
    assert "ernel" not in plan_text(near, config)
    slices = from_dict({"model": {"dims": 2}, "data": {"patch_size": [1, 64, 64]}})
    assert make_plan(slices, store_of((20, 320, 320), (3.6, 0.6, 0.6)), memory_of_maps, 2**31).kernels == ()
    coarse = make_plan(slices, store_of((20, 64, 320), (3.6, 2.4, 0.6)), memory_of_maps, 2**31)
    assert coarse.kernels[0] == (3, 1, 3)


def test_a_preset_is_planned_for_its_own_memory_and_no_other_bound(tmp_path: Path) -> None:
    store = store_of((252, 512, 512), (1.24, 0.79, 0.79))
    config = from_dict({"model": {"preset": "resenc_xl"}})
    plan = make_plan(config, store, memory_of_maps, 16 * 2**30)
    assert math.prod(plan.patch_size) > 160**3
    assert plan.depth == 7
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(plan, config))
    again = load(path).model
    assert again.preset == "resenc_xl"
    assert again.settled.blocks == (1, 3, 4, 6, 6, 6, 6)
    with pytest.raises(VoxelscaleError) as caught:
        make_plan(config, store, memory_of_maps, 1)
    assert "model.filters" not in caught.value.hint


@pytest.mark.parametrize(("preset", "target"), [("resenc_m", 8), ("resenc_l", 24), ("resenc_xl", 40)])
def test_the_memory_of_each_preset(
    preset: str, target: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voxelscale.train.plan.estimate_memory", lambda config, **_: memory_of_maps(config))
    here = replace(store, path=tmp_path)
    config = from_dict({"model": {"preset": preset}})
    assert f"of {target:.2f} GiB" in plan_store(config, here).reasons[-1]
    small = replace(config, prepare=replace(config.prepare, memory_gib=2.0))
    assert "of 2.00 GiB" in plan_store(small, here).reasons[-1]


def test_prepare_plans_again_where_data_or_settings_have_changed(
    tiny: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voxelscale.train.plan.estimate_memory", lambda config, **_: memory_of_maps(config))
    here, path = replace(store, path=tmp_path), tmp_path / "plan.yaml"
    small = replace(tiny, prepare=replace(tiny.prepare, memory_gib=0.1))

    def planned(config: Config, store: Store) -> str:
        write_table(store)
        report_plan(config, tmp_path)
        return path.read_text() if path.is_file() else ""

    usual = replace(tiny, prepare=replace(tiny.prepare, memory_gib=0.2))
    first, aside = planned(usual, here), tmp_path / "plan.before.yaml"
    assert "of 0.10 GiB" in planned(small, here)
    fewer = replace(here, cases=here.cases[:3])
    assert planned(small, fewer)
    path.write_text(first.rpartition("# Made for ")[0])  # as an earlier version wrote it
    assert planned(usual, here) == first
    assert not aside.exists()
    # What somebody has changed is not lost, whatever its encoding; nor a plan of an earlier version.
    for mine in (first.encode() + b"# mein Pr\xfcfling\n", first.rpartition("#")[0].encode()):
        path.write_bytes(mine)
        if b"# Made" in mine:
            report_plan(usual, tmp_path)
            assert path.read_bytes() == mine
        assert "of 0.10 GiB" in planned(small, here)
        assert aside.read_bytes() == mine
        planned(usual, here)
    planned(tiny, here)
    with monkeypatch.context() as patch:
        patch.setattr("voxelscale.train.plan.available_memory", lambda device: 2**33)
        patch.setattr("voxelscale.train.plan.default_device", lambda: torch.device("cuda"))
        for name in ("a GPU", "a larger GPU"):
            patch.setattr("torch.cuda.get_device_name", lambda _, name=name: name)
            before = path.read_text()
            assert planned(tiny, here) != before, "the memory is another"
    assert planned(replace(tiny, prepare=replace(tiny.prepare, memory_gib=1e-6)), fewer) == ""


def test_a_small_patch_and_batch_are_planned_for_cpus_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody names the memory, it is that of the device to train on, whatever this one is."""
    planned = {}
    monkeypatch.setattr("voxelscale.train.plan.estimate_memory", lambda config, **_: memory_of_maps(config))
    monkeypatch.setattr("voxelscale.train.plan.available_memory", lambda device: 2**33)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    many = replace(store_of((96, 128, 128), (2.0, 1.0, 1.0)), path=tmp_path)
    many = replace(many, cases=tuple(replace(many.cases[0], case=f"case_{n}") for n in range(200)))
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr("voxelscale.train.plan.default_device", lambda kind=kind: torch.device(kind))
        planned[kind] = plan_store(Config(), many)
    assert (planned["cpu"].patch_size, planned["cpu"].batch_size) == ((28, 56, 56), 2)
    assert "a CPU takes seconds for a larger one" in planned["cpu"].reasons[1]
    assert (planned["cuda"].patch_size, planned["cuda"].batch_size) == ((96, 128, 128), 10)
    named = Config(prepare=replace(Config().prepare, memory_gib=8.0))
    monkeypatch.setattr("voxelscale.train.plan.default_device", lambda: torch.device("cpu"))
    assert plan_store(named, many).patch_size == planned["cuda"].patch_size


def test_blocks_of_levels_follow_the_planned_depth(tmp_path: Path) -> None:
    config = from_dict({"model": {"depth": 3, "blocks": [1, 2, 3]}})
    plan = make_plan(config, store_of((96, 96, 96), (1.0, 1.0, 1.0)), memory_of_maps, 2**31)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(plan, config))
    assert load(path).model.blocks == (1, 2, *[3] * (plan.depth - 2))


def test_the_stores_channels_and_classes_count(store: Store, tmp_path: Path) -> None:
    """With many classes less fits than with one."""
    names = tuple(f"class{n}" for n in range(1, 31))
    many = Classes(names=names, values=tuple((n,) for n in range(1, 31)))
    config = from_dict({"model": {"filters": 4}, "prepare": {"memory_gib": 0.05}})
    wide = replace(store, classes=many, channels=(Channel(), Channel(name="PET", scheme="zscore")))
    one, other = (plan_store(config, replace(each, path=tmp_path)) for each in (store, wide))
    assert math.prod(other.patch_size) * other.batch_size < math.prod(one.patch_size) * one.batch_size
    assert other.memory <= 0.05 * 2**30


def test_a_patch_for_a_store_without_training_cases(
    tiny: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not what is wrong with it: the training says that there are no cases."""
    cases = tuple(replace(info, split="test") for info in store.cases)
    write_table(replace(store, path=tmp_path, cases=cases))
    monkeypatch.setattr("voxelscale.train.plan.fit_patch", lambda *_, limit, **__: tuple(limit))
    median = np.median([info.shape for info in cases], axis=0)
    assert fit_to_memory(tiny, tmp_path).data.patch_size == tuple(map(round, median.tolist()))
