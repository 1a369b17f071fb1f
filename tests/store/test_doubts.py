"""What `prepare` and `inspect` say of scans and masks that are likely not what they are taken for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command

from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk

AFFINE = affine_from_itk((0, 0, 0), (2, 2, 2), np.eye(3))
SETS = ("prepare.spacing=[2,2,2]", "prepare.plan=false", "prepare.workers=1")


def write_pairs(folder: Path, lowest: int, values: tuple[int, ...], apart: int = 0) -> Path:
    """Two noisy scans with values from `lowest`, and masks of boxes side by side."""
    random = np.random.default_rng(0)
    for case in ("a", "b"):
        image = random.integers(lowest, lowest + 2000, (16, 24, 40)).astype(np.int16)
        mask = np.zeros(image.shape, np.uint8)
        for number, value in enumerate(values):
            start = 4 + number * (6 + apart)
            mask[5:10, 6:14, start : start + 6] = value
        write_scan(Scan(image, AFFINE), folder / "images" / f"{case}.nii.gz")
        write_scan(Scan(mask, AFFINE), folder / "labels" / f"{case}.nii.gz")
    return folder


def doubts(voxelscale: Command, data: Path, out: Path, *sets: str) -> list[str]:
    """The warnings of `prepare`, but for those about two cases that cannot be split."""
    words = [word for one in (*SETS, *sets) for word in ("--set", one)]
    code, _, errors = voxelscale("prepare", data, out, *words)
    assert code == 0, errors
    lines = [line for line in errors.splitlines() if line.startswith("warning: ")]
    return [line for line in lines if "no scan for" not in line]


def test_an_unnamed_mr_is_not_taken_for_ct_silently(tmp_path: Path, voxelscale: Command) -> None:
    data = write_pairs(tmp_path / "data", 3, (1,))
    (said,) = doubts(voxelscale, data, tmp_path / "store")
    assert said.startswith("warning: 2 of 2 scans taken for CT but not in HU, such as a: values from 3 to ")
    assert "reading.channels=[MR] (now CT)" in said
    # Kept from before, they are as doubtful.
    assert doubts(voxelscale, data, tmp_path / "store") == [said]
    assert doubts(voxelscale, data, tmp_path / "named", "reading.channels=[MR]") == []
    assert doubts(voxelscale, write_pairs(tmp_path / "ct", -1000, (1,)), tmp_path / "of_ct") == []


@pytest.mark.parametrize("apart", [0, 2])
def test_an_organ_and_its_tumour_are_not_one_lesion_silently(
    tmp_path: Path, voxelscale: Command, apart: int
) -> None:
    """Values that touch each other; lesions that are only numbered do not."""
    data = write_pairs(tmp_path / "data", -1000, (1, 2), apart)
    said = doubts(voxelscale, data, tmp_path / "store")
    _, table, _ = voxelscale("inspect", data)
    if apart:
        assert said == []
        assert "touch" not in table
        return
    assert len(said) == 1
    assert (
        "2 of 2 masks with values that touch each other, such as 1, 2 in a: all count as lesion" in said[0]
    )
    assert "values 1, 2 of its mask touch each other" in table
    assert doubts(voxelscale, data, tmp_path / "tumour", "reading.labels=[2]") == []
    assert doubts(voxelscale, data, tmp_path / "both", "reading.labels={organ: 1, tumour: 2}") == []
