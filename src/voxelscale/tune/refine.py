"""Training false-positive reduction on what a network finds in its training scans: lesions and others.

`docs/benchmarks.md` ("False positives") holds it against hard negatives in the first network's training.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from voxelscale.config import Config, PredictConfig
from voxelscale.console import Progress
from voxelscale.device import default_device
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.froc import match
from voxelscale.files import digest_of, not_written, read_json_lines
from voxelscale.findings import lesions_of_mask
from voxelscale.geometry import Scan, Triple
from voxelscale.model.bundle import Bundle, bundle_path, one_class, read_bundle, write_bundle
from voxelscale.model.false_positives import FalsePositiveNet, crop_shape, crop_start
from voxelscale.predict.classes import lesions_by
from voxelscale.predict.predictor import Predictor
from voxelscale.randomness import generator
from voxelscale.ranks.place import fill
from voxelscale.samples.batch import Normalisation
from voxelscale.store import CaseInfo, Reader, Store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.fitting import fit

FOLDER = "refine"
"""Beside the model: the candidates and the training."""
NOISE_HU = 15.0
LEAST = 5
"""Of candidates that are none, and of lesions; fewer teach nothing."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Places in the training scans, in voxels (z, y, x) of the store.

    Attributes:
        lesions: case and centre of each true lesion.
        others: case and centre of what the network took for one, and is none.
    """

    lesions: list[tuple[str, Triple]]
    others: list[tuple[str, Triple]]


def refine(run: Path, store_path: Path, config: Config) -> Candidates | None:
    """Train false-positive reduction for a run's model and put it into its ``model.vxs``.

    After an interruption the same call resumes. The model's calibration is dropped: it is of other scores.

    Args:
        run: the run's folder, or a model file.
        store_path: the store that it was trained on.
        config: `refine`, `predict` and `train` of it are used.

    Returns:
        what it was trained on; None after Ctrl-C, which saves.

    Raises:
        VoxelscaleError: the model is of another store, an ensemble, of several classes or of no CT; too few
            candidates.
    """
    path = bundle_path(run)
    bundle = read_bundle(path)
    store = open_fold(store_path, bundle.config.data.fold)
    _check(bundle, store, path)
    before, bundle = bundle, replace(bundle, false_positives=None, calibration=None)
    folder = path.parent / FOLDER
    candidates = find_candidates(bundle, store, config, folder)
    for there, what in ((candidates.lesions, "lesions"), (candidates.others, "candidates that are none")):
        if len(there) < LEAST:
            raise VoxelscaleError(
                f"{store_path}: {len(there)} {what} in the training scans; {LEAST} are needed",
                "lower refine.candidates, or train on more scans",
            )
    torch.manual_seed(config.train.seed)
    network = FalsePositiveNet()
    crops = Crops(candidates, store, bundle.normalisation, config.train.seed)
    training, loss = training_of(config), F.binary_cross_entropy_with_logits
    key = digest_of([*_sought(bundle, config), asdict(config.refine), config.train.seed])[:16]
    result = fit(network, loss, crops, training, run=folder / key)
    if not result.finished:
        return None
    weights = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    lowered = min(bundle.config.predict.candidates, config.refine.candidates)
    predict = replace(bundle.config.predict, candidates=lowered)
    refined = replace(bundle, false_positives=weights, config=replace(bundle.config, predict=predict))
    if refined.identity != before.identity:  # else it is there, and perhaps calibrated
        write_bundle(path, refined)
    return candidates


def _check(bundle: Bundle, store: Store, path: Path) -> None:
    fill()
    if "RANK" in os.environ:
        raise VoxelscaleError("refine runs in one process", "start it without torchrun")
    one_class(bundle, path, "false-positive reduction")
    if not (bundle.of_ct and len(bundle.channels) == 1):
        names = ", ".join(channel.name for channel in bundle.channels)
        raise VoxelscaleError(
            f"{path}: false-positive reduction is only for one channel of CT, not {names}",
            "go on without it: it is not needed to predict",
        )
    if bundle.others:
        raise VoxelscaleError(
            f"{path}: is an ensemble", "refine each of its models, then voxelscale ensemble again"
        )
    if bundle.trained.get("data") != store.fingerprint["digest"]:
        raise VoxelscaleError(
            f"{path}: was not trained on {store.path}", "name the store that it was trained on"
        )


def training_of(config: Config) -> Config:
    """The config of the second network's training."""
    wanted = config.refine
    train = replace(
        config.train,
        samples=wanted.samples,
        batch_size=wanted.batch_size,
        validate_every=0,
        ranks=1,
        virtual_workers=1,
        start_from="",  # that was of the first network
        freeze="nothing",
    )
    optim = replace(
        config.optim,
        name="adamw",
        lr=wanted.lr,
        reference_batch=wanted.batch_size,
        grow_from=0,
        pretrained_lr=1.0,
    )
    # Windows and thresholds do not matter here, and must not prevent resuming.
    return replace(config, train=train, optim=optim, predict=PredictConfig())


