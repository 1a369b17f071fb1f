"""The viewer's page in a real browser: places, keys, the brush."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.viewer.conftest import Served, until

from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.dataset.reading import read_image
from voxelscale.findings import lesions_of_mask, read_findings
from voxelscale.formats import read_label
from voxelscale.geometry import reorient
from voxelscale.viewer.runs import filled

READY = "return Boolean(window.voxelscale && voxelscale.ready && voxelscale.facts.name === arguments[0])"


class Page:
    """The page as a reader uses it."""

    def __init__(self, driver: Any, served: Served) -> None:
        self.driver, self.served = driver, served

    def open(self, case: str, finding: str = "1") -> None:
        self.driver.get("about:blank")
        self.driver.get(f"{self.served.url}?token={self.served.door.token}#case={case}&finding={finding}")
        self.ready(case)

    def ready(self, case: str) -> None:
        until(lambda: self.driver.execute_script(READY, case))

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def settled(self) -> None:
        """Wait until all that was asked for has been answered."""
        self.driver.execute_async_script("voxelscale.queue.then(arguments[0])")

    def steady(self) -> None:
        """Wait until the planes have kept their places for ten frames: a busy machine draws late."""
        self.driver.execute_async_script(
            "const done = arguments[0]; let before = '', same = 0;"
            "const look = () => {"
            "  const now = JSON.stringify([voxelscale.tiles, $('drawn').getBoundingClientRect()]);"
            "  same = now === before ? same + 1 : 0; before = now;"
            "  same >= 10 ? done() : requestAnimationFrame(look); }; look()"
        )

    def mask(self) -> Any:
        """The reader's mask (z, y, x) as the page has it."""
        shape, runs = self.js(
            "const s = voxelscale.lattice.shape, out = [];"
            "for (const [z, slice] of voxelscale.decided.slices) {"
            "  const runs = runsOf(slice, s[2]);"
            "  for (let k = 0; k < runs.length; k += 3)"
            "    out.push([z * s[1] * s[2] + runs[k], runs[k + 1], runs[k + 2]]);"
            "} return [s, out.sort((a, b) => a[0] - b[0])]"
        )
        return filled(np.asarray(runs), int(np.prod(shape))).reshape(shape)

    def outcome(self, predictions: Path, case: str) -> Any:
        file = predictions / "readers" / "A. Smith" / case / "decisions.json"
        return json.loads(file.read_text()) if file.is_file() else {"marks": []}


@pytest.fixture(scope="module")
def page(browser: Any, served: Served) -> Page:
    return Page(browser, served)


@pytest.mark.parametrize("case", ["a", "b"])
def test_a_click_on_a_finding_leads_there(page: Page, scans: Path, predictions: Path, case: str) -> None:
    from selenium.webdriver.common.by import By

    page.open(case)
    # The token is out of the address, and nothing came from elsewhere or was refused by the policy.
    assert "token" not in page.driver.current_url
    loaded = page.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(name.startswith((page.served.url, "data:", "blob:")) for name in loaded)
    assert [line for line in page.driver.get_log("browser") if line["level"] == "SEVERE"] == []
    source = next(s for s in DataSet(path=scans).cases if s.case == case)
    image = reorient(read_image(source, ReadingConfig()))
    for number, finding in enumerate(read_findings(predictions / case / "findings.json"), start=1):
        page.driver.find_element(By.ID, f"finding-{number}").click()
        place = [finding.x, finding.y, finding.z]
        assert page.js("return voxelscale.lattice.toMm(voxelscale.voxel)") == pytest.approx(place, abs=0.1)
        # NiiVue's own idea of it, from the NIfTI file that it read: RAS.
        ras = page.js(
            "return Array.from(voxelscale.niivue.frac2mm(voxelscale.niivue.scene.crosshairPos, 0, true))"
        )
        assert ras[:3] == pytest.approx([-finding.x, -finding.y, finding.z], abs=0.1)
        # What stands there: the scan's own voxel. Each has a value of its own around.
        voxel = tuple(np.floor(image.grid.mm_to_index(place) + 0.5 + 1e-6).astype(int))
        where = "tellWhere(); return document.getElementById('where').textContent"
        until(lambda: "HU" in page.js(where))  # noqa: B023
        _, x, _, y, _, z, *_, hu, unit = page.js(where).split()
        assert [float(x), float(y), float(z)] == pytest.approx(place, abs=0.051)
        assert (int(hu), unit) == (image.array[voxel], "HU")


