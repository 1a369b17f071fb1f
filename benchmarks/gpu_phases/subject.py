"""Something to train on: a store of made-up scans, in memory where Blosc2 is missing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_phases.common import Setting, relative
from numpy.typing import NDArray
from torch import Tensor

import voxelscale.store as stores
from voxelscale.config import Config, IntTriple, from_dict
from voxelscale.store import CaseInfo, Store, write_case, write_table
from voxelscale.store.fingerprint import fingerprint, open_fold
from voxelscale.train.engine import Engine
from voxelscale.train.loop import joined, patch_task

CASES = {"train": 4, "val": 2}
BALLS = 3


def balls(shape: Sequence[int], seed: int, highest: int) -> NDArray[np.uint8]:
    """Labels (z, y, x): a few balls, of values from 1 to `highest` in turn."""
    random = np.random.default_rng([seed, 77])
    mask = np.zeros(shape, np.uint8)
    for number in range(BALLS):
        centre = random.uniform(0.2, 0.8, 3) * shape
        radius = random.uniform(0.08, 0.16) * min(shape)
        axes = np.ogrid[tuple(slice(n) for n in shape)]
        distance = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
        mask[distance < max(radius, 1.2) ** 2] = 1 + number % highest
    return mask


@lru_cache(maxsize=8)
def case_of(number: int, shape: IntTriple) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image (HU) and mask of a made-up scan: noise like lung's, with brighter balls."""
    mask = balls(shape, number, 1)
    image = np.random.default_rng(number).normal(-700, 120, shape).astype(np.float32) + 600.0 * mask
    return image.astype(np.int16), mask


class Kept(np.ndarray[Any, np.dtype[np.int16]]):
    """A case in memory that is read as a Blosc2 array is: what is cut out of it is a copy."""

    schunk: Any

    def __getitem__(self, key: Any) -> Any:
        return np.array(self.view(np.ndarray)[key])


def make_store(folder: Path, shape: IntTriple) -> str:
    """Write a store, or only its table where Blosc2 is missing: the cases are then kept in memory.

    To be called by every process that reads it.

    Returns:
        where the cases are: ``files`` or ``memory``.
    """
    splits = [split for split, count in CASES.items() for _ in range(count)]
    cases = tuple(_info(number, split, shape) for number, split in enumerate(splits))
    store = Store(path=folder, spacing=(1.0, 1.0, 1.0), fingerprint=fingerprint(cases), cases=cases)
    files = _has_blosc2()
    if not files:
        kept = {info.case: _kept(number, shape) for number, info in enumerate(cases)}
        vars(stores)["open_case"] = lambda path, case: kept[case]
    if not (folder / "dataset.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number, info in enumerate(cases) if files else ():
            image, mask = case_of(number, shape)
            write_case(folder, info, image, mask, [np.flatnonzero(mask)])
        write_table(store)
    return "files" if files else "memory"


def _has_blosc2() -> bool:
    try:
        importlib.import_module("blosc2")
    except ImportError:
        return False
    return True


def _info(number: int, split: str, shape: IntTriple) -> CaseInfo:
    image, mask = case_of(number, shape)
    lesion = image[mask > 0]
    low, middle, high = (float(v) for v in np.percentile(lesion, [0.5, 50, 99.5]))
    affine = ((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    return CaseInfo(
        case=f"case{number}",
        patient=f"case{number}",
        split=split,
        shape=shape,
        affine=affine,
        source_spacing=(1.0, 1.0, 1.0),
        lesion_volumes_mm3=(float(mask.sum()),),
        intensities={
            **{"count": len(lesion), "mean": float(lesion.mean()), "std": float(lesion.std())},
            **{"percentile_00_5": low, "percentile_50": middle, "percentile_99_5": high},
        },
        key=f"{number} {shape}",
    )


def _kept(number: int, shape: IntTriple) -> Kept:
    image, mask = case_of(number, shape)
    array = np.stack([image, mask.astype(np.int16)]).view(Kept)
    array.schunk = SimpleNamespace(vlmeta={"lesions": [np.flatnonzero(mask).astype("<i4").tobytes()]})
    return array


def shape_of(setting: Setting) -> IntTriple:
    """Of the scans that phases train on."""
    return (24, 32, 32) if setting.tiny else (160, 256, 256)


def small_config(setting: Setting, **sections: dict[str, Any]) -> Config:
    """A network small enough to be trained many times, in float32; sections are laid over."""
    patch, filters = ([16] * 3, 4) if setting.tiny else ([48] * 3, 16)
    tree: dict[str, dict[str, Any]] = {
        "data": {"patch_size": patch},
        "model": {"depth": 2 if setting.tiny else 3, "filters": filters},
        "train": {
            **{"precision": "fp32", "channels_last": True, "validate_every": 0},
            **({"threads": 1} if setting.tiny else {}),
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return from_dict(tree)


def large_config(setting: Setting, **sections: dict[str, Any]) -> Config:
    """The network and patch that the speed is measured with."""
    if setting.tiny:
        return small_config(setting, **sections)
    tree: dict[str, dict[str, Any]] = {
        "data": {"patch_size": [128] * 3, "readers": 6, "prefetch": 6},
        "model": {"depth": 6, "filters": 32},
        "train": {"precision": "bf16", "validate_every": 0},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return from_dict(tree)


def run_engine(
    config: Config, store: Path, run: Path | None, asked: Callable[[], bool] = lambda: False
) -> tuple[int, dict[str, Tensor]]:
    """Train without validation, as this process's rank; samples seen, and the weights on the processor."""
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
    with joined(config, whole=False) as (workers, config, batch_size):
        task = replace(patch_task(config, open_fold(store, None), workers.device), scoring=None)
        result = Engine(task, config, run, workers, batch_size).go(asked)
        weights = {name: value.detach().cpu().clone() for name, value in task.model.state_dict().items()}
    return result.seen, weights


def apart(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """||found - right|| / ||right|| over all weights."""
    one, other = (torch.cat([w[name].flatten().double() for name in right]) for w in (found, right))
    return relative(one, other)
