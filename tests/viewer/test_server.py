"""The viewer's server, asked by a plain client: who is let in, what is answered, what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from starlette.testclient import TestClient
from tests.conftest import SHARED, Command
from tests.dicom_out.made import predict_by_hand, source_of
from tests.viewer.conftest import READER, shown

from voxelscale.classes import Classes
from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.dataset.reading import read_image, read_truth
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import Finding, lesions_of_mask, write_findings
from voxelscale.formats import read_label, write_scan
from voxelscale.geometry import Scan, as_lps, reorient
from voxelscale.phantom.series import Person, write_series
from voxelscale.report.cases import read_scans
from voxelscale.viewer import decisions
from voxelscale.viewer.app import Viewer, build
from voxelscale.viewer.cases import Case, list_predicted
from voxelscale.viewer.decisions import Desk
from voxelscale.viewer.guard import Door
from voxelscale.viewer.pages import build_pages
from voxelscale.viewer.readers import agreement, compare_readers
from voxelscale.viewer.runs import filled, runs_of
from voxelscale.viewer.serve import is_loopback

HOST = "127.0.0.1:8123"
ORIGIN = {"origin": f"http://{HOST}"}


@pytest.fixture
def door() -> Door:
    return Door(hosts=frozenset({HOST, "localhost:8123"}))


@pytest.fixture
def opened(
    scans: Path, predictions: Path, door: Door, tmp_path: Path
) -> Iterator[tuple[TestClient, Viewer, Path]]:
    """A client that has entered, with decisions in a folder of its own."""
    app, viewer = build(replace(shown(scans, predictions), folder=tmp_path / "reader"), door)
    client = TestClient(app, base_url=f"http://{HOST}")
    assert client.get(f"/?token={door.token}").status_code == 200
    yield client, viewer, tmp_path / "reader"
    viewer.close()


def act(client: TestClient, case: int = 0, **line: Any) -> Any:
    answer = client.post(f"/api/case/{case}/act", json=line, headers=ORIGIN)
    return answer.json() if answer.status_code == 200 else answer


def decided(client: TestClient, case: int, shape: tuple[int, ...]) -> Any:
    runs = np.frombuffer(client.get(f"/api/case/{case}/decided").content, "<i4")
    return filled(runs, int(np.prod(shape))).reshape(shape)


def test_who_is_let_in(scans: Path, predictions: Path, door: Door) -> None:
    app, viewer = build(shown(scans, predictions), door)
    before = set(predictions.glob("readers/*/*/decisions.jsonl"))  # of other tests' readers
    client = TestClient(app, base_url=f"http://{HOST}")
    assert client.get("/api/cases").status_code == 401
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/static/viewer.js").status_code == 401
    entered = client.get(f"/?token={door.token}")
    assert entered.status_code == 200
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    policy = entered.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert client.get("/api/cases").status_code == 200
    # With the cookie: foreign pages, foreign names of this machine.
    assert client.get("/api/cases", headers={"origin": "http://evil.example"}).status_code == 403
    assert (
        client.get("/api/cases", headers={"origin": f"http://{HOST.replace('8123', '9')}"}).status_code
        == 403
    )
    assert client.get("/api/cases", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/api/cases", headers={"sec-fetch-site": "same-site"}).status_code == 403
    assert client.get("/api/cases", headers={"host": "evil.example:8123"}).status_code == 421
    assert client.get("/api/cases", headers={"host": "127.0.0.1"}).status_code == 421
    body = {"action": "accept", "finding": "1"}
    assert client.post("/api/case/0/act", json=body).status_code == 403
    foreign = {"origin": "null"}
    assert client.post("/api/case/0/act", json=body, headers=foreign).status_code == 403
    huge = {**ORIGIN, "content-length": str(2**30)}
    assert client.post("/api/case/0/act", content=b"{}", headers=huge).status_code == 413
    # A link in a report leads here from another page; only the entry may be reached so.
    crossing = {"sec-fetch-site": "cross-site"}
    assert client.get(f"/?token={door.token}", headers=crossing).status_code == 200
    assert set(predictions.glob("readers/*/*/decisions.jsonl")) == before
    viewer.close()


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/viewer.html",
        "/api/case/-1",
        "/api/case/2",
        "/api/case/0/plane/3/0",
        "/api/case/0/plane/0/9999",
        "/api/case/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/api/case/0/mask.nii.gz",
    ],
)
def test_nothing_else_is_served(opened: tuple[TestClient, Viewer, Path], path: str) -> None:
    assert opened[0].get(path).status_code == 404


def test_voxels_and_places(opened: tuple[TestClient, Viewer, Path], scans: Path) -> None:
    client, *_ = opened
    for number, source in enumerate(DataSet(path=scans).cases):
        facts = client.get(f"/api/case/{number}").json()
        image = reorient(read_image(source, ReadingConfig()))
        shape = image.array.shape
        assert facts["lattice"]["shape"] == list(shape)
        np.testing.assert_allclose(facts["lattice"]["affine"], image.affine)
        for axis in range(3):
            plane = np.frombuffer(client.get(f"/api/case/{number}/plane/{axis}/5").content, "<i2")
            np.testing.assert_array_equal(plane, image.array.take(5, axis).ravel())
        truth = np.frombuffer(client.get(f"/api/case/{number}/truth").content, "<i4")
        expected = read_truth(source, ReadingConfig()).array
        np.testing.assert_array_equal(filled(truth, image.array.size).reshape(shape), expected)
        # NiiVue's copy, as nibabel reads it: the same values at the same RAS positions.
        overview = nibabel.Nifti1Image.from_bytes(client.get(f"/api/case/{number}/overview.nii").content)
        places = np.argwhere(expected)[::50]
        ras = image.grid.index_to_mm(places) * [-1, -1, 1]
        inverse = np.linalg.inv(overview.affine)
        voxels = np.rint(ras @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
        np.testing.assert_array_equal(
            overview.get_fdata()[tuple(voxels.T)], image.array[tuple(places.T)].astype(float)
        )
        owners = np.frombuffer(client.get(f"/api/case/{number}/prediction").content, "<i4")
        owners = filled(owners, image.array.size).reshape(shape)
        for at, finding in enumerate(facts["findings"], start=1):
            there = np.argwhere(owners == at)
            assert len(there) == finding["voxels"]
            if len(there):
                np.testing.assert_allclose(there.mean(axis=0), finding["voxel"], atol=1e-3)
        assert [f["truth"] for f in facts["findings"]].count("hit") == 3
        assert [f["truth"] for f in facts["findings"]].count("false") == 2
        assert sorted(len(lesion["hits"]) for lesion in facts["lesions"]) == [0, 1, 1, 1]
        assert facts["patient"] == ""


def test_a_scan_is_shown_as_it_was_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here with an interpolated slice, which the settings of the viewer and report do not allow."""
    dicom, image = tmp_path / "scan", Scan(np.full((9, 12, 12), -700, np.int16), np.eye(4)[:, [2, 1, 0, 3]])
    for file in write_series(image, Person(number="P1"), dicom)[4:5]:
        file.unlink()
    reading = ReadingConfig(fill_gaps=1)
    folder = predict_by_hand(
        tmp_path / "p", source_of(dicom, reading), [[(0.5, 0.5, 0.5, 2.0)]], reading=reading
    )
    data = DataSet(path=dicom, reading=ReadingConfig())
    (listed,) = list_predicted(folder.parent, data)
    case = Case(listed, data.reading)
    case.check()
    assert case.image.grid.shape == (9, 12, 12)
    assert read_scans(listed.name, {listed.name: listed.source}, folder.parent, data.reading)
    assert "no picture" not in capsys.readouterr().err


