"""Which cases a folder of predictions should hold: without it a missing one would go unnoticed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from voxelscale.files import write_atomic

RECORD = "predict.json"
"""In the folder of predictions, beside the cases' folders."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a folder of predictions was to hold.

    Attributes:
        cases: names of all cases that were to be predicted.
        splits: by the digest of a store's fingerprint, the split of cases that were named by it.
    """

    cases: frozenset[str]
    splits: dict[str, dict[str, str]] = field(default_factory=dict)


def record_cases(folder: Path, cases: Iterable[str], split: str = "", data: str = "") -> None:
    """Add cases that are about to be predicted to the folder's record.

    Args:
        split, data: their split in a store, and the digest of its fingerprint, where that is known.
    """
    known, names = read_record(folder), frozenset(cases)
    old = known or Record(cases=frozenset())
    splits = {**old.splits}
    if split:
        splits[data] = {**splits.get(data, {}), **dict.fromkeys(sorted(names), split)}
    now = Record(cases=old.cases | names, splits=splits)
    if now != known:
        content = {"cases": sorted(now.cases), "splits": now.splits}
        write_atomic(folder / RECORD, json.dumps(content, indent=1))


def read_record(folder: Path) -> Record | None:
    """A folder's record; None where there is none, or no whole one."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        splits = {str(data): dict(cases) for data, cases in content.get("splits", {}).items()}
        return Record(cases=frozenset(map(str, content["cases"])), splits=splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
