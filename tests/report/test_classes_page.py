"""The report of several classes, and its colours."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import Command
from tests.pages import checked
from tests.several import CLASSES, REGIONS, write_predictions, write_several

from voxelscale.classes import Classes
from voxelscale.pages.page import CLASS_COLOURS, class_colour
from voxelscale.report.overlays import Slice, draw_slice


@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_the_page(classes: Classes, voxelscale: Command, tmp_path: Path) -> None:
    data = write_several(tmp_path / "data", classes)
    write_predictions(data, tmp_path / "p")
    assert voxelscale("evaluate", tmp_path / "p", tmp_path / "data")[0] == 0
    out = tmp_path / "report.html"
    code, _, err = voxelscale("report", tmp_path / "p", tmp_path / "data", "--out", out)
    assert (code, err) == (0, err)
    html = out.read_text()
    page = checked(html)
    summary = json.loads((tmp_path / "p" / "evaluation.json").read_text())
    assert f"<b>{summary['mean_dice']['mean']:.3f}</b>" in html
    assert "<core>" not in html
    assert "level -600 HU" in html, "the first channel is CT"
    cases = sorted({row["case"] for row in summary["cases"]})
    means = {
        case: np.mean([r["dice"] for r in summary["cases"] if r["case"] == case and r["dice"] is not None])
        for case in cases
    }
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    assert re.search(rf"Best case: mean Dice {means[best]:.3f}<small>c\d", html)
    assert f"Worst case: mean Dice {means[worst]:.3f}<small>{worst}" in html
    sections = page.all("details")
    assert [one.get("id") for one in sections] == ["class-0", "class-1"]
    links = [a.get("href") for tag, a in page.seen if tag == "a"]
    assert links == ["#class-0", "#class-1"]
    for at, name in enumerate(classes.names):
        for kind in ("truth", "prediction"):
            drawn = [p for p in page.all("path", kind) if p.get("style") == f"stroke:{class_colour(at)}"]
            assert drawn, f"{kind} of {name} has its colour"
    ignored = [p for p in page.all("path", "truth") if "stroke-dasharray" in (p.get("style") or "")]
    assert ignored, "what is ignored is outlined, too"
    listed = html[html.index("<h2>Findings</h2>") :]
    assert listed.count("<td data-value=") % 9 == 0, "one column more: the class"
    assert listed.count(">not counted<") == 6
    assert listed.count("<b>false positive</b>") == 6
    assert "Most confident false positive" in html


def test_a_scan_without_truth_in_the_colours_of_its_model(voxelscale: Command, tmp_path: Path) -> None:
    data = write_several(tmp_path / "data", CLASSES, cases=2)
    write_predictions(data, tmp_path / "p")
    for source in data.cases:
        path = tmp_path / "p" / source.case / "findings.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "classes": CLASSES.to_dict()}))
    images = tmp_path / "scans"
    images.mkdir()
    for source in data.cases:
        (images / f"{source.case}.nii.gz").write_bytes(source.image.read_bytes())
    out = tmp_path / "page.html"
    code, _, err = voxelscale("report", tmp_path / "p", images, "--out", out)
    assert code == 0, err
    page = checked(out.read_text())
    colours = {p.get("style") for p in page.all("path", "prediction")}
    assert colours == {f"stroke:{class_colour(0)}", f"stroke:{class_colour(1)}"}
    assert "Finding 1, &lt;core&gt;: confidence" in out.read_text()
    assert '<th scope="col">Class</th>' in out.read_text()


def test_regions_that_overlap_are_both_outlined() -> None:
    stored = np.zeros((9, 9), np.int16)
    stored[2:7, 2:7] = 1
    stored[3:6, 3:6] = 3
    svg = draw_slice(Slice(np.zeros((9, 9)), stored, 0 * stored, (1.0, 1.0), classes=REGIONS), 5)
    outlines = re.findall(r'class="truth" style="stroke:(#\w+)" d="([^"]*)"', svg)
    assert [colour for colour, _ in outlines] == [class_colour(0), class_colour(1)]
    edges = [
        np.asarray([[float(n) for n in p.split()] for p in re.split("[ML]", d) if p]) for _, d in outlines
    ]
    assert [points.min() for points in edges] == [2, 3]
    assert [points.max() for points in edges] == [7, 6]


LACKING = {
    "none": np.eye(3),
    "long": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "middle": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "short": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
"""Linear RGB as it is seen without a kind of cone: Machado, Oliveira and Fernandes 2009, table 1."""


def linear(colour: str) -> NDArray[np.float64]:
    c = np.asarray([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    to_xyz = np.asarray([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = to_xyz @ np.clip(rgb, 0, 1) / (0.9505, 1.0, 1.089)
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.asarray([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("lacking", LACKING)
def test_colours_are_distinguished_by_everyone(lacking: str) -> None:
    assert len(set(CLASS_COLOURS)) == 12
    seen = [lab(np.asarray(LACKING[lacking]) @ linear(colour)) for colour in CLASS_COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 24
    light = [float(np.dot([0.2126, 0.7152, 0.0722], linear(colour))) for colour in CLASS_COLOURS]
    assert min((y + 0.05) / 0.05 for y in light) >= 3, "contrast on black, as WCAG 2 asks of graphics"
    assert class_colour(13) == CLASS_COLOURS[1]
