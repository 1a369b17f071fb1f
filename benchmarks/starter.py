"""The starter model: its training set, its training, and what it finds in patients that it never saw.

    python benchmarks/starter.py DATA WORK [--out benchmarks/results/starter.json]

DATA holds ``lidc_nodule_cubes``, ``lidc_nodule_vois``, ``lidc``, ``lidc_whole``, ``lung_tumour`` and
``totalsegmentator`` (docs/starter.md says what they are and whose). Patients are split first, across all
folders. Interrupted, the same command goes on. Pixels stay in WORK; only weights leave it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine  # type: ignore[import-not-found]

from voxelscale.config import Config, PhantomConfig, PrepareConfig, load
from voxelscale.dataset import DataSet
from voxelscale.dataset.reading import read_case
from voxelscale.evaluate.froc import match
from voxelscale.files import write_atomic
from voxelscale.findings import Finding, lesions_of_mask, read_prediction
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan, reorient
from voxelscale.lungs import CROP_MM, lung_field
from voxelscale.model.bundle import Calibration, read_bundle, write_bundle
from voxelscale.phantom.dataset import write_copies, write_phantoms
from voxelscale.predict.predict import predict
from voxelscale.store.prepare import prepare
from voxelscale.train.launch import start
from voxelscale.tune.calibrate import calibrate_run

SHARES = {"test": 0.22, "val": 0.12}
"""Of the patients; the rest trains."""
TEST = {"LIDC-IDRI-0001", "LIDC-IDRI-0023"}
"""Patients of whom there is more than a crop: the only scans with readers' truth to be judged on."""
TRAIN = {"LIDC-IDRI-0002", "lung1", "totalsegmentator"}
"""Of the few other real lungs."""
BRIGHTEST_HU = 400.0
"""Where the cubes' HU end."""
PAD = 18
"""Voxels by which a cube is continued by its mirror image: patches are not to be centred on its nodule."""


def split_of(patient: str) -> str:
    """Where a patient belongs: a function of the name alone, the same for every folder."""
    if patient in TEST | TRAIN or patient.startswith("phantom"):
        return "test" if patient in TEST else "train"
    share = int.from_bytes(hashlib.sha256(f"starter {patient}".encode()).digest()[:4], "big") / 2**32
    return "test" if share < SHARES["test"] else "val" if share < sum(SHARES.values()) else "train"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A real crop or scan of the given folders."""

    name: str
    patient: str
    image: Path
    label: Path | None

    @property
    def split(self) -> str:
        return split_of(self.patient)


def cubes(data: Path) -> list[Case]:
    return list(_pairs(data / "lidc_nodule_cubes"))


def vois(data: Path) -> list[Case]:
    return list(_pairs(data / "lidc_nodule_vois"))


def _pairs(folder: Path) -> Iterator[Case]:
    for image in sorted((folder / "images").iterdir()):
        name = image.name.removesuffix(".nii.gz")
        label = folder / "labels" / image.name
        yield Case(name=name, patient=name[: len("LIDC-IDRI-0000")], image=image, label=label)


def table(path: Path, cases: list[Case]) -> Path:
    """A CSV as `voxelscale prepare` and `phantom --into` read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["case", "patient", "split", "image", "label"])
        for case in cases:
            writer.writerow([case.name, case.patient, case.split, case.image, case.label])
    return path


def padded(case: Case, folder: Path) -> Case:
    """A cube with its mirror image around it; so much of it that the nodule is there once."""
    image, label = folder / "images" / f"{case.name}.nii.gz", folder / "labels" / f"{case.name}.nii.gz"
    assert case.label is not None
    if not label.is_file():
        mask = read_scan(case.label)
        at = np.argwhere(mask.array)
        pad = max(0, min(PAD, int(at.min()) - 1, int((np.asarray(mask.array.shape) - 1 - at).min()) - 1))
        for scan, target in ((read_scan(case.image), image), (mask, label)):
            target.parent.mkdir(parents=True, exist_ok=True)
            affine = scan.affine.copy()
            affine[:3, 3] = scan.grid.index_to_mm([-pad] * 3)
            write_scan(Scan(np.pad(scan.array, pad, mode="reflect"), affine), target)
    return Case(name=case.name, patient=case.patient, image=image, label=label)


