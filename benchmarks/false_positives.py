"""Which is better against false positives: hard negatives in training, or a second network on crops?

    python benchmarks/false_positives.py DIR [--seeds 3] [--samples 12000] [--out F]

DIR holds, or gets, the phantoms and the trained networks of benchmarks/detection.py. Hard negatives: a
network trained for two thirds of the samples looks at its own training scans; what it takes for a lesion
and is none is shown to it in a quarter of the last third's samples. The control goes on for that third as
it began, with the same rate. The second network sees a crop around every candidate of the first one and
says whether it is a lesion; it is trained on the candidates of the training scans. Prints sensitivity at
1/8 to 8 false positives a scan and CPM with 95 % intervals by Student's t over seeds; writes JSON.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import (  # type: ignore[import-not-found]
    config_of,
    figures,
    make_data_set,
    recipe_folder,
    show,
    summary,
    test_sources,
    train_and_look,
    truth_of,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from voxelscale.config import Config
from voxelscale.data.augment import Normalisation, make_batch
from voxelscale.data.listing import Source
from voxelscale.data.patches import PatchSource, Sample
from voxelscale.data.randomness import generator
from voxelscale.data.store import CaseInfo, Store, open_store
from voxelscale.evaluate.froc import match
from voxelscale.geometry import Scan, Triple
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.predict.bundle import Bundle, read_bundle, write_bundle
from voxelscale.predict.findings import Finding, find_lesions, lesions_of_mask
from voxelscale.predict.predict import Predictor
from voxelscale.train import fit

RECIPE = "cross-entropy 5"
MINED = 0.2
"""Least probability of what is mined."""
SHARE = 0.25
"""Of the samples that show what was mined."""
FLOOR = 0.01
"""Least probability of a candidate for the second network."""
CROP = (16, 24, 24)
CROP_SAMPLES = 16_000
MINE, CROPS = 3, 4
"""Streams of a sample's random numbers, beside the product's 0 to 2."""


@dataclass(frozen=True)
class Candidates:
    """What a network takes for lesions in the training scans, in voxels of the store.

    Attributes:
        wrong: case, centre and confidence of each that is none.
        right: case and centre of each true lesion.
    """

    wrong: list[tuple[str, Triple, float]]
    right: list[tuple[str, Triple]]


def candidates_of(bundle: Bundle, config: Config, store: Store) -> Candidates:
    """Look at the training scans with a network trained on them."""
    predictor = Predictor(bundle, config.predict, torch.device("cpu"), torch.float32)
    wrong, right = [], []
    for info in store.split("train"):
        image, mask = store.read(info.case)
        scan = Scan(image, np.asarray(info.affine))
        probability = predictor.probability(scan)
        findings, _ = find_lesions(
            info.case, probability, scan.grid, threshold=0.5, candidates=FLOOR, min_volume_mm3=10.0
        )
        lesions = lesions_of_mask(info.case, mask, scan.grid)
        right += [(info.case, lesion.index) for lesion in lesions]
        wrong += [
            (info.case, f.index, f.probability) for f in findings if match(lesions, [f]).false_positives
        ]
    return Candidates(wrong, right)


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


def go_on(folder: Path, seed: int, samples: int, mined: bool) -> Path:
    """Train a network for two thirds, then the last third, with hard negatives or without; its maps."""
    maps: Path = recipe_folder(folder, "hard negatives" if mined else "control", seed)
    if (maps / "done").is_file():
        return maps
    two_thirds = samples * 2 // 3
    first = folder / "thirds"
    train_and_look((first, RECIPE, seed, two_thirds, folder))
    store = open_store(folder / "store")
    bundle = read_bundle(recipe_folder(first, RECIPE, seed))
    config = config_of(RECIPE, seed + 1000, samples - two_thirds)
    config = replace(config, optim=replace(config.optim, lr=config.optim.lr / 2))
    places: list[tuple[str, Triple]] = []
    if mined:
        every = candidates_of(bundle, config, store).wrong
        places = [(case, centre) for case, centre, confidence in every if confidence >= MINED]
        print(f"seed {seed}: {len(places)} hard negatives", flush=True)
    source = Mined(places, store, config.data, config.augment, config.train.seed)
    network = bundle.network(torch.device("cpu")).train()

    def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        return make_batch(
            samples, config.data.patch_size, bundle.normalisation, torch.device("cpu"), config.train.seed
        )

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return dice_cross_entropy(logits, target, cross_entropy=5.0)[0]

    fit(network, loss, source, config, run=maps / "run", collate=collate)
    torch.set_num_threads(1)
    trained = replace(bundle, weights=network.state_dict())
    write_bundle(maps / "model.vxs", trained)
    predictor = Predictor(trained, config.predict, torch.device("cpu"), torch.float32)
    for case in test_sources(folder):
        np.save(maps / f"{case.case}.npy", predictor.probability(truth_of(case)[0]).astype(np.float16))
    (maps / "done").touch()
    return maps


def crop_network() -> nn.Module:
    """``(batch, 1, *CROP)`` to the logit of being a lesion, ``(batch, 1)``."""
    layers: list[nn.Module] = []
    channels = 1
    for wide in (16, 32, 64):
        for _ in range(2):
            layers += [
                nn.Conv3d(channels, wide, 3, padding=1, bias=False),
                nn.BatchNorm3d(wide),
                nn.ReLU(),
            ]
            channels = wide
        layers.append(nn.MaxPool3d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 1))


def crop_of(volume: NDArray[Any], centre: Sequence[float], size: Sequence[int] = CROP) -> NDArray[Any]:
    """The voxels about a place; air beyond the scan."""
    starts = [round(c) - n // 2 for c, n in zip(centre, size, strict=True)]
    crop = np.full(size, -1000, volume.dtype)
    into, of = [], []
    for start, n, whole in zip(starts, size, volume.shape, strict=True):
        low, high = max(0, start), min(whole, start + n)
        into.append(slice(low - start, max(low, high) - start))
        of.append(slice(low, max(low, high)))
    crop[tuple(into)] = volume[tuple(of)]
    return crop


class Crops:
    """Crops about lesions and about candidates that are none, as often; mirrored and moved by chance."""

    def __init__(self, candidates: Candidates, store: Store, seed: int) -> None:
        self._volumes = {info.case: store.read(info.case)[0] for info in store.split("train")}
        self._normalise = Normalisation.of_fingerprint(store.fingerprint["lesion_hu"])
        self._candidates, self._seed = candidates, seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = generator(self._seed, index, CROPS)
        lesion = random.random() < 0.5
        places = [p[:2] for p in (self._candidates.right if lesion else self._candidates.wrong)]
        case, centre = places[int(random.random() * len(places))]
        moved = [c + m for c, m in zip(centre, random.integers(-1, 1, 3, endpoint=True), strict=True)]
        crop = crop_of(self._volumes[case], moved)
        crop = crop[tuple(slice(None, None, int(s)) for s in random.choice([-1, 1], 3))]
        noise = random.normal(0, 15, crop.shape)
        return self._normalise(torch.from_numpy(crop + noise))[None], torch.tensor([float(lesion)])


def second_network(folder: Path, seed: int) -> nn.Module:
    """Trained on the candidates of the first network of that seed."""
    store = open_store(folder / "store")
    run = recipe_folder(folder, "second network", seed)
    network = crop_network()
    if (run / "crops.pt").is_file():
        network.load_state_dict(torch.load(run / "crops.pt", weights_only=True))
        return network.eval()
    config = config_of(RECIPE, seed, CROP_SAMPLES)
    candidates = candidates_of(read_bundle(recipe_folder(folder, RECIPE, seed)), config, store)
    print(f"seed {seed}: {len(candidates.wrong)} candidates that are none, {len(candidates.right)} lesions")
    config = replace(
        config,
        train=replace(config.train, batch_size=32),
        optim=replace(config.optim, lr=0.002, reference_batch=32),
    )
    torch.manual_seed(seed)
    loss: Callable[[Any, Any], Tensor] = nn.functional.binary_cross_entropy_with_logits
    fit(network, loss, Crops(candidates, store, seed), config, run=run / "run")
    torch.save(network.state_dict(), run / "crops.pt")
    return network.eval()


def judged_again(
    findings: Sequence[Finding], image: Scan, network: nn.Module, normalise: Normalisation
) -> list[float]:
    """What the second network makes of the first one's findings, in [0, 1]; a mean over mirrored crops."""
    if not findings:
        return []
    crops = torch.stack([torch.from_numpy(crop_of(image.array, f.index)) for f in findings])[:, None]
    with torch.inference_mode():
        looks = [network(normalise(crops).flip(axes)) for axes in ((), (2,), (3,), (4,))]
    return [float(v) for v in torch.stack(looks).mean(0).sigmoid()[:, 0]]


