"""What a training needs to know of a data set as a whole."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import equivalent_diameter
from voxelscale.store import CaseInfo, Store, open_store
from voxelscale.store.plausible import summary

SPLITS = ("train", "val", "test")


def fingerprint(cases: Sequence[CaseInfo]) -> dict[str, Any]:
    """What a training needs to know of the data set, from its training cases (all, if there are none).

    ``lesion_hu``: mean, std and percentiles of the lesions' HU, pooled over cases weighted by their
    voxels (percentiles: the minimum and maximum over cases, so that none is clipped);
    ``lesion_volume_mm3``: count and quartiles; ``lesion_diameter_mm`` (of the sphere of the same volume)
    and ``lesions_per_case``: quartiles; ``source_spacing`` and ``extent_mm``: minimum, median and maximum
    (z, y, x) of the scans as they came and of what they cover; ``orientations``: how many files have
    which axes (`axis_codes`); ``scans``: what they are (`voxelscale.store.plausible.summary`); ``digest``:
    of all cases' keys, by which a resumed run knows its data.
    """
    used = [c for c in cases if c.split == "train"] or list(cases)
    volumes = [v for c in used for v in c.lesion_volumes_mm3]
    diameters = [
        equivalent_diameter(v, c.shape, c.grid.spacing) for c in used for v in c.lesion_volumes_mm3
    ]
    spacings = np.asarray([c.source_spacing for c in used])
    extents = np.asarray([np.multiply(c.shape, c.grid.spacing) for c in used])
    digest = hashlib.sha256("\n".join(f"{c.case} {c.split} {c.key}" for c in cases).encode()).hexdigest()
    return {
        "cases": {name: sum(c.split == name for c in cases) for name in SPLITS},
        "patients": len({c.patient for c in cases}),
        "lesion_hu": _pooled([c.intensities for c in used if c.intensities]),
        "lesion_volume_mm3": {
            "count": len(volumes),
            "quartiles": _quartiles(volumes),
        },
        "lesion_diameter_mm": _quartiles(diameters),
        "lesions_per_case": _quartiles([len(c.lesion_volumes_mm3) for c in used]),
        "orientations": dict(sorted(Counter(c.axes for c in used).items())),
        "source_spacing": _range(spacings, 4),
        "extent_mm": _range(extents, 1),
        "scans": summary([c.scan for c in used]),
        "digest": digest[:16],
        **_of_channels(used),
    }


def _of_channels(used: Sequence[CaseInfo]) -> dict[str, Any]:
    """``channel_hu``: of several channels what ``lesion_hu`` is of the first; None where one is no CT."""
    if not any(len(info.channel_hu) > 1 for info in used):
        return {}
    each = zip(*(info.channel_hu for info in used), strict=True)
    return {"channel_hu": [_pooled([one for one in of if one]) if any(of) else None for of in each]}


def _quartiles(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles and maximum; [] of nothing."""
    return [round(float(q), 1) for q in np.percentile(values, [0, 25, 50, 75, 100])] if values else []


def _range(values: NDArray[np.float64], digits: int) -> dict[str, list[float]]:
    return {
        name: [round(float(v), digits) for v in pick(values, axis=0)]
        for name, pick in (("least", np.min), ("median", np.median), ("greatest", np.max))
    }


def _pooled(each: Sequence[dict[str, float]]) -> dict[str, float]:
    if not each:
        # A data set without lesions: lung to soft tissue, so that normalising is still defined.
        return {"mean": -400.0, "std": 400.0, "percentile_00_5": -1000.0, "percentile_99_5": 400.0}
    weights = np.asarray([e["count"] for e in each])
    means, stds = (np.asarray([e[name] for e in each]) for name in ("mean", "std"))
    mean = np.average(means, weights=weights)
    variance = np.average(stds**2 + (means - mean) ** 2, weights=weights)
    return {
        "mean": round(float(mean), 3),
        "std": round(max(float(np.sqrt(variance)), 1.0), 3),
        "percentile_00_5": min(e["percentile_00_5"] for e in each),
        "percentile_99_5": max(e["percentile_99_5"] for e in each),
    }


def open_fold(path: Path, fold: int | None) -> Store:
    """The store in a folder, with the split of one of its folds (`in_fold`).

    Raises:
        VoxelscaleError: as `open_store` and `in_fold`.
    """
    return in_fold(open_store(path), fold)


def folds_of(store: Store, digests: Collection[str]) -> list[Store]:
    """A store with each of its splits, its own and its folds', whose fingerprint has one of the digests.

    So a model is known to have been trained on their training cases (`Bundle.trained`).

    Args:
        store: as `open_store` gives it.
    """
    found = []
    for fold in (None, *range(len(store.folds))):
        with contextlib.suppress(VoxelscaleError):  # none of its training cases is there
            found.append(in_fold(store, fold))
    return [each for each in found if each.fingerprint["digest"] in digests]


def in_fold(store: Store, fold: int | None) -> Store:
    """The store with the split of one of its folds, from 0, and the fingerprint of its training cases.

    Test scans stay what they are; cases in neither list of the fold are not used.

    Args:
        fold: None: the store as it is.

    Raises:
        VoxelscaleError: it has no such fold, or none of the fold's training cases.
    """
    if fold is None:
        return store
    if fold >= len(store.folds):
        has = f"folds 0 to {len(store.folds) - 1}" if store.folds else "no folds"
        hint = "choose another data.fold" if store.folds else "prepare with prepare.folds or prepare.splits"
        raise VoxelscaleError(f"{store.path}: data.fold is {fold}, but the store has {has}", hint)
    of = store.folds[fold].split_of
    cases = tuple(
        replace(info, split=of.get(info.case, "test" if info.split == "test" else ""))
        for info in store.cases
    )
    if not any(info.split == "train" for info in cases):
        hint = "prepare the data set again, or choose another data.fold"
        raise VoxelscaleError(f"{store.path}: none of fold {fold}'s training cases is there", hint)
    return replace(store, cases=cases, fingerprint=fingerprint(cases))
