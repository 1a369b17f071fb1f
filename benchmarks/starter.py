"""The starter model: its training set, its training, and what it finds in patients that it never saw.

    python benchmarks/starter.py DATA WORK [--out benchmarks/results/starter.json]

DATA holds ``lidc_nodule_cubes``, ``lidc_nodule_vois``, ``lidc``, ``lidc_whole``, ``lung_tumour`` and
``totalsegmentator`` (docs/starter.md says what they are and whose). Patients are split first, across all
folders. Interrupted, the same command goes on. Pixels stay in WORK; only weights leave it.
"""

from __future__ import annotations

import argparse
import csv
import json
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxelscale.config import Config, PhantomConfig, PrepareConfig
from voxelscale.dataset import DataSet
from voxelscale.dataset.reading import read_case
from voxelscale.files import write_atomic
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan
from voxelscale.phantom.dataset import write_copies, write_phantoms

SHARES = {"test": 0.22, "val": 0.12}
"""Of the patients; the rest trains."""
TEST = {"LIDC-IDRI-0001", "LIDC-IDRI-0023"}
"""Patients of whom there is more than a crop: the only scans with readers' truth to be judged on."""
TRAIN = {"LIDC-IDRI-0002", "lung1", "totalsegmentator"}
"""Of the few other real lungs."""
BRIGHTEST_HU = 400.0
"""Where the cubes' HU end."""
PAD = 18
"""Voxels by which a cube is continued by its mirror image, so that patches are not centred on its nodule."""


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
    """A cube with its mirror image around it, image and mask; so much of it that the nodule is there once."""
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
        _written(folder, "lung1", data / "lung_tumour/lung1_image.nrrd", data / "lung_tumour/lung1_label.nrrd"),
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


def training_set(data: Path, work: Path) -> Path:
    """The table of all that the model is trained and validated on, made in WORK."""
    found = [padded(case, work / "padded") for case in cubes(data) if case.split != "test"]
    few = {case.name: case for case in scans(data, work / "scans") if case.split == "train"}
    for name, mix in MIXES.items():
        if name == "cubes":
            into = [case for case in cubes(data) if case.split == "train"]
        elif name == "phantoms":
            into = phantoms(work / "phantoms")
        else:
            into = [few[name]]
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
        Case(name=f"{folder.name}-{row['case']}", patient=row["patient"], image=made.table.parent / row["image"],
             label=made.table.parent / row["label"])
        for row in csv.DictReader(made.table.open(encoding="utf-8"))
    ]


def phantoms(folder: Path) -> list[Case]:
    """Synthetic chests without nodules; they train only."""
    config = PhantomConfig(cases=PHANTOMS, nodules=(0, 0), spacing=(1.5, 1.2, 1.2))
    made = write_phantoms(config, folder, 1)
    return [
        Case(name=row["case"], patient=row["case"], image=folder / row["image"], label=folder / row["label"])
        for row in csv.DictReader(made.open(encoding="utf-8"))
    ]


def bound_hu(store: Path) -> None:
    """Take lesions' brightest HU as `BRIGHTEST_HU`: calcified ones among the crops reach 3000, while the cubes
    were cut there, and a network that tells the two apart would have learnt nothing of nodules."""
    path = store / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["fingerprint"]["lesion_hu"]["percentile_99_5"] = BRIGHTEST_HU
    write_atomic(path, json.dumps(content))
