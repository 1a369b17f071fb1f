"""Folds: which cases train and which validate, as a data set or its user gives them, or by patient."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxelscale.errors import VoxelscaleError

MOST_FOLDS = 1000

TO_SPLIT = 'write it as nnU-Net does: [{"train": ["a", "b"], "val": ["c"]}, ...]'


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One division of a data set's cases, by their names.

    Attributes:
        train: cases to train on.
        val: cases that choose the model.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]

    @property
    def split_of(self) -> dict[str, str]:
        """``train`` or ``val`` of each of its cases."""
        return dict.fromkeys(self.train, "train") | dict.fromkeys(self.val, "val")


def folds_of(where: str, content: Any, called: Callable[[str], str | None]) -> tuple[Fold, ...]:
    """The folds of a ``splits_final.json``, or of a table of which cases validate in which fold.

    Such a table, as there is one of LUNA16's ten folds, is ``{"0": ["a", "b"], "1": ["c"]}``; the others
    of its cases train.

    Args:
        where: the file, for messages.
        content: what it holds.
        called: what the data set calls the case of a name; None: it lists none of this name.

    Raises:
        VoxelscaleError: it is no list of folds, or a fold names an unknown case.
    """
    if isinstance(content, dict) and content and all(re.fullmatch(r"\d{1,3}", key) for key in content):
        content = _of_table(where, content)
    if not isinstance(content, list) or not 0 < len(content) <= MOST_FOLDS:
        raise VoxelscaleError(f"{where}: no list of 1 to {MOST_FOLDS} folds", TO_SPLIT)
    folds = []
    for number, fold in enumerate(content):
        lists = [fold.get(side) if isinstance(fold, Mapping) else None for side in ("train", "val")]
        sides = []
        for side, names in zip(("train", "val"), lists, strict=True):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise VoxelscaleError(f"{where}: fold {number} has no list {side!r} of names", TO_SPLIT)
            cases = {name: called(name) for name in names}
            if unknown := [name for name, case in cases.items() if case is None]:
                more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
                hint = "take the names out of it, or add the cases to the data set"
                what = f"fold {number} names {unknown[0][:80]}{more}, which the data set does not list"
                raise VoxelscaleError(f"{where}: {what}", hint)
            sides.append(tuple(case for case in cases.values() if case is not None))
        folds.append(Fold(train=sides[0], val=sides[1]))
    return tuple(folds)


def _of_table(where: str, table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table's folds in nnU-Net's form, in the order of their numbers."""
    fold_of: dict[Any, str] = {}
    for key, names in table.items():
        for name in names if isinstance(names, list) else [None]:
            if not isinstance(name, str):
                raise VoxelscaleError(f"{where}: fold {key} is no list of names", TO_SPLIT)
            if fold_of.setdefault(name, key) != key:
                what = f"{name[:80]} is in fold {fold_of[name]} and in fold {key}"
                raise VoxelscaleError(f"{where}: {what}", "take it out of one of them")
    return [
        {
            "train": [name for name, own in fold_of.items() if own != key],
            "val": [name for name, own in fold_of.items() if own == key],
        }
        for key in sorted(table, key=int)
    ]


def check_folds(where: str, folds: Sequence[Fold], patient_of: Mapping[str, str]) -> None:
    """Raise a VoxelscaleError where a fold trains on nothing, or on what it validates on.

    Args:
        where: what gives the folds, for messages.
        patient_of: the patient of each case.
    """
    for number, fold in enumerate(folds):
        if not (fold.train and fold.val):
            side = "val" if fold.train else "train"
            raise VoxelscaleError(f"{where}: fold {number} has no case in {side!r}", "give each fold both")
        if both := sorted(set(fold.train) & set(fold.val)):
            hint = "take it out of one of them"
            raise VoxelscaleError(f"{where}: fold {number} has {both[0]} in both train and val", hint)
        check_patients(f"{where}: fold {number}", {"train": fold.train, "val": fold.val}, patient_of)


def check_patients(where: str, sides: Mapping[str, Sequence[str]], patient_of: Mapping[str, str]) -> None:
    """Raise a VoxelscaleError where two sides of a split hold cases of one patient."""
    first: dict[str, tuple[str, str]] = {}
    for side, cases in sides.items():
        for case in cases:
            other, of = first.setdefault(patient_of[case], (side, case))
            if other != side:
                hint = "put all cases of a patient on one side"
                what = f"{of} ({other}) and {case} ({side}) are of one patient"
                raise VoxelscaleError(f"{where}: {what}", hint)


def by_number(numbers: Mapping[str, int]) -> tuple[Fold, ...]:
    """The folds of a table whose cases each name the fold they validate in, in the order of the numbers."""
    return tuple(
        Fold(
            train=tuple(case for case, own in numbers.items() if own != number),
            val=tuple(case for case, own in numbers.items() if own == number),
        )
        for number in sorted(set(numbers.values()))
    )


def kfold(
    patients: Mapping[str, str], k: int, seed: int, order: Mapping[str, str] | None = None
) -> tuple[Fold, ...]:
    """k folds by patient: each patient's cases validate in one fold and train in the others.

    The patients are sorted, shuffled by `seed` and dealt out one by one, so that folds differ by at most
    one patient.

    Args:
        patients: the patient of each case.
        order: what to sort the patients by before they are shuffled, where it is not their name.

    Raises:
        VoxelscaleError: there are fewer patients than folds.
    """
    order = order or {}
    every = sorted(set(patients.values()), key=lambda patient: (order.get(patient, patient), patient))
    if not 2 <= k <= len(every):
        raise VoxelscaleError(f"{k} folds of {len(every)} patients", "choose a smaller prepare.folds")
    shuffled = np.random.default_rng(seed).permutation(len(every))
    fold_of = {every[at]: place % k for place, at in enumerate(shuffled)}
    return by_number({case: fold_of[patient] for case, patient in patients.items()})