def scans(data: Path, folder: Path) -> list[Case]:
    """The scans that show more than a nodule's surroundings, with masks, as NIfTI."""
    lidc = data / "lidc"
    found = [
        _written(
            folder, "lung1", data / "lung_tumour/lung1_image.nrrd", data / "lung_tumour/lung1_label.nrrd"
        ),
        _written(folder, "totalsegmentator", data / "totalsegmentator/example_ct.nii.gz", None),
    ]
    for patient in ("LIDC-IDRI-0001", "LIDC-IDRI-0002"):
        (source,) = DataSet(path=lidc / patient).cases
        image, labels = read_case(source, Config().reading)
        found.append(_saved(folder, patient, image, labels.mask))
    found += list(_pairs(data / "lidc_whole"))
    return found


def _written(folder: Path, name: str, image: Path, label: Path | None) -> Case:
    scan = read_scan(image)
    mask = read_scan(label) if label else Scan(np.zeros(scan.array.shape, np.uint8), scan.affine)
    return _saved(folder, name, scan, mask)


def _saved(folder: Path, name: str, image: Scan, mask: Scan) -> Case:
    places = [folder / kind / f"{name}.nii.gz" for kind in ("images", "labels")]
    for scan, place in zip((image, mask), places, strict=True):
        if not place.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_scan(scan, place)
    return Case(name=name, patient=name, image=places[0], label=places[1])


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Copies of some scans with real nodules of the same split put in.

    Attributes:
        copies: of each scan.
        nodules: minimum and maximum in a copy.
        diameter_mm: minimum and maximum.
    """

    copies: int
    nodules: tuple[int, int]
    diameter_mm: tuple[float, float]


MIXES = {
    "cubes": Mix(copies=1, nodules=(1, 3), diameter_mm=(3.5, 14)),
    "lung1": Mix(copies=8, nodules=(8, 16), diameter_mm=(4, 28)),
    "LIDC-IDRI-0002": Mix(copies=6, nodules=(2, 5), diameter_mm=(3.5, 9)),
    "totalsegmentator": Mix(copies=2, nodules=(2, 4), diameter_mm=(6, 20)),
    "phantoms": Mix(copies=1, nodules=(8, 14), diameter_mm=(3.5, 25)),
}
"""A case is drawn as often as any other: copies of a scan weigh its lungs, of which there are few."""
PHANTOMS = 2


def training_set(data: Path, work: Path, copies: int) -> Path:
    """The table of all that the model is trained and validated on, made in WORK.

    Args:
        copies: of each cube, with other nodules put in.
    """
    found = [padded(case, work / "padded") for case in cubes(data) if case.split != "test"]
    few = {case.name: case for case in scans(data, work / "scans") if case.split == "train"}
    for name, mix in MIXES.items():
        if name == "cubes":
            into = [case for case in cubes(data) if case.split == "train"]
        elif name == "phantoms":
            into = phantoms(work / "phantoms")
        else:
            into = [few[name]]
        if name == "cubes":
            mix = replace(mix, copies=copies)
        found += with_nodules(data, work / f"with-{name}", into, mix)
    return table(work / "training.csv", found)


def with_nodules(data: Path, folder: Path, into: list[Case], mix: Mix, seed: int = 0) -> list[Case]:
    """Copies of some cases of one split with nodules of other patients of this split."""
    (split,) = {case.split for case in into}
    donors = table(folder / "donors.csv", [case for case in vois(data) if case.split == split])
    sources = DataSet(path=table(folder / "into.csv", into)).cases
    config = Config(
        phantom=PhantomConfig(
            seed=seed, nodules=mix.nodules, diameter_mm=mix.diameter_mm, crops=str(donors)
        ),
        prepare=PrepareConfig(workers=1),
    )
    made = write_copies(sources, config, folder / "copies", mix.copies)
    for name, error, _ in made.failed:
        print(f"{name}: {error}")
    return [
        Case(
            name=f"{folder.name}-{row['case']}",
            patient=row["patient"],
            image=made.table.parent / row["image"],
            label=made.table.parent / row["label"],
        )
        for row in csv.DictReader(made.table.open(encoding="utf-8"))
    ]


def phantoms(folder: Path) -> list[Case]:
    """Synthetic chests without nodules; they train only."""
    config = PhantomConfig(cases=PHANTOMS, nodules=(0, 0), spacing=(1.5, 1.2, 1.2))
    made = write_phantoms(config, folder, 1)
    return [
        Case(
            name=row["case"], patient=row["case"], image=folder / row["image"], label=folder / row["label"]
        )
        for row in csv.DictReader(made.open(encoding="utf-8"))
    ]


def bound_hu(store: Path) -> None:
    """Take lesions' brightest HU as `BRIGHTEST_HU`, where the cubes were cut off.

    Calcified nodules among the crops reach 3000; a network that can tell the two apart has learnt nothing.
    """
    path = store / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["fingerprint"]["lesion_hu"]["percentile_99_5"] = BRIGHTEST_HU
    write_atomic(path, json.dumps(content))


LUNGS_L = 4.5
"""Lungs of a scan, by which false positives in crops are carried over to a scan: an estimate."""
SIZES_MM = (0.0, 6.0, 10.0, 20.0, 100.0)
TEXTURES = {1: "ground-glass", 2: "part-solid", 3: "part-solid", 4: "part-solid", 5: "solid"}
"""The reader's rating of LIDC-IDRI."""


