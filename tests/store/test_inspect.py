from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from tests.conftest import Command
from tests.formats.test_formats import write_series
from tests.several import CLASSES, REGIONS, write_several
from typer.testing import CliRunner

from voxelscale.classes import Classes
from voxelscale.cli import app
from voxelscale.config import load
from voxelscale.dataset import DataSet
from voxelscale.dataset.listing import list_scans, list_sources
from voxelscale.dataset.names import Names
from voxelscale.formats import read_label, read_scan
from voxelscale.geometry import Scan, reorient
from voxelscale.pages.page import class_colour
from voxelscale.report.dataset import write_dataset_page
from voxelscale.store import Store
from voxelscale.store.inspect import across_splits, class_voxels, describe, inspect

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Nesting(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_faults_are_named_and_names_escaped(scans: Path, tmp_path: Path) -> None:
    images = sorted((scans / "images").iterdir())
    labels = sorted((scans / "labels").iterdir())
    data = tmp_path / "set"
    data.mkdir()
    shutil.copy(images[0], data / "copy.nii.gz")
    (data / "torn.nii.gz").write_bytes(images[1].read_bytes()[:500])
    name = '<b>&amp;"x"'
    quoted = '"<b>&amp;""x"""'
    rows = [
        f"first,{images[0]},{labels[0]}",
        f"second,{data / 'copy.nii.gz'},{labels[0]}",
        f"torn,{data / 'torn.nii.gz'},{labels[1]}",
        f"{quoted},{images[2]},{labels[2]}",
        f"swapped,{images[3]},{labels[4]}",
    ]
    (data / "dataset.csv").write_text("\n".join(["case,image,label", *rows]) + "\n")
    found = inspect(DataSet(path=data), workers=1)
    told = {(p.severity, p.case) for p in found.problems}
    assert any("same voxels" in p.text for p in found.problems)
    assert {("error", "torn"), ("error", "swapped")} <= told
    write_dataset_page(found, data.name, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    nesting = Nesting()
    nesting.feed(page)
    assert not nesting.open
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert name not in page
    assert str(tmp_path) not in page


def test_a_store(store: Store) -> None:
    result = CliRunner().invoke(app, ["inspect", str(store.path), "--json"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["kind"] == "store"
    volumes = {case["case"]: case["lesions_mm3"] for case in told["cases"]}
    for info in store.cases:
        assert volumes[info.case] == pytest.approx(info.lesion_volumes_mm3)


def test_intercept_empty_mask_outside_and_split(scans: Path) -> None:
    image = reorient(read_scan(list_sources(scans)[0].image))
    blank = np.zeros(image.array.shape, np.uint8)
    corner = blank.copy()
    corner[:2, :2, :2] = 1
    unsigned = Scan((image.array + 1024).clip(0).astype(np.int16), image.affine)
    one = describe(("a", "p", "LPS"), image, blank, [], labelled=True)
    two = describe(("b", "p", "LPS"), unsigned, corner, [], labelled=True)
    three = describe(("c", "q", "LPS"), image, corner, [], labelled=True)
    assert any("empty mask" in p.text for p in one.problems)
    assert any("intercept" in p.text for p in two.problems)
    assert any("1 of 1 lesions lie outside" in p.text for p in three.problems)
    found = across_splits([one, two, three], {"train": ["a"], "val": ["b", "c"]})
    assert {p.text.split(" on ")[0] for p in found} == {"one patient", "the same voxels"}


def test_plain_scans_are_looked_at_as_predict_takes_them(
    voxelscale: Command, scans: Path, tmp_path: Path
) -> None:
    """One file, and files and a DICOM series at any depth of a folder, without labels."""
    one, two = (source.image for source in list_sources(scans)[:2])
    code, out, err = voxelscale("inspect", one)
    assert code == 0, err
    assert "no mask" in out
    (tmp_path / "tree" / "deep" / "p1").mkdir(parents=True)
    shutil.copy(one, tmp_path / "tree" / "ct.nii.gz")
    shutil.copy(two, tmp_path / "tree" / "deep" / "p1" / "ct.nii.gz")
    code, out, err = voxelscale("inspect", tmp_path / "tree", "--json")
    assert code == 0, err
    assert [case["case"] for case in json.loads(out)["cases"]] == ["ct", "deep-p1-ct"]
    write_series(tmp_path / "tree" / "series", read_scan(one))
    listed = list_scans(tmp_path / "tree", names=Names(how="file"))
    assert [source.case for source in listed] == ["ct", "deep-p1-ct", "series"]
    code, out, err = voxelscale("inspect", tmp_path / "tree", "--json")
    assert code == 0
    assert len(json.loads(out)["cases"]) == 1
    assert "2 files in other formats, as ct.nii.gz, not read" in err
    (tmp_path / "notes.txt").write_text("not a scan")
    code, _, err = voxelscale("inspect", tmp_path / "notes.txt")
    assert code == 2
    assert "not a scan in a known format" in err


def test_unreadable_cases_are_in_the_table(voxelscale: Command, scans: Path, tmp_path: Path) -> None:
    image = list_sources(scans)[0].image
    shutil.copy(image, tmp_path / "good.nii.gz")
    (tmp_path / "torn.nii.gz").write_bytes(image.read_bytes()[:500])
    page = tmp_path / "out" / "page.html"
    code, out, _ = voxelscale("inspect", tmp_path, page)
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("torn"))
    assert "cannot be read: torn.nii.gz" in line
    assert '<td>torn</td><td colspan="8">cannot be read: torn.nii.gz' in page.read_text()
    told = json.loads(voxelscale("inspect", tmp_path, "--json")[1])
    assert [case["case"] for case in told["unreadable"]] == ["torn"]


@pytest.mark.parametrize(("names", "shown"), [("auto", True), ("hash", False)])
def test_where_a_renamed_case_lies_is_not_said(names: str, shown: bool, tmp_path: Path) -> None:
    """Folders may be called after patients: who asks for hashed names gets no path of them."""
    (tmp_path / "DOE_JOHN").mkdir()
    (tmp_path / "DOE_JOHN" / "ct.nii.gz").write_bytes(b"no scan")
    (tmp_path / "cases.csv").write_text("image,label\nDOE_JOHN/ct.nii.gz,\n")
    (tmp_path / "key").write_text("of this test alone")
    config = load(sets=[f"reading.names={names}", f"reading.name_key={tmp_path / 'key'}"])
    found = inspect(DataSet(path=tmp_path / "cases.csv", reading=config.reading), workers=1)
    assert found.unreadable
    assert ("DOE_JOHN" in json.dumps(found.to_dict())) == shown


@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_several_classes_and_channels(classes: Classes, voxelscale: Command, tmp_path: Path) -> None:
    data = write_several(tmp_path / "data", classes)
    code, out, err = voxelscale("inspect", tmp_path / "data", "--json")
    assert code == 0, err
    told = {case["case"]: case for case in json.loads(out)["cases"]}
    for source in data.cases:
        case = told[source.case]
        raw = read_label(source.labels[0])
        for at, name in enumerate(classes.names):
            there = np.isin(raw.array, classes.values[at])
            count = ndimage.label(there, np.ones((3, 3, 3)))[1]
            assert len(case["classes"][name]) == count
            assert sum(case["classes"][name]) == pytest.approx(2.0 * there.sum())
        of_any = np.isin(raw.array, np.concatenate(classes.values)).sum()
        assert case["all_mm3"] == pytest.approx(2.0 * of_any)
        assert [(c["name"], c["scheme"]) for c in case["channels"]] == [("CT", "ct"), ("MRI", "zscore")]
        for channel, path in zip(case["channels"], (source.image, *source.more), strict=True):
            values = read_scan(path).array
            percentiles = np.percentile(values, [0, 1, 50, 99, 100])
            assert channel["values"] == pytest.approx(percentiles, rel=1e-5)
        assert case["hu"] == case["channels"][0]["values"]
    page = tmp_path / "page.html"
    code, out, err = voxelscale("inspect", tmp_path / "data", page)
    assert code == 0, err
    assert "6 readable cases, " in out
    assert "2 channels (CT, MRI), 2 classes" in out
    row = next(line for line in out.splitlines() if line.startswith("c0 "))
    assert f"{told['c0']['all_mm3'] / 1000:.2f}" in row.split()
    (line,) = (line for line in out.splitlines() if line.startswith(classes.names[1]))
    assert line.split()[1:4] == ["5", "of", "6"]
    html = page.read_text()
    nesting = Nesting()
    nesting.feed(html)
    assert not nesting.open
    assert "<core>" not in html
    for at in (0, 1):
        assert f'style="stroke:{class_colour(at)}"' in html
    assert ">MRI, its own unit</text>" in html
    assert ">HU</text>" in html


def test_what_is_no_ct_has_no_hu_and_no_lungs(voxelscale: Command, tmp_path: Path) -> None:
    data = write_several(tmp_path / "data", CLASSES, cases=3)
    path = tmp_path / "data" / "dataset.json"
    content = json.loads(path.read_text())
    content["channel_names"] = {"0": "T1", "1": "T2"}
    path.write_text(json.dumps(content))
    code, out, err = voxelscale("inspect", tmp_path / "data", "--json")
    assert code == 0, err
    for case in json.loads(out)["cases"]:
        assert "hu" not in case
        assert case["values"] == case["channels"][0]["values"]
        assert case["lungs_ml"] is None
    assert not any("lungs" in problem["text"] for problem in json.loads(out)["problems"])
    page = tmp_path / "page.html"
    out = voxelscale("inspect", tmp_path / "data", page)[1]
    assert "channel T2 (zscore): " in out
    head = out.splitlines()[0]
    assert "Values" in head
    assert "HU" not in head
    assert "Lungs" not in head
    assert ">HU</text>" not in page.read_text()
    assert "1st to 99th percentile" in page.read_text()
    (data.cases[1].more[0]).unlink()
    told = json.loads(voxelscale("inspect", tmp_path / "data", "--json")[1])
    (problem,) = (p for p in told["problems"] if p["severity"] == "error")
    assert problem["case"] == "c1"
    assert str(tmp_path) not in json.dumps(told)


def test_a_store_of_several_classes_and_channels(voxelscale: Command, tmp_path: Path) -> None:
    """The volumes are those of the data set, the values those of its images, to their last of 15 bits."""
    write_several(tmp_path / "data", REGIONS)
    sets = ["--set", "prepare.spacing=[2,1,1]", "--set", "prepare.workers=1", "--set", "prepare.plan=false"]
    code, _, err = voxelscale("prepare", tmp_path / "data", tmp_path / "store", *sets)
    assert code == 0, err
    of_data, of_store = (
        json.loads(voxelscale("inspect", tmp_path / name, "--json")[1]) for name in ("data", "store")
    )
    for there, here in zip(of_data["cases"], of_store["cases"], strict=True):
        assert here["classes"] == there["classes"]
        for own, kept in zip(there["channels"], here["channels"], strict=True):
            assert (kept["name"], kept["scheme"]) == (own["name"], own["scheme"])
            step = (own["values"][4] - own["values"][0]) / 2**15
            assert kept["values"] == pytest.approx(
                own["values"], abs=max(step, 1e-3) if own["name"] == "MRI" else 1
            )


def test_components_of_classes_by_their_definition() -> None:
    random = np.random.default_rng(5)
    stored = random.integers(-1, 4, (9, 10, 11)).astype(np.int16)
    three = Classes(names=("a", "b", "c"), values=((1,), (2,), (3,)))
    bits = Classes(names=("a", "b"), values=((1, 2), (2,)), regions=True, order=(1, 2))
    for classes in (three, bits):
        for at, (own, (_, there)) in enumerate(
            zip(class_voxels(classes, stored), classes.each(stored), strict=True)
        ):
            labels, count = ndimage.label(there, np.ones((3, 3, 3)))
            assert len(own) == count, at
            assert [len(v) for v in own] == sorted(np.bincount(labels.ravel())[1:].tolist(), reverse=True)
            assert np.array_equal(np.sort(np.concatenate(own)), np.flatnonzero(there))
