"""The public functions for notebooks: the same as the command line gives."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import assert_type

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import Command
from tests.several import bundle_of
from voxelscale import api
from voxelscale.api import (
    CaseResult,
    Classes,
    Config,
    Finding,
    Froc,
    Model,
    Points,
    Prediction,
    Scan,
    VoxelscaleError,
    array_of,
    evaluate,
    froc,
    load_scan,
    save_scan,
    scan_of,
    summarise,
)
from voxelscale.channels import Channel
from voxelscale.classes import LESION
from voxelscale.dataset.listing import list_sources
from voxelscale.findings import lesions_of_mask
from voxelscale.formats import read_label
from voxelscale.model.build import build_model
from voxelscale.model.bundle import write_bundle
from voxelscale.store import Store
from voxelscale.train.launch import start


@pytest.fixture(scope="module")
def run(tiny: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "run"
    quick = replace(tiny, train=replace(tiny.train, samples=80), optim=replace(tiny.optim, lr=0.01))
    assert start(quick, store.path, folder)
    return folder


def test_a_prediction_is_that_of_the_command(
    run: Path, scans: Path, tmp_path: Path, voxelscale: Command
) -> None:
    source = list_sources(scans)[0]
    assert voxelscale("predict", run, source.image, tmp_path, "--set", "predict.probabilities=true")[0] == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    model = Model.load(run)
    found = model.predict(source.image)
    assert np.array_equal(found.mask.array, read_label(folder / "mask.nii.gz").array)
    assert np.array_equal(found.probabilities["lesion"], read_label(folder / "probability.nii.gz").array)
    with (folder / "findings.csv").open() as file:
        written = [
            [float(row[key]) for key in ("coordX", "coordY", "coordZ")] for row in csv.DictReader(file)
        ]
    assert written
    np.testing.assert_allclose([[f.x, f.y, f.z] for f in found.findings], written, atol=1e-3)
    assert list(found.warnings) == json.loads((folder / "findings.json").read_text())["warnings"]
    fewer = model.predict(load_scan(source.image), settings=["predict.candidates=0.9"])
    assert len(fewer.findings) <= len(found.findings)
    with pytest.raises(VoxelscaleError, match="an affine, but no array"):
        model.predict(source.image, affine=np.eye(4))


def test_an_array_is_predicted_as_its_file_is(run: Path, scans: Path, tmp_path: Path) -> None:
    source, model = list_sources(scans)[0], Model.load(run)
    image = nib.load(source.image)
    of_file = model.predict(source.image)
    of_array = model.predict(np.asanyarray(image.dataobj), affine=image.affine)
    assert len(of_file.findings) == len(of_array.findings) > 0
    for one, other in zip(of_file.findings, of_array.findings, strict=True):
        np.testing.assert_allclose([one.x, one.y, one.z], [other.x, other.y, other.z], atol=1e-3)
    array, affine = array_of(of_array.mask)
    np.testing.assert_allclose(affine, image.affine, atol=1e-4)
    assert np.array_equal(array, np.transpose(of_file.mask.array, (2, 1, 0)))
    save_scan(of_array.mask, tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj), array)
    probability = of_file.probability
    assert np.array_equal(np.rint(probability * 255), of_file.probabilities["lesion"])
    with pytest.raises(VoxelscaleError, match="array without an affine"):
        model.predict(np.asanyarray(image.dataobj))


def test_the_same_figures_as_the_command(
    run: Path, scans: Path, tmp_path: Path, voxelscale: Command
) -> None:
    assert voxelscale("predict", run, scans, tmp_path / "predictions")[0] == 0
    assert voxelscale("evaluate", tmp_path / "predictions", scans, "--out", tmp_path / "out")[0] == 0
    theirs = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    model, sources = Model.load(run), list_sources(scans)
    results = [evaluate(model.predict(s.image), s.labels[0], case=s.case) for s in sources]
    ours = summarise(results)
    for key in ("dice", "surface_dice", "hd95_mm", "iou", "cases"):
        assert ours[key] == theirs[key]
    assert froc(results).cpm == theirs["froc"]["cpm"]


def test_masks_held_against_each_other(scans: Path, tmp_path: Path) -> None:
    source = list_sources(scans)[0]
    truth = read_label(source.labels[0])
    same = evaluate(source.labels[0], truth)
    assert same.overlap.dice == 1
    assert same.matches.hits == (1.0,) * len(lesions_of_mask("", truth.array, truth.grid))
    flipped = scan_of(*array_of(truth))  # the same place
    flipped = Scan(flipped.array[:, ::-1], flipped.grid.affine @ _mirrored(flipped.array.shape[1]))
    assert evaluate(flipped, source.labels[0]) == same
    as_floats = Scan(truth.array.astype(np.float64), truth.affine)
    assert evaluate(as_floats, truth) == same
    with pytest.raises(VoxelscaleError, match=r"the prediction: values that are no whole numbers"):
        evaluate(Scan(as_floats.array * 0.5, truth.affine), truth)
    moved = truth.affine.copy()
    moved[2, 3] += 3
    with pytest.raises(VoxelscaleError, match=r"lies up to 3\.00 mm away"):
        evaluate(Scan(truth.array, moved), truth)
    with pytest.raises(VoxelscaleError, match="no class is called tumour"):
        evaluate(truth, truth, label="tumour")


def _mirrored(length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    affine = np.diag([1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = length - 1
    return affine


def test_one_class_of_several() -> None:
    """Values are the data set's own, as in a mask of the model; an ignored voxel does not count."""
    classes = Classes(names=("organ", "tumour"), values=((3,), (5,)), ignore=(9,))
    truth, mask = (np.zeros((4, 6, 6), np.uint8) for _ in range(2))
    truth[1, 1:3, 1:3], truth[2, 3:5, 3:5], truth[3] = 3, 5, 9
    mask[1, 1:3, 1:3], mask[2, 3:5, 3], mask[3, 0, 0] = 3, 5, 5
    prediction = Prediction(
        findings=(), mask=Scan(mask, np.eye(4)), probabilities={}, warnings=(), classes=classes
    )
    assert evaluate(prediction, Scan(truth, np.eye(4)), label="organ").overlap.dice == 1
    assert evaluate(prediction, Scan(truth, np.eye(4)), label="tumour").overlap.dice == pytest.approx(2 / 3)
    with pytest.raises(VoxelscaleError, match="one class is needed of organ, tumour"):
        evaluate(prediction, Scan(truth, np.eye(4)))
    with pytest.raises(VoxelscaleError, match="the truth: values without a name: 4"):
        evaluate(prediction, Scan(np.full_like(truth, 4), np.eye(4)), label="organ")
    with pytest.raises(VoxelscaleError, match="one class is needed"):
        _ = prediction.probability