def test_decisions(opened: tuple[TestClient, Viewer, Path], scans: Path, predictions: Path) -> None:
    client, viewer, folder = opened
    source = DataSet(path=scans).cases[1]  # the oblique one
    facts = client.get("/api/case/1").json()
    shape = tuple(facts["lattice"]["shape"])
    raw = read_label(predictions / "b" / "mask.nii.gz")
    owners = np.frombuffer(client.get("/api/case/1/prediction").content, "<i4")
    owners = filled(owners, int(np.prod(shape))).reshape(shape)

    act(client, 1, action="accept", finding="1")
    np.testing.assert_array_equal(decided(client, 1, shape), owners == 1)
    act(client, 1, action="accept", finding="2")
    act(client, 1, action="reject", finding="1")
    np.testing.assert_array_equal(decided(client, 1, shape), owners == 2)
    act(client, 1, action="undo")
    np.testing.assert_array_equal(decided(client, 1, shape), (owners == 1) | (owners == 2))

    second = facts["findings"][1]
    step = np.asarray(facts["lattice"]["affine"])[:3, :3] @ [1, 2, -3]
    place = (np.asarray([second["x"], second["y"], second["z"]]) + step).tolist()
    state = act(client, 1, action="move", finding="2", mm=place)
    assert state["marks"][1]["moved"] is True
    moved = np.zeros(shape, bool)
    moved[tuple((np.argwhere(owners == 2) + np.asarray([1, 2, -3])).T)] = True
    np.testing.assert_array_equal(decided(client, 1, shape), moved | (owners == 1))

    blank = client.post("/api/case/1/act", json={"action": "finish", "value": True}, headers=ORIGIN)
    assert blank.status_code == 409
    assert "3, 4" in blank.json()["error"]
    centre = (
        np.asarray(facts["lattice"]["affine"])[:3, :3] @ [10, 20, 30]
        + np.asarray(facts["lattice"]["affine"])[:3, 3]
    )
    state = act(client, 1, action="add", mm=centre.tolist(), diameter_mm=8.0)
    assert state["marks"][-1]["finding"] == "a1"
    added = decided(client, 1, shape) - (moved | (owners == 1))
    voxels = np.argwhere(added > 0)
    spacing = np.asarray(facts["lattice"]["spacing"])
    np.testing.assert_allclose(voxels.mean(axis=0), [10, 20, 30], atol=0.01)
    assert np.linalg.norm((voxels - [10, 20, 30]) * spacing, axis=1).max() <= 4.0
    assert len(voxels) * spacing.prod() == pytest.approx(np.pi * 8**3 / 6, rel=0.15)
    act(client, 1, action="brush", slices={"3": [7, 2, 1, 100, 3, 1]})
    for name in ("3", "4"):
        act(client, 1, action="reject", finding=name)
    now = decided(client, 1, shape)
    assert np.flatnonzero(now[3].ravel()).tolist() == [7, 8, 100, 101, 102]
    assert act(client, 1, action="finish", value=True)["finished"] is True
    viewer.close()

    written = read_label(folder / "b" / "mask.nii.gz")
    assert written.grid.same_as(raw.grid)
    order, flipped, _ = as_lps(raw.grid)
    np.testing.assert_array_equal(np.flip(written.array.transpose(order), tuple(flipped)), now)
    outcome = json.loads((folder / "b" / "decisions.json").read_text())
    assert outcome["reader"] == READER
    assert outcome["time"].endswith("+00:00")
    verdicts = [mark["verdict"] for mark in outcome["marks"]]
    assert verdicts == ["accepted", "accepted", "rejected", "rejected", "open", "accepted"]
    # What the data set's reader makes of the finished case.
    (case,) = DataSet(path=folder).cases
    assert (case.case, case.image) == ("b", source.image)
    np.testing.assert_array_equal(read_truth(case, ReadingConfig()).array, now)
    assert (folder / "dataset.csv").stat().st_mode & 0o077 == 0


