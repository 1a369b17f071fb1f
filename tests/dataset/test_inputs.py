"""What commands make of inputs as people have them: lungs, SEG in a tree, old nnU-Net, names, workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from pydicom.uid import generate_uid
from tests.conftest import assert_same_place
from tests.dataset.test_layouts import image, mask
from tests.dataset.test_privacy import volume
from tests.formats.test_formats import write_series
from tests.labels.test_kinds import LATTICES, truth, write_seg
from typer.testing import CliRunner, Result

from voxelscale.cli import app
from voxelscale.config import Config, dump
from voxelscale.dataset.listing import list_sources
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan, reorient, resample
from voxelscale.lungs import lung_field
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, read_bundle, write_bundle
from voxelscale.predict.predictor import Predictor
from voxelscale.samples.batch import Normalisation
from voxelscale.store import open_store
from voxelscale.store.prepare import resample_hu

CPU = torch.device("cpu")
SPACING = (5.0, 4.0, 4.0)
"""Of the network, (z, y, x) mm."""


def voxelscale(*arguments: object) -> Result:
    """A command in this process; its exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def config_file(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump(tiny))
    return path


@pytest.fixture(scope="module")
def model(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that nobody trained: it finds something everywhere, with a probability near one half."""
    torch.manual_seed(0)
    network = build_model(tiny.model, tiny.data.patch_size, SPACING)
    bundle = Bundle(
        config=tiny,
        weights=network.state_dict(),
        spacing=SPACING,
        normalisation=Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0),
        trained={},
    )
    path = tmp_path_factory.mktemp("model") / "model.vxs"
    write_bundle(path, bundle)
    return path


def predictor(model: Path, lungs: bool) -> Predictor:
    bundle = read_bundle(model)
    # What is air around the patient, a box alone cannot say.
    config = replace(bundle.config.predict, lungs=lungs, skip_air=False)
    return Predictor(bundle, config, CPU, torch.float32)


def flipped(scan: Scan) -> Scan:
    """The same scan, its columns counted from the other side."""
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, 2] * (scan.array.shape[2] - 1)
    affine[:3, 2] *= -1
    return Scan(np.ascontiguousarray(scan.array[:, :, ::-1]), affine)


def water() -> Scan:
    affine = np.asarray(np.eye(4)[[2, 1, 0, 3]] * [[5], [4], [4], [1]])
    return Scan(np.zeros((30, 40, 40), np.int16), affine)


# ---------------------------------------------------------------- lungs


def test_in_the_lung_box_it_is_the_prediction_of_the_whole_scan(scans: Path, model: Path) -> None:
    scan = resample_hu(reorient(read_scan(list_sources(scans)[0].image)), SPACING)
    (z, y, x), (d, h, w) = lung_field(scan).box
    box = (slice(z, z + d), slice(y, y + h), slice(x, x + w))
    whole = predictor(model, lungs=False).probability(scan)
    found = predictor(model, lungs=True).probability(scan)
    assert found.shape == scan.array.shape
    assert np.array_equal(found[box], whole[box])
    assert whole.min() > 0
    outside = np.ones(found.shape, bool)
    outside[box] = False
    assert outside.any()
    assert not found[outside].any()


def test_without_lungs_the_whole_scan_is_looked_at(model: Path) -> None:
    found, whole = (predictor(model, lungs=lungs).probability(water()) for lungs in (True, False))
    assert np.array_equal(found, whole)
    assert found.min() > 0


def test_what_is_found_in_the_lungs_lies_on_the_scans_own_lattice(
    scans: Path, model: Path, tmp_path: Path
) -> None:
    """On finer voxels than the network's, counted the other way round."""
    scan = reorient(read_scan(list_sources(scans)[1].image))
    fine = flipped(resample_hu(scan, (4.0, 3.0, 2.5)))
    write_scan(fine, tmp_path / "scan.nii.gz")
    coarse = resample_hu(reorient(fine), SPACING)
    box, grid = lung_field(coarse).box, coarse.grid
    sets = ["--set", "predict.lungs=true", "--set", "predict.threshold=0.01"]
    sets += ["--set", "predict.skip_air=false"]
    done = voxelscale("predict", model, tmp_path / "scan.nii.gz", tmp_path / "out", *sets)
    assert done.exit_code == 0, done.output
    theirs = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    found = sitk.ReadImage(str(tmp_path / "out" / "scan" / "mask.nii.gz"))
    assert_same_place(found, theirs)
    findings = json.loads((tmp_path / "out" / "scan" / "findings.json").read_text())["findings"]
    assert findings
    for finding in findings:
        there = theirs.TransformContinuousIndexToPhysicalPoint(finding["index_zyx"][::-1])
        assert (finding["x"], finding["y"], finding["z"]) == pytest.approx(there, abs=1e-3)
    voxels = np.argwhere(sitk.GetArrayFromImage(found))
    places = np.array([theirs.TransformIndexToPhysicalPoint(v[::-1].tolist()) for v in voxels])
    index = grid.mm_to_index(places)
    start, shape = np.array(box)
    # All of the box is above so low a threshold, and nothing a voxel of the network's away from it.
    assert (index > start - 1).all()
    assert (index < start + shape).all()
    assert (index.min(axis=0) < start + 1).all()
    assert (index.max(axis=0) > start + shape - 2).all()


def test_lungs_are_prepared(scans: Path, tmp_path: Path, config_file: Path) -> None:
    rows = ["case,image,label"]
    for source in list_sources(scans)[:2]:
        rows.append(f"{source.case},{source.image},{source.labels[0]}")
    block = np.zeros(water().array.shape, np.uint8)
    block[10:14, 10:14, 10:14] = 1
    write_scan(water(), tmp_path / "water.nii.gz")
    write_scan(Scan(block, water().affine), tmp_path / "block.nii.gz")
    rows.append("water,water.nii.gz,block.nii.gz")
    (tmp_path / "set.csv").write_text("\n".join(rows) + "\n")
    with_lungs = ["prepare", tmp_path / "set.csv", tmp_path / "store", "--config", config_file]
    with_lungs += ["--set", "prepare.plan=false", "--set", "prepare.lungs=true"]
    done = voxelscale(*with_lungs)
    assert done.exit_code == 0, done.output
    assert "water: no lungs found" in done.stderr
    store = open_store(tmp_path / "store")
    boxes = {info.case: info.lungs for info in store.cases}
    assert boxes.pop("water") is None
    assert len(boxes) == 2
    for case, box in boxes.items():
        hu, _ = store.read(case)
        affine = next(info.grid.affine for info in store.cases if info.case == case)
        assert box == lung_field(Scan(hu, affine)).box
    assert "3 of them kept" in voxelscale(*with_lungs).stdout
    again = voxelscale(*with_lungs[:-1], "prepare.lungs=false")
    assert "kept" not in again.stdout, "what the store holds of lungs depends on the config"
    assert all(info.lungs is None for info in open_store(tmp_path / "store").cases)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("turn", ["straight", "flipped"])
def test_a_tree_with_segmentations_by_highdicom(tmp_path: Path, config_file: Path, turn: str) -> None:
    lesions: dict[str, Scan] = {}
    for number in range(2):
        place, uid = tmp_path / "tree" / f"study{number}", generate_uid()
        lesion = truth(LATTICES[turn])
        lesion.array[:, :, : 11 + number] = 0
        write_series(place / "ct", Scan(lesion.array.astype(np.int16) * 100, lesion.affine), uid=uid)
        scan = read_scan(place / "ct")
        on_scan = resample(reorient(lesion), scan.grid, "nearest")
        write_seg(place / "seg.dcm", on_scan, scan, place / "ct", "BINARY")
        lesions[uid] = reorient(on_scan)
    spacing = ",".join(f"{s:g}" for s in lesions[uid].spacing)
    sets = ["--set", f"prepare.spacing=[{spacing}]", "--set", "prepare.plan=false"]
    sets += ["--set", "reading.names=series"]
    done = voxelscale("prepare", tmp_path / "tree", tmp_path / "store", "--config", config_file, *sets)
    assert done.exit_code == 0, done.output
    assert "layout: DICOM tree, 2 cases" in done.stderr
    assert "without labels" not in done.stderr
    store = open_store(tmp_path / "store")
    assert {info.case for info in store.cases} == set(lesions)
    for info in store.cases:
        hu, stored = store.read(info.case)
        assert np.array_equal(stored, lesions[info.case].array)
        assert np.array_equal(hu == 100, stored > 0)
        assert np.allclose(info.grid.affine, lesions[info.case].affine, atol=1e-3)


def old_nnunet(folder: Path) -> None:
    """A raw data set as nnU-Net 1 has it: the Decathlon's JSON, and files with a channel's number."""
    for name in ("lung_001", "lung_002"):
        write_scan(image(), folder / "imagesTr" / f"{name}_0000.nii.gz")
        write_scan(mask(), folder / "labelsTr" / f"{name}.nii.gz")
    write_scan(image(), folder / "imagesTs" / "lung_003_0000.nii.gz")
    pairs = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
        for n in ("lung_001", "lung_002")
    ]
    content = {
        "name": "Lung",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "cancer"},
        "numTraining": 2,
        "numTest": 1,
        "training": pairs,
        "test": ["./imagesTs/lung_003.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("named", ["", "dataset.json"])
def test_the_older_nnunet(tmp_path: Path, config_file: Path, model: Path, named: str) -> None:
    old_nnunet(tmp_path / "Task006")
    sets = ["--set", "prepare.spacing=[2,1,1]", "--set", "prepare.plan=false", "--config", config_file]
    done = voxelscale("prepare", tmp_path / "Task006" / named, tmp_path / "store", *sets)
    assert done.exit_code == 0, done.output
    assert "layout: nnU-Net, 2 cases, 1 test scan left out" in done.stderr
    store = open_store(tmp_path / "store")
    assert [info.case for info in store.cases] == ["lung_001", "lung_002"]
    for info in store.cases:
        hu, stored = store.read(info.case)
        assert np.array_equal(hu, image().array)
        assert np.array_equal(stored, mask().array)
    looked = voxelscale("predict", model, tmp_path / "Task006" / named, tmp_path / "out")
    assert looked.exit_code == 0, looked.output
    written = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert written == ["lung_001", "lung_002", "lung_003"]


def test_the_older_nnunet_with_a_modality_that_is_not_there(tmp_path: Path, config_file: Path) -> None:
    old_nnunet(tmp_path / "Task")
    path = tmp_path / "Task" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modality": {"0": "CT", "1": "PET"}}))
    done = voxelscale("prepare", tmp_path / "Task", tmp_path / "store", "--config", config_file)
    assert done.exit_code == 2
    assert "lung_001_0000.nii.gz: lacks the channel PET" in done.stderr


# ---------------------------------------------------------------- names


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients, each with a CT and a SEG in a folder of their own."""
    folder = tmp_path_factory.mktemp("tree")
    for number in range(3):
        scan, lesion = volume(number)
        place = folder / f"p{number}"
        write_series(place / "ct", scan)
        for path in (place / "ct").iterdir():
            data = pydicom.dcmread(path)
            data.PatientID = f"patient number {number}"
            data.save_as(path)
        written = read_scan(place / "ct")
        write_seg(
            place / "seg.dcm", resample(lesion, written.grid, "nearest"), written, place / "ct", "BINARY"
        )
    return folder


@pytest.mark.parametrize("names", ["series", "hash", "auto", "file"])
def test_commands_find_each_others_cases(
    tree: Path, tmp_path: Path, config_file: Path, model: Path, names: str
) -> None:
    sets = ["--config", config_file, "--set", f"reading.names={names}"]
    sets += ["--set", "prepare.split=[1,1,1]", "--set", "prepare.plan=false"]
    store, out = tmp_path / "store", tmp_path / "predictions"
    done = voxelscale("prepare", tree, store, *sets)
    assert done.exit_code == 0, done.output
    infos = open_store(store).cases
    (test,) = (info.case for info in infos if info.split == "test")
    looked = voxelscale("predict", model, tree, out, "--store", store, "--split", "test", *sets)
    assert looked.exit_code == 0, looked.output
    assert [path.name for path in out.iterdir() if path.is_dir()] == [test]
    judged = voxelscale("evaluate", out, tree, *sets)
    assert judged.exit_code == 0, judged.output
    (case,) = json.loads((out / "evaluation.json").read_text())["cases"]
    assert case["case"] == test
    assert case["lesions"] == 1
    uids = {pydicom.dcmread(next((tree / f"p{n}" / "ct").iterdir())).SeriesInstanceUID for n in range(3)}
    if names == "series":
        assert {info.case for info in infos} == uids
    elif names == "file":
        assert {info.case for info in infos} == {"p0-ct", "p1-ct", "p2-ct"}
    else:
        assert all(info.case.startswith("case-") for info in infos)


def test_other_names_than_the_stores_are_reported(
    tree: Path, tmp_path: Path, config_file: Path, model: Path
) -> None:
    sets = ["--config", config_file, "--set", "prepare.plan=false"]
    assert voxelscale("prepare", tree, tmp_path / "store", *sets).exit_code == 0
    asked = ["--store", tmp_path / "store", "--split", "train", "--set", "reading.names=series"]
    done = voxelscale("predict", model, tree, tmp_path / "out", *asked)
    assert done.exit_code == 2
    assert "error: " in done.stderr
    assert "reading.names" in done.stderr


# ---------------------------------------------------------------- workers


def test_one_worker_and_two_write_the_same_store(scans: Path, tmp_path: Path, config_file: Path) -> None:
    stores = []
    for workers in (1, 2):
        folder = tmp_path / f"store{workers}"
        sets = ["--set", f"prepare.workers={workers}", "--set", "prepare.lungs=true"]
        sets += ["--set", "prepare.memory_gib=0.05"]  # else the plan says how much is free just now
        done = voxelscale("prepare", scans, folder, "--config", config_file, *sets)
        assert done.exit_code == 0, done.output
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stores.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert stores[0].keys() == stores[1].keys()
    assert sum(name.endswith(".b2nd") for name in stores[0]) == 5
    different = [name for name in stores[0] if stores[0][name] != stores[1][name]]
    assert not different