WAYS: dict[str, Callable[[float, float], float]] = {
    "first network, from 0.01": lambda first, second: first,
    "second network alone": lambda first, second: second,
    "both, geometric mean": lambda first, second: (first * second) ** 0.5,
}


def second_scores(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of each way to use the second network, on the unseen scans."""
    torch.set_num_threads(1)
    network = second_network(folder, seed)
    torch.set_num_threads(1)
    maps = recipe_folder(folder, RECIPE, seed)
    normalise = read_bundle(maps).normalisation
    found: dict[str, list[list[Finding]]] = {name: [] for name in WAYS}
    truths, masks = [], []
    for source in test_sources(folder):
        image, truth = truth_of(source)
        probability = np.load(maps / f"{source.case}.npy").astype(np.float32)
        findings, mask = find_lesions(
            source.case, probability, truth.grid, threshold=0.5, candidates=FLOOR, min_volume_mm3=10.0
        )
        seconds = judged_again(findings, image, network, normalise)
        for name, way in WAYS.items():
            found[name].append(
                [
                    replace(f, probability=way(f.probability, s))
                    for f, s in zip(findings, seconds, strict=True)
                ]
            )
        truths.append(truth)
        masks.append(mask)
    return {name: figures(truths, found[name], masks) for name in WAYS}


def work(job: tuple[Path, str, int, int]) -> tuple[str, int, dict[str, dict[str, Any]]]:
    """One training and its figures, by name of the way."""
    folder, what, seed, samples = job
    torch.set_num_threads(1)
    if what == "second network":
        return what, seed, second_scores(folder, seed)
    sources: list[Source] = test_sources(folder)
    truths = [truth_of(source)[1] for source in sources]
    maps = go_on(folder, seed, samples, mined=what == "hard negatives")
    found, masks = [], []
    for source, truth in zip(sources, truths, strict=True):
        probability = np.load(maps / f"{source.case}.npy").astype(np.float32)
        findings, mask = find_lesions(
            source.case, probability, truth.grid, threshold=0.5, candidates=FLOOR, min_volume_mm3=10.0
        )
        found.append(findings)
        masks.append(mask)
    return what, seed, {what: figures(truths, found, masks)}


def main() -> None:
    """Read the arguments, train what is missing, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("false_positives.json"))
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