def test_what_was_brushed_stays(opened: tuple[TestClient, Viewer, Path]) -> None:
    """Accepted once more, moved, and beside a candidate that is rejected."""
    client, *_ = opened
    shape = tuple(client.get("/api/case/0").json()["lattice"]["shape"])
    affine = np.asarray(client.get("/api/case/0").json()["lattice"]["affine"])
    owners = filled(np.frombuffer(client.get("/api/case/0/prediction").content, "<i4"), int(np.prod(shape)))
    whole = owners.reshape(shape) == 1

    def place_of(mask: Any, step: Any = (0, 0, 0)) -> list[float]:
        return list(affine[:3, :3] @ (np.argwhere(mask).mean(axis=0) + step) + affine[:3, 3])

    act(client, action="accept", finding="1")
    left = whole.copy()
    left[:, :, round(np.argwhere(whole)[:, 2].mean()) :] = False
    slices = {str(z): runs_of(left[z : z + 1]).ravel().tolist() for z in np.flatnonzero(whole.any((1, 2)))}
    act(client, action="brush", slices=slices)
    np.testing.assert_array_equal(decided(client, 0, shape), left)
    act(client, action="accept", finding="1")
    np.testing.assert_array_equal(decided(client, 0, shape), left)

    act(client, action="move", finding="1", mm=place_of(left, (1, 2, 3)))
    np.testing.assert_array_equal(decided(client, 0, shape), np.roll(left, (1, 2, 3), (0, 1, 2)))
    act(client, action="reject", finding="1")
    assert not decided(client, 0, shape).any()
    # Taken back it is as it was found, where it was moved to.
    act(client, action="accept", finding="1")
    again = decided(client, 0, shape) > 0
    assert again.sum() == whole.sum()
    np.testing.assert_allclose(place_of(again), place_of(left, (1, 2, 3)), atol=1)

    # A candidate has no voxels of its own: what a neighbour has there is the neighbour's.
    act(client, action="move", finding="1", mm=(affine @ [4, 30, 8, 1])[:3].tolist())
    beside = decided(client, 0, shape)
    act(client, action="reject", finding="5")
    np.testing.assert_array_equal(decided(client, 0, shape), beside)
    act(client, action="accept", finding="5")
    act(client, action="reject", finding="5")
    np.testing.assert_array_equal(decided(client, 0, shape), beside)


