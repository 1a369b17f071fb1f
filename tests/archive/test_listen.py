"""`listen` with a real Orthanc: each series answered once, whatever ends in between."""

from __future__ import annotations

import contextlib
import shutil
import time as clock
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from pydicom.dataset import Dataset
from tests.archive.hospital import BEGAN, Orthanc, StandIn, Time, listener, result_uid, series, uids

from voxelscale.archive import identity
from voxelscale.archive.access import Access
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.ledger import STATES, Ledger, State
from voxelscale.archive.listen import Listener
from voxelscale.archive.settings import ArchiveSettings, RulesSettings
from voxelscale.errors import VoxelscaleError


def web(orthanc: Orthanc) -> DicomWeb:
    return DicomWeb(Access(url=orthanc.web, timeout=20))


def test_a_series_is_answered_once(orthanc: Orthanc, tmp_path: Path) -> None:
    files = series(tmp_path / "a", "P1")
    orthanc.add(files)
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time)
    one.round()
    assert not answer.looked  # it may still be growing
    time.at += 121
    for _ in range(3):
        one.round()
    again = listener(tmp_path / "l", web(orthanc), answer, time)
    again.round()
    assert answer.looked == [uids(files)[1]]
    (report,) = orthanc.headers("SR")
    assert report["SOPInstanceUID"] == result_uid(uids(files)[1])
    assert report["StudyInstanceUID"] == uids(files)[0]
    assert report["PatientID"] == "P1"
    assert again.ledger.counts()["stored"] == 1
    assert not list((tmp_path / "l" / "work").rglob("*.dcm"))
    with pytest.MonkeyPatch.context() as patch:  # a lost ledger: predicted again, but not sent again
        patch.delattr(DICOMwebClient, "store_instances")
        lost = listener(tmp_path / "l2", web(orthanc), answer, time)
        settle(lost, time)
    assert lost.ledger.counts()["stored"] == 1
    assert len(answer.looked) == 2


@pytest.mark.parametrize(("zone", "day"), [("Pacific/Honolulu", 31), ("UTC", 1)])
def test_days_are_those_of_the_hospital(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str, day: int
) -> None:
    """At 03:15 UTC it is still the day before in Hawaii."""
    asked: list[date | None] = []

    class Empty:
        def studies(self, modality: str, since: date | None) -> list[Any]:
            asked.append(since)
            return []

    monkeypatch.setenv("TZ", zone)
    clock.tzset()
    try:
        one = listener(tmp_path / "l", Empty(), StandIn(), Time())
        days = ArchiveSettings(url="http://x", days=1)
        one.settings = replace(one.settings, archive=days)
        one.round()
    finally:
        monkeypatch.undo()
        clock.tzset()
    assert [one.day for one in asked if one] == [day]


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_kill_left_of_answered_series_is_put_away(tmp_path: Path, keep: bool) -> None:
    """It identifies patients; those of series that are still worked on stay."""
    ledger = Ledger(tmp_path / "ledger.sqlite")
    states: tuple[State, ...] = ("predicted", "stored", "failed")
    for number, state in enumerate(states):
        ledger.move(ledger.see("1.2", f"1.2.{number}", state, 4, 0.0), state, 1.0)
    ledger.close()
    for name in ("predicted", "stored", "failed", "unknown"):
        series(tmp_path / "work" / name / "scan", "P1", 2)
    listener(tmp_path, None, StandIn(), Time(), keep_scans=keep)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["predicted"]
    assert len(list((tmp_path / "scans").rglob("*.dcm"))) == (2 if keep else 0)


def settle(one: Listener, time: Time, rounds: int = 3) -> None:
    for _ in range(rounds):
        one.round()
        time.at += 200


def test_half_uploaded_studies_wait(orthanc: Orthanc, tmp_path: Path) -> None:
    files = series(tmp_path / "a", "P1", slices=6)
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time, rules=RulesSettings(min_slices=5))
    for file in files[:4]:  # a slice a minute: never quiet for two minutes
        orthanc.add([file])
        one.round()
        time.at += 60
    assert one.ledger.counts()["seen"] == 1
    settle(one, time)  # the scanner pauses for longer than that
    assert one.ledger.counts()["skipped"] == 1
    orthanc.add(files[4:])
    settle(one, time)
    assert answer.looked == [uids(files)[1]]
    assert len(orthanc.headers("SR")) == 1
    orthanc.add(series(tmp_path / "more", "P1", slices=8)[6:])
    settle(one, time)
    (row,) = one.ledger.rows()
    assert row.state == "stored"
    assert row.reason == "answered with 6 instances; the archive has 8 now"
    assert len(answer.looked) == 1


