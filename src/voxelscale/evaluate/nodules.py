"""Synthetic nodules, whose kind, margin and place are known: which of them are found.

``nodules.csv`` lies beside ``dataset.csv`` where `voxelscale phantom` made the data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.lesions import sensitivity_figures
from voxelscale.tables import read_table

TABLE = "nodules.csv"

NUMBERS = ("x", "y", "z", "diameter_mm")

TRAITS = ("kind", "margin", "place")
"""Columns by which sensitivities are reported."""


@dataclass(frozen=True, kw_only=True)
class Nodule:
    """A nodule that was put there.

    Attributes:
        x, y, z: its centre, LPS mm.
        diameter_mm: of the sphere of its volume.
        traits: values of those of `TRAITS` that the table has.
    """

    x: float
    y: float
    z: float
    diameter_mm: float
    traits: Mapping[str, str]


def read_nodules(data: Path) -> dict[str, list[Nodule]]:
    """The nodules of each case of a data set; empty where it has no such table.

    Args:
        data: the data set's folder or its CSV.

    Raises:
        VoxelscaleError: a line of the table is not understood; one with other columns gives a warning.
    """
    path = (data if data.is_dir() else data.parent) / TABLE
    if not path.is_file():
        return {}
    try:
        table = read_table(path, ("case", *NUMBERS), TRAITS)
    except VoxelscaleError as error:  # another program's table may be called so, too
        warn(f"{error.message}; no sensitivities by kind. {error.hint}")
        return {}
    nodules: dict[str, list[Nodule]] = {}
    for line, cells in table.rows():
        x, y, z, diameter = table.numbers(line, cells, NUMBERS)
        traits = {trait: word for trait in TRAITS if (word := table.word(cells, trait))}
        nodule = Nodule(x=x, y=y, z=z, diameter_mm=diameter, traits=traits)
        nodules.setdefault(table.word(cells, "case"), []).append(nodule)
    return nodules


def by_trait(
    nodules: Sequence[Nodule], hits: Sequence[float], threshold: float
) -> dict[str, list[dict[str, Any]]]:
    """Of each trait a row for each of its values, by name.

    Args:
        nodules, hits: of all scans, in the same order.
        threshold: the confidence from which on there is one false positive per scan at most.
    """
    tables = {}
    for trait in TRAITS:
        values = sorted({nodule.traits[trait] for nodule in nodules if trait in nodule.traits})
        tables[trait] = [
            {
                "value": value,
                **sensitivity_figures(
                    [hit for n, hit in zip(nodules, hits, strict=True) if n.traits.get(trait) == value],
                    threshold,
                ),
            }
            for value in values
        ]
    return {trait: rows for trait, rows in tables.items() if rows}
