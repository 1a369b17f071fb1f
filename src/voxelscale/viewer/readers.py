"""Two readers' decisions about the same predictions, compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.lesions import mean_or_none
from voxelscale.evaluate.overlap import overlap
from voxelscale.formats import read_label
from voxelscale.viewer.decisions import MASK, OUTCOME, READERS, read_journal, reader_folder

VERDICTS = ("accepted", "rejected")


def compare_readers(predictions: Path, a: str, b: str) -> dict[str, Any]:
    """How far two readers agree.

    Findings count that both accepted or rejected; Cohen's kappa is that of these two verdicts (Cohen,
    Educational and Psychological Measurement 20, 1960), None where both gave one verdict only. The Dice is
    of the masks of cases that both have finished: the mean over the values in them (of regions, each has
    the value of the smallest region that holds the voxel), None where both masks are empty.

    Returns:
        plain values, as ``--json`` prints them.

    Raises:
        VoxelscaleError: one reader decided nothing, they share no case, or they judged other predictions.
    """
    mine, theirs = _outcomes(predictions, a), _outcomes(predictions, b)
    shared = sorted(set(mine) & set(theirs))
    if not shared:
        raise VoxelscaleError(f"{predictions}: {a} and {b} share no case", "let both read the same cases")
    counts = {first: dict.fromkeys(VERDICTS, 0) for first in VERDICTS}
    cases: list[dict[str, Any]] = []
    for case in shared:
        one, other = mine[case], theirs[case]
        if one["prediction"] != other["prediction"]:
            what = f"{predictions}: {case}: {a} and {b} judged different predictions"
            raise VoxelscaleError(what, "let both read the same predictions")
        second = {mark["finding"]: mark["verdict"] for mark in other["marks"]}
        for mark in one["marks"]:
            pair = mark["verdict"], second.get(mark["finding"])
            if mark["finding"].isdigit() and pair[0] in VERDICTS and pair[1] in VERDICTS:
                counts[pair[0]][pair[1]] += 1
        both = one["finished"] and other["finished"]
        dice = (
            _dice(*(reader_folder(predictions, reader) / case / MASK for reader in (a, b)))
            if both
            else None
        )
        cases.append({"case": case, "dice": dice, "added": [_added(one), _added(other)]})
    return {
        "readers": [a, b],
        "cases": cases,
        "verdicts": counts,
        **agreement(counts),
        "dice": mean_or_none([row["dice"] for row in cases if row["dice"] is not None]),
    }


def agreement(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Share of equal verdicts and Cohen's kappa; None where there is nothing to say."""
    total = sum(n for row in counts.values() for n in row.values())
    if not total:
        return {"findings": 0, "agreement": None, "kappa": None}
    equal = sum(counts[v][v] for v in VERDICTS) / total
    chance = sum(sum(counts[v].values()) * sum(counts[w][v] for w in VERDICTS) for v in VERDICTS) / total**2
    kappa = (equal - chance) / (1 - chance) if chance < 1 else None
    return {"findings": total, "agreement": equal, "kappa": kappa}


def text_table(result: Mapping[str, Any]) -> list[str]:
    """The comparison in lines."""
    a, b = result["readers"]
    counts = result["verdicts"]
    added = [sum(row["added"][which] for row in result["cases"]) for which in (0, 1)]
    finished = [row for row in result["cases"] if row["dice"] is not None]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    return [
        f"cases that both read      {len(result['cases'])}",
        f"findings that both judged {result['findings']}",
        f"  both accepted           {counts['accepted']['accepted']}",
        f"  both rejected           {counts['rejected']['rejected']}",
        f"  only {a} accepted: {counts['accepted']['rejected']}",
        f"  only {b} accepted: {counts['rejected']['accepted']}",
        f"agreement                 {shown(result['agreement'])}",
        f"Cohen's kappa             {shown(result['kappa'])}",
        f"mean Dice of the masks    {shown(result['dice'])} ({len(finished)} cases, both finished)",
        f"added nodules             {a}: {added[0]}, {b}: {added[1]}",
    ]


def _outcomes(predictions: Path, reader: str) -> dict[str, dict[str, Any]]:
    """By case, what a reader's outcome files say."""
    found = {}
    for path in sorted(reader_folder(predictions, reader).glob(f"*/{OUTCOME}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found[str(content["case"])] = content
            _ = [(m["finding"], m["verdict"]) for m in content["marks"]], content["finished"]
            if content.get("lines", lines := len(read_journal(path.parent))) != lines:
                raise ValueError("decisions were made since")
        except (OSError, ValueError, KeyError, TypeError):
            hint = "open the case in voxelscale view again: it writes the file anew"
            raise VoxelscaleError(f"{path}: cannot be read", hint) from None
    if not found:
        known = sorted(path.name for path in (predictions / READERS).glob("*") if path.is_dir())
        there = f"there are {', '.join(known)}" if known else "decide in voxelscale view first"
        raise VoxelscaleError(f"{predictions}: no decisions of {reader}", there)
    return found


def _added(outcome: Mapping[str, Any]) -> int:
    marks = outcome["marks"]
    return sum(not m["finding"].isdigit() and m["verdict"] == "accepted" for m in marks)


def _dice(a: Path, b: Path) -> float | None:
    """Mean over the values that either mask has; None where both are empty."""
    one, other = read_label(a).array, read_label(b).array
    values = np.setdiff1d(np.union1d(one, other), [0])
    return mean_or_none([overlap(one == value, other == value).dice for value in values])