def test_an_outcome_that_a_kill_left_behind_is_written_again(
    scans: Path, predictions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided while the mask was being written, and then the power failed."""
    case = Case(list_predicted(predictions, DataSet(path=scans))[0], ReadingConfig())
    desk = Desk(case, tmp_path, READER)
    desk.act({"action": "accept", "finding": "1"})

    def write_slowly(scan: Scan, path: Path) -> None:
        monkeypatch.undo()
        write_scan(scan, path)
        for number in range(1, 5):
            desk.act({"action": "reject", "finding": str(number)})
        desk.act({"action": "finish", "value": True})

    monkeypatch.setattr(decisions, "write_scan", write_slowly)
    desk.save()
    again = Desk(case, tmp_path, READER)
    assert again.unsaved
    again.save()
    assert not Desk(case, tmp_path, READER).unsaved
    assert not read_label(tmp_path / "a" / "mask.nii.gz").array.any()
    table = (tmp_path / "dataset.csv").read_text().splitlines()
    assert table[0] == "image,label,case,patient,seriesuid"
    assert len(table) == 2


def test_a_kill_does_not_leave_an_old_mask_in_the_table(
    scans: Path, predictions: Path, door: Door, tmp_path: Path
) -> None:
    """Finished, reopened and changed, and killed before it was written: the next start writes it."""
    case = Case(list_predicted(predictions, DataSet(path=scans))[1], ReadingConfig())
    desk = Desk(case, tmp_path, READER)
    for number in range(1, 5):
        desk.act({"action": "accept", "finding": str(number)})
    desk.act({"action": "finish", "value": True})
    desk.save()
    desk.act({"action": "reject", "finding": "1"})
    before = read_label(tmp_path / "b" / "mask.nii.gz").array
    _, viewer = build(replace(shown(scans, predictions), folder=tmp_path), door)
    viewer.close()
    mask = reorient(read_label(tmp_path / "b" / "mask.nii.gz")).array
    np.testing.assert_array_equal(mask, desk.state.mask)
    assert mask.sum() < before.sum()
    assert not (tmp_path / "a").exists()


def test_decisions_survive(scans: Path, predictions: Path, door: Door, tmp_path: Path) -> None:
    """The journal is what counts: whatever was not written yet follows from it."""
    what = replace(shown(scans, predictions), folder=tmp_path)
    app, viewer = build(what, door)
    client = TestClient(app, base_url=f"http://{HOST}")
    client.get(f"/?token={door.token}")
    act(client, 0, action="accept", finding="1")
    before = client.get("/api/case/0/decided").content
    viewer.close()
    journal = tmp_path / "a" / "decisions.jsonl"
    with journal.open("ab") as handle:
        handle.write(b'{"action":"rej')  # killed while writing
    (tmp_path / "a" / "mask.nii.gz").unlink()
    (tmp_path / "a" / "decisions.json").unlink()
    app, viewer = build(what, door)
    client = TestClient(app, base_url=f"http://{HOST}")
    client.get(f"/?token={door.token}")
    assert client.get("/api/case/0/decided").content == before
    assert client.get("/api/cases").json()["cases"][0]["state"] == "begun"
    act(client, 0, action="reject", finding="2")
    viewer.close()
    assert (tmp_path / "a" / "mask.nii.gz").is_file()
    lines = journal.read_text().splitlines()
    assert [json.loads(line)["action"] for line in (lines[0], lines[-1])] == ["accept", "reject"]
    # A new prediction of the case has other findings: the old decisions are not applied to them.
    changed = json.loads(lines[0]) | {"prediction": "another"}
    journal.write_text(json.dumps(changed) + "\n")
    app, viewer = build(what, door)
    client = TestClient(app, base_url=f"http://{HOST}")
    client.get(f"/?token={door.token}")
    answer = client.get("/api/case/0")
    assert answer.status_code == 422
    assert "another prediction" in answer.json()["error"]
    viewer.close()


@pytest.mark.parametrize(
    "line",
    [
        {"action": "format"},
        {"action": "accept"},
        {"action": "accept", "finding": "99"},
        {"action": "accept", "finding": ["1"]},
        {"action": "undo"},
        {"action": "add", "mm": [1e9, 0, 0], "diameter_mm": 5},
        {"action": "add", "mm": [9000, 0, 0], "diameter_mm": 5},
        {"action": "add", "mm": [0, 0, 0], "diameter_mm": -1},
        {"action": "add", "mm": [0, 0, 0], "diameter_mm": 5, "label": 3},
        {"action": "move", "finding": "1", "mm": ["a", 0, 0]},
        {"action": "move", "finding": "1", "mm": [9000, 0, 0]},
        {"action": "brush", "slices": {"../x": [0, 1, 1]}},
        {"action": "brush", "slices": {"9999": [0, 1, 1]}},
        {"action": "brush", "slices": {"0": [0, 10**9, 1]}},
        {"action": "brush", "slices": {"0": [0, 5, 1, 3, 2, 1]}},
        {"action": "brush", "slices": {"0": [0, 5, 7]}},
        {"action": "brush", "slices": {"0": [0, 5]}},
        {"action": "brush", "slices": {"0": "abc"}},
        [],
    ],
)
def test_refused_lines(opened: tuple[TestClient, Viewer, Path], line: Any) -> None:
    client, _, folder = opened
    answer = client.post("/api/case/0/act", json=line, headers=ORIGIN)
    assert answer.status_code == 409
    assert answer.json()["error"]
    assert not (folder / "a").exists()
    assert not client.get("/api/case/0/decided").content


def test_runs_are_the_mask() -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        mask = rng.integers(-1, 3, rng.integers(1, 7, 3)).astype(np.int16)
        runs = runs_of(mask)
        np.testing.assert_array_equal(filled(runs, mask.size).reshape(mask.shape), mask)
        rows = runs[:, 0] // mask.shape[2]
        np.testing.assert_array_equal(rows, (runs[:, 0] + runs[:, 1] - 1) // mask.shape[2])


def test_two_readers(scans: Path, predictions: Path, door: Door, voxelscale: Command) -> None:
    verdicts = {"Ann": "aarr", "Bob": "arra"}
    for reader, each in verdicts.items():
        app, viewer = build(shown(scans, predictions, reader), door)
        client = TestClient(app, base_url=f"http://{HOST}")
        client.get(f"/?token={door.token}")
        for number, verdict in enumerate(each, start=1):
            act(client, 0, action="accept" if verdict == "a" else "reject", finding=str(number))
        act(client, 0, action="finish", value=True)
        viewer.close()
    result = compare_readers(predictions, "Ann", "Bob")
    counts = result["verdicts"]
    assert counts == {
        "accepted": {"accepted": 1, "rejected": 1},
        "rejected": {"accepted": 1, "rejected": 1},
    }
    assert (result["findings"], result["agreement"], result["kappa"]) == (4, 0.5, 0.0)
    a, b = (read_label(predictions / "readers" / r / "a" / "mask.nii.gz").array for r in verdicts)
    assert result["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    code, printed, _ = voxelscale("compare-readers", predictions, "Ann", "Bob")
    assert code == 0
    assert "only Ann accepted: 1" in printed
    code, _, errors = voxelscale("compare-readers", predictions, "Ann", "Eve")
    assert code == 2
    assert "no decisions of Eve" in errors


def test_readers_who_disagree_about_the_class(tmp_path: Path) -> None:
    """The same voxels in another class are no agreement, and where both found nothing there is no Dice."""
    for reader, value in (("Ann", 1), ("Bob", 2)):
        for case, there in (("a", value), ("b", 1), ("c", 0)):
            mask = np.zeros((6, 8, 10), np.uint8)
            mask[2:4, 3:6, 2:7] = there
            folder = tmp_path / "readers" / reader / case
            write_scan(Scan(mask, np.eye(4)), folder / "mask.nii.gz")
            outcome = {"case": case, "finished": True, "prediction": "p", "marks": []}
            (folder / "decisions.json").write_text(json.dumps(outcome))
    result = compare_readers(tmp_path, "Ann", "Bob")
    assert [row["dice"] for row in result["cases"]] == [0.0, 1.0, None]
    assert result["dice"] == 0.5


def test_a_case_that_cannot_be_read(scans: Path, predictions: Path, door: Door, tmp_path: Path) -> None:
    """One line that says why, without the scan's path; the other cases are shown."""
    here = tmp_path / "Miller^Anna"
    shutil.copytree(scans, here)
    image = here / "images" / "a.nii.gz"
    image.write_bytes(image.read_bytes()[:2000])
    app, viewer = build(shown(here, predictions, "Eve"), door)
    client = TestClient(app, base_url=f"http://{HOST}")
    client.get(f"/?token={door.token}")
    answer = client.get("/api/case/0")
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("a: ")
    assert "Miller" not in answer.text
    assert client.get("/api/case/1").status_code == 200
    viewer.close()


def test_kappa() -> None:
    """Cohen's own kind of table: 45 and 15, 25 and 15 of 100 (observed 0.6, by chance 0.54)."""
    counts = {"accepted": {"accepted": 45, "rejected": 15}, "rejected": {"accepted": 25, "rejected": 15}}
    assert agreement(counts)["kappa"] == pytest.approx((0.60 - 0.54) / (1 - 0.54))


def test_report_pages(tmp_path: Path, door: Door) -> None:
    (tmp_path / "search.html").write_text("<p>found</p>")
    (tmp_path / "secret.txt").write_text("secret")
    client = TestClient(build_pages(tmp_path, door), base_url=f"http://{HOST}")
    assert client.get("/page/0").status_code == 401
    assert "search.html" in client.get(f"/?token={door.token}").text
    page = client.get("/page/0")
    assert "found" in page.text
    assert page.headers["content-security-policy"].startswith("sandbox")
    assert client.get("/page/1").status_code == 404
    assert client.get("/page/..%2fsecret.txt").status_code == 404
    (tmp_path / "search.html").unlink()
    with pytest.raises(VoxelscaleError, match="no report page"):
        build_pages(tmp_path, door)


def test_errors_of_the_command(voxelscale: Command, scans: Path, predictions: Path, tmp_path: Path) -> None:
    assert "no prediction" in voxelscale("view", tmp_path, scans)[2]
    assert (
        "no prediction of the case nobody" in voxelscale("view", predictions, scans, "--case", "nobody")[2]
    )
    assert "holds no report page" in voxelscale("view", tmp_path)[2]
    anywhere = voxelscale("view", predictions, scans, "--host", "0.0.0.0")
    assert anywhere[0] == 2
    assert "name the one that others use" in anywhere[2]


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.8.8.8")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.4", "example.org", "::")))


