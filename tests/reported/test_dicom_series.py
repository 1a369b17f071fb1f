"""Reported inputs: DICOM series that are not one scan, lost slices, numbers that cannot be read, links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command

from voxelscale.data.listing import list_scans
from voxelscale.data.reading import read_image

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
    assert [read_image(scan).array.shape for scan in scans] == [(24, 48, 48)] * 2
    direct = list_scans(folder / "archive")
    assert {s.series for s in direct} == {s.series for s in scans}
    assert np.array_equal(read_image(direct[0]).array, read_image(scans[0]).array)
