from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from voxelscale.dataset import DataSet
from voxelscale.dataset.listing import list_sources
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.evaluate import evaluate_folder
from voxelscale.findings import lesions_of_mask, read_findings, write_findings
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan
from voxelscale.pages import charts
from voxelscale.pages.charts import Line, Panel, chart
from voxelscale.pages.page import write_page
from voxelscale.report.overlays import Slice, draw_slice, overlay_views, point_of_interest
from voxelscale.report.report import write_report
from voxelscale.store import Store

VOID = {"meta", "input", "image", "path", "line"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def predicted(scans: Path, tmp_path: Path) -> Path:
    """Predictions for three scans: the truth, half of it, nothing."""
    for number, source in enumerate(list_sources(scans)[:3]):
        assert source.labels
        truth = read_label(source.labels[0])
        mask = truth.array.copy()
        if number:
            mask[:, :, : mask.shape[2] // number**3] = 0
        folder = tmp_path / "predictions" / source.case
        write_scan(Scan(mask, truth.affine), folder / "mask.nii.gz")
        found = lesions_of_mask(source.case, mask, truth.grid)
        write_findings(found, folder / "findings.csv", folder / "findings.json")
    return tmp_path / "predictions"


def test_the_page(scans: Path, predicted: Path, store: Store, tmp_path: Path) -> None:
    summary = evaluate_folder(predicted, DataSet(path=scans), predicted)
    assert summary["cases"][0]["dice"] == 1.0
    page = tmp_path / "report.html"
    write_report(predicted, predicted, DataSet(path=scans), page)
    html = page.read_text()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert "$" not in re.sub(r"\$\{", "", html.split("<script>")[0])
    assert not re.search(r'(src|href)="(?!data:|#)', html)  # nothing is loaded from elsewhere
    for case in summary["cases"]:
        assert case["case"] in html
        assert f"{case['dice']:.3f}" in html
    assert "other findings" not in html
    assert html.count('class="case"') == 3
    assert html.count('class="truth" d="M') >= 3


@pytest.mark.parametrize("now", ["another model", "nothing"])
def test_an_evaluation_of_other_findings_is_named(
    scans: Path, predicted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], now: str
) -> None:
    """Predicted again since: the figures are not of what is drawn and listed beside them."""
    summary = evaluate_folder(predicted, DataSet(path=scans), predicted)
    case = summary["cases"][0]["case"]
    found = read_findings(predicted / case / "findings.json")
    less_sure = [replace(f, probability=0.9 * f.probability) for f in found if now != "nothing"]
    write_findings(less_sure, predicted / case / "findings.csv", predicted / case / "findings.json")
    write_report(None, predicted, DataSet(path=scans), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert f"Have other findings now than the figures are of: 1 case</b><div>{case}</div>" in html
    assert "run voxelscale evaluate again" in capsys.readouterr().err


def test_names_are_escaped(scans: Path, predicted: Path, tmp_path: Path) -> None:
    evaluate_folder(predicted, DataSet(path=scans), predicted)
    path = predicted / "evaluation.json"
    summary = json.loads(path.read_text())
    evil = '"><script>alert(1)</script>'
    summary["cases"][0]["case"] = evil
    summary["failed"] = [{"case": evil, "error": evil, "hint": ""}]
    path.write_text(json.dumps(summary))
    write_report(predicted, predicted, DataSet(path=scans), tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_no_evaluation_is_reported(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError, match="no evaluation there"):
        write_report(tmp_path, tmp_path, DataSet(path=scans), tmp_path / "report.html")
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(VoxelscaleError, match="no evaluation there"):
        write_report(tmp_path, tmp_path, DataSet(path=scans), tmp_path / "report.html")


def test_outlines_lie_around_the_mask_in_mm() -> None:
    mask = np.zeros((10, 12), np.uint8)
    mask[2:5, 6:10] = 1
    svg = draw_slice(Slice(np.zeros((10, 12)), mask, 0 * mask, (2.0, 0.5)), 5)
    assert 'viewBox="0 0 6.00 20.00"' in svg
    assert 'class="prediction"' not in svg
    (path,) = re.findall(r'class="truth" d="([^"]*)"', svg)
    numbers = np.asarray([[float(n) for n in p.split()] for p in re.split("[ML]", path) if p])
    # Edges of the outermost pixels: columns 6..9 of 0.5 mm, rows 2..4 of 2 mm.
    assert numbers.min(axis=0) == pytest.approx([3.0, 4.0])
    assert numbers.max(axis=0) == pytest.approx([5.0, 10.0])


def test_the_view_is_where_most_of_the_truth_is(scans: Path) -> None:
    source = list_sources(scans)[0]
    assert source.labels
    truth = read_label(source.labels[0])
    z, y, x = point_of_interest(truth.array, 0 * truth.array)
    assert truth.array[z, y, x] == 1
    assert np.count_nonzero(truth.array[z]) == np.count_nonzero(truth.array, axis=(1, 2)).max()
    assert point_of_interest(0 * truth.array, truth.array) == (z, y, x)
    empty = 0 * truth.array
    assert point_of_interest(empty, empty) == tuple(n // 2 for n in empty.shape)
    views = overlay_views(truth, truth, truth)
    assert [caption.split(",")[0] for caption, _ in views] == ["axial", "axial", "coronal", "sagittal"]


def test_charts() -> None:
    line = Line(name="<a> $x", points=[(0.125, 0.2), (8.0, 0.9)], mark="o")
    drawn = chart(Panel(x_label="x", y_label="<y>", lines=[line], x_log=True, x_ticks=[0.125, 1, 8]), "<n>")
    for name in ("&lt;a&gt; $x", "&lt;y&gt; against x", "<figcaption>&lt;n&gt;", ">0.125<"):
        assert name in drawn
    assert "<a>" not in drawn
    assert "var(--s0)" in drawn
    assert not re.search(r"(fill|stroke): #", drawn), "every colour is the page's"
    assert 'viewBox="0 0 420 300"' in drawn
    assert chart(Panel(x_label="x", lines=[Line(name="none", points=[])]))
    assert chart(Panel(x_label="x", counts=[0, 0], edges=[0, 1, 2]))


def test_a_page_runs_its_own_scripts_only(tmp_path: Path) -> None:
    write_page("<t>", ["<h1>t</h1><script>alert(1)</script>"], tmp_path / "page.html", ["let a = 1;"])
    html = (tmp_path / "page.html").read_text()
    policy = re.search(r"script-src ([^\"]*)\"", html)
    assert policy is not None
    trusted = set(policy[1].split())
    assert "'unsafe-inline'" not in trusted

    def digest(script: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"

    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert [digest(script) in trusted for script in scripts] == [False, True, True]
    assert "prefers-color-scheme:dark" in html


def test_ticks_are_short_on_both_sides_of_zero() -> None:
    values = (-25_000, -1000, -0.125, 0, 1234, 10_000, 2_500_000)
    assert [charts.number(value) for value in values] == [
        "-25k",
        "-1000",
        "-0.125",
        "0",
        "1234",
        "10k",
        "2.5M",
    ]