def test_what_is_drawn_is_what_is_there(page: Page, scans: Path) -> None:
    """A pixel of each plane's picture is the voxel that its place says."""
    source = DataSet(path=scans).cases[1]
    image = reorient(read_image(source, ReadingConfig()))
    page.open("b", "2")
    until(
        lambda: page.js(
            "return [0, 1, 2].every((a) =>"
            "  voxelscale.planes.kept.has(`${a}/${Math.round(voxelscale.voxel[a])}`))"
        )
    )
    page.js(
        "Object.assign(voxelscale, {window: [-1000, 275], on: {}, selected: ''});"
        "drawCross = () => {}; draw()"
    )
    places = [[row, column] for row in range(2, 18, 3) for column in range(3, 48, 6)]
    drawn = page.driver.execute_async_script(
        "const places = arguments[0], done = arguments[1];"
        "requestAnimationFrame(() => requestAnimationFrame(() => {"
        "  const context = document.getElementById('drawn').getContext('2d');"
        "  done(voxelscale.tiles.map((tile) => [tile.axis, Math.round(voxelscale.voxel[tile.axis]),"
        "    places.map((p) => context.getImageData(...toPixel(tile, p), 1, 1).data[0])])) }))",
        places,
    )
    assert sorted(axis for axis, *_ in drawn) == [0, 1, 2]
    for axis, at, greys in drawn:
        plane = (image.array.take(at, axis).astype(float) + 1000) / 5
        compared = 0
        for (row, column), grey in zip(places, greys, strict=True):
            around = plane[row - 1 : row + 2, column - 1 : column + 2]
            if np.ptp(around) < 8:  # no border of a nodule, between whose sides the picture interpolates
                compared += 1
                assert around.min() - 3 <= grey <= around.max() + 3
        assert compared > 20
    # Radiological: the patient's right on the left, the head on top.
    tiles = {tile["axis"]: tile for tile in page.js("return voxelscale.tiles")}
    assert tiles[0]["cs"] > 0 and tiles[0]["rs"] > 0  # noqa: PT018
    assert tiles[1]["cs"] > 0 and tiles[1]["rs"] < 0  # noqa: PT018
    assert tiles[2]["cs"] > 0 and tiles[2]["rs"] < 0  # noqa: PT018


def test_a_link_leads_to_a_lesion_of_the_truth(page: Page, scans: Path) -> None:
    page.open("b", "t2")
    source = next(s for s in DataSet(path=scans).cases if s.case == "b")
    mask = reorient(read_label(source.labels[0]))
    lesion = lesions_of_mask("b", mask.array, mask.grid)[1]
    mm = page.js("return voxelscale.lattice.toMm(voxelscale.voxel)")
    assert mm == pytest.approx([lesion.x, lesion.y, lesion.z], abs=0.1)


def test_threshold(page: Page) -> None:
    page.open("a")
    summary = "return document.getElementById('summary').textContent"
    assert page.js(summary) == "4 of 5 findings · 3 of 4 lesions found · 1 false positive"
    page.js(
        "const slider = document.getElementById('threshold');"
        "slider.value = 0.85; slider.dispatchEvent(new Event('input'))"
    )
    assert page.js(summary).startswith("1 of 5 findings")
    assert page.js(
        "return [1, 2, 5].map((n) => document.getElementById(`finding-${n}`).classList.contains('below'))"
    ) == [
        False,
        True,
        True,
    ]
    visible = "return layers().find(([name]) => name === 'prediction')[1][0].inside(arguments[0])"
    assert [page.js(visible, number) for number in (1, 2)] == [True, False]
    page.js("setThreshold(0.1)")
    assert page.js(summary) == "5 of 5 findings · 3 of 4 lesions found · 2 false positives"


def test_a_mask_follows_the_threshold_where_probabilities_are_known(page: Page, predictions: Path) -> None:
    """In every plane through a finding, voxel by voxel; at the prediction's threshold it is the mask."""
    page.open("b", "1")
    until(lambda: page.js("return Boolean(voxelscale.probability)"))
    kept = reorient(read_label(predictions / "b" / "probability.nii.gz")).array
    mask = reorient(read_label(predictions / "b" / "mask.nii.gz")).array
    voxel = [round(v) for v in page.js("return voxelscale.voxel")]
    for threshold in (0.5, 0.62, 0.85):
        page.js("setThreshold(arguments[0])", threshold)
        for axis in range(3):
            inside = page.js(
                "const [, [rule], source] = layers().find(([,, source]) => source === 'probability');"
                "return [...(voxelscale[source].plane(arguments[0], arguments[1]) || [])].map(rule.inside)",
                axis,
                voxel[axis],
            )
            wanted = kept.take(voxel[axis], axis) >= 255 * threshold
            assert np.array_equal(np.reshape(inside, wanted.shape), wanted)
            if threshold == 0.5:
                assert np.array_equal(wanted, mask.take(voxel[axis], axis) > 0)
    assert not page.js("return layers().find(([name]) => name === 'truth')[2]")