def held_out(data: Path, work: Path, split: str) -> dict[str, list[Case]]:
    """The sets that thresholds are chosen on (val) or that are judged once (test)."""
    own = [case for case in cubes(data) if case.split == split]
    mix = Mix(copies=2, nodules=(1, 2), diameter_mm=(3.5, 16))
    sets = {"cubes": own, "cubes with nodules": with_nodules(data, work / f"{split}-cubes", own, mix)}
    if split == "test":
        real = [case for case in scans(data, work / "scans") if case.split == "test"]
        whole = [case for case in real if case.name == "LIDC-IDRI-0023"]
        mix = Mix(copies=2, nodules=(10, 14), diameter_mm=(3.5, 25))
        sets |= {"scans": real, "scan with nodules": with_nodules(data, work / "test-scan", whole, mix)}
    return sets


def looked_at(model: Path, cases: list[Case], folder: Path) -> None:
    """Predict them, and keep what is there."""
    bundle = read_bundle(model)
    sources = DataSet(path=table(folder.with_suffix(".csv"), cases)).cases
    predict(sources, bundle, bundle.config.predict, folder)


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A true one: of which kind, and the confidence with which it was found; NaN: it was not."""

    case: str
    diameter_mm: float
    kind: str
    confidence: float


def held_against(data: Path, cases: list[Case], folder: Path) -> tuple[list[Lesion], list[float], float]:
    """The lesions, the confidences of the false positives, and the litres of lung, of a set."""
    lesions: list[Lesion] = []
    false: list[float] = []
    litres = 0.0
    textures = textures_of(data)
    for case in cases:
        findings, facts = read_prediction(folder / case.name / "findings.json")
        assert case.label is not None
        mask = reorient(read_scan(case.label))
        truth = lesions_of_mask(case.name, mask.array > 0, mask.grid)
        inner, more = inside(case, litres_of(facts))
        held = match(truth, [f for f in findings if inner(f) or not match(truth, [f]).false_positives])
        put_in = inserted(case)
        for lesion, confidence in zip(truth, held.hits, strict=True):
            place = np.array([lesion.x, lesion.y, lesion.z])
            near = [kind for at, size, kind in put_in if np.linalg.norm(at - place) < max(3.0, size / 2)]
            kind = (
                near[0]
                if near
                else textures.get(case.name.split("_with")[0].split("cubes-")[-1], "unknown")
            )
            lesions.append(
                Lesion(case=case.name, diameter_mm=lesion.diameter_mm, kind=kind, confidence=confidence)
            )
        false += held.false_positives
        litres += more
    return lesions, false, litres


EDGE = 4
"""Voxels (mm) from a crop's border within which false positives do not count: it cuts vessels to balls."""


def litres_of(facts: dict[str, Any]) -> float:
    return float(facts["lungs"]["volume_ml"]) / 1000


