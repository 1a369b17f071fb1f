"""Two channels, three overlapping regions and an ignore label, from the files to the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from tests.conftest import Command
from tests.regions import write_regions

FAST = [
    *("--set", "data.patch_size=[16,24,24]", "--set", "model.depth=3", "--set", "model.filters=8"),
    *("--set", "train.samples=400", "--set", "train.batch_size=2"),
    *(
        "--set",
        "train.ranks=1",
        "--set",
        "train.threads=1",
        "--set",
        "train.validate_every=0",
        "--set",
        "train.precision=fp32",
    ),
    *("--set", "loss.cross_entropy=1", "--set", "loss.top_k=1", "--set", "optim.lr=0.01"),
]


def read(path: Path) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regions(tmp_path_factory.mktemp("regions") / "data", cases=12)


def test_the_whole_job(voxelscale: Command, data: Path, tmp_path: Path) -> None:
    store, run, out = tmp_path / "store", tmp_path / "run", tmp_path / "out"
    assert voxelscale("prepare", data, store, "--set", "prepare.plan=false")[0] == 0
    code, _, err = voxelscale("train", store, run, *FAST)
    assert code == 0, err
    code, said, err = voxelscale("predict", run, data, out, "--store", store, "--split", "val")
    assert code == 0, err
    assert "core" in said
    unseen = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert unseen == ["case_000", "case_004", "case_008"]

    # By our own count of the voxels that are not ignored, each region of each unseen case.
    each: dict[str, list[float]] = {name: [] for name in ("whole", "core", "enhancing")}
    for case in unseen:
        truth, found = read(data / "labelsTr" / f"{case}.nii.gz"), read(out / case / "mask.nii.gz")
        counted = truth != 4
        for least, name in enumerate(each, start=1):
            each[name].append(dice((truth >= least) & counted, (found >= least) & counted))
    print("DICE", {k: np.mean(v) for k, v in each.items()})
    assert np.mean(list(each.values())) >= 0.8

    code, said, err = voxelscale("evaluate", out, data)
    assert code == 0, err
    found = json.loads((out / "evaluation.json").read_text())
    for name, scores in each.items():
        assert found["classes"][name]["dice"]["mean"] == pytest.approx(np.mean(scores), abs=1e-9)
    assert found["mean_dice"]["mean"] == pytest.approx(np.mean(list(each.values())), abs=1e-9)
    with (out / "cases.csv").open() as handle:
        assert {row["class"] for row in csv.DictReader(handle)} == set(each)

    code, said, err = voxelscale("report", out, data, "--run", run, "--out", tmp_path / "report.html")
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in each)

    # Any region is a finding of its own, with its name.
    listed = json.loads((out / "case_000" / "findings.json").read_text())["findings"]
    assert {one["label"] for one in listed} == set(each)


def test_pictures_from_png_to_a_score(voxelscale: Command, tmp_path: Path) -> None:
    data, store, run, out = (tmp_path / name for name in ("data", "store", "run", "out"))
    for folder in ("images", "labels"):
        (data / folder).mkdir(parents=True)
    for number in range(6):
        random = np.random.default_rng(number)
        y, x = np.mgrid[:48, :56]
        label = np.zeros((48, 56), np.uint8)
        for value in (1, 2):
            label[np.hypot(y - random.uniform(10, 38), x - random.uniform(10, 46)) < 8] = value
        colours = np.array([[90, 90, 90], [200, 90, 90], [90, 90, 200]])[label]
        noisy = (colours + random.normal(0, 15, colours.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(data / "images" / f"cell{number}.png")
        Image.fromarray(label).save(data / "labels" / f"cell{number}.png")
    classes = ["--set", "reading.labels={red: 1, blue: 2}"]
    code, _, err = voxelscale("prepare", data, store, *classes, "--set", "prepare.plan=false")
    assert code == 0, err
    assert "channels: R (rgb), G (rgb), B (rgb)" in err
    assert "a pixel counts as 1 mm" in err
    flat = [word.replace("[16,24,24]", "[1,32,32]").replace("samples=400", "samples=240") for word in FAST]
    code, _, err = voxelscale("train", store, run, *flat, "--set", "model.dims=2")
    assert code == 0, err
    code, _, err = voxelscale("predict", run, data, out, "--set", "predict.min_volume_mm3=0")
    assert code == 0, err
    code, said, err = voxelscale("evaluate", out, data, *classes)
    assert code == 0, err
    assert json.loads((out / "evaluation.json").read_text())["mean_dice"]["mean"] > 0.8, said