def test_froc_of_points() -> None:
    """Two lesions, one found, twice; one mark on what is excluded, one wrong."""
    scans = [
        Points(
            marks=[(0, 0, 0, 0.9), (1, 0, 0, 0.8), (50, 0, 0, 0.7), (90, 0, 0, 0.6)],
            lesions=[(0, 0, 0, 6), (20, 0, 0, 6)],
            excluded=[(50, 0, 0, 5)],
        ),
        Points(marks=(), lesions=()),
    ]
    curve = froc(scans)
    assert curve.fp_per_scan.tolist() == [0, 0, 0.5]
    assert curve.sensitivity.tolist() == [0, 0.5, 0.5]
    assert curve.cpm == 0.5
    with pytest.raises(VoxelscaleError, match="lesions of scan 0 are no rows of four numbers"):
        froc([Points(marks=(), lesions=[(1, 2, 3)])])
    with pytest.raises(VoxelscaleError, match="lesions of scan 0: a diameter is not above 0"):
        froc([Points(marks=(), lesions=[(1, 2, 3, 0)])])
    with pytest.raises(VoxelscaleError, match="no scan has a lesion"):
        froc([Points(marks=[(1, 2, 3, 0.5)], lesions=())])


def test_a_users_program_needs_no_casts(run: Path, scans: Path) -> None:
    """`make lint` holds these types against what is declared."""
    source = list_sources(scans)[0]
    prediction = Model.load(run).predict(source.image)
    assert_type(prediction, Prediction)
    assert_type(prediction.findings, tuple[Finding, ...])
    assert_type(prediction.findings[0].diameter_mm, float)
    assert_type(prediction.probability, NDArray[np.float32])
    result = evaluate(prediction, source.labels[0])
    assert_type(result, CaseResult)
    assert_type(result.overlap.dice, float)
    assert_type(froc([result]), Froc)
    assert_type(froc([result]).sensitivity_at(1.0), float)
    assert {name for name in api.__all__ if getattr(api, name).__doc__} == set(api.__all__)


