"""The real data sets, their splits, and how a prediction is scored."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.evaluate.overlap import overlap
from voxelscale.evaluate.surface import compare_surfaces
from voxelscale.formats import read_scan

INNER_SHARE = 0.2
"""Of the training cases of an outer fold: those on which settings are chosen."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An image and its labels, as files."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is segmented.

    Attributes:
        channel: as nnU-Net names it; it decides the normalisation.
        labels: name of each label but the background, from 1 on.
        cases: by name.
        folds: (training, judge) cases of each outer fold.
    """

    channel: str
    labels: tuple[str, ...]
    cases: dict[str, Case]
    folds: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """An outer fold: `choose` is a part of `train`, on which settings are chosen; `judge` is apart."""

    train: tuple[str, ...]
    choose: tuple[str, ...]
    judge: tuple[str, ...]

    @property
    def rest(self) -> tuple[str, ...]:
        """What is trained on while settings are chosen."""
        return tuple(name for name in self.train if name not in set(self.choose))


def hippocampus(shared: Path) -> DataSet:
    """The Decathlon's, with the folds that nnU-Net makes of it."""
    folder = shared / "msd_hippocampus"
    folds = json.loads((folder / "splits_final.json").read_text())
    names = sorted(
        path.name.removesuffix("_0000.nii.gz") for path in (folder / "imagesTr").glob("*.nii.gz")
    )
    cases = {
        name: Case(
            name=name,
            image=folder / "imagesTr" / f"{name}_0000.nii.gz",
            label=folder / "labelsTr" / f"{name}.nii.gz",
        )
        for name in names
    }
    return DataSet(
        channel="MRI",
        labels=("Anterior", "Posterior"),
        cases=cases,
        folds=tuple((tuple(fold["train"]), tuple(fold["val"])) for fold in folds),
    )


def nodule_cubes(shared: Path) -> DataSet:
    """Lung nodules of LIDC-IDRI, five folds; there is one cube a patient."""
    folder = shared / "lidc_nodule_cubes"
    with (folder / "nodules.csv").open(newline="") as file:
        names = sorted(row["case"] for row in csv.DictReader(file))
    cases = {
        name: Case(
            name=name,
            image=folder / "images" / f"{name}.nii.gz",
            label=folder / "labels" / f"{name}.nii.gz",
        )
        for name in names
    }
    patients = sorted({name.split("_")[0] for name in names})
    order = np.random.default_rng(12345).permutation(len(patients))
    fold_of = {patients[at]: place % 5 for place, at in enumerate(order)}
    folds = tuple(
        (
            tuple(name for name in names if fold_of[name.split("_")[0]] != fold),
            tuple(name for name in names if fold_of[name.split("_")[0]] == fold),
        )
        for fold in range(5)
    )
    return DataSet(channel="CT", labels=("lesion",), cases=cases, folds=folds)


DATA_SETS = {"hippocampus": hippocampus, "cubes": nodule_cubes}


def split_of(data: DataSet, fold: int) -> Split:
    """An outer fold, with the part of its training cases on which settings are chosen: drawn once, by the
    fold's number alone."""
    train, judge = data.folds[fold]
    order = np.random.default_rng(fold).permutation(len(train))[: round(INNER_SHARE * len(train))]
    return Split(train=train, choose=tuple(sorted(train[at] for at in order)), judge=judge)


def score(data: DataSet, names: Sequence[str], masks: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Dice and surface Dice at 1 mm of each case and label, on the images' own voxels."""
    dice: list[list[float]] = []
    surface: list[list[float]] = []
    for name in names:
        truth = read_scan(data.cases[name].label)
        pairs = [(truth.array == k, masks[name] == k) for k in range(1, len(data.labels) + 1)]
        dice.append([overlap(*pair).dice for pair in pairs])
        surface.append([compare_surfaces(*pair, truth.grid.spacing).dice[0] for pair in pairs])
    return {"cases": list(names), "dice": dice, "surface_dice_1mm": surface}