def inside(case: Case, litres: float) -> tuple[Callable[[Finding], bool], float]:
    """Whether a finding lies away from a crop's border, and the lung there; a scan counts as a whole."""
    image = reorient(read_scan(case.image))
    shape = np.asarray(image.array.shape)
    if max(shape * image.spacing) >= CROP_MM:
        return lambda finding: True, litres
    lung = lung_field(image).mask[(slice(EDGE, -EDGE),) * 3]

    def inner(finding: Finding) -> bool:
        index = np.asarray(finding.index)
        return bool((index >= EDGE).all() and (index <= shape - 1 - EDGE).all())

    return inner, float(np.count_nonzero(lung)) * image.grid.voxel_mm3 / 1e6


def textures_of(data: Path) -> dict[str, str]:
    rows = csv.DictReader((data / "lidc_nodule_cubes/nodules.csv").open(encoding="utf-8"))
    return {row["case"]: TEXTURES[int(row["texture"])] for row in rows}


def inserted(case: Case) -> list[tuple[Any, float, str]]:
    """Place, diameter and kind of each nodule that was put into a case."""
    path = case.image.parent.parent / "nodules.csv"
    if not path.with_name("truth").is_dir():  # the crops have another table of this name
        return []
    name = case.image.name.removesuffix(".nii.gz")
    return [
        (np.array([float(row[axis]) for axis in "xyz"]), float(row["diameter_mm"]), row["kind"])
        for row in csv.DictReader(path.open(encoding="utf-8"))
        if row["case"] == name
    ]


def figures(lesions: list[Lesion], false: list[float], litres: float, scans_seen: int) -> dict[str, Any]:
    """Sensitivity by size and kind at several confidences, each with its false positives."""
    points: dict[str, Any] = {}
    for least in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        wrong = sum(confidence >= least for confidence in false)
        points[f"{least:g}"] = {
            "sensitivity": share(lesions, least),
            "false_positives": wrong,
            "per_litre_of_lung": round(wrong / litres, 2),
            "per_scan_estimated": round(wrong / litres * LUNGS_L, 1),
            "by_size": {
                f"{low:g}-{high:g} mm": share(
                    [one for one in lesions if low <= one.diameter_mm < high], least
                )
                for low, high in pairwise(SIZES_MM)
            },
            "by_kind": {
                kind: share([one for one in lesions if one.kind == kind], least)
                for kind in sorted({one.kind for one in lesions})
            },
        }
    return {"cases": scans_seen, "lesions": len(lesions), "litres_of_lung": round(litres, 2), "at": points}


def share(lesions: list[Lesion], least: float) -> dict[str, Any]:
    """Found of all, and Wilson's 95 % interval."""
    n = len(lesions)
    found = sum(one.confidence >= least for one in lesions)
    if not n:
        return {"found": 0, "of": 0}
    z = 1.96
    middle, half = (
        found / n + z * z / (2 * n),
        z * math.sqrt(found / n * (1 - found / n) / n + z * z / (4 * n * n)),
    )
    ends = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    return {"found": found, "of": n, "interval": [round(max(0.0, ends[0]), 3), round(min(1.0, ends[1]), 3)]}


def judged(data: Path, work: Path, model: Path, split: str, folder: str) -> dict[str, Any]:
    """The figures of each set of a split."""
    result: dict[str, Any] = {}
    for name, cases in held_out(data, work, split).items():
        place = work / folder / f"{split}-{name.replace(' ', '-')}"
        looked_at(model, cases, place)
        lesions, false, litres = held_against(data, cases, place)
        result[name] = figures(lesions, false, litres, len(cases))
        if name == "scans":
            result[name]["each"] = [
                {
                    "scan": case.name,
                    "lesions": [asdict(one) for one in lesions if one.case == case.name],
                    "false_positives": sorted(
                        (round(c, 3) for c in held_against(data, [case], place)[1]), reverse=True
                    ),
                    "dice": dice(case, place),
                    "seconds": json.loads((place / case.name / "case.json").read_text())["seconds"],
                }
                for case in cases
            ]
    return result


