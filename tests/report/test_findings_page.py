"""The report of scans without a truth, and what all pages and charts must keep to."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command
from tests.pages import checked

from voxelscale import __version__
from voxelscale.dataset import DataSet
from voxelscale.dataset.listing import list_sources
from voxelscale.evaluate.evaluate import evaluate_folder
from voxelscale.evaluate.froc import OPERATING_POINTS
from voxelscale.findings import lesions_of_mask, write_findings
from voxelscale.formats import read_label, read_scan, write_scan
from voxelscale.geometry import Scan
from voxelscale.pages.charts import Line, Panel, chart
from voxelscale.report.curves import froc_chart, froc_panel, training_charts, training_panels, visible
from voxelscale.report.dataset import write_dataset_page
from voxelscale.report.facts import warnings_of
from voxelscale.report.overlays import Place, Slice, draw_slice, overlay_views
from voxelscale.store.inspect import inspect


@pytest.fixture
def predicted(scans: Path, tmp_path: Path) -> Path:
    """Predictions of all five scans: their lesions with falling confidence, and one more that is none."""
    folder = tmp_path / "predictions"
    for number, source in enumerate(list_sources(scans)):
        truth = read_label(source.labels[0])
        found = [
            replace(f, probability=0.9 - 0.1 * n)
            for n, f in enumerate(lesions_of_mask("", truth.array, truth.grid))
        ]
        x, y, z = truth.grid.index_to_mm((2, 3, 4))
        wrong = replace(
            found[0], x=x, y=y, z=z, index=(2, 3, 4), diameter_mm=8.0, probability=0.5 + 0.01 * number
        )
        mine = [replace(f, case=source.case) for f in [*found, wrong]]
        here = folder / source.case
        write_scan(Scan(truth.array, truth.affine), here / "mask.nii.gz")
        write_findings(mine, here / "findings.csv", here / "findings.json")
        (here / "case.json").write_text(json.dumps({"key": "k", "model": "0123456789abcdef"}))
    return folder


def test_findings_alone(voxelscale: Command, scans: Path, predicted: Path, tmp_path: Path) -> None:
    shutil.rmtree(predicted / "phantom_0004")
    out = tmp_path / "page.html"
    code, printed, errors = voxelscale("report", predicted, scans / "images", "--out", out)
    assert code == 0, errors
    assert "page.html" in printed
    html = out.read_text()
    assert "voxelscale view PREDICTIONS SCANS --case phantom_0000 --finding 1</code>" in html
    page = checked(html)
    assert "phantom_0004" in errors, "the scan without a prediction is named"
    assert "Not predicted" in html
    shown = 0
    for folder in sorted(predicted.iterdir()):
        rows = json.loads((folder / "findings.json").read_text())
        rows = rows if isinstance(rows, list) else rows["findings"]
        shown += min(len(rows), 3)
        for row in rows:
            assert f"<td>{row['x']:.1f}, {row['y']:.1f}, {row['z']:.1f}</td>" in html
            assert f"{row['probability']:.3f}" in html
    assert len(page.all("circle", "mark")) == 4 * shown
    assert len(page.all("svg", "slice")) == 4 * shown
    for said in (f"voxelscale {__version__}", "level -600 HU, width 1500 HU", "model 0123456789abcdef"):
        assert said in html
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", html)
    for place in (tmp_path, scans, Path.home()):
        assert str(place) not in html, "a page that is passed on does not say where files lie here"


def test_scans_with_masks_are_to_be_evaluated_first(
    voxelscale: Command, scans: Path, predicted: Path, tmp_path: Path
) -> None:
    code, _, errors = voxelscale("report", predicted, scans, "--out", tmp_path / "page.html")
    assert code == 2
    assert "no evaluation there" in errors
    assert not (tmp_path / "page.html").exists()
    code, _, errors = voxelscale(
        "report", tmp_path / "none", scans / "images", "--out", tmp_path / "page.html"
    )
    assert code == 2
    assert "no prediction of a scan" in errors


def test_of_a_data_set_with_test_scans_alone_predicted(
    voxelscale: Command, scans: Path, predicted: Path, tmp_path: Path
) -> None:
    """nnU-Net's imagesTs lie beside scans with labels, which were not predicted."""
    data, name = tmp_path / "raw", "phantom_0001"
    for source in list_sources(scans):
        part, mine = ("Ts", name) if source.case == name else ("Tr", source.case)
        write_scan(read_scan(source.image), data / f"images{part}" / f"{mine}_0000.nii.gz")
        if part == "Tr":
            write_scan(read_label(source.labels[0]), data / "labelsTr" / f"{mine}.nii.gz")
            shutil.rmtree(predicted / mine)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 4}
    (data / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    code, _, errors = voxelscale("report", predicted, data, "--out", tmp_path / "page.html")
    assert code == 0, errors
    assert "no prediction" not in errors
    html = (tmp_path / "page.html").read_text()
    assert name in html
    assert "phantom_0000" not in html


def test_what_the_report_of_an_evaluation_says(
    voxelscale: Command, scans: Path, predicted: Path, tmp_path: Path
) -> None:
    """A lesion without a finding and a finding without a lesion are both drawn."""
    first = predicted / "phantom_0000" / "findings.json"
    content = json.loads(first.read_text())
    rows = content if isinstance(content, list) else content["findings"]
    largest = max(rows[:-1], key=lambda row: row["diameter_mm"])
    rows.remove(largest)
    first.write_text(json.dumps(content))
    summary = evaluate_folder(predicted, DataSet(path=scans), predicted)
    points = summary["froc"]["points"]
    assert points[3]["interval"] == summary["sensitivity_at_1_fp_interval"]
    assert all(p["interval"][0] <= p["sensitivity"] <= p["interval"][1] for p in points)
    path = predicted / "evaluation.json"
    kept = json.loads(path.read_text())
    kept["coverage"]["missing"] = [f"case-<{n}>" for n in range(1, 13)]
    path.write_text(json.dumps(kept))
    out = tmp_path / "report.html"
    assert voxelscale("report", predicted, scans, "--out", out)[0] == 0
    html = out.read_text()
    page = checked(html)
    assert f"Largest missed lesion: {largest['diameter_mm']:.1f} mm" in html
    where = f"({largest['x']:.1f}, {largest['y']:.1f}, {largest['z']:.1f}) mm"
    assert f"phantom_0000, at {where}" in html
    assert "Most confident false positive: 0.540<small>phantom_0004" in html
    assert len(page.all("circle", "mark")) == 4 * 2
    assert html.count("<b>false positive</b>") == 5
    assert "Have no prediction, and are not in the figures: 12 cases" in html
    folded = html.split("<summary>and 7 more</summary>")[1].split("</details>")[0]
    assert [f"case-&lt;{n}&gt;" in folded for n in range(1, 13)] == [False] * 5 + [True] * 7
    assert "case-&lt;1&gt;" in html
    assert ">95 % interval</text>" in html
    for said in (f"voxelscale {__version__}", "level -600 HU, width 1500 HU", "model 0123456789abcdef"):
        assert said in html
    for place in (tmp_path, scans):
        assert str(place) not in html


def test_warnings_of_predict_are_read_beside_the_findings(tmp_path: Path) -> None:
    assert warnings_of(tmp_path) == []
    path = tmp_path / "findings.json"
    path.write_text("[]")  # as older versions wrote it
    assert warnings_of(tmp_path) == []
    path.write_text(json.dumps({"format": 2, "warnings": ["no lungs found"], "findings": []}))
    assert warnings_of(tmp_path) == ["no lungs found"]


def test_the_ring_is_where_the_finding_is() -> None:
    """In all views, of a scan whose axes are turned and whose voxels are no cubes."""
    affine = np.array([[0, 0, -0.7, 40.0], [0, 0.9, 0, -20.0], [2.5, 0, 0, -300.0], [0, 0, 0, 1.0]])
    image = Scan(np.zeros((40, 90, 100), np.int16), affine)
    mask = np.zeros(image.array.shape, np.uint8)
    mask[11, 60, 25] = 1
    x, y, z = image.grid.index_to_mm((11, 60, 25))
    views = overlay_views(
        image, Scan(0 * mask, affine), Scan(mask, affine), Place(centre=(x, y, z), diameter_mm=10.0)
    )
    assert len(views) == 4
    assert views[0][0] == f"axial, slice 12 of 40 from the feet, z {z:.1f} mm"
    for _, svg in views:
        (path,) = re.findall(r'class="prediction" d="([^"]*)"', svg)
        outline = np.asarray([[float(n) for n in p.split()] for p in re.split("[ML]", path) if p])
        middle = (outline.min(axis=0) + outline.max(axis=0)) / 2
        ring = re.search(r'class="mark" cx="([-\d.]+)" cy="([-\d.]+)" r="([\d.]+)"', svg)
        assert ring is not None
        assert [float(ring[1]), float(ring[2])] == pytest.approx(middle, abs=0.02)
        assert float(ring[3]) == 7.5


def test_the_scale_bar_is_seen_on_bright_tissue() -> None:
    bright = np.full((20, 20), 3000)
    svg = draw_slice(Slice(bright, 0 * bright, 0 * bright, (1.0, 1.0)), 10)
    back, bar = re.findall(r'<path class="(bar back|bar)" d="([^"]*)"', svg)
    assert (back[0], bar[0]) == ("bar back", "bar")
    assert back[1] == bar[1]
    styles = (Path(__file__).parents[2] / "src/voxelscale/pages/page.html").read_text()
    assert "path.back { stroke: #000" in styles


def test_a_froc_curve_that_runs_beyond_8_is_cut_there_and_says_so() -> None:
    rates, found = [0.0, 0.0, 4.0, 20.0, 20.0], [0.0, 0.25, 0.25, 0.25, 1.0]
    points = [{"fp_per_scan": at, "sensitivity": 0.25} for at in OPERATING_POINTS]
    html = froc_chart({"fp_per_scan": rates, "sensitivity": found, "points": points})
    assert "continues to 1.000 at 20 false positives per scan" in html
    assert max(y for _, y in visible(rates, found, 0.125, 8.0)) == 0.25
    drawn = froc_panel({"fp_per_scan": rates, "sensitivity": found, "points": points})
    assert not any(line.band for line in drawn.lines), "an evaluation of an older version has no intervals"
    within = froc_panel(
        {
            "fp_per_scan": rates,
            "sensitivity": found,
            "points": [{**p, "interval": [0.1, 0.4]} for p in points],
        }
    )
    (band,) = (line.band for line in within.lines if line.name == "95 % interval")
    assert band == [(at, 0.1, 0.4) for at in OPERATING_POINTS]
    early = froc_chart({"fp_per_scan": [0.0, 0.5], "sensitivity": [0.0, 0.5], "points": points})
    assert "no further findings" in early
    assert froc_chart({"fp_per_scan": [], "sensitivity": [], "points": points}) == ""


def test_the_visible_part_of_a_curve_by_hand() -> None:
    rates, found = [0.0, 1.0, 1.0, 3.0], [0.2, 0.2, 0.6, 1.0]
    drawn = visible(rates, found, 0.125, 3.0)
    assert drawn[0] == pytest.approx((0.125, 0.2))
    assert [y for x, y in drawn if x == 1.0] == [0.2, 0.6]
    assert drawn == sorted(drawn)
    for x, y in drawn:
        assert y == pytest.approx(0.2 if x < 1 else 0.2 * x + 0.4 if x > 1 else y)
    assert visible([0.0, 0.0], [0.0, 1.0], 0.125, 0.0) == []


def test_numbers_that_are_none_break_a_line() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, math.inf), (4.0, 2.0), (5.0, 2.5)]
    html = chart(
        Panel(x_label="samples", y_label="loss", lines=[Line(name="loss", points=points, mark="o")])
    )
    assert not re.search(r"\b(nan|inf)\b", html)
    events = [
        {"event": "train", "samples": 1},  # before the first sums of several ranks
        {"event": "train", "samples": 2, "dice": 0.1, "loss": float("nan")},
        {"event": "validation", "samples": 2},  # of scans without a lesion
    ]
    assert not any(re.search(r"\bnan\b", drawn) for drawn in training_charts(events))
    dice, loss = training_panels(events)
    assert [line.points for line in dice.lines] == [[], [(2, 0.1)]]
    assert math.isnan(loss.lines[0].points[0][1])
    alone = Line(name="one", points=[(3.0, 0.5)])
    html = chart(Panel(x_label="x", y_label="Dice <", lines=[alone]))
    assert "<use " in html.split("legend")[0], "a line of one point is a dot"
    assert "Dice &lt; against x" in html


