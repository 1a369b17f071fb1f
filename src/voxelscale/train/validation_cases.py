"""The validation scans that choose the best model during training."""

from __future__ import annotations

from voxelscale.config import Config
from voxelscale.console import count, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.store import CaseInfo, Store

TO_VALIDATE = "prepare with scans with lesions in val, by another prepare.split or prepare.seed"


def validation_cases(store: Store, config: Config) -> tuple[CaseInfo, ...]:
    """The scans on which a training is validated; the training scans if the store has no others."""
    cases = store.split("val") or store.split("train")
    return cases[: config.train.validate_cases or None]


def has_lesions(cases: tuple[CaseInfo, ...]) -> bool:
    """Whether any of the scans has a lesion: without one a model that finds nothing is perfect."""
    return any(info.lesion_volumes_mm3 for info in cases)


def warn_of_validation(store: Store, config: Config) -> None:
    """Warn if the validation cannot distinguish a better model from a worse one."""
    cases = validation_cases(store, config)
    if not has_lesions(cases):
        what = count(len(cases), "validation scan")
        few = " (train.validate_cases takes the first ones only)" if config.train.validate_cases else ""
        warn(
            f"{store.path}: no lesion in the {what}{few}: they cannot select a model, so "
            f"model.vxs will be the last one; {TO_VALIDATE}"
        )
    elif not store.split("val"):
        warn(
            f"{store.path}: no validation scans: the model is validated on its training scans, which says "
            f"nothing about others; {TO_VALIDATE}"
        )


def require_validation(store: Store, config: Config) -> None:
    """Refuse to compare trainings by a validation that cannot distinguish them.

    Raises:
        VoxelscaleError: no validation scan has a lesion.
    """
    cases = validation_cases(store, config)
    if not has_lesions(cases):
        what = count(len(cases), "validation scan")
        raise VoxelscaleError(f"{store.path}: no lesion in the {what}: no Dice to compare by", TO_VALIDATE)