def dice(case: Case, folder: Path) -> float:
    assert case.label is not None
    truth, found = (read_scan(path).array > 0 for path in (case.label, folder / case.name / "mask.nii.gz"))
    return round(2 * float((truth & found).sum()) / max(1, int(truth.sum() + found.sum())), 4)


FIRST = {"lung1": 10, "totalsegmentator": 4, "LIDC-IDRI-0002": 4}
"""How often each scan is in the first training's table, which has the cubes besides and nothing put in."""
LUNGS = ["predict.lungs=true", "predict.overlap=0.25"]
RUNS = {
    "first": (0, 3192, ["train.samples=6000", "optim.lr=2.5e-3"]),
    "second": (1, 1134, ["train.samples=1800", "optim.lr=2e-3", *LUNGS]),
    "third": (3, 2400, ["train.samples=2400", "optim.lr=2e-3", *LUNGS]),
    "fourth": (3, 2000, ["train.samples=2000", "optim.lr=2e-3", *LUNGS]),
}
"""Trainings, each from the weights of the one before: copies of each cube with nodules put in, and of
the scans where it is above 0; samples after which it was stopped (Ctrl-C) or ended; settings."""
SETTINGS = (
    "reading.allow_empty=true",
    "prepare.spacing=[1,1,1]",
    "prepare.lungs=true",
    "prepare.plan=false",
    "prepare.chunk=48",
    "prepare.workers=1",
    "data.patch_size=[40,40,40]",
    "data.foreground=0.5",
    "augment.p_affine=0.2",
    "augment.rotate_deg=[10,10,45]",
    "augment.p_noise=0.15",
    "augment.p_blur=0.1",
    "augment.p_gamma=0",
    "augment.p_brightness=0.1",
    "augment.p_low_resolution=0.15",
    "model.depth=4",
    "model.filters=16",
    "model.norm=batch",
    "loss.cross_entropy=10",
    "optim.name=muon",
    "optim.momentum=0.9",
    "train.ranks=1",
    "train.threads=1",
    "train.batch_size=2",
    "train.validate_every=0",
    "train.checkpoint_every=500",
    "train.precision=bf16",
    "predict.patch_size=[96,96,96]",
)


RECORD: dict[str, Any] = {
    "card": "docs/starter.md",
    "made_by": "benchmarks/starter.py",
    "trainings": {
        name: f"{samples} samples; {', '.join(sets)}" for name, (_, samples, sets) in RUNS.items()
    },
    "data_from": "LIDC-IDRI (CC BY 3.0), LUNA16 (CC BY 4.0), pyradiomics' lung1 (BSD-3-Clause), "
    "TotalSegmentator's example CT (Apache-2.0), phantoms",
    "use": "research, not diagnosis",
}
"""Kept in the model's file."""


def first_set(data: Path, work: Path) -> Path:
    """Cubes with their mirror images, and the few scans as they are."""
    found = [padded(case, work / "padded") for case in cubes(data) if case.split != "test"]
    for case in scans(data, work / "scans"):
        if case.split == "train":
            found += [replace(case, name=f"{case.name}_{n:02d}") for n in range(FIRST[case.name])]
    return table(work / "first.csv", found)


def trained(data: Path, work: Path) -> Path:
    """The last run's folder; every training goes on where it was."""
    begun = ""
    for name, (copies, samples, sets) in RUNS.items():
        run, store = work / f"run-{name}", work / f"store-{name}"
        config = load(None, (*SETTINGS, *sets, f"train.start_from={begun}"))
        if not (store / "dataset.json").is_file():
            path = training_set(data, work, copies) if copies else first_set(data, work)
            prepare(DataSet(path=path, reading=config.reading).cases, store, config.prepare, config.reading)
            bound_hu(store)
        stops = run / "checkpoints" / f"samples_{samples:012d}.ckpt"
        if not stops.is_file() and not start(config, store, run) and not stops.is_file():
            raise SystemExit(f"{run}: the same command goes on; with {stops.name} the next training begins")
        ended = run / "model.vxs"
        begun = str(ended if ended.is_file() else stops)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/starter.json"))
    parser.add_argument("--model", type=Path, help="judge this one instead of training")
    given = parser.parse_args()
    model = given.model or finished(given.data, given.work, trained(given.data, given.work) / "model.vxs")
    write_atomic(given.out, json.dumps(judgement(given.data, given.work, model), indent=1))