def test_dicom_and_privacy(door: Door, tmp_path: Path) -> None:
    """A DICOM series of real CT: places as SimpleITK has them; nothing says who the patient is."""
    import pydicom
    import SimpleITK as sitk

    series = SHARED / "thorax_small" / "ct-64Dicom"
    if not series.is_dir():
        pytest.skip("the real scans are not here")
    for file in series.iterdir():
        slice_ = pydicom.dcmread(file)
        slice_.PatientName, slice_.PatientID = "Planted^Name", "PLANTED-ID"
        (tmp_path / "Planted").mkdir(exist_ok=True)
        slice_.save_as(tmp_path / "Planted" / file.name)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "Planted")))
    expected = reader.Execute()
    (source,) = DataSet(path=tmp_path / "Planted").scans
    image = read_image(source, ReadingConfig())
    mask = np.zeros(image.array.shape, np.uint8)
    mask[30:33, 20:24, 40:44] = 1
    folder = tmp_path / "predictions" / source.case
    write_scan(Scan(mask, image.affine), folder / "mask.nii.gz")
    found = lesions_of_mask(source.case, mask, image.grid)
    write_findings(found, folder / "findings.csv", folder / "findings.json")
    what = shown(tmp_path / "Planted", tmp_path / "predictions")
    for patients in (False, True):
        app, viewer = build(replace(what, patients=patients), door)
        client = TestClient(app, base_url=f"http://{HOST}")
        client.get(f"/?token={door.token}")
        answer = client.get("/api/case/0")
        facts = answer.json()
        assert ("PLANTED-ID" in answer.text) is patients
        if not patients:
            assert "lanted" not in answer.text + client.get("/api/cases").text + client.get("/").text
        affine = np.asarray(facts["lattice"]["affine"])
        for voxel in ((0, 0, 0), (30, 20, 40), (78, 63, 63)):
            x, y, z = affine[:3, :3] @ voxel + affine[:3, 3]
            index = expected.TransformPhysicalPointToIndex((x, y, z))
            plane = np.frombuffer(client.get(f"/api/case/0/plane/0/{voxel[0]}").content, "<i2")
            assert plane.reshape(64, 64)[voxel[1:]] == expected.GetPixel(index)
        assert act(client, 0, action="accept", finding="1")["marks"][0]["verdict"] == "accepted"
        assert act(client, 0, action="finish", value=True)["finished"] is True
        viewer.close()
    (case,) = DataSet(path=what.folder).cases
    assert case.case == source.case
    np.testing.assert_array_equal(
        read_truth(case, ReadingConfig()).array, reorient(Scan(mask, image.affine)).array
    )