def test_what_no_network_can_handle_stops_nothing(
    orthanc: Orthanc, tmp_path: Path, told: Callable[[], str]
) -> None:
    kinds = {
        "fine": "stored",
        "UNFIT": "failed",
        "CRASH": "failed",
        "OTHER PATIENT": "failed",
        "two slices": "skipped",
        "last": "stored",
    }
    for number, kind in enumerate(kinds):
        slices = 2 if kind == "two slices" else 4
        folder = tmp_path / str(number)
        orthanc.add(series(folder, f"PATIENT{number}", slices, description=kind, name=f"SECRET{number}^A"))
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time, attempts=2)
    settle(one, time, 4)
    ends = {uids(list((tmp_path / str(n)).iterdir()))[1]: end for n, end in enumerate(kinds.values())}
    assert {row.series: row.state for row in one.ledger.rows()} == ends
    reasons = sorted(row.reason for row in one.ledger.rows() if row.state == "failed")
    assert reasons[0] == "not a scan for this model"
    assert reasons[1] == "result 1 is for another patient: it is not sent"
    assert reasons[2].startswith("unexpected: RuntimeError in hospital.py:")
    assert reasons[2].endswith("(2 attempts)")
    assert len(orthanc.headers("SR")) == 2
    said = told() + one.meter.text() + "".join(reasons) + "".join(map(str, (tmp_path / "l").rglob("*")))
    assert "CRASH" not in said
    assert not [word for word in ("SECRET", "PATIENT0", "PATIENT2", "2.25.") if word in said]
    assert one.ledger.retry_failed(time.at) == 3
    settle(one, time, 4)
    assert one.ledger.counts()["failed"] == 3
    assert len(answer.looked) == 2 + 4 + 4  # what nobody thought of is tried twice


def test_the_rules_choose(orthanc: Orthanc, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"kernel": "B70f", "description": "Lung 1.25"}
    others: list[dict[str, Any]] = [
        {"kernel": "B30f", "description": "Lung"},
        {"body_part": "ABDOMEN"},
        {"description": "Lung scout"},
        {"description": "Soft"},
    ]
    for number, person in enumerate([chosen, *others]):
        orthanc.add(series(tmp_path / str(number), f"P{number}", **({"kernel": "B70f"} | person)))
    localizer = series(tmp_path / "8", "P8", change=lambda d: setattr(d, "ImageType", LOCALIZER))
    thick = series(tmp_path / "9", "P9", change=lambda d: setattr(d, "SliceThickness", 8), **chosen)
    nothing = series(tmp_path / "10", "P10", change=without_words, kernel="B70f")
    for files in (localizer, thick, nothing):
        orthanc.add(files)
    rules = RulesSettings(
        min_slices=3, kernel=("b7*",), description=("*lung*", ""), not_description=("*scout*",)
    )
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time, rules=rules)
    settle(one, time)
    wanted = {uids(sorted((tmp_path / n).iterdir()))[1] for n in ("0", "10")}
    assert set(answer.looked) == wanted
    assert {row.reason for row in one.ledger.rows() if row.state == "skipped"} == {
        "kernel: none of rules.kernel",
        "body_part: none of rules.body_part",
        "description: one of rules.not_description",
        "description: none of rules.description",
        "a localizer",
        "slices of 8 mm; rules.slice_thickness is 0 to 5",
    }


LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def without_words(dataset: Dataset) -> None:
    del dataset.BodyPartExamined
    del dataset.SeriesDescription
    del dataset.SliceThickness


def test_fifty_series_queue_while_the_archive_is_away(orthanc: Orthanc, tmp_path: Path) -> None:
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time)
    orthanc.kill()
    waits = [one.round() for _ in range(10)]
    assert waits == [min(30 * 2**n, 3600) for n in range(1, 11)]
    assert one.meter.health()["status"] != "ok"
    orthanc.start()
    all_files = [series(tmp_path / str(n), f"P{n}", slices=3) for n in range(50)]
    for files in all_files:
        orthanc.add(files)
    assert one.round() == 30
    orthanc.kill()
    time.at += 200
    settle(one, time)
    assert one.ledger.counts() == {**dict.fromkeys(STATES, 0), "seen": 50}
    orthanc.start()
    settle(one, time)
    assert one.ledger.counts() == {**dict.fromkeys(STATES, 0), "stored": 50}
    assert sorted(answer.looked) == sorted(uids(files)[1] for files in all_files)
    assert len(orthanc.headers("SR")) == 50


