"""What makes a segmentation network a good detector: an ablation on phantoms.

    python benchmarks/detection.py DIR [--seeds 3] [--samples 12000] [--out F]

A segmentation network used plainly as a detector misses small lesions and has one confidence for what it
sees (nnDetection, Baumgartner et al. 2021). Here every recipe is trained with the same phantoms, patches,
samples and seeds, and looks at the same unseen scans; what can be chosen after training (which components
become findings, how certain they are, several networks together) is then chosen on the same probability
maps. Prints Dice, sensitivity at 1/8 to 8 false positives a scan, and CPM, with 95 % intervals by Student's
t over seeds; writes JSON. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import centres  # type: ignore[import-not-found]
import numpy as np
import torch
from numpy.typing import NDArray

from voxelscale.config import Config, load
from voxelscale.dataset.listing import Source, list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.evaluate.froc import OPERATING_POINTS, froc, match
from voxelscale.evaluate.overlap import overlap
from voxelscale.findings import Finding, find_lesions, lesions_of_mask
from voxelscale.geometry import Scan
from voxelscale.model.bundle import read_bundle
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.predict.predictor import Predictor
from voxelscale.scale.study import t_interval
from voxelscale.store import open_store
from voxelscale.store.prepare import prepare
from voxelscale.train.launch import start

BASE = [
    "phantom.cases=72",
    "phantom.spacing=[3,2,2]",
    "phantom.diameter_mm=[4,25]",
    "prepare.spacing=[3,2,2]",
    "prepare.split=[0.64,0.03,0.33]",
    "prepare.lungs=true",
    "prepare.plan=false",
    "prepare.chunk=32",
    "data.patch_size=[20,32,32]",
    "model.filters=8",
    "train.batch_size=4",
    "train.threads=1",
    "train.ranks=1",
    "train.validate_every=0",
    "train.precision=bf16",
    "optim.name=adamw",
    "optim.lr=0.004",
    "loss.small=0",
    "loss.top_k=1",
    "predict.lungs=true",
]
DEFAULT = "cross-entropy 5, small, hardest"
CENTRES = "centres"
"""In a recipe's name: with a heat map of the lesions' centres beside the mask (benchmarks/centres.py)."""
RECIPES: dict[str, list[str]] = {
    "plain": ["loss.cross_entropy=1"],
    "small lesions weigh more": ["loss.cross_entropy=1", "loss.small=0.5"],
    "hardest tenth of the voxels": ["loss.cross_entropy=1", "loss.top_k=0.1"],
    "cross-entropy 5": ["loss.cross_entropy=5"],
    "cross-entropy 5, small": ["loss.cross_entropy=5", "loss.small=0.5"],
    "cross-entropy 5, hardest": ["loss.cross_entropy=5", "loss.top_k=0.1"],
    DEFAULT: ["loss.cross_entropy=5", "loss.small=0.5", "loss.top_k=0.1"],
    "cross-entropy 5, centres": ["loss.cross_entropy=5"],
    "cross-entropy 5, small, hardest, centres": [
        "loss.cross_entropy=5",
        "loss.small=0.5",
        "loss.top_k=0.1",
    ],
}
WAYS: dict[str, dict[str, float | None]] = {
    "components at 0.5": {"threshold": 0.5, "candidates": None},
    "doubtful from 0.2": {"threshold": 0.5, "candidates": 0.2},
    "doubtful from 0.05": {"threshold": 0.5, "candidates": 0.05},
    "doubtful from 0.01": {"threshold": 0.5, "candidates": 0.01},
}
"""Ways to make findings of a probability map; the first is the plain one."""


def config_of(recipe: str, seed: int, samples: int) -> Config:
    """A training's config."""
    return load(sets=[*BASE, *RECIPES[recipe], f"train.seed={seed}", f"train.samples={samples}"])


def make_data_set(folder: Path) -> None:
    """The phantoms and their store, made where they are not there."""
    config = load(sets=BASE)
    table = write_phantoms(config.phantom, folder / "scans")
    prepare(list_sources(table), folder / "store", config.prepare)


def recipe_folder(folder: Path, recipe: str, seed: int) -> Path:
    """Where a training of a recipe lies."""
    return folder / "runs" / f"{recipe.replace(' ', '_')}-{seed}"


def train_and_look(job: tuple[Path, str, int, int, Path]) -> Path:
    """Train a recipe with a seed and keep its probability maps of the unseen scans; where they are.

    Args:
        job: the folder for trainings, recipe, seed, samples, the data set's folder.
    """
    folder, recipe, seed, samples, data = job
    torch.set_num_threads(1)
    maps = recipe_folder(folder, recipe, seed)
    store, sources = data / "store", test_sources(data)
    if all((maps / f"{source.case}.npy").is_file() for source in sources):
        return maps
    config = config_of(recipe, seed, samples)
    look: Callable[[Scan], dict[str, NDArray[np.float32]]]
    if CENTRES in recipe:
        network = centres.train(config, store, maps)
        look = partial(centres.look, network, config, store)
    else:
        start(config, store, maps)
        predictor = Predictor(read_bundle(maps), config.predict, torch.device("cpu"), torch.float32)
        look = lambda image: {"": predictor.probability(image)}  # noqa: E731
    torch.set_num_threads(1)
    for source in sources:
        for kind, values in reversed(look(truth_of(source)[0]).items()):
            np.save(maps / ".new.npy", values.astype(np.float16))
            (maps / ".new.npy").rename(maps / f"{source.case}{kind}.npy")
    return maps


