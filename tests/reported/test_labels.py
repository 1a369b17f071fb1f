"""Labels that were read wrong, or not at all: each input, and the right answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from scipy import ndimage
from tests.conftest import Command

from voxelscale.config import ReadingConfig
from voxelscale.dataset.listing import list_sources
from voxelscale.dataset.reading import read_case, read_truth
from voxelscale.geometry import Scan
from voxelscale.store import open_store

Reported = Callable[..., Path]
ALONE = ("prepare.workers=1", "prepare.plan=false", "prepare.split=[1,0,0]")


def prepared(voxelscale: Command, data: Path, out: Path, *sets: str) -> dict[str, tuple[Scan, Scan]]:
    """The HU and the mask of each case, as the CLI puts them into a store."""
    options = [word for assignment in (*ALONE, *sets) for word in ("--set", assignment)]
    code, _, err = voxelscale("prepare", data, out, *options)
    assert code == 0, err
    store = open_store(out)
    found = {}
    for info in store.cases:
        hu, mask = (np.asarray(array) for array in store.read(info.case))
        affine = np.asarray(info.affine)
        found[info.case] = (Scan(hu, affine), Scan(mask, affine))
    return found


def lesions(mask: Scan) -> int:
    return int(ndimage.label(mask.array, np.ones((3, 3, 3)))[1])


def centre(mask: Scan) -> list[float]:
    mm: list[float] = mask.grid.index_to_mm(np.argwhere(mask.array).mean(axis=0)).tolist()
    return mm


def read(data: Path) -> list[tuple[Scan, Scan]]:
    """Image and mask of every case, the truth alone the same."""
    found = []
    for source in list_sources(data):
        image, labels = read_case(source, ReadingConfig())
        assert np.array_equal(read_truth(source, ReadingConfig()).array, labels.mask.array)
        found.append((image, labels.mask))
    return found


def test_lidc_prone(reported: Reported, voxelscale: Command, tmp_path: Path) -> None:
    """The outlines count the pixels of slices whose rows and columns run the other way."""
    folder = reported("lidc_prone")
    ((image, mask),) = read(folder)
    assert mask.array.sum() == 147
    assert centre(mask) == pytest.approx([-7, -1, -26], abs=1e-3)
    assert (image.array[mask.array > 0] > 0).mean() > 0.8
    ((hu, stored),) = prepared(voxelscale, folder, tmp_path / "s", "prepare.spacing=[2,1,1]").values()
    assert stored.array.sum() == 147
    assert centre(stored) == pytest.approx([-7, -1, -26], abs=1e-3)
    assert (hu.array[stored.array > 0] > 0).mean() > 0.8


def test_turned_45(reported: Reported, voxelscale: Command, tmp_path: Path) -> None:
    folder = reported("turned_45")
    cases = prepared(voxelscale, folder / "set.csv", tmp_path / "s", "prepare.spacing=[2,1,1]")
    assert len(cases) == 3
    for hu, mask in cases.values():
        assert lesions(mask) == 1
        assert mask.array.sum() == 280
        assert hu.array[mask.array > 0].tolist() == [60] * 280


def test_rtstruct_near_planes(reported: Reported, voxelscale: Command) -> None:
    folder = reported("rtstruct_near_planes")
    ((_, exact),) = read(folder / "set_exact.csv")
    ((_, off),) = read(folder / "set_off.csv")
    assert np.array_equal(exact.array, off.array)
    assert (lesions(off), off.array.sum()) == (2, 392)
    code, out, err = voxelscale("inspect", folder / "set_off.csv")
    assert code == 0, err
    assert "0.39" in out


@pytest.mark.parametrize("name", ["seg_labelmap", "seg_without_reference"])
def test_one_segmentation(reported: Reported, voxelscale: Command, tmp_path: Path, name: str) -> None:
    folder = reported(name)
    ((hu, mask),) = prepared(
        voxelscale, folder / "tree", tmp_path / "s", "prepare.spacing=[2,1,1]"
    ).values()
    assert mask.array.sum() == 280
    assert hu.array[mask.array > 0].tolist() == [60] * 280
    ((_, read_mask),) = read(folder / "tree")
    assert read_mask.array.sum() == 280


def test_a_segmentation_without_reference_may_be_a_healthy_scans(
    reported: Reported, voxelscale: Command, tmp_path: Path
) -> None:
    """Where scans without a mask are taken as healthy, this one still has its lesion."""
    tree = reported("seg_without_reference") / "tree"
    ((_, mask),) = prepared(voxelscale, tree, tmp_path / "s", "reading.allow_empty=true").values()
    assert lesions(mask) == 1


def test_a_segmentation_of_the_studys_pet_is_named(
    reported: Reported, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be placed on the CT, which would else be a healthy scan without a word."""
    tree = reported("seg_without_reference") / "tree"
    pet, segmentation = generate_uid(), Dataset()
    segmentation.SeriesInstanceUID = pet
    (tree / "pet").mkdir()
    for path in [p for p in tree.rglob("*") if p.is_file()]:
        data = pydicom.dcmread(path)
        if data.Modality == "SEG":
            data.ReferencedSeriesSequence = [segmentation]
            data.save_as(path)
        else:
            data.Modality, data.SeriesInstanceUID, data.SOPInstanceUID = "PT", pet, generate_uid()
            data.save_as(tree / "pet" / path.name)
    (source,) = list_sources(tree)
    assert source.labels == ()
    assert "refers to a series that is not there or is no CT" in capsys.readouterr().err


def test_seg_per_nodule(reported: Reported, voxelscale: Command, tmp_path: Path) -> None:
    tree = reported("seg_per_nodule") / "tree"
    code, _, err = voxelscale("inspect", tree)
    assert code == 0
    assert "1 with several label files, which are merged" in err
    ((_, mask),) = prepared(voxelscale, tree, tmp_path / "s", "prepare.spacing=[2,1,1]").values()
    assert (lesions(mask), mask.array.sum()) == (2, 560)
    copies = [(tree / f"copy{n}.dcm").write_bytes((tree / "seg0.dcm").read_bytes()) for n in range(2)]
    assert copies
    (source,) = list_sources(tree)
    assert len(source.labels) == 2, "byte-identical copies are one"


def test_several_label_files_in_folders_and_tables(reported: Reported) -> None:
    tree = reported("seg_per_nodule") / "tree"
    data = tree.parent / "data"
    (data / "images").mkdir(parents=True)
    (data / "labels" / "a").mkdir(parents=True)
    (data / "images" / "a").symlink_to(tree / "ct")
    for n in range(2):
        (data / "labels" / "a" / f"{n}.dcm").symlink_to(tree / f"seg{n}.dcm")
    ((_, mask),) = read(data)
    assert mask.array.sum() == 560
    table = tree / "set.csv"
    (tree / "more").mkdir()
    (tree / "more" / "1.dcm").symlink_to(tree / "seg1.dcm")
    for labels in ("seg0.dcm;seg1.dcm", r"seg0.dcm; more\1.dcm"):  # the latter as Windows writes it
        table.write_text(f"image,label\nct,{labels}\n")
        ((_, mask),) = read(table)
        assert mask.array.sum() == 560
