"""Tables and names as people write them: read right, or an error that quotes what was not understood."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command

from voxelscale.config import ReadingConfig
from voxelscale.dataset.listing import list_scans, list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.dataset.source import safe_names
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk

Reported = Callable[..., Path]

ALONE = (
    *("--set", "prepare.workers=1", "--set", "prepare.plan=false"),
    *("--set", "prepare.split=[1,0,0]", "--set", "prepare.spacing=[2,1,1]"),
)
"""Every case for training, on its own lattice."""

UID = "1.2.826.0.1.11.1"

SCAN = Scan(
    np.random.default_rng(0).integers(-1000, 400, (4, 8, 8)).astype(np.int16),
    affine_from_itk((0.0, 0.0, 0.0), (1.0, 1.0, 2.0), np.eye(3)),
)

HEADERS = {
    "as LUNA16 writes it": "seriesuid,coordX,coordY,coordZ,diameter_mm\n{u},6.0,0.0,-26.0,8.0\n",
    "other names": "SeriesInstanceUID,x,y,z,Diameter\n{u},6.0,0.0,-26.0,8.0\n",
    "blanks and quotes": '"Series UID" , "Coord X","coordY","coord_z", "Diameter"\n{u},6.0,0.0,-26,8\n',
    "capitals": "SERIESUID,COORDX,COORDY,COORDZ,DIAMETER_MM\n {u} ,6.0,0.0,-26.0,8.0\n",
    "semicolons, decimal comma": "seriesuid;coordX;coordY;coordZ;diameter_mm\n{u};6,0;0,0;-26,0;8,0\n",
    "tabs": "seriesuid\tcoordX\tcoordY\tcoordZ\tdiameter_mm\n{u}\t6.0\t0.0\t-26.0\t8.0\n",
    "order and more columns": "note,diameter_mm,coordZ,coordY,coordX,seriesuid\na;b,8,-26,0,6,{u}\n",
    "carriage returns": "seriesuid,coordX,coordY,coordZ,diameter_mm\r{u},6.0,0.0,-26.0,8.0\r",
    "Windows": "\ufeffseriesuid,coordX,coordY,coordZ,diameter_mm\r\n{u},6.0,0.0,-26.0,8.0\r\n\r\n",
    "empty cells behind": "seriesuid,coordX,coordY,coordZ,diameter_mm\n{u},6.0,0.0,-26.0,8.0,,\n,,,,\n",
    "the same row twice": "seriesuid,coordX,coordY,coordZ,diameter_mm\n" + "{u},6,0,-26,8\n" * 2,
    "other scans": "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,0,0,0,5\n{u},6,0,-26,8\n",
}


def nodules(store: Path) -> list[tuple[float, ...]]:
    """x, y, z and diameter of the nodules that `prepare` noted."""
    with (store / "findings.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["kind"] == "nodule"]
    return [tuple(float(row[name]) for name in ("x", "y", "z", "diameter_mm")) for row in rows]


def test_a_table_of_spheres_whatever_its_header(
    reported: Reported, voxelscale: Command, tmp_path: Path
) -> None:
    folder = reported("table_header_series_uid")
    for name in ("right", "header", "semicolon"):
        code, _, err = voxelscale("prepare", folder / f"set_{name}.csv", tmp_path / name, *ALONE)
        assert code == 0, err
        assert nodules(tmp_path / name) == [(6.0, 0.0, -26.0, 8.0)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_headers_in_every_form(reported: Reported, encoding: str) -> None:
    folder = reported("table_header_series_uid")
    for name, text in HEADERS.items():
        (folder / "right.csv").write_bytes(text.format(u=UID).encode(encoding))
        (source,) = list_sources(folder / "set_right.csv")
        image, labels = read_case(source, ReadingConfig())
        (found,) = labels.findings
        assert (*found.centre, found.diameter_mm) == (6.0, 0.0, -26.0, 8.0), name
        assert image.array[labels.mask.array > 0].mean() > -100, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scan_no,coordX,coordY,coordZ,diameter_mm\n1,6,0,-26,8\n", "'scan_no,coordX,coordY,coordZ,"),
        ("seriesuid,coordX,coordY,coordZ\n{u},6,0,-26\n", "names no column diameter_mm"),
        ("seriesuid,x,xmm,y,z,diameter_mm\n{u},6,6,0,-26,8\n", "names twice the column coordX"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n{u},6,0,-26,8 mm\n", "line 2: diameter_mm is '8 mm'"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n{u},6,0,0,-26,0,8,0\n", "line 2 has 8 cells"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n{u},6,0,-26\n", "line 2 is cut short"),
        ('seriesuid,coordX,coordY,coordZ,diameter_mm\n"{u},6,0,-26,8\n', "not readable as CSV"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,6,0,-26,8\n", "no row belongs to a scan"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n", "no row belongs to a scan"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\n{u},6,0,26000,8\n", "none of its 1 nodules"),
    ],
)
def test_what_is_not_understood_is_quoted(
    reported: Reported, voxelscale: Command, tmp_path: Path, text: str, words: str
) -> None:
    folder = reported("table_header_series_uid")
    (folder / "right.csv").write_text(text.format(u=UID))
    code, _, err = voxelscale("prepare", folder / "set_right.csv", tmp_path / "s", *ALONE)
    assert code == 2
    assert "right.csv" in err
    assert words in err
    assert "hint: " in err


def test_a_scan_without_a_row_is_healthy_only_where_that_is_said(
    reported: Reported, voxelscale: Command, tmp_path: Path
) -> None:
    folder = reported("table_header_series_uid")
    (other,) = (reported("names_not_latin") / "images").glob("张*")  # a scan without DICOM
    rows = [f"ct,right.csv,a,{UID}", f"{other},right.csv,b,2", f"{other},right.csv,c,"]
    (folder / "set.csv").write_text("\n".join(["image,label,case,seriesuid", *rows]) + "\n")
    code, out, err = voxelscale("--verbose", "prepare", folder / "set.csv", tmp_path / "s", *ALONE)
    assert code == 2
    assert err.count("no row belongs to this scan") == 1
    assert err.count("this scan's is not known") == 1
    assert "rows of 1 of 3 scans; 0 rows of other scans" in err
    assert out.startswith("1 case")
    healthy = (*ALONE, "--set", "reading.allow_empty=true")
    code, out, _ = voxelscale("prepare", folder / "set.csv", tmp_path / "t", *healthy)
    assert (code, out.split()[0]) == (2, "2"), "a scan that cannot be in the table is not healthy for it"
    assert nodules(tmp_path / "t") == [(6.0, 0.0, -26.0, 8.0)]


def test_names_in_other_scripts(reported: Reported, voxelscale: Command, tmp_path: Path) -> None:
    folder = reported("names_not_latin")
    assert sorted(source.case for source in list_sources(folder)) == ["张三", "李四"]
    assert sorted(source.case for source in list_scans(folder / "images")) == ["张三", "李四"]
    code, out, err = voxelscale("prepare", folder, tmp_path / "s", *ALONE)
    assert (code, out.split()[:2]) == (0, ["2", "cases"]), err
    with (tmp_path / "s" / "names.csv").open(encoding="utf-8") as handle:
        assert {row["case"] for row in csv.DictReader(handle)} == {"张三", "李四"}


@pytest.mark.parametrize(
    ("names", "safe"),
    [
        (["Müller", "Иванов", "أحمد", "김", "שרה", "รพ"], ["Müller", "Иванов", "أحمد", "김", "שרה", "รพ"]),
        (["e\u0301tude"], ["étude"]),
        (["../../etc/x y"], ["_.._etc_x_y"]),
        (["a\x1b[31m\u202eb\n"], ["a__31m_b_"]),
        (["CON", "nul.1", "com7", "CONS"], ["_CON", "_nul.1", "_com7", "CONS"]),
        (["a.", ".."], ["a", "case"]),
        (["x_y", "x_y"], ["x_y", "x_y"]),
    ],
)
def test_names_are_readable_and_safe(names: list[str], safe: list[str]) -> None:
    assert safe_names(names) == safe


def test_different_names_never_become_one() -> None:
    names = ["a b", "a_b", "a/b", "a\nb", "\udcff", "\udcfe", "名" * 60, "名" * 61, "e\u0301", "é"]
    found = safe_names(names)
    assert len(set(found)) == len(names)
    assert found[1] == "a_b", "a name that is safe is kept"
    assert all(len(name.encode()) <= 127 for name in found)


def write_pair(folder: Path, image: str, label: str | None) -> None:
    """A scan and its mask under these paths."""
    write_scan(SCAN, folder / image)
    if label is not None:
        write_scan(Scan((SCAN.array > 0).astype("uint8"), SCAN.affine), folder / label)


def names_of_both(data: Path, images: Path) -> tuple[list[str], list[str]]:
    """What prepare and predict call the cases."""
    return [s.case for s in list_sources(data)], [s.case for s in list_scans(images)]


def test_a_number_is_a_channel_only_where_the_data_set_says_so(tmp_path: Path) -> None:
    for name in ("ct_0001", "ct_0002"):
        write_pair(tmp_path / "own", f"images/{name}.nii.gz", f"labels/{name}.nii.gz")
        write_pair(tmp_path / "bare", f"images/{name}.nii.gz", None)
        write_pair(tmp_path / "nn", f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz")
    write_pair(tmp_path / "nn", "imagesTs/ct_0003_0000.nii.gz", None)
    both = ["ct_0001", "ct_0002"]
    assert names_of_both(tmp_path / "own", tmp_path / "own" / "images") == (both, both)
    assert [s.case for s in list_scans(tmp_path / "bare")] == both
    assert names_of_both(tmp_path / "nn", tmp_path / "nn" / "imagesTr") == (both, both)
    described = {"channel_names": {"0": "CT"}, "labels": {"lesion": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "nn" / "dataset.json").write_text(json.dumps(described))
    assert names_of_both(tmp_path / "nn", tmp_path / "nn" / "imagesTs") == (both, ["ct_0003"])
    assert [s.case for s in list_scans(tmp_path / "nn" / "imagesTs" / "ct_0003_0000.nii.gz")] == ["ct_0003"]
    assert [s.case for s in list_scans(tmp_path / "nn")] == [*both, "ct_0003"]


def test_folders_and_names_that_differ_in_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path, "Images/Lung_1.nii", "LABELS/lung_1.nii.gz")
    write_pair(tmp_path, "Images/e\u0301.nii", "LABELS/é.nii")
    write_pair(tmp_path, "Images/c.nii", "LABELS/forgotten.nii")
    sources = list_sources(tmp_path)
    assert [(s.case, len(s.labels)) for s in sources] == [("Lung_1", 1), ("c", 0), ("é", 1)]
    assert "warning: 1 label of no listed case: forgotten.nii" in capsys.readouterr().err
    write_pair(tmp_path, "Images/c.nii.gz", None)
    with pytest.raises(VoxelscaleError, match=r"case c occurs twice: c\.nii, c\.nii\.gz"):
        list_sources(tmp_path)


def test_what_a_dataset_json_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        write_pair(tmp_path, f"imagesTr/{name}.nii.gz", f"labelsTr/{name}.nii.gz")
    pairs = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "aba"]
    content = {"modality": {"0": "CT"}, "labels": {"1": "cancer"}, "training": pairs}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert [source.case for source in list_sources(tmp_path)] == ["a", "b"]
    told = capsys.readouterr().err
    assert "1 image of no listed case: c.nii.gz" in told
    assert "1 label of no listed case: c.nii.gz" in told


def test_an_xml_and_its_copy_are_one(reported: Reported) -> None:
    folder = reported("lidc_xml_twice")
    (source,) = list_sources(folder)
    _, labels = read_case(source, ReadingConfig())
    assert (source.fault, [finding.kind for finding in labels.findings]) == ("", ["nodule"])
    other = folder / "tcia-lidc-xml" / "157" / "158.xml"
    other.write_text(other.read_text().replace("24.0", "26.0"))
    (source,) = list_sources(folder)
    assert len(source.labels) > 1 or source.fault, "another reading is no copy"


def test_patients_without_a_name_of_their_own(
    reported: Reported, voxelscale: Command, tmp_path: Path
) -> None:
    folder = reported("all_patients_anonymous")
    sets = ["prepare.workers=1", "prepare.plan=false", "prepare.split=[2,1,0]", "prepare.spacing=[4,2,2]"]
    options = [word for one in sets for word in ("--set", one)]
    code, out, err = voxelscale("--quiet", "prepare", folder, tmp_path / "s", *options)
    assert code == 0, err
    assert "(4 train, 2 val, 0 test)" in out
    assert "6 studies have no PatientID that tells patients apart" in err
    rows = [f"{p / 'ct'},{p / 'seg.dcm'},{p.name},one" for p in sorted(folder.iterdir())]
    (tmp_path / "set.csv").write_text("\n".join(["image,label,case,patient", *rows[:2]]) + "\n")
    code, out, err = voxelscale("--quiet", "prepare", tmp_path / "set.csv", tmp_path / "t", *options)
    assert "(2 train, 0 val, 0 test)" in out
    assert "no scan for val: 2 scans of 1 patient" in err