def test_sources(folder: Path) -> list[Source]:
    """The unseen scans."""
    unseen = {info.case for info in open_store(folder / "store").split("test")}
    return [s for s in list_sources(folder / "scans" / "dataset.csv") if s.case in unseen]


def truth_of(source: Source) -> tuple[Scan, Scan]:
    """Image and mask."""
    image, labels = read_case(source, load(sets=BASE).reading)
    return image, labels.mask


def maps_of(folders: Sequence[Path], case: str, kind: str = "") -> NDArray[np.float32]:
    """The mean of the folders' maps of a case."""
    parts = [np.load(folder / f"{case}{kind}.npy").astype(np.float32) for folder in folders]
    return np.asarray(np.mean(parts, axis=0), np.float32)


def score(
    maps: Sequence[Path], sources: Sequence[Source], truths: Sequence[Scan], way: dict[str, Any]
) -> dict[str, Any]:
    """Figures of one network, or of several whose probabilities are averaged, over all unseen scans."""
    found, masks = [], []
    for source, truth in zip(sources, truths, strict=True):
        probability = maps_of(maps, source.case)
        findings, mask = find_lesions(source.case, probability, truth.grid, min_volume_mm3=10.0, **way)
        found.append(findings)
        masks.append(mask)
    return figures(truths, found, masks)


def score_centres(maps: Path, sources: Sequence[Source], truths: Sequence[Scan]) -> dict[str, Any]:
    """Figures of a network with a heat map whose peaks are the findings."""
    found, masks = [], []
    for source, truth in zip(sources, truths, strict=True):
        findings, mask = find_lesions(
            source.case, maps_of([maps], source.case), truth.grid, threshold=0.5, min_volume_mm3=10.0
        )
        heat = maps_of([maps], source.case, centres.KIND)
        found.append(centres.peaks_of(findings, heat, truth.grid, source.case))
        masks.append(mask)
    return figures(truths, found, masks)


def figures(
    truths: Sequence[Scan], found: Sequence[Sequence[Finding]], masks: Sequence[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Dice, CPM and the sensitivities of findings and masks held against true masks."""
    lesions = [lesions_of_mask("", truth.array, truth.grid) for truth in truths]
    curve = froc([match(true, findings) for true, findings in zip(lesions, found, strict=True)])
    points = {f"{p:g}": curve.sensitivity_at(p) for p in OPERATING_POINTS}
    dices = [overlap(truth.array, mask).dice for truth, mask in zip(truths, masks, strict=True)]
    return {"dice": statistics.mean(dices), "cpm": curve.cpm, "points": points}


def rows_of(folder: Path, seeds: int, samples: int) -> list[dict[str, Any]]:
    """Every recipe with every way, and all seeds of a recipe together."""
    sources = test_sources(folder)
    truths = [truth_of(source)[1] for source in sources]
    rows = []
    for recipe in RECIPES:
        maps = [train_and_look((folder, recipe, seed, samples, folder)) for seed in range(seeds)]
        for name, way in WAYS.items():
            each = [score([one], sources, truths, way) for one in maps]
            rows.append({"recipe": recipe, "way": name, **summary(each)})
        if CENTRES in recipe:
            each = [score_centres(one, sources, truths) for one in maps]
            rows.append({"recipe": recipe, "way": "peaks of the heat map", **summary(each)})
        together = score(maps, sources, truths, WAYS["doubtful from 0.05"])
        rows.append({"recipe": recipe, "way": f"{seeds} networks, from 0.05", **summary([together])})
    return rows


def summary(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and their intervals."""
    figures: dict[str, Any] = {"seeds": len(each)}
    for key in ("dice", "cpm"):
        values = [one[key] for one in each]
        figures[key] = statistics.mean(values)
        figures[f"{key}_interval"] = list(t_interval(values) or ()) if len(values) > 1 else None
    figures["points"] = {p: statistics.mean(one["points"][p] for one in each) for p in each[0]["points"]}
    return figures


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print them."""
    points = list(rows[0]["points"])
    head = f"{'recipe':42}{'findings':26}{'Dice':>7}{'CPM':>7}{'95 %':>16}"
    print(head + "".join(f"{p:>7}" for p in points))
    for row in rows:
        spread = row["cpm_interval"]
        shown = f"{spread[0]:.3f} to {spread[1]:.3f}" if spread else ""
        read = "".join(f"{row['points'][p]:7.3f}" for p in points)
        print(f"{row['recipe']:42}{row['way']:26}{row['dice']:7.3f}{row['cpm']:7.3f}{shown:>16}{read}")


def parser_of(about: str, out: str) -> argparse.ArgumentParser:
    """What the benchmarks on these phantoms are told: folder, seeds, processes, where to write."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def main() -> None:
    """Read the arguments, train what is missing, measure, print, write."""
    parser = parser_of(__doc__, "detection.json")
    parser.add_argument("--samples", type=int, default=12_000)
    options = parser.parse_args()
    make_data_set(options.folder)
    jobs = [
        (options.folder, recipe, seed, options.samples, options.folder)
        for seed in range(options.seeds)
        for recipe in RECIPES
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        for done in pool.map(train_and_look, jobs):
            print(f"{done.name}: done", flush=True)
    rows = rows_of(options.folder, options.seeds, options.samples)
    show(rows)
    options.out.write_text(json.dumps({"base": BASE, "recipes": RECIPES, "rows": rows}, indent=1))
    with options.out.with_suffix(".csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([r["recipe"], r["way"], r["dice"], r["cpm"]] for r in rows)


if __name__ == "__main__":
    main()
