"""Recipes for many workers: chosen on some scans, reported on others that nobody looked at.

    python benchmarks/recipes.py DIR choose      phantoms and seeds that recipes are chosen with
    python benchmarks/recipes.py DIR screen      16 combinations of settings, on the same phantoms
    python benchmarks/recipes.py DIR report      other phantoms, training seeds never used before
    python benchmarks/recipes.py DIR hippocampus --shared DATA      real scans, the default config

What is trained stands in ``benchmarks/recipes.yaml``, the most important first. Network and phantoms are
those of ``benchmarks/scaling.yaml``, with another `phantom.seed`. Every training that has ended is a line
of ``benchmarks/results/recipes_NAME.jsonl``, so the same command continues, on another machine too.
``--table`` prints what is there: Dice, and its share of the reference (one worker, same seed), as mean over
seeds with a 95 % interval by Student's t; and the time efficiency, the updates with unchanged settings over
those with the recipe. ``--detect`` predicts the validation scans with the models that are there, and prints
CPM and sensitivity by size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from machine import machine  # type: ignore[import-not-found]

from voxelscale.config import Config, load
from voxelscale.console import count
from voxelscale.dataset import DataSet
from voxelscale.experiments.shares import share_devices
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.scale.study import Stop, Trial, TrialScore, plan, run_study, t_interval, write_outcome
from voxelscale.scale.trials import train_trial
from voxelscale.store.prepare import prepare

HERE = Path(__file__).parent

Line = dict[str, Any]
"""Of the results: one training."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A recipe at a number of workers: its name, and a study of it alone."""

    name: str
    config: Config

    @property
    def trials(self) -> list[Trial]:
        """One of each seed."""
        return plan(self.config)


def ways_of(section: dict[str, Any], shared: dict[str, str], config: Config) -> list[Way]:
    """What a section of recipes.yaml lists, in its order."""
    ways = []
    for entry in section["trainings"]:
        base, _, settings = entry["recipe"].partition(":")
        recipe = f"{base}:{';'.join(shared.get(name, name) for name in settings.split(';'))}"
        for workers in entry["workers"]:
            seeds = tuple(entry.get("seeds") or section["seeds"])
            scale = replace(config.scale, workers=(workers,), recipes=(recipe,), seeds=seeds)
            name = f"{entry['name']}: {count(workers, 'worker')}"
            ways.append(Way(name=name, config=replace(config, scale=scale)))
    return ways


def make_store(config: Config, folder: Path, data: Path | None) -> None:
    """Prepare a data set, or phantoms where there is none."""
    if data is None:
        data = write_phantoms(config.phantom, folder / "scans", config.prepare.workers)
    listed = DataSet(path=data, reading=config.reading, splits=config.prepare.splits)
    prepare(listed.cases, folder / "store", config.prepare, config.reading, listed.folds)


def read(path: Path) -> dict[str, Line]:
    """The results, by the trial's name."""
    if not path.is_file():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["trial"]: line for line in lines}