def test_keys_alone(page: Page, predictions: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open("a")
    page.keys("j")
    assert page.js("return voxelscale.selected") == "2"
    page.keys("k", "a")
    page.settled()
    until(lambda: page.js("return voxelscale.selected") == "2")  # the next one that is open
    page.keys("r")
    page.settled()
    verdicts = "return voxelscale.facts.marks.map((m) => m.verdict)"
    assert page.js(verdicts)[:3] == ["accepted", "rejected", "open"]
    page.driver.find_element("tag name", "body").send_keys(Keys.CONTROL, "z")
    page.settled()
    assert page.js(verdicts)[:3] == ["accepted", "open", "open"]
    before = page.js("return voxelscale.voxel.map(Math.round)")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.PAGE_UP)
    assert page.js("return voxelscale.voxel.map(Math.round)") == [
        before[0] + 1,
        before[1] + 1,
        before[2] + 1,
    ]
    page.keys("2")
    assert page.js("return voxelscale.window") == [-160, 240]
    page.keys("w")
    assert page.js("return voxelscale.window") == pytest.approx([40 - 230, 40 + 230])
    page.keys("t", "x")
    assert page.js("return [voxelscale.on.truth, voxelscale.axis]") == [False, 1]
    page.keys("d")
    page.settled()
    assert page.js(verdicts)[-1] == "accepted"
    assert page.js("return voxelscale.selected") == "a1"
    page.keys("h")
    assert page.js("return document.getElementById('help').open")
    page.keys(Keys.ESCAPE)
    until(lambda: not page.js("return document.getElementById('help').open"))
    page.keys("n")
    page.ready("b")
    page.keys("p")
    page.ready("a")
    saved = until(lambda: marks if len(marks := page.outcome(predictions, "a")["marks"]) == 6 else None)
    assert [mark["verdict"] for mark in saved] == ["accepted", "open", "open", "open", "open", "accepted"]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_brush_strokes_survive_a_reload(page: Page, predictions: Path, axis: int) -> None:
    """On the oblique scan, in each plane: painted by mouse, saved, read again."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    page.open("b", "1")
    before = page.mask()
    page.js("document.getElementById('brush-size').value = 3; setBrush('paint')")
    page.settled()
    before = page.mask() if not before.any() else before
    # Five voxels along the columns of the plane, through a free place.
    page.steady()
    from_to = page.js(
        "const axis = arguments[0], tile = voxelscale.tiles.find((t) => t.axis === axis), s = $('drawn');"
        "const box = s.getBoundingClientRect(), scale = s.width / box.width;"
        "return [[12, 20], [12, 24]].map((p) => toPixel(tile, p).map((v) => v / scale))",
        axis,
    )
    drawn = page.driver.find_element(By.ID, "drawn")
    size = drawn.size
    (ax, ay), (bx, by) = [[x - size["width"] / 2, y - size["height"] / 2] for x, y in from_to]
    chain = ActionChains(page.driver, duration=20).move_to_element_with_offset(drawn, round(ax), round(ay))
    chain.click_and_hold().move_to_element_with_offset(drawn, round(bx), round(by)).release().perform()
    page.settled()
    assert page.js("return $('said').className") == ""
    painted = page.mask()
    at = page.js("return Math.round(voxelscale.voxel[arguments[0]])", axis)
    new = np.argwhere((painted > 0) & (before == 0))
    assert set(new[:, axis]) <= {at}
    plane = painted.take(at, axis)
    # Pixels are rounded to whole ones of the screen, which is finer than a voxel.
    assert plane[12, 20:25].all()
    steps = np.delete([3.0, 0.9, 0.7], axis)
    rows, columns = (new[:, [a for a in range(3) if a != axis]]).T
    far = np.hypot((rows - 12) * steps[0], (columns - np.clip(columns, 20, 24)) * steps[1])
    assert far.max() <= 1.5 + 1e-6 + max(steps) / 2
    page.open("b", "1")
    np.testing.assert_array_equal(page.mask(), painted)

    def saved() -> bool:
        file = predictions / "readers" / "A. Smith" / "b" / "mask.nii.gz"
        return file.is_file() and np.array_equal(reorient(read_label(file)).array, painted)

    until(saved)


def test_brush_by_keys(page: Page) -> None:
    page.open("a", "5")
    page.js("voxelscale.voxel = [20, 30, 40]; place(); voxelscale.axis = 0; $('brush-size').value = 2")
    page.js("voxelscale.selected = ''")
    page.keys("b", " ")
    page.settled()
    until(lambda: page.mask()[20].any())
    mask = page.mask()
    assert mask[20, 30, 40] == 1
    assert mask[20].sum() == 5  # a disc of 2 mm at 0.8 mm: the voxel and its four neighbours
    page.keys("e", " ")
    until(lambda: not page.mask()[20].any())
    page.js(  # as a German keyboard has it: AltGr and 9
        "document.body.dispatchEvent(new KeyboardEvent('keydown',"
        "  { key: ']', ctrlKey: true, altKey: true, bubbles: true }))"
    )
    assert page.js("return $('brush-size').value") == "3"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_beyond_the_last_slice_there_is_none(page: Page, axis: int) -> None:
    """By keys or by dragging to the border one stays in the last slice, and paints there."""
    page.open("a", "5")
    page.js("setBrush(''); voxelscale.selected = ''; voxelscale.axis = arguments[0]", axis)
    last = page.js("return voxelscale.lattice.shape")[axis] - 1
    page.js("for (let k = 0; k < 80; k++) nudge(voxelscale.axis, 1)")
    assert page.js("return Math.round(voxelscale.voxel[voxelscale.axis])") == last
    share = [0, 1, 0] if axis == 2 else [0, 0, 1]
    page.js("niivue.scene.crosshairPos = arguments[0]; niivue.onLocationChange()", share)
    assert page.js("return Math.round(voxelscale.voxel[voxelscale.axis])") == last
    page.js(
        "const v = voxelscale.lattice.shape.map((n) => n >> 1); v[voxelscale.axis] = 1000;"
        "voxelscale.voxel = v; place()"
    )
    before = page.mask()
    page.keys("b", " ")
    page.settled()
    until(lambda: (page.mask() != before).any())
    assert set(np.argwhere(page.mask() != before)[:, axis]) == {last}
    assert page.js("return $('said').className") == ""


def test_nothing_is_decided_while_another_case_is_read(page: Page) -> None:
    """By no button and no key: what is shown is still the case before."""
    page.open("a", "1")
    states = "return voxelscale.cases.map((c) => c.state)"
    before = page.js(states)
    page.driver.execute_async_script(
        "const done = arguments[0]; open(1);"
        "setTimeout(() => {"
        "  for (const name of ['accept', 'reject', 'add', 'brush', 'undo', 'finish'])"
        "    document.querySelector(`[data-act=${name}]`).click();"
        "  for (const key of ['a', 'r', 'd', 'b', ' '])"
        "    document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));"
        "  voxelscale.queue.then(done) }, 0)"
    )
    page.ready("b")
    page.settled()
    assert page.js(states) == before
    page.js("ACTS.accept()")
    page.settled()
    assert page.js(states)[1] == "begun"
    page.js("ACTS.undo()")
    page.settled()


def test_what_another_window_decided_is_not_painted_over(page: Page) -> None:
    page.open("b", "1")
    count = page.js("return voxelscale.facts.lines")
    page.js("ACTS.accept()")
    page.settled()
    accepted = page.mask()
    # As a window that was opened before has it: an empty slice in which one voxel is painted.
    page.js(
        "voxelscale.facts.lines = arguments[0]; act({ action: 'brush', slices: { 4: [0, 1, 1] } })", count
    )
    page.settled()
    assert "in another window" in page.js("return $('said').textContent")
    page.open("b", "1")
    np.testing.assert_array_equal(page.mask(), accepted)
    page.js("ACTS.undo()")
    page.settled()


def test_a_case_that_cannot_be_shown(page: Page) -> None:
    """It says why, shows nothing of the case before, and the next one can be opened by keys."""
    page.open("a", "1")
    states = "return voxelscale.cases.map((c) => c.state)"
    before = page.js(states)
    page.js(
        "window.fetched = window.fetch; window.fetch = (path, ...more) => path === '/api/case/1'"
        ' ? Promise.resolve(new Response(\'{"error": "b: is damaged"}\', { status: 422 }))'
        " : fetched(path, ...more)"
    )
    page.keys("n")
    until(lambda: page.js("return $('said').textContent") == "b: is damaged")
    assert page.js("return getComputedStyle($('views')).visibility") == "hidden"
    page.keys("a")
    page.settled()
    assert page.js("return $('said').textContent") == "b: is damaged"
    assert page.js(states) == before
    page.keys("p")
    page.ready("a")
    assert page.js("return getComputedStyle($('views')).visibility") == "visible"


def test_links_to_what_is_not_there(page: Page) -> None:
    page.driver.get("about:blank")
    page.driver.get(f"{page.served.url}?token={page.served.door.token}#case=nobody&finding=2")
    page.ready("a")
    assert "no case nobody" in page.js("return $('said').textContent")
    page.open("b", "99")
    assert "no finding 99" in page.js("return $('said').textContent")
    assert page.js("return voxelscale.selected") == ""


def test_a_key_that_is_held_down_decides_once(page: Page) -> None:
    page.open("a", "1")
    lines = page.js("return voxelscale.facts.lines")
    page.js(
        "const press = (more) => document.body.dispatchEvent("
        "  new KeyboardEvent('keydown', { bubbles: true, ...more }));"
        "press({ key: 'd' }); press({ key: 'd', repeat: true }); press({ key: 'd', repeat: true });"
        "press({ key: 'Z', ctrlKey: true, shiftKey: true })"
    )
    page.settled()
    assert page.js("return voxelscale.facts.lines") == lines + 1
    page.keys("j")
    place = page.js("return voxelscale.voxel")
    page.js(
        "const k = { key: 'PageUp', bubbles: true, repeat: true };"
        "document.body.dispatchEvent(new KeyboardEvent('keydown', k))"
    )
    assert page.js("return voxelscale.voxel") != place
    page.js("ACTS.undo()")
    page.settled()


def test_the_class_is_that_of_the_selected_finding(page: Page) -> None:
    """So that the brush goes on with it; another one may be chosen."""
    page.open("a", "1")
    chosen = page.js(
        "Object.assign(voxelscale.facts, { classes: ['x', 'y'] });"
        "voxelscale.facts.marks.forEach((m, n) => { m.class = 'xyyx'[n] || 'x' }); showFacts();"
        "return ['1', '2', '4', '3'].map((name) => { select(name); return label() })"
    )
    assert chosen == [0, 1, 0, 1]


def test_without_findings_the_threshold_is_the_predictions(page: Page) -> None:
    page.open("b", "1")
    threshold = page.js(
        "voxelscale.facts.findings = []; voxelscale.facts.marks = []; voxelscale.facts.lesions = [];"
        "showFacts(); return voxelscale.threshold"
    )
    assert threshold == 0.5
    assert page.js("select('1'); return $('said').textContent") == "Nothing was found"
    page.js(  # of a lesion that was missed, or added by the reader, it is no error either
        "voxelscale.facts.lesions = [{ x: 0, y: 0, z: 0, diameter_mm: 5, hits: [] }]; select('1')"
    )
    assert page.js("return [$('said').textContent, $('said').className]") == ["Nothing was found", ""]
    page.js("select('7')")
    assert page.js("return [$('said').textContent, $('said').className]") == [
        "There is no finding 7",
        "error",
    ]


def test_balls_lie_where_the_scan_is_shown(page: Page) -> None:
    """Also of a very oblique scan, which NiiVue is given as if it were upright."""
    page.open("b", "1")
    until(lambda: page.js("return solid.volumes.length > 0 && solid.meshes.length > 0"))
    upright, oblique, shown = page.js(
        "const place = () => { draw3d(); const { pts } = solid.meshes.at(-1), out = [0, 0, 0];"
        "  for (let k = 0; k < 528; k++) out[k % 3] += pts[k] / 176; return out };"
        "const v = voxelscale, before = place(), voxel = v.lattice.toVoxel(v.facts.marks[0].mm);"
        "const [a, b, c, d] = v.facts.lattice.affine;"
        "v.lattice = new Lattice({ ...v.facts.lattice, affine: [b, c, a, d] });"
        "v.facts.marks[0].mm = v.lattice.toMm(voxel);"
        "return [before, place(), Array.from(solid.frac2mm(v.lattice.toShare(voxel), 0, true))]"
    )
    assert upright == pytest.approx(shown[:3], abs=0.01)
    assert oblique == pytest.approx(upright, abs=0.01)


def test_of_very_many_findings_the_first_are_in_3d(page: Page) -> None:
    page.open("a", "1")
    until(lambda: page.js("return solid.volumes.length > 0"))
    balls = page.js(
        "const { facts } = voxelscale;"
        "facts.findings = Array(500).fill(facts.findings[0]); facts.lesions = [];"
        "facts.marks = facts.findings.map((_, n) => ({ ...facts.marks[0], finding: String(n + 1) }));"
        "select('450'); draw3d(); return solid.meshes.map((mesh) => mesh.pts.length / 528)"
    )
    assert balls == [200, 2]  # the selected one, and the crosshair