def test_an_array_lies_where_nibabel_says(tmp_path: Path) -> None:
    """Turned, mirrored, with three spacings, and moved."""
    c, s = np.cos(0.3), np.sin(0.3)
    turn = np.array([[0.0, -c, s], [1.0, 0.0, 0.0], [0.0, s, c]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * [0.7, 0.8, 2.0], (-10, 20, 30)
    array = np.random.default_rng(0).integers(-1000, 400, (5, 6, 7)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    ours, read = scan_of(array, affine), load_scan(tmp_path / "a.nii.gz")
    place = np.linalg.inv(ours.affine) @ read.affine @ [1, 2, 3, 1]
    np.testing.assert_allclose(place, np.round(place), atol=1e-4)
    z, y, x = np.round(place).astype(int)[:3]
    assert ours.array[z, y, x] == read.array[1, 2, 3]
    for wrong in (array[0], array[..., None]):
        with pytest.raises(VoxelscaleError, match="three axes"):
            scan_of(wrong, affine)


def test_what_is_no_scan_for_the_model(run: Path, scans: Path) -> None:
    model, source = Model.load(run), list_sources(scans)[0]
    with pytest.raises(VoxelscaleError, match="not a scan for this model"):
        model.predict(source.labels[0])
    with pytest.raises(VoxelscaleError, match="2 images for a model of CT"):
        model.predict(source.image, source.image)
    with pytest.raises(VoxelscaleError, match="thresold"):
        model.predict(source.image, settings=["predict.thresold=1"])
    # What a file would be refused for.
    array, affine = array_of(load_scan(source.image))
    torn = array.astype(np.float32)
    torn[:2] = np.nan
    with pytest.raises(VoxelscaleError, match="voxels are NaN or infinite"):
        model.predict(torn, affine=affine)
    with pytest.raises(VoxelscaleError, match="the scan: its voxel axes do not stand at right angles"):
        model.predict(array, affine=affine + np.eye(4, k=1) * [1, 1, 0, 0])


def test_channels_that_do_not_belong_together(tiny: Config, tmp_path: Path) -> None:
    """As of the command: an error where one lies elsewhere, a warning where it covers a part only."""
    two = (Channel(name="T1", scheme="zscore"), Channel(name="T2", scheme="zscore"))
    network = build_model(tiny.model, tiny.data.patch_size, (4.0, 4.0, 4.0), channels=2)
    config = replace(tiny, predict=replace(tiny.predict, refuse_unusable=False))
    bundle = bundle_of(config, network.state_dict(), (4.0, 4.0, 4.0), LESION, two)
    write_bundle(tmp_path / "model.vxs", bundle)
    model, values = Model.load(tmp_path / "model.vxs"), np.random.default_rng(0).random((20, 20, 20))
    here, part, away = (np.diag([4.0, 4.0, 4.0, 1.0]) for _ in range(3))
    part[0, 3], away[0, 3] = 40.0, 500.0
    first, partly, elsewhere = (scan_of(values, affine) for affine in (here, part, away))
    assert model.predict(first, first).warnings == ()
    (warning,) = model.predict(first, partly).warnings
    assert "channel T2: covers" in warning
    with pytest.raises(VoxelscaleError, match="channel T2: does not overlap with the first"):
        model.predict(first, elsewhere)


def test_findings_as_a_table(run: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    found = Model.load(run).predict(list_sources(scans)[0].image)
    table = found.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert list(table["diameter_mm"]) == [finding.diameter_mm for finding in found.findings]
    none = replace(found, findings=()).to_pandas()
    assert list(none.columns) == list(table.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(VoxelscaleError, match="pandas is not installed"):
        found.to_pandas()