def test_an_archive_killed_in_mid_transfer(orthanc: Orthanc, tmp_path: Path) -> None:
    """While it sends a scan, and before a result can be stored."""
    orthanc.add(series(tmp_path / "a", "P1", slices=30, size=512))
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time)
    one.round()
    time.at += 200
    take, taken = identity.Series.take, list[bool]()

    def killed(self: identity.Series, dataset: Dataset, content: bytes) -> bool:
        orthanc.kill()
        taken.append(take(self, dataset, content))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity.Series, "take", killed)
        one.round()
    assert 1 <= len(taken) < 30
    assert [(r.state, r.attempts) for r in one.ledger.rows()] == [("seen", 0)]
    orthanc.start()
    answer.before = orthanc.kill
    one.round()
    assert [(r.state, r.attempts) for r in one.ledger.rows()] == [("predicted", 0)]
    orthanc.start()
    settle(one, time)
    assert len(answer.looked) == 1
    assert len(orthanc.headers("SR")) == 1


def test_an_end_at_any_instant(orthanc: Orthanc, tmp_path: Path) -> None:
    """Ctrl-C in each step, and a result that arrived although nobody was left to note it."""
    orthanc.add(series(tmp_path / "a", "P1"))
    time, answer, archive = Time(), StandIn(), web(orthanc)
    listener(tmp_path / "l", archive, answer, time).round()
    time.at += 200
    for owner, name, after in (
        (DicomWeb, "describe", False),
        (DicomWeb, "fetch", True),
        (StandIn, "__call__", True),
        (DicomWeb, "send", False),
        (DicomWeb, "send", True),
    ):
        real = getattr(owner, name)

        def ended(*args: Any, real: Any = real, after: bool = after) -> None:
            if after:
                real(*(args[:2] if real is DicomWeb.send else args))  # the ledger hears nothing of it
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, ended)
            with pytest.raises(KeyboardInterrupt):
                listener(tmp_path / "l", archive, answer, time).round()
    one = listener(tmp_path / "l", archive, answer, time)
    assert len(orthanc.headers("SR")) == 1
    assert [(r.state, r.attempts) for r in one.ledger.rows()] == [("predicted", 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(DICOMwebClient, "store_instances")  # nothing is sent again
        settle(one, time)
    assert one.ledger.counts()["stored"] == 1
    assert len(orthanc.headers("SR")) == 1


def test_a_series_that_ends_the_program_each_time(orthanc: Orthanc, tmp_path: Path) -> None:
    orthanc.add(series(tmp_path / "a", "P1"))
    time, archive = Time(), web(orthanc)
    one = listener(tmp_path / "l", archive, StandIn(), time, attempts=3)
    one.round()
    time.at += 200
    (row,) = one.ledger.rows()
    for _ in range(3):  # a kill leaves what was counted before the step
        row = one.ledger.begin(row, time.at)
    settle(listener(tmp_path / "l", archive, StandIn(), time, attempts=3), time)
    (row,) = one.ledger.rows()
    assert (row.state, row.reason) == ("failed", "the program ended 3 times while it worked on it")


def test_a_full_disk(orthanc: Orthanc, tmp_path: Path, small_disk: Path) -> None:
    """Nothing fails for it; what waited is answered when there is room again."""
    files = series(tmp_path / "a", "P1", slices=6, size=512)
    orthanc.add(files)
    time, answer = Time(), StandIn()
    one = listener(small_disk / "l", web(orthanc), answer, time)
    one.round()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**21))
    time.at += 200
    settle(one, time, 12)
    assert [(r.state, r.attempts) for r in one.ledger.rows()] == [("seen", 0)]
    filler.unlink()
    settle(one, time)
    assert one.ledger.counts()["stored"] == 1


def test_files_that_are_gone_are_fetched_again(orthanc: Orthanc, tmp_path: Path) -> None:
    orthanc.add(series(tmp_path / "a", "P1"))
    time, answer = Time(), StandIn(before=orthanc.kill)
    one = listener(tmp_path / "l", web(orthanc), answer, time)
    one.round()
    time.at += 200
    one.round()
    shutil.rmtree(tmp_path / "l" / "work")
    answer.before = lambda: None
    orthanc.start()
    settle(one, time)
    assert len(answer.looked) == 2
    assert one.ledger.counts()["stored"] == 1
    assert len(orthanc.headers("SR")) == 1


def test_what_a_message_quotes_of_a_header(orthanc: Orthanc, tmp_path: Path) -> None:
    def plant(dataset: Dataset) -> None:
        dataset.ContrastBolusAgent = "SECRET, Peter"
        dataset.PatientName = "Secrét^Petra"

    orthanc.add(series(tmp_path / "a", "P1", change=plant))
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time)

    def quote() -> None:
        raise VoxelscaleError("ContrastBolusAgent=SECRET, Peter of Petra, 5 slices missing", "")

    answer.before = quote
    settle(one, time)
    (row,) = one.ledger.rows()
    assert row.reason == "ContrastBolusAgent=..., ... of ..., 5 slices missing"