def train(ways: Sequence[Way], folder: Path, results: Path, jobs: int) -> None:
    """What the results do not hold yet of ways with the same workers and seeds."""
    lines, names = read(results), {}
    for way in ways:
        for trial in way.trials:
            names[trial.name] = way.name
            if (line := lines.get(trial.name)) is not None:
                known = TrialScore(dice=line["dice"], diverged=line["diverged"])
                write_outcome(folder / "study", trial, known)
    shares = share_devices(jobs)

    def train_one(trial: Trial, run: Path, stop: Stop) -> TrialScore:
        score = train_trial(trial, run, stop, store=folder / "store", shares=shares)
        line = {
            "trial": trial.name,
            "way": names[trial.name],
            "recipe": trial.recipe,
            "workers": trial.workers,
            "seed": trial.seed,
            "updates": trial.updates,
            "dice": score.dice,
            "diverged": score.diverged,
            "machine": machine(),
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return score

    recipes = tuple(recipe for way in ways for recipe in way.config.scale.recipes)
    config = ways[0].config
    whole = replace(config, scale=replace(config.scale, recipes=recipes))
    run_study(whole, folder / "study", train_one, jobs)


def detect(ways: Sequence[Way], folder: Path, results: Path, jobs: int) -> None:
    """Predict and evaluate the validation scans with the models that are in this folder."""
    done = read(results)
    todo = [
        (trial, way)
        for way in ways
        for trial in way.trials
        if trial.name not in done and (folder / "study" / "runs" / trial.name / "model.vxs").is_file()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def found(item: tuple[Trial, Way]) -> Line:
        trial, way = item
        out = folder / "predictions" / trial.name
        run, scans = folder / "study" / "runs" / trial.name, folder / "scans"
        predict = ["predict", run, scans, out, "--store", folder / "store", "--split", "val"]
        for words in (predict, ["evaluate", out, scans]):
            command = [sys.executable, "-m", "voxelscale.cli", "--quiet", *map(str, words)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        facts = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
        sizes = [row for row in facts["sizes"] if row["lesions"]]
        return {
            "trial": trial.name,
            "way": way.name,
            "seed": trial.seed,
            "dice": facts["dice"]["mean"],
            "cpm": facts["froc"]["cpm"],
            "sensitivity_at_1": facts["sensitivity_at_1_fp"],
            "sizes": [[row["from_mm"], row["lesions"], row["sensitivity_at_1_fp"]] for row in sizes],
        }

    with ThreadPoolExecutor(jobs) as pool, results.open("a", encoding="utf-8") as file:
        # All ways with a seed before the next seed: what is interrupted can be compared.
        for line in pool.map(found, sorted(todo, key=lambda item: item[0].seed)):
            print(json.dumps(line), file=file, flush=True)


def detection_table(ways: Sequence[Way], lines: dict[str, Line]) -> str:
    """A Markdown row a way: means over seeds."""
    rows = ["| recipe | seeds | CPM | sensitivity at 1 FP | by diameter from |", "|---|---|---|---|---|"]
    for way in ways:
        found = [lines[trial.name] for trial in way.trials if trial.name in lines]
        if not found:
            continue
        cpm, at_one = (fmean(line[key] for line in found) for key in ("cpm", "sensitivity_at_1"))
        low, high = t_interval([line["cpm"] for line in found])
        each = zip(*(line["sizes"] for line in found), strict=True)
        sizes = [f"{row[0][0]:g} mm {fmean(one[2] for one in row):.3f} of {row[0][1]}" for row in each]
        cells = [way.name, str(len(found)), f"{cpm:.3f} ({low:.3f} to {high:.3f})", f"{at_one:.3f}"]
        rows.append(f"| {' | '.join([*cells, ', '.join(sizes)])} |")
    return "\n".join(rows)


def table(ways: Sequence[Way], lines: dict[str, Line]) -> str:
    """A Markdown row a way; the first way is the reference."""
    reference = {t.seed: lines[t.name]["dice"] for t in ways[0].trials if t.name in lines}
    rows = [
        "| recipe | updates | time efficiency, % | Dice of each seed | mean | share of the reference, % |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways:
        found = {t.seed: lines[t.name]["dice"] for t in way.trials if t.name in lines}
        if not found:
            continue
        trial = way.trials[0]
        least = replace(trial, config=way.config).updates
        shares = [100 * dice / reference[seed] for seed, dice in found.items() if seed in reference]
        low, high = t_interval(shares) if shares else (0.0, 0.0)
        cells = [
            way.name,
            f"{trial.updates:,}",
            f"{100 * least / trial.updates:.0f}",
            ", ".join(f"{dice:.3f}" for dice in found.values()),
            f"{sum(found.values()) / len(found):.3f}",
            f"{sum(shares) / len(shares):.1f} ({low:.1f} to {high:.1f})" if shares else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def effects(pairs: Sequence[tuple[str, str]], ways: Sequence[Way], lines: dict[str, Line]) -> str:
    """What the second value of each setting adds to the Dice; least squares, with the seeds as blocks."""
    rows = [
        (way.name.partition(":")[0].split(";"), t) for way in ways for t in way.trials if t.name in lines
    ]
    seeds = sorted({trial.seed for _, trial in rows})
    design = np.array(
        [[second in words for _, second in pairs] + [t.seed == s for s in seeds] for words, t in rows],
        float,
    )
    dice = np.array([lines[trial.name]["dice"] for _, trial in rows])
    found, _, rank, _ = np.linalg.lstsq(design, dice)
    free = len(dice) - rank
    variance = np.square(dice - design @ found).sum() / free if free else np.nan
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(design.T @ design)))
    table = ["| from | to | Dice | standard error |", "|---|---|---|---|"]
    for (one, other), effect, error in zip(pairs, found, errors, strict=False):
        table.append(f"| {one} | {other} | {effect:+.4f} | {error:.4f} |")
    return "\n".join(table)


def main() -> None:
    """Read the arguments, train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("section", help="of recipes.yaml: choose or report")
    parser.add_argument("--shared", type=Path, help="folder of the data sets that sections name")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--detect", action="store_true", help="instead: lesions found in phantoms, by size")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    options = parser.parse_args()
    facts = yaml.safe_load((HERE / "recipes.yaml").read_text(encoding="utf-8"))
    section = facts[options.section]
    config = load(HERE / section.get("config", "scaling.yaml"), section.get("set", []))
    results = HERE / "results" / f"recipes_{options.section}.jsonl"
    ways, folder = (
        ways_of(section, facts["shared"], config),
        options.folder / section.get("folder", options.section),
    )
    found = results.with_name(f"recipes_{options.section}_detection.jsonl")
    if options.detect:
        if not options.table:
            detect(ways, folder, found, options.jobs)
        print(detection_table(ways, read(found)))
        return
    if not options.table:
        make_store(config, folder, options.shared / section["data"] if "data" in section else None)
        for _, alike in groupby(ways, key=lambda way: (way.config.scale.workers, way.config.scale.seeds)):
            train(list(alike), folder, results, options.jobs)
    if "pairs" in section:
        print(effects([tuple(pair) for pair in section["pairs"]], ways, read(results)))
    else:
        print(table(ways, read(results)))


if __name__ == "__main__":
    main()
