"""By what a predicted case was made, as its folder says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxelscale.classes import Classes
from voxelscale.config import PredictConfig, ReadingConfig
from voxelscale.config.renamed import with_first_names
from voxelscale.dataset.listing import Source
from voxelscale.dataset.stamps import source_stamp
from voxelscale.files import digest_of, not_written, read_json_object
from voxelscale.findings import FORMAT

if TYPE_CHECKING:
    from voxelscale.model.bundle import Bundle

CASE_FACTS = "case.json"
"""Beside a case's mask and findings: by what they were made, and that they are whole."""


PROBABILITIES = re.compile(r"probability(_\d+)?\.nii\.gz")
"""The names that `probability_file` gives."""


def probability_file(classes: Classes, name: str) -> str:
    """The file of a class's probabilities in the folder of a case."""
    return f"probability{'' if classes.single else f'_{classes.names.index(name) + 1}'}.nii.gz"


def as_predicted(reading: ReadingConfig, facts: Mapping[str, Any]) -> ReadingConfig:
    """How a case's scan was read when it was predicted: so its mask lies on it voxel by voxel.

    Args:
        reading: what counts where the prediction does not say.
        facts: of its ``findings.json``.
    """
    fill_gaps, select = facts.get("fill_gaps"), facts.get("select")
    if isinstance(fill_gaps, int):
        reading = replace(reading, fill_gaps=fill_gaps)
    if isinstance(select, list):
        reading = replace(reading, select=tuple(map(str, select)))
    return reading


def _rules(bundle: Bundle, config: PredictConfig, reading: ReadingConfig) -> list[Any]:
    """What a prediction depends on beside the scan."""
    named = with_first_names({"predict": asdict(config)})["predict"]
    return [bundle.digest, named, [reading.fill_gaps, reading.select], FORMAT]


def key_of(stamp: str, bundle: Bundle, config: PredictConfig, reading: ReadingConfig) -> str:
    """What identifies all that a prediction depends on; `stamp` is that of the scan's files."""
    return digest_of([stamp, *_rules(bundle, config, reading)])[:16]


def settings_of(bundle: Bundle, config: PredictConfig, reading: ReadingConfig) -> str:
    """What identifies all that findings depend on beside the scan, the model's calibration among it."""
    alike = replace(config, probabilities=False, batch_size=1, refuse_unusable=True)
    return digest_of(_rules(bundle, alike, reading))[:16]


def predicted_with(folder: Path) -> str:
    """The `settings_of` a case; "" where its folder does not say."""
    return str(facts_of(folder).get("settings", ""))


def predicted_by(folder: Path) -> str:
    """The `Bundle.identity` of the model that predicted a case; "" where its folder does not say."""
    return str(facts_of(folder).get("model", ""))


def made_from_this(folder: Path, source: Source) -> bool | None:
    """Whether a case was predicted from a scan's files as they are now; None: its folder does not say."""
    stamp = facts_of(folder).get("scan")
    return None if stamp is None else bool(stamp == stamp_of(source))


def clear(folder: Path) -> None:
    """Take away what would be taken for a part of the prediction that is about to be written.

    What says that the case is whole goes first; then the findings, which without it would be any model's.
    What is not ours stays: the folder may hold the scan itself.
    """
    kept = [old for old in folder.glob("*.nii.gz") if PROBABILITIES.fullmatch(old.name)]
    try:
        for old in (*(folder / name for name in (CASE_FACTS, "findings.json", "findings.csv")), *kept):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise not_written(folder, error) from None


def stamp_of(source: Source) -> str:
    """What identifies a scan's files, and changes when they change."""
    return digest_of([source_stamp(source)])[:16]


def facts_of(folder: Path) -> dict[str, Any]:
    """What a case's folder says of how it was made; nothing where it is not whole."""
    return read_json_object(folder / CASE_FACTS)
