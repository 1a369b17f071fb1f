"""A second prediction into the same folder: nothing of the first is taken for a part of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command
from tests.predict.test_several_classes import ORGANS, T1, made, scan

from voxelscale.config import Config, load
from voxelscale.formats import read_label, write_scan
from voxelscale.model.bundle import write_bundle
from voxelscale.predict import work

LARGE = ("--set", "predict.smallest_mm3={liver: 20000, kidney: 20000, tumour: 20000}")
KEPT = ("--set", "predict.probabilities=true")


@pytest.fixture
def model(tiny: Config, tmp_path: Path) -> Path:
    sets = ["data.patch_size=[16,32,32]", "model.depth=2", "predict.overlap=0", "predict.candidates=0.5"]
    write_bundle(tmp_path / "model.vxs", made(load(sets=sets, base=tiny), ORGANS, T1))
    write_scan(scan(1), tmp_path / "a.nii.gz")
    return tmp_path / "model.vxs"


@pytest.fixture
def arguments(model: Path) -> tuple[object, ...]:
    return "predict", model, model.with_name("a.nii.gz"), model.with_name("out")


def test_a_case_half_replaced_is_not_taken_for_the_one_before(
    arguments: tuple[object, ...], voxelscale: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mask = tmp_path / "out" / "a" / "mask.nii.gz"
    assert voxelscale(*arguments)[0] == 0
    first = read_label(mask).array

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "write_findings", killed)
        assert voxelscale(*arguments, *LARGE)[0] != 0
    assert (read_label(mask).array != first).any(), "interrupted after the mask, before the findings"
    # Nor for another model's: which made its findings is not known any more.
    write_scan(scan(2), tmp_path / "b.nii.gz")
    assert voxelscale(*arguments[:2], tmp_path / "b.nii.gz", tmp_path / "out")[0] == 0
    cases = {row.split(",")[0] for row in (tmp_path / "out" / "findings.csv").read_text().splitlines()[1:]}
    assert cases == {"b"}
    assert voxelscale(*arguments)[0] == 0
    assert (read_label(mask).array == first).all()


@pytest.mark.parametrize("name", ["mask.nii.gz", "findings.csv", "findings.json", "probability_2.nii.gz"])
def test_a_file_that_is_missing_is_made_again(
    name: str, arguments: tuple[object, ...], voxelscale: Command, tmp_path: Path
) -> None:
    assert voxelscale(*arguments, *KEPT)[0] == 0
    path = tmp_path / "out" / "a" / name
    before = path.read_bytes()
    path.unlink()
    assert voxelscale(*arguments, *KEPT)[0] == 0
    assert path.read_bytes() == before
    if name == "findings.json":
        path.write_text("torn")
        assert voxelscale(*arguments, *KEPT)[0] == 0
        assert path.read_bytes() == before


def test_what_only_the_prediction_before_had_goes(
    arguments: tuple[object, ...], voxelscale: Command, tmp_path: Path
) -> None:
    assert voxelscale(*arguments, *KEPT)[0] == 0
    folder = tmp_path / "out" / "a"
    own = {"seg.dcm", "notes.txt", "probability_of_mine.nii.gz"}
    for name in own:
        (folder / name).write_text("of before")
    assert len(list(folder.glob("probability_?.nii.gz"))) == 3
    assert voxelscale(*arguments, *LARGE)[0] == 0
    left = {path.name for path in folder.iterdir()}
    whole = {"case.json", "findings.csv", "findings.json", "mask.nii.gz"}
    assert left == whole | own, "not the user's files"
    assert np.isin(read_label(folder / "mask.nii.gz").array, (0, *ORGANS.written_values)).all()


def test_cases_of_other_settings_in_one_table_are_warned_of(
    model: Path, voxelscale: Command, tmp_path: Path
) -> None:
    write_scan(scan(2), tmp_path / "b.nii.gz")
    a, b, out = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", tmp_path / "out"
    words = "findings.csv holds 1 case with other settings or another calibration, such as a"
    assert voxelscale("predict", model, a, out)[0] == 0
    alike = ("--set", "predict.batch_size=2", "--set", "predict.refuse_unusable=false")
    assert words not in voxelscale("predict", model, b, out, *KEPT, *alike)[2]
    assert words in voxelscale("predict", model, b, out, *LARGE)[2]
    assert voxelscale("predict", model, a, out, *LARGE)[0] == 0
    assert words not in voxelscale("predict", model, b, out, *LARGE)[2]