def find_candidates(bundle: Bundle, store: Store, config: Config, folder: Path) -> Candidates:
    """Look at the training scans; each one's result is kept in the folder, for the same command again."""
    lines = _Lines(folder / f"{digest_of(_sought(bundle, config))[:16]}.jsonl")
    cases = store.split("train")
    predictor: Predictor | None = None
    with Progress("look for candidates", len(cases)) as progress:
        for done, info in enumerate(cases, start=1):
            if info.case not in lines.known:
                predictor = predictor or Predictor(bundle, config.predict, default_device())
                lines.add(info.case, _candidates_in(info, store, predictor, config))
            progress.update(done, info.case)
    found = [(info.case, lines.known[info.case]) for info in cases]
    return Candidates(
        lesions=[(case, place) for case, places in found for place in places["lesions"]],
        others=[(case, place) for case, places in found for place in places["others"]],
    )


def _sought(bundle: Bundle, config: Config) -> list[Any]:
    """What the candidates depend on beside the scans."""
    return [bundle.identity, asdict(_rules(config))]


def _rules(config: Config) -> PredictConfig:
    """How candidates are looked for."""
    return replace(config.predict, candidates=config.refine.candidates, probabilities=False, batch_size=1)


def _candidates_in(
    info: CaseInfo, store: Store, predictor: Predictor, config: Config
) -> dict[str, list[Triple]]:
    image, mask = store.read(info.case)
    scan = Scan(image, np.asarray(info.affine))
    findings, _ = lesions_by(
        _rules(config), info.case, predictor.probability(scan), scan.grid, store.classes.names[0]
    )
    lesions = lesions_of_mask(info.case, mask, scan.grid)
    others = [f.index for f in findings if match(lesions, [f]).false_positives]
    return {"lesions": [lesion.index for lesion in lesions], "others": others}


class _Lines:
    """What was found in each case, a line of JSON a case; a torn last line counts as none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, dict[str, list[Triple]]] = {}
        for entry in read_json_lines(path):
            with suppress(KeyError, TypeError):
                self.known[entry["case"]] = {name: entry[name] for name in ("lesions", "others")}

    def add(self, case: str, places: dict[str, list[Triple]]) -> None:
        self.known[case] = places
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps({'case': case, **places})}")
        except OSError as error:
            raise not_written(self._path, error) from None


class Crops:
    """Crops about lesions and about candidates that are none, as often; mirrored, moved and noised.

    Sample i is a pure function of (seed, i).
    """

    def __init__(self, candidates: Candidates, store: Store, normalise: Normalisation, seed: int) -> None:
        self._candidates, self._normalise, self._seed = candidates, normalise, seed
        self._reader = Reader(store.path)
        self._shape = crop_shape(store.spacing)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = generator(self._seed, index, 0)
        lesion = random.random() < 0.5
        places = self._candidates.lesions if lesion else self._candidates.others
        case, centre = places[int(random.random() * len(places))]
        moved = np.asarray(centre) + random.integers(-1, 1, 3, endpoint=True)
        region = self._reader.region(case, crop_start(moved.tolist(), self._shape), self._shape)
        sides = tuple(slice(None, None, int(side)) for side in random.choice([-1, 1], 3))
        crop: NDArray[Any] = region[0][sides] + random.normal(0, NOISE_HU, self._shape)
        return self._normalise(torch.from_numpy(crop))[None], torch.tensor([float(lesion)])
