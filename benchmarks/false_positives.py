"""Which is better against false positives: hard negatives in training, or a second network on crops?

    python benchmarks/false_positives.py DIR [--seeds 3] [--samples 12000] [--out F]

DIR holds, or gets, the phantoms and the trained networks of benchmarks/detection.py. Hard negatives: a
network trained for two thirds of the samples looks at its own training scans; what it takes for a lesion
and is none is shown to it in a quarter of the last third's samples. The control goes on for that third as
it began, with the same rate. The second network is `voxelscale refine`'s. Prints Dice, sensitivity at 1/8
to 8 false positives a scan and CPM with 95 % intervals by Student's t over seeds; writes JSON.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import (  # type: ignore[import-not-found]
    config_of,
    figures,
    make_data_set,
    parser_of,
    recipe_folder,
    show,
    summary,
    test_sources,
    train_and_look,
    truth_of,
)
from numpy.typing import NDArray

from voxelscale.config import Config
from voxelscale.geometry import Triple
from voxelscale.model.bundle import Bundle, read_bundle
from voxelscale.predict.predictor import Predictor
from voxelscale.randomness import generator
from voxelscale.samples.patches import PatchSource
from voxelscale.store import CaseInfo, Store, open_store
from voxelscale.train import fit
from voxelscale.train.loop import patch_task
from voxelscale.tune.refine import find_candidates, refine

RECIPE = "cross-entropy 5, small, hardest"
MINED = 0.2
"""Least probability of what is mined."""
SHARE = 0.25
"""Of the samples that show what was mined."""
FLOOR = 0.01
"""Least probability of a finding."""
MINE = 3
"""Stream of a sample's random numbers, beside the product's 0 to 2."""


def hard_negatives(bundle: Bundle, config: Config, store: Store, folder: Path) -> list[tuple[str, Triple]]:
    """Case and voxel of what a network takes for lesions in the scans it was trained on, and is none."""
    mining = replace(config, refine=replace(config.refine, candidates=MINED))
    return find_candidates(bundle, store, mining, folder).others


class Mined(PatchSource):
    """The product's samples, a share of them about places that were mined."""

    def __init__(self, places: Sequence[tuple[str, Triple]], *args: Any) -> None:
        super().__init__(*args)
        infos = {info.case: info for info in self.cases}
        self._places = [(infos[case], np.asarray(centre)) for case, centre in places]

    def _place(self, index: int) -> tuple[CaseInfo, NDArray[np.int64]]:
        random = generator(self._seed, index, MINE)
        if not self._places or random.random() >= SHARE:
            return super()._place(index)
        info, centre = self._places[int(random.random() * len(self._places))]
        reach = np.asarray(self._data.patch_size) // 3
        return info, centre.astype(np.int64) + random.integers(-reach, reach, endpoint=True)


def go_on(folder: Path, seed: int, samples: int, mined: bool) -> Bundle:
    """Train a network for two thirds, then the last third, with hard negatives or without."""
    out: Path = recipe_folder(folder, "hard negatives" if mined else "control", seed)
    two_thirds = samples * 2 // 3
    first = folder / "thirds"
    train_and_look((first, RECIPE, seed, two_thirds, folder))
    store = open_store(folder / "store")
    bundle = read_bundle(recipe_folder(first, RECIPE, seed))
    config = config_of(RECIPE, seed + 1000, samples - two_thirds)
    config = replace(config, optim=replace(config.optim, lr=config.optim.used.lr / 2))
    places = hard_negatives(bundle, config, store, out / "mined") if mined else []
    print(f"seed {seed}: {len(places)} hard negatives", flush=True)
    source = Mined(places, store, config.data, config.augment, config.train.seed)
    network = bundle.network(torch.device("cpu")).train()
    task = patch_task(config, store, torch.device("cpu"))
    fit(
        network,
        lambda logits, target: task.loss(logits, target)[0],
        source,
        config,
        run=out / "run",
        collate=task.collate,
    )
    torch.set_num_threads(1)
    return replace(bundle, weights=network.state_dict())


def second_network(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of the first network alone, with all its candidates, and of both, on the unseen scans."""
    run = recipe_folder(folder, "second network", seed)
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "model.vxs").is_file():
        shutil.copy(recipe_folder(folder, RECIPE, seed) / "model.vxs", run)
    refine(run, folder / "store", config_of(RECIPE, seed, 1))
    torch.set_num_threads(1)
    bundle = read_bundle(run)
    ways = {
        "first network, from 0.01": replace(bundle, false_positives=None),
        "with a second network": bundle,
    }
    return {name: looked(folder, way) for name, way in ways.items()}


def looked(folder: Path, bundle: Bundle) -> dict[str, Any]:
    """Figures of a model on the unseen scans."""
    config = replace(bundle.config.predict, candidates=FLOOR)
    predictor = Predictor(bundle, config, torch.device("cpu"), torch.float32)
    pairs = [(source.case, *truth_of(source)) for source in test_sources(folder)]
    looks = [predictor.look(case, image) for case, image, _ in pairs]
    found, masks = [findings for findings, _ in looks], [mask.array for _, mask in looks]
    return dict(figures([truth for _, _, truth in pairs], found, masks))


def work(job: tuple[Path, str, int, int]) -> tuple[str, int, dict[str, dict[str, Any]]]:
    """One training and its figures, by name of the way; kept for the same command again."""
    folder, what, seed, samples = job
    torch.set_num_threads(1)
    kept = recipe_folder(folder, what, seed) / "figures.json"
    if kept.is_file():
        return what, seed, json.loads(kept.read_text())
    if what == "second network":
        there = second_network(folder, seed)
    else:
        there = {what: looked(folder, go_on(folder, seed, samples, mined=what == "hard negatives"))}
    kept.write_text(json.dumps(there))
    return what, seed, there


def main() -> None:
    """Read the arguments, train what is missing, measure, print, write."""
    parser = parser_of(__doc__, "false_positives.json")
    parser.add_argument("--samples", type=int, default=12_000)
    options = parser.parse_args()
    folder, seeds = options.folder, range(options.seeds)
    make_data_set(folder)
    whole = [(folder, RECIPE, s, options.samples, folder) for s in seeds]
    jobs = [
        (folder, what, seed, options.samples)
        for seed in seeds
        for what in ("second network", "control", "hard negatives")
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        list(pool.map(train_and_look, whole))
        thirds = [(folder / "thirds", RECIPE, s, options.samples * 2 // 3, folder) for s in seeds]
        list(pool.map(train_and_look, thirds))
        each: dict[str, list[dict[str, Any]]] = {}
        for what, seed, done in pool.map(work, jobs):
            read = ", ".join(f"{name} {found['cpm']:.3f}" for name, found in done.items())
            print(f"{what} {seed}: CPM {read}", flush=True)
            for name, found in done.items():
                each.setdefault(name, []).append(found)
    rows = [{"recipe": RECIPE, "way": name, **summary(found)} for name, found in each.items()]
    show(rows)
    options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
