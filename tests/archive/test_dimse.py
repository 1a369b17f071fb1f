"""C-STORE in both directions, with Orthanc as the other side."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, Verification
from tests.archive.hospital import Orthanc, StandIn, Time, free_port, listener, result, series, uids

from voxelscale.archive.dimse import Sender, receiver
from voxelscale.archive.inbox import Inbox
from voxelscale.archive.settings import ReceiveSettings, SendSettings
from voxelscale.archive.troubles import AwayError, UntrueError
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError


class Port:
    """A receiver, and what it counted."""

    def __init__(self, folder: Path) -> None:
        self.inbox = Inbox(folder / "inbox", Names(how="hash", folder=folder))
        self.counted: list[str] = []
        self.port = 0

    def send(
        self,
        *files: Path,
        title: str = "VOXELSCALE",
        calling: str = "SCANNER",
        syntax: str = ImplicitVRLittleEndian,
        end: str = "release",
    ) -> list[int]:
        """Status of each; [] where the association is refused."""
        entity = AE(ae_title=calling)
        entity.add_requested_context(CTImageStorage, syntax)
        association = entity.associate("127.0.0.1", self.port, ae_title=title)
        if not association.is_established:
            return []
        codes = [int(association.send_c_store(file).Status) for file in files]
        getattr(association, end)()
        return codes


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path / "l")
    with receiver(ReceiveSettings(port=0), made.inbox, made.counted.append) as made.port:
        yield made


def sender(orthanc: Orthanc, **more: Any) -> Sender:
    values = {
        "host": "127.0.0.1",
        "port": orthanc.dicom_port,
        "ae_title": "ORTHANC",
        "timeout": 5.0,
        **more,
    }
    return Sender(SendSettings(**values))


def test_from_orthanc_and_back(start_orthanc: Callable[..., Orthanc], tmp_path: Path, port: Port) -> None:
    modality = {"AET": "VOXELSCALE", "Host": "127.0.0.1", "Port": port.port}
    orthanc = start_orthanc(DicomModalities={"us": modality})
    files = series(tmp_path / "a", "P1", slices=5)
    orthanc.add(files)
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", None, answer, time, sender(orthanc), receive=ReceiveSettings())
    (study,) = orthanc.get("/studies")
    orthanc.ask("POST", "/modalities/us/store", json={"Resources": [study]})
    assert port.counted == ["received"] * 5
    orthanc.kill()
    for _ in range(3):
        one.round()
        time.at += 200
    assert [(r.state, r.attempts) for r in one.ledger.rows()] == [("predicted", 0)]
    orthanc.start()
    one.round()
    assert answer.looked == [uids(files)[1]]
    (report,) = orthanc.headers("SR")
    assert (report["PatientID"], report["StudyInstanceUID"]) == ("P1", uids(files)[0])
    assert not list((tmp_path / "l").rglob("*.dcm"))
    orthanc.ask("POST", "/modalities/us/store", json={"Resources": [orthanc.get("/series")[0]]})
    for _ in range(3):
        one.round()
        time.at += 200
    assert len(answer.looked) == 1


def test_what_is_received_is_what_was_sent(tmp_path: Path, port: Port) -> None:
    files = series(tmp_path / "a", "PATIENT1", name="SECRET^A")
    assert port.send(*files) == [0] * 4
    (entry,) = port.inbox.look()
    assert (entry.study, entry.series, entry.instances) == (*uids(files), 4)
    assert port.inbox.fetch(entry, tmp_path / "out") == "PATIENT1"
    sent = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, files)}
    for path in (tmp_path / "out").iterdir():
        kept = pydicom.dcmread(path)
        assert kept.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian  # what was agreed upon
        assert kept.SOPInstanceUID in sent
        assert kept.PixelData == sent[kept.SOPInstanceUID].PixelData
        assert kept.PatientName == "SECRET^A"
    names = "".join(map(str, (tmp_path / "l").rglob("*")))
    assert not [word for word in ("PATIENT1", "SECRET", "2.25.") if word in names]


class Sink:
    """An archive that takes everything."""

    def answers(self) -> bool:
        return True

    def patient(self, study: str) -> str:
        return "P1"

    def send(self, files: list[Path], done: Callable[[str], None] = lambda uid: None) -> int:
        for file in files:
            done(str(pydicom.dcmread(file).SOPInstanceUID))
        return len(files)


def test_what_arrives_while_a_series_is_predicted_is_kept_and_noted(
    tmp_path: Path, told: Callable[[], str]
) -> None:
    files = series(tmp_path / "a", "P1", slices=8)
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", None, answer, time, sink=Sink())

    def put(some: list[Path]) -> None:
        assert isinstance(one.scans, Inbox)
        for file in some:
            one.scans.put(pydicom.dcmread(file), file.read_bytes())

    put(files[:4])
    answer.before = lambda: put(files[4:])
    for _ in range(3):
        one.round()
        time.at += 200
    (row,) = one.ledger.rows()
    assert (row.state, row.instances) == ("stored", 4)
    assert row.reason == "answered with 4 instances; 4 more came meanwhile"
    assert row.reason in told()
    assert len(list((tmp_path / "l" / "inbox").rglob("*.dcm"))) == 4


@pytest.mark.parametrize("trouble", ["busy", "two patients"])
def test_a_query_that_fails_is_not_an_answer(tmp_path: Path, trouble: str) -> None:
    """A result must not go out because the archive could not say whose the study is now."""

    def find(event: Any) -> Iterator[tuple[int, Any]]:
        if trouble == "busy":
            yield 0xA700, None
            return
        for patient in ("P1", "P2"):
            found = pydicom.Dataset()
            found.QueryRetrieveLevel, found.PatientID = "STUDY", patient
            found.StudyInstanceUID = event.identifier.StudyInstanceUID
            yield 0xFF00, found

    entity = AE(ae_title="PACS")
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    entity.add_supported_context(Verification)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    settings = SendSettings(host="127.0.0.1", port=server.server_address[1], ae_title="PACS", timeout=5.0)
    raised, said = {"busy": (AwayError, "0xA700"), "two patients": (UntrueError, "2 patients")}[trouble]
    try:
        with pytest.raises(raised, match=said):
            Sender(settings).patient("1.2.3")
    finally:
        entity.shutdown()


def test_duplicates_are_harmless(tmp_path: Path, port: Port, told: Callable[[], str]) -> None:
    files = series(tmp_path / "a", "P1")
    threads = [threading.Thread(target=port.send, args=files) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert port.send(*files, *files) == [0] * 8
    assert Counter(port.counted) == {"received": 4, "again": 16}
    assert port.send(*files, syntax=ExplicitVRLittleEndian) == [0] * 4
    assert port.send(*series(tmp_path / "d", "P1", change=compress), syntax=RLELossless) == [0] * 4
    other = series(tmp_path / "b", "P1", change=lambda d: setattr(d, "PatientName", "OTHER"))
    brighter = series(tmp_path / "c", "P1", change=brighten)
    assert port.send(other[0], brighter[1]) == [0xA900] * 2  # the sender hears that they were not taken
    said = told()
    assert "two different instances have one SOPInstanceUID" in said
    assert "OTHER" not in said
    assert port.inbox.look()[0].instances == 4


def brighten(dataset: pydicom.Dataset) -> None:
    dataset.PixelData = bytes(len(dataset.PixelData))


def compress(dataset: pydicom.Dataset) -> None:
    dataset.compress(RLELossless, generate_instance_uid=False)


def test_an_association_that_breaks_off(tmp_path: Path, port: Port) -> None:
    files = series(tmp_path / "a", "P1")
    assert port.send(*files[:2], end="abort") == [0] * 2
    assert port.inbox.look()[0].instances == 2
    assert port.send(*files) == [0] * 4
    assert port.inbox.look()[0].instances == 4
    assert not list((tmp_path / "l").rglob("*.part"))


def test_another_patients_instance_in_a_series(tmp_path: Path, port: Port) -> None:
    files = series(tmp_path / "a", "P1")
    stray = series(tmp_path / "b", "P2", change=lambda d: _move(d, files))
    port.send(*files, stray[0])
    (entry,) = port.inbox.look()
    with pytest.raises(UntrueError, match=r"instance . is of another patient"):
        port.inbox.fetch(entry, tmp_path / "out")


def _move(dataset: pydicom.Dataset, files: list[Path]) -> None:
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uids(files)


def test_titles(tmp_path: Path) -> None:
    made = Port(tmp_path / "l")
    files = series(tmp_path / "a", "P1")
    settings = ReceiveSettings(port=0, accept=("SCANNER",))
    with receiver(settings, made.inbox) as made.port:
        assert not made.send(*files, title="NOBODY")
        assert not made.send(*files, calling="STRANGER")
        assert made.send(*files) == [0] * 4
        with (
            pytest.raises(VoxelscaleError, match="cannot be opened"),
            receiver(ReceiveSettings(port=made.port), made.inbox),
        ):
            pass


def test_what_was_not_answered_goes_after_a_week(tmp_path: Path, port: Port) -> None:
    port.send(*series(tmp_path / "a", "P1"))
    port.inbox.forget_old(set())
    (entry,) = port.inbox.look()
    old = Inbox(tmp_path / "l" / "inbox", Names(how="hash", folder=tmp_path / "l"), keep_days=-1)
    old.forget_old({entry.series})
    assert old.look()
    old.forget_old(set())
    assert not old.look()


def test_a_result_is_sent_once(orthanc: Orthanc, tmp_path: Path) -> None:
    files = series(tmp_path / "a", "P1")
    orthanc.add(files)
    path = tmp_path / "report.dcm"
    path.write_bytes(result(pydicom.dcmread(files[0])))
    to, done = sender(orthanc), list[str]()
    assert to.patient(uids(files)[0]) == "P1"
    assert to.patient("1.2.3") is None
    assert [to.send([path], done.append) for _ in range(2)] == [1, 0]
    assert len(done) == 2


def test_nobody_there(tmp_path: Path) -> None:
    away = Sender(SendSettings(host="127.0.0.1", port=free_port(), ae_title="X", timeout=2))
    assert not away.answers()
    path = tmp_path / "report.dcm"
    path.write_bytes(result(pydicom.dcmread(series(tmp_path / "a", "P1")[0])))
    with pytest.raises(AwayError, match="cannot be reached"):
        away.send([path])
