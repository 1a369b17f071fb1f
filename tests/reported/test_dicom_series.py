"""Reported inputs: DICOM series that are not one scan, lost slices, numbers that cannot be read, links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import Command

from voxelscale.config import ReadingConfig
from voxelscale.dataset.listing import list_scans
from voxelscale.dataset.reading import read_image
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan
from voxelscale.store import open_store

Reported = Callable[..., Path]


@pytest.mark.parametrize("extra", ["", "loop", "above", "twice"])
def test_linked_folders(reported: Reported, voxelscale: Command, extra: str) -> None:
    folder = reported("linked_folders")
    selected = folder / "selected"
    if extra == "loop":
        (selected / "again").symlink_to(selected)
    elif extra == "above":
        (selected / "up").symlink_to(folder)
    elif extra == "twice":
        (selected / "z1").symlink_to(folder / "archive" / "p1")
    code, _, err = voxelscale("inspect", selected)
    assert code == 0, err
    assert "2 cases" in err
    scans = list_scans(selected)
    assert [read_image(scan, ReadingConfig()).array.shape for scan in scans] == [(24, 48, 48)] * 2
    direct = list_scans(folder / "archive")
    assert {s.series for s in direct} == {s.series for s in scans}
    assert np.array_equal(
        read_image(direct[0], ReadingConfig()).array, read_image(scans[0], ReadingConfig()).array
    )


RIGHT = [
    *("intercept_with_comma/" + name for name in ("right", "intercept", "all", "spacing")),
    *("odd_series/" + name for name in ("icon", "negative", "mono1", "no_iop_end", "no_iop_alternate")),
    "odd_series/naeotom",
]
REFUSED = {
    "intercept_with_comma/intercept_empty": "000.dcm: RescaleIntercept (0028,1052) is empty",
    "intercept_with_comma/intercept_twice": r"RescaleIntercept (0028,1052) is '-1024\\-1024'",
    "intercept_with_comma/intercept_word": "RescaleIntercept (0028,1052) is '-1024 HU'",
    "odd_series/turned": "slices are turned against each other",
}


def body() -> NDArray[np.int16]:
    """The HU that the generators write."""
    z, y, x = np.indices((24, 48, 48))
    hu = np.full(z.shape, -1000, np.int16)
    hu[((y - 23.5) / (48 * 0.42)) ** 2 + ((x - 23.5) / (48 * 0.42)) ** 2 < 1] = -800
    hu[(z - 11.5) ** 2 + (y - 23.5) ** 2 + (x - 29.5) ** 2 < 16] = 60
    return hu


def test_numbers_and_places_are_read_or_named(reported: Reported, voxelscale: Command) -> None:
    folders = {name: reported(name) for name in ("intercept_with_comma", "odd_series")}
    for name in RIGHT:
        kind, variant = name.split("/")
        scan = read_scan(folders[kind] / variant)
        assert np.array_equal(scan.array, body()), name
        assert scan.spacing == pytest.approx((2, 1, 1)), name
    for name, words in REFUSED.items():
        kind, variant = name.split("/")
        with pytest.raises(VoxelscaleError) as caught:
            read_scan(folders[kind] / variant)
        assert words in caught.value.message, name
        code, out, err = voxelscale("inspect", folders[kind] / variant, "--set", "prepare.workers=1")
        assert code == 2 or words.removeprefix("000.dcm: ") in out + err, name  # no file names: privacy


@pytest.mark.parametrize("shift", ["half", "uneven"])
def test_interleaved_acquisitions_are_distinguished(
    reported: Reported, voxelscale: Command, shift: str, tmp_path: Path
) -> None:
    folder = reported("two_acquisitions_interleaved") / shift
    with pytest.raises(VoxelscaleError, match="2 acquisitions or reconstructions in one series") as caught:
        read_scan(folder)
    assert "AcquisitionNumber 1 (24 slices, as 001.dcm)" in caught.value.message
    for hu, file, select in (
        (40, "003.dcm", "AcquisitionNumber=1"),
        (240, "031.dcm", "AcquisitionNumber=2"),
    ):
        for scan in (read_scan(folder / file), read_scan(folder, select=[select])):
            assert scan.array.shape == (24, 48, 48)
            assert scan.spacing == pytest.approx((2, 1, 1))
            assert (scan.array == hu).all()
        (tmp_path / "set.csv").write_text(f"image,label\n{folder / file},\n")
        asked = ["--set", f"reading.select=[{select}]"]
        given: list[tuple[Path, list[str]]] = [(tmp_path / "set.csv", []), (folder, asked)]
        for number, (data, more) in enumerate(given):
            store = tmp_path / f"store{hu}{number}"
            settings = "prepare.workers=1", "prepare.plan=false", "reading.allow_empty=true"
            each = [word for setting in settings for word in ("--set", setting)]
            code, _, err = voxelscale(
                "prepare", data, store, *each, "--set", "prepare.split=[1,0,0]", *more
            )
            assert code == 0, err
            opened = open_store(store)
            assert (opened.read(opened.cases[0].case)[0] == hu).all()
    with pytest.raises(VoxelscaleError, match="takes 0 of 2"):
        read_scan(folder, select=["AcquisitionNumber=3"])
    with pytest.raises(VoxelscaleError, match="cannot tell images apart"):
        read_scan(folder, select=["PatientName=3"])


@pytest.mark.parametrize(("table", "voxels"), [("set_table.csv", 0), ("set_seg.csv", 280)])
def test_a_scout_first_in_a_folder_is_not_its_series(
    reported: Reported, voxelscale: Command, tmp_path: Path, table: str, voxels: int
) -> None:
    folder = reported("scout_first_in_folder")
    settings = "prepare.workers=1", "prepare.plan=false", "prepare.split=[1,0,0]"
    each = [word for setting in settings for word in ("--set", setting)]
    code, _, err = voxelscale("prepare", folder / table, tmp_path / "store", *each)
    assert code == 0, err
    store = open_store(tmp_path / "store")
    info = store.cases[0]
    assert len(info.lesion_volumes_mm3) == 1
    mask = store.read(info.case)[1]
    centre = info.grid.index_to_mm(np.argwhere(mask).mean(axis=0))
    assert centre == pytest.approx((6, 0, -26), abs=1.1)
    if voxels:
        assert mask.sum() == voxels
    else:
        assert "nodule,6.0,0.0,-26.0,8.0" in (tmp_path / "store" / "findings.csv").read_text()
