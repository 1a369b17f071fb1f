"""The public functions for notebooks: the same as the command line gives."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import Command
from voxelscale.api import Model, VoxelscaleError, evaluate_case, froc, load_scan, scan_of
from voxelscale.config import Config
from voxelscale.dataset.listing import list_sources
from voxelscale.formats import read_label
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
    truth = read_label(source.labels[0])
    result = evaluate_case("scan", truth, found.mask, found.findings)
    assert 0 <= froc([result.matches]).sensitivity[-1] <= 1


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


def test_findings_as_a_table(run: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    found = Model.load(run).predict(list_sources(scans)[0].image)
    table = found.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert list(table["diameter_mm"]) == [finding.diameter_mm for finding in found.findings]