@pytest.mark.parametrize("regions", [False, True])
def test_several_classes(door: Door, tmp_path: Path, regions: bool) -> None:
    """Two classes, and two regions of which one holds the other: each is written with its value."""
    classes = Classes(
        names=("outer", "inner"),
        values=((3, 7), (7,)) if regions else ((3,), (7,)),
        regions=regions,
        order=(3, 7) if regions else (),
    )
    written = np.zeros((12, 16, 18), np.uint8)
    written[2:8, 2:9, 3:11], written[4:6, 4:7, 5:9], written[9:11, 10:14, 12:15] = 3, 7, 7
    stored = classes.of_written(written)
    scan = Scan(np.where(written > 0, 2.5, 0.1).astype(np.float32), np.diag([1.0, 1, 1, 1])[[2, 1, 0, 3]])
    write_scan(scan, tmp_path / "scans" / "one.nii.gz")
    folder = tmp_path / "predictions" / "one"
    write_scan(Scan(written, scan.affine), folder / "mask.nii.gz")
    found: list[Finding] = []
    for name, where in classes.each(stored):
        lesions = lesions_of_mask("one", where, scan.grid)
        found += [replace(f, label=name, probability=0.9 - 0.1 * len(found)) for f in lesions]
    facts = {"classes": classes.to_dict()}
    write_findings(found, folder / "findings.csv", folder / "findings.json", facts, labelled=True)
    app, viewer = build(shown(tmp_path / "scans", tmp_path / "predictions"), door)
    client = TestClient(app, base_url=f"http://{HOST}")
    client.get(f"/?token={door.token}")
    assert client.get("/api/case/0").json()["classes"] == ["outer", "inner"]
    for number in range(1, len(found) + 1):
        act(client, 0, action="accept", finding=str(number))
    np.testing.assert_array_equal(decided(client, 0, written.shape), stored)
    if not regions:  # what lay under an added one of another class is there again without it
        act(client, 0, action="add", mm=[5.0, 5.0, 3.0], diameter_mm=3.0, label=1)
        assert (decided(client, 0, written.shape) != stored).any()
        act(client, 0, action="reject", finding="a1")
        np.testing.assert_array_equal(decided(client, 0, written.shape), stored)
    act(client, 0, action="reject", finding="1")
    expected = stored.copy()
    expected[2:8][expected[2:8] == 1] = 0
    expected[2:8][expected[2:8] == 3] = 2  # of regions: the inner one without the outer one
    np.testing.assert_array_equal(decided(client, 0, written.shape), expected)
    viewer.close()
    mask = read_label(tmp_path / "predictions" / "readers" / READER / "one" / "mask.nii.gz").array
    np.testing.assert_array_equal(mask, classes.written(expected))
