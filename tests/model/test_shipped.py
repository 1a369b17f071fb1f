from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import SHARED, Command

from voxelscale.api import Model
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan
from voxelscale.lungs import lung_field
from voxelscale.model.bundle import read_bundle
from voxelscale.model.shipped import shipped
from voxelscale.predict.predictor import check_usable
from voxelscale.store.plausible import about

CUBE = SHARED / "lidc_nodule_cubes" / "images"
STARTER = Path("starter")


def made_up_crop() -> Scan:
    """40 mm of lung with a ball of 10 mm in it."""
    z, y, x = np.indices((40, 40, 40)) - 20
    random = np.random.default_rng(0)
    hu = np.where(z**2 + y**2 + x**2 < 25, 30, -860) + random.normal(0, 20, z.shape)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1]
    return Scan(np.rint(hu).astype(np.int16), affine)


def test_the_starter_is_small_calibrated_and_says_what_it_was_trained_on() -> None:
    path = shipped(STARTER)
    assert path is not None
    assert path.stat().st_size < 12e6
    bundle = read_bundle(STARTER)
    assert bundle.calibration is not None
    assert bundle.of_chests
    (facts,) = bundle.trained_on
    assert facts is not None
    assert facts.spacing[0][1] < 0.6
    assert Model.load("starter").spacing == bundle.spacing


def test_predict_starter_needs_nothing_but_a_scan(voxelscale: Command, tmp_path: Path) -> None:
    write_scan(made_up_crop(), tmp_path / "crop.nii.gz")
    code, out, err = voxelscale("predict", "starter", tmp_path / "crop.nii.gz", tmp_path / "out")
    assert code == 0, err
    assert err.count("for research, not for diagnosis") == 1
    assert "docs/starter.md" in err
    content = json.loads((tmp_path / "out" / "crop" / "findings.json").read_text())
    first = content["findings"][0]
    assert np.linalg.norm([first["x"] - 20, first["y"] - 20, first["z"] - 20]) < 5
    assert "crop: " in out


def test_a_folder_of_that_name_is_meant_instead(
    voxelscale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()
    write_scan(made_up_crop(), tmp_path / "crop.nii.gz")
    code, _, err = voxelscale("predict", "starter", "crop.nii.gz", "out")
    assert code == 2
    assert "starter: the one in this folder, not the model that comes with voxelscale" in err
    assert "starter: holds no model.vxs" in err


def test_the_starter_is_not_changed(voxelscale: Command, tmp_path: Path) -> None:
    code, _, err = voxelscale("calibrate", "starter", tmp_path, tmp_path)
    assert code == 2
    assert "comes with voxelscale and is not changed" in err
    with pytest.raises(VoxelscaleError, match="cannot be read"):
        read_bundle(Path("elsewhere/starter"))


@pytest.mark.parametrize("change", ["offset", "rescaled", "no lungs"])
def test_a_scan_unlike_its_training_is_said_beside_the_findings(
    voxelscale: Command, tmp_path: Path, change: str
) -> None:
    """200 mm, two lungs in soft tissue, padding around: as it is nothing is said of its values."""
    z, y, x = (np.indices((50, 100, 100)).T - [25, 50, 50]).T * np.array([4, 2, 2]).reshape(3, 1, 1, 1)
    hu = np.where((x / 95) ** 2 + (y / 80) ** 2 < 1, 40.0, -1000.0)
    for side in (-1, 1):
        hu[((x - 45 * side) / 38) ** 2 + (y / 60) ** 2 + (z / 85) ** 2 < 1] = -850
    hu += np.random.default_rng(0).normal(0, 15, hu.shape)
    if change == "no lungs":
        hu[(hu > -960) & (hu < -700)] = 30
    values = {"offset": hu + 1024, "rescaled": hu / 2, "no lungs": hu}[change]
    values[x**2 + y**2 > 98**2] = -2048
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * (4, 2, 2)
    scan = Scan(np.rint(values).astype(np.int16), affine)
    words = {"offset": "no lungs found", "rescaled": "air or lungs at", "no lungs": "no lungs found"}
    assert any(words[change] in text for text in said_of(scan))
    if change == "rescaled":  # the others look at all of it, which takes long; so would this of the whole
        part = Scan(scan.array[15:35, 30:70, 30:70], affine)
        write_scan(part, tmp_path / "odd.nii.gz")
        code, _, err = voxelscale("predict", "starter", tmp_path / "odd.nii.gz", tmp_path / "out")
        assert code == 0, err
        said = json.loads((tmp_path / "out" / "odd" / "findings.json").read_text())["warnings"]
        assert set(said_of(part)) <= set(said)
        assert words[change] in err


def said_of(scan: Scan) -> list[str]:
    return check_usable(read_bundle(STARTER), about(scan, lung_field(scan)), "odd", True)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")
def test_it_finds_a_real_nodule_of_a_patient_that_it_never_saw(tmp_path: Path) -> None:
    """LIDC-IDRI-0023, 24 mm, solid: of the test patients."""
    prediction = Model.load("starter").predict(CUBE / "LIDC-IDRI-0023_nod1.nii.gz")
    mask = read_scan(CUBE.parent / "labels" / "LIDC-IDRI-0023_nod1.nii.gz").array > 0
    assert prediction.findings[0].probability > 0.5
    found = prediction.mask.array > 0
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.6