def test_a_study_that_is_deleted_meanwhile(orthanc: Orthanc, tmp_path: Path) -> None:
    """Its result would be a study without a scan."""
    orthanc.add(series(tmp_path / "a", "P1"))
    time = Time()
    answer = StandIn(before=lambda: orthanc.ask("DELETE", f"/patients/{orthanc.get('/patients')[0]}"))
    one = listener(tmp_path / "l", web(orthanc), answer, time, attempts=2)
    settle(one, time, 4)
    (row,) = one.ledger.rows()
    assert (row.state, row.reason) == ("failed", "the archive has no such study any more (2 attempts)")
    assert not orthanc.get("/studies")


def test_scans_are_kept_if_asked_for(orthanc: Orthanc, tmp_path: Path) -> None:
    files = series(tmp_path / "a", "P1")
    orthanc.add(files)
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time, keep_scans=True)
    settle(one, time)
    (row,) = one.ledger.rows()
    kept = (tmp_path / "l" / "scans" / row.name).iterdir()
    theirs = {pydicom.dcmread(file).SOPInstanceUID for file in kept}
    assert theirs == {pydicom.dcmread(file).SOPInstanceUID for file in files}


def test_a_patient_corrected_in_between(orthanc: Orthanc, tmp_path: Path) -> None:
    """The archive gives the study to another patient after it was fetched: the result goes to that one."""
    orthanc.add(series(tmp_path / "a", "WRONG"))
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", web(orthanc), answer, time)
    one.round()
    time.at += 200

    def correct() -> None:
        answer.before = lambda: None
        (patient,) = orthanc.get("/patients")
        orthanc.ask("DELETE", f"/patients/{patient}")
        orthanc.add(series(tmp_path / "b", "WRONG", change=lambda d: setattr(d, "PatientID", "RIGHT")))

    answer.before = correct
    settle(one, time)
    (report,) = orthanc.headers("SR")
    assert report["PatientID"] == "RIGHT"
    assert len(answer.looked) == 2


@pytest.mark.slow
def test_a_day(orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 hours: 60 series at random times, uploaded in pieces; both sides end and come back at random."""
    random = Random(7)
    sent: Counter[str] = Counter()
    store = DICOMwebClient.store_instances

    def counted(self: Any, datasets: Any, *args: Any) -> Any:
        reply = store(self, datasets, *args)
        sent.update(str(dataset.SOPInstanceUID) for dataset in datasets)
        return reply

    monkeypatch.setattr(DICOMwebClient, "store_instances", counted)
    day = 24 * 3600.0
    uploads: list[tuple[float, Path]] = []
    wanted: dict[str, str] = {}
    for number in range(60):
        unfit = number % 10 == 9
        files = series(tmp_path / str(number), f"P{number}", description="UNFIT" if unfit else "fine")
        wanted[uids(files)[1]] = "failed" if unfit else "stored"
        begins = BEGAN + random.uniform(0, 0.9 * day)
        uploads += [(begins + random.uniform(0, 90), file) for file in files]
    uploads.sort()
    troubles = sorted(
        (BEGAN + random.uniform(0, 0.9 * day), random.choice(("down", "end"))) for _ in range(16)
    )
    up_again: list[float] = []
    time, answer = Time(), StandIn()

    def beside(at: float) -> None:
        if up_again and at >= up_again[0]:
            up_again.pop()
            orthanc.start()
        while uploads and uploads[0][0] <= at and orthanc.process:
            orthanc.add([uploads.pop(0)[1]])
        if troubles and troubles[0][0] <= at:
            _, kind = troubles.pop(0)
            if kind == "end":
                raise KeyboardInterrupt
            if orthanc.process:
                orthanc.kill()
                up_again.append(at + random.uniform(60, 1800))

    time.beside = beside
    answer.before = lambda: time.wait(random.uniform(30, 240))
    while time.at < BEGAN + day:
        one = listener(tmp_path / "l", web(orthanc), answer, time, every=120.0, longest_wait=600.0)
        with contextlib.suppress(KeyboardInterrupt):
            while time.at < BEGAN + day:
                time.wait(one.round())
        one.ledger.close()
    one = listener(tmp_path / "l", web(orthanc), answer, time)
    assert not uploads
    assert not troubles
    assert {row.series: row.state for row in one.ledger.rows()} == wanted
    results = {result_uid(uid): 1 for uid, end in wanted.items() if end == "stored"}
    assert sent == results
    assert {h["SOPInstanceUID"] for h in orthanc.headers("SR")} == set(results)