IN_MASK, LISTED = 2.0, 25.0
"""False positives a scan that are aimed at, by the estimate from crops: in the mask, and in the table."""
GROWN = 0.5
"""Voxels of this probability belong to a finding that reaches the upper threshold."""
NODULES_A_LITRE = 1186 / 888 / LUNGS_L
"""In LUNA16's scans; in crops about a nodule there are many times more."""


def finished(data: Path, work: Path, trained_model: Path) -> Path:
    """Thresholds and calibration, both on the validation patients alone, in a copy of the model."""
    model, folder = work / "starter.vxs", work / "chosen"
    sets = held_out(data, work, "val")
    cases = [case for of in sets.values() for case in of]
    looked_at(trained_model, cases, folder)
    seen = {name: (*held_against(data, of, folder), len(of)) for name, of in sets.items()}
    write_atomic(work / "val.json", json.dumps({name: figures(*one) for name, one in seen.items()}))
    false = [confidence for _, wrong, *_ in seen.values() for confidence in wrong]
    litres = sum(one[2] for one in seen.values())
    threshold, candidates = (least_for(false, litres, most) for most in (IN_MASK, LISTED))
    bundle = read_bundle(trained_model)
    rules = replace(
        bundle.config.predict,
        threshold=threshold,
        low_threshold=min(GROWN, threshold),
        candidates=candidates,
    )
    trained = {**bundle.trained, **RECORD}
    write_bundle(model, replace(bundle, config=replace(bundle.config, predict=rules), trained=trained))
    print(f"threshold {threshold}, candidates {candidates}")
    summary = calibrate_run(model, folder, DataSet(path=folder.with_suffix(".csv")))
    print(
        json.dumps({key: summary[key] for key in ("findings", "hits", "scans", "ece_before", "ece_after")})
    )
    # The calibration counted every false finding, those at the crops' borders, too.
    whole = sum(litres_of(read_prediction(folder / case.name / "findings.json")[1]) for case in cases)
    counted = (summary["findings"] - summary["hits"]) / whole
    lesions = sum(len(one[0]) for one in seen.values()) / whole
    rarer = lesions / NODULES_A_LITRE * (len(false) / litres) / counted
    print(f"odds divided by {rarer:.0f}")
    made_rare(model, rarer)
    return model


def made_rare(model: Path, rarer: float) -> None:
    """Recalibrate for scans in which nodules are rarer than in the crops, by Bayes' rule.

    Args:
        rarer: by which the odds of a finding are divided.
    """
    bundle = read_bundle(model)
    assert bundle.calibration is not None
    curve = bundle.calibration
    scores = sorted({*curve.scores, *(n / 200 for n in range(201))})
    shares = np.interp(scores, curve.scores, curve.probabilities)
    shifted = (shares / (shares + rarer * (1 - shares))).tolist()
    calibration = Calibration(scores=tuple(scores), probabilities=tuple(shifted))
    write_bundle(model, replace(bundle, calibration=calibration))


def least_for(false: list[float], litres: float, most: float) -> float:
    """Minimum confidence at which a scan has at most `most` false positives."""
    steps = [n / 20 for n in range(2, 20)]
    held = [s for s in steps if sum(one >= s for one in false) / litres * LUNGS_L <= most]
    return held[0] if held else steps[-1]


def judgement(data: Path, work: Path, model: Path) -> dict[str, Any]:
    """What the finished model does with validation and test patients."""
    place = f"judged-{read_bundle(model).digest[:8]}"
    return {
        "machine": machine(),
        "model": read_bundle(model).identity,
        "bytes": model.stat().st_size,
        "patients": {
            kind: dict(Counter(split_of(name) for name in sorted({case.patient for case in each})))
            for kind, each in (("cubes", cubes(data)), ("crops", vois(data)))
        },
        "val": json.loads((work / "val.json").read_text(encoding="utf-8")),
        "test": judged(data, work, model, "test", place),
    }


if __name__ == "__main__":
    main()