def test_counts_have_whole_ticks(scans: Path, tmp_path: Path) -> None:
    write_dataset_page(inspect(DataSet(path=scans), workers=1), "<scans>", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    checked(html)
    figure = next(
        f for f in re.findall(r"<figure>.*?</figure>", html, re.DOTALL) if "cases against lesions" in f
    )
    ticks = re.findall(r">([-−\d.]+)</text>", figure)
    assert ticks
    assert all(re.fullmatch(r"\d+", tick) for tick in ticks)


def test_the_page_of_a_data_set_names_cases_that_cannot_be_read(
    voxelscale: Command, scans: Path, tmp_path: Path
) -> None:
    data = tmp_path / "scans"
    shutil.copytree(scans, data)
    broken = sorted((data / "images").iterdir())[0]
    broken.write_bytes(b"no scan")
    single = ("--set", "prepare.workers=1")
    code, printed, errors = voxelscale("inspect", data, tmp_path / "page.html", *single)
    assert code == 0, errors
    assert "phantom_0000" in printed
    assert "cannot be read" in printed
    html = (tmp_path / "page.html").read_text()
    checked(html)
    table = html.split("<h2>Cases</h2>")[1].split("</table>")[0]
    assert "<td>phantom_0000</td><td colspan" in table
    assert str(tmp_path) not in html


def test_nothing_of_a_case_without_findings_is_drawn(
    voxelscale: Command, scans: Path, predicted: Path, tmp_path: Path
) -> None:
    here = predicted / "phantom_0001"
    write_findings([], here / "findings.csv", here / "findings.json")
    content = json.loads((here / "findings.json").read_text())
    content["warnings"] = ["<no lungs found>"]
    (here / "findings.json").write_text(json.dumps(content))
    assert voxelscale("report", predicted, scans / "images", "--out", tmp_path / "page.html")[0] == 0
    html = (tmp_path / "page.html").read_text()
    checked(html)
    assert "phantom_0001: 0 findings" in html
    assert "&lt;no lungs found&gt;" in html
    assert "1 without a finding" in html
