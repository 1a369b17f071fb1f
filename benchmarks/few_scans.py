"""What `voxelscale train --from` is worth where there are few labelled scans: nodules in real CT.

    python benchmarks/few_scans.py DIR --shared FOLDER [--scans 10 30 80] [--seeds 3] [--out F]

A network is trained on LIDC-IDRI's nodules in tight crops (`lidc_nodule_vois`) of patients who are in no
cube. Then others are trained on 10, 30 and 80 of the nodule cubes (`lidc_nodule_cubes`, one a patient),
with random weights and from that network, with the same settings and samples, and scored on 26 cubes of
other patients. No setting was chosen on them. A seed chooses the training cubes and draws the samples.
Prints the mean Dice; intervals (95 %) are bootstraps over cubes and seeds together, the difference's is
paired. All is done by the commands, on one thread; interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from machine import machine  # type: ignore[import-not-found]
from numpy.typing import NDArray

JUDGED = 26
SPLIT_SEED = 20
PREPARE = ("prepare.spacing=[1,1,1]", "prepare.split=[1,0,0]", "prepare.workers=1")
TRAIN = (
    *("data.patch_size=[48,48,48]", "train.batch_size=2", "train.ranks=1", "train.threads=1"),
    *("train.validate_every=0", "train.validate_cases=1", "data.readers=1", "optim.name=adamw"),
)
RESAMPLES = 2000
WAYS = ("random weights", "from the other network")

Row = tuple[str, str, Path, Path]
"""Case, patient, image, label."""


def rows(folder: Path) -> list[Row]:
    """The cases of a folder of crops; a name begins with the patient's."""
    found = []
    for image in sorted((folder / "images").glob("*.nii.gz")):
        case = image.name.removesuffix(".nii.gz")
        found.append((case, case.partition("_")[0], image, folder / "labels" / image.name))
    return found


def voxelscale(*words: object, sets: Sequence[str] = ()) -> None:
    """Run a command; its output is shown."""
    command = [sys.executable, "-m", "voxelscale.cli", "--quiet", *map(str, words)]
    command += [word for setting in sets for word in ("--set", setting)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def listed(cases: Sequence[Row], path: Path) -> Path:
    """A CSV of the cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("case", "patient", "image", "label"), *cases])
    return path


def train(cases: Sequence[Row], run: Path, sets: Sequence[str], start: Path | None = None) -> None:
    """Prepare and train; what is done is not done again."""
    store = run.parent / f"{run.name}_store"
    voxelscale("prepare", listed(cases, run.parent / f"{run.name}.csv"), store, sets=PREPARE)
    voxelscale("train", store, run, *(["--from", start] if start else []), sets=[*TRAIN, *sets])


def dice(run: Path, judged: Sequence[Row]) -> list[float]:
    """Of each judged cube."""
    out, table = run.parent / f"{run.name}_predictions", listed(judged, run.parent / "judged.csv")
    voxelscale("predict", run, table, out)
    voxelscale("evaluate", out, table)
    summary = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    return [row["dice"] for row in sorted(summary["cases"], key=lambda row: row["case"])]


def interval(values: NDArray[np.float64]) -> str:
    """Mean and interval of (seed, case) values."""
    generator = np.random.default_rng(0)
    seeds, cases = values.shape
    means = [
        values[generator.integers(0, seeds, seeds)][:, generator.integers(0, cases, cases)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="for stores, runs and predictions")
    parser.add_argument("--shared", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--scans", type=int, nargs="+", default=[10, 30, 80])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-samples", type=int, default=4000, help="of the first network's training")
    parser.add_argument("--samples", type=int, default=600, help="of each of the others")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    cubes = rows(options.shared / "lidc_nodule_cubes")
    random.Random(SPLIT_SEED).shuffle(cubes)
    judged, rest = cubes[:JUDGED], cubes[JUDGED:]
    patients = {patient for _, patient, _, _ in cubes}
    others = [row for row in rows(options.shared / "lidc_nodule_vois") if row[1] not in patients]
    first = options.folder / "first"
    train(others, first, [f"train.samples={options.first_samples}"])
    results: dict[str, dict[str, list[list[float]]]] = {}
    for count in options.scans:
        each: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for seed in range(options.seeds):
            chosen = random.Random(seed).sample(rest, count)
            sets = [f"train.samples={options.samples}", f"train.seed={seed}"]
            for way, start in zip(WAYS, (None, first), strict=True):
                run = options.folder / f"{count}-{seed}-{'from' if start else 'alone'}"
                train(chosen, run, sets, start)
                each[way].append(dice(run, judged))
        results[str(count)] = each
        alone, begun = (np.asarray(each[way]) for way in WAYS)
        print(f"{count} cubes: {WAYS[0]} {interval(alone)}, {WAYS[1]} {interval(begun)},", end=" ")
        print(f"difference {interval(begun - alone)}", flush=True)
    if options.out:
        facts = {"machine": machine(), "patients of the first network": len({row[1] for row in others})}
        options.out.write_text(json.dumps({**facts, "samples": vars(options)["samples"], "dice": results}))


if __name__ == "__main__":
    main()
