"""An archive that lies: a clear line, an entry in the ledger, nothing lost, and nobody's name anywhere."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest
from tests.archive.hospital import StandIn, Time, listener, series, uids

from voxelscale.archive.access import TOKEN, Access
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.archive.identity import Entry
from voxelscale.archive.inbox import Inbox
from voxelscale.archive.rules import against
from voxelscale.archive.settings import RulesSettings
from voxelscale.dataset.names import Names

MULTIPART = 'multipart/related; type="application/dicom"; boundary="b"'
SECRETS = ("PATIENT", "SECRET", "2.25.", "hidden-token")


class Liar:
    """A DICOMweb service in a few lines; a test changes what it says.

    Attributes:
        files: what it has, by series.
        lie: changes an answer to a path: status, content type, body.
    """

    def __init__(self) -> None:
        self.files: dict[str, list[bytes]] = {}
        self.studies: dict[str, str] = {}
        self.lie: Callable[[str, tuple[int, str, bytes]], tuple[int, str, bytes]] = lambda _, answer: answer
        self.announce: Callable[[list[dict[str, Any]]], Any] = lambda items: items
        self.stored: list[bytes] = []
        self.asked: list[str | None] = []

    def add(self, files: list[Path]) -> None:
        study, uid = uids(files)
        self.files[uid], self.studies[uid] = [file.read_bytes() for file in files], study

    def answer(self, path: str) -> tuple[int, str, bytes]:
        parts = urlsplit(path)
        words, query = parts.path.strip("/").split("/"), parse_qs(parts.query)
        if int(query.get("offset", ["0"])[0]):
            return 200, "application/dicom+json", b"[]"
        if words[-1] == "metadata":
            each = (pydicom.dcmread(io.BytesIO(f), stop_before_pixels=True) for f in self.files[words[3]])
            header = next(header for header in each if header.SOPInstanceUID == words[5])
            return 200, "application/dicom+json", json.dumps([header.to_json_dict()]).encode()
        if len(words) == 4:
            parts_of = b"".join(
                b"\r\n--b\r\nContent-Type: application/dicom\r\n\r\n" + f for f in self.files[words[3]]
            )
            return 200, MULTIPART, parts_of + b"\r\n--b--"
        if words[-1] == "studies":
            wanted = query.get("StudyInstanceUID", [""])[0]
            found = {s: u for u, s in self.studies.items() if wanted in ("", s)}
            items = [self._item(u, "0020000D", "00100020") for u in found.values()]
        elif words[-1] == "series":
            own = [u for u, s in self.studies.items() if s == words[1]]
            items = [self._item(u, "0020000E", "00080060") for u in own]
            for uid, item in zip(own, items, strict=True):
                item["00201209"] = {"vr": "IS", "Value": [len(self.files[uid])]}
        else:
            own_files = self.files.get(words[3], [])
            names = [pydicom.dcmread(io.BytesIO(f)).SOPInstanceUID for f in own_files]
            wanted = query.get("SOPInstanceUID", [""])[0]
            items = [{"00080018": {"vr": "UI", "Value": [n]}} for n in names if wanted in ("", n)]
        return 200, "application/dicom+json", json.dumps(self.announce(items)).encode()

    def receipt(self, body: bytes) -> bytes:
        """What STOW-RS answers: the instance is stored."""
        start, end = body.index(b"\r\n\r\n") + 4, body.rindex(b"\r\n--")
        uid = str(pydicom.dcmread(io.BytesIO(body[start:end])).SOPInstanceUID)
        item = {"00081155": {"vr": "UI", "Value": [uid]}}
        return json.dumps({"00081199": {"vr": "SQ", "Value": [item]}}).encode()

    def _item(self, uid: str, *tags: str) -> dict[str, Any]:
        header = pydicom.dcmread(io.BytesIO(self.files[uid][0]), stop_before_pixels=True)
        return {tag: header[tag].to_json_dict(None, 0) for tag in tags}


@pytest.fixture
def liar() -> Iterator[tuple[Liar, str]]:
    made = Liar()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**16  # header and body in one packet

        def do_GET(self) -> None:
            made.asked.append(self.headers["Authorization"])
            self.reply(*made.lie(self.path, made.answer(self.path)))

        def do_POST(self) -> None:
            body = b""
            if self.headers["Transfer-Encoding"] == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers["Content-Length"]))
            made.stored.append(body)
            self.reply(*made.lie("POST " + self.path, (200, "application/dicom+json", made.receipt(body))))

        def reply(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


Change = Callable[[list[bytes]], list[bytes]]


def with_tag(number: int, **values: str) -> Change:
    """An instance of the series has other attributes; an underscore stands for none."""

    def change(files: list[bytes]) -> list[bytes]:
        dataset = pydicom.dcmread(io.BytesIO(files[number]))
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        content = io.BytesIO()
        pydicom.dcmwrite(content, dataset, enforce_file_format=True)
        return [*files[:number], content.getvalue(), *files[number + 1 :]]

    return change


def same_uid(files: list[bytes]) -> list[bytes]:
    first = pydicom.dcmread(io.BytesIO(files[0]))
    return with_tag(1, SOPInstanceUID=first.SOPInstanceUID)(files)


SENT: dict[str, tuple[Change, str]] = {
    "another patient's instance": (
        with_tag(2, PatientID="PATIENT-B", PatientName="SECRET^B"),
        "instance 3 is of another patient",
    ),
    "another study's instance": (
        with_tag(1, StudyInstanceUID="1.2.3"),
        "instance 2 has another StudyInstanceUID than was asked for",
    ),
    "another series' instance": (
        with_tag(1, SeriesInstanceUID="1.2.3"),
        "instance 2 has another SeriesInstanceUID than was asked for",
    ),
    "one SOPInstanceUID twice": (same_uid, "two different instances have one SOPInstanceUID"),
    "an instance it does not list": (
        with_tag(3, SOPInstanceUID="1.2.3"),
        "instance 4 is none that the archive lists",
    ),
    "an instance too few": (lambda files: files[:-1], "1 of 4 instances did not arrive"),
    "none": (lambda files: [], "the archive sent no instance"),
    "no DICOM": (lambda files: [b"SECRET"] * 4, "the archive's answer cannot be read (InvalidDicomError)"),
    "pixels cut off": (lambda files: [*files[:-1], files[-1][:-20]], "instance 4 is cut off"),
    "a header cut off": (lambda files: [files[0][:500], *files[1:]], "instance 1 has no StudyInstanceUID"),
}


@pytest.mark.parametrize("name", SENT)
def test_what_it_sends(liar: tuple[Liar, str], tmp_path: Path, told: Callable[[], str], name: str) -> None:
    """Tried again a while, then failed; the other series is answered; the truth afterwards is taken."""
    archive, url = liar
    change, reason = SENT[name]
    files = series(tmp_path / "a", "PATIENT-A", name="SECRET^A", description="of SECRET")
    archive.add(files)
    archive.add(series(tmp_path / "b", "PATIENT-C"))
    uid = uids(files)[1]

    def lie(path: str, answer: tuple[int, str, bytes]) -> tuple[int, str, bytes]:
        if not urlsplit(path).path.endswith(f"/series/{uid}"):
            return answer
        truth, archive.files[uid] = archive.files[uid], change(archive.files[uid])
        try:
            return archive.answer(path)
        finally:
            archive.files[uid] = truth

    archive.lie = lie
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", DicomWeb(Access(url=url)), answer, time, attempts=2)
    for _ in range(5):
        one.round()
        time.at += 200
    rows = {row.series == uid: row for row in one.ledger.rows()}
    assert (rows[True].state, rows[False].state) == ("failed", "stored")
    assert rows[True].reason.startswith(reason)
    assert rows[True].reason.endswith("(2 attempts)")
    assert not list((tmp_path / "l" / "work").rglob("*.dcm"))
    said = told() + one.meter.text() + "".join(map(str, (tmp_path / "l").rglob("*")))
    assert reason in said
    assert not [word for word in SECRETS if word in said]
    archive.lie = lambda _, truth: truth
    one.ledger.retry_failed(time.at)
    one.round()
    assert one.ledger.counts()["stored"] == 2
    assert len(archive.stored) == 2


ANSWERS: dict[str, tuple[str, tuple[int, str, bytes], str]] = {
    "wrong content type": (
        "scan",
        (200, "text/html", b"<p>SECRET"),
        "the answer is no multipart of DICOM (wrong content type)",
    ),
    "cut-off multipart": ("scan", (200, MULTIPART, b""), "the archive sent no instance"),
    "no such series": ("scan", (404, "text/plain", b"SECRET"), "the archive has no such study"),
    "redirection": ("scan", (302, "text/plain", b"SECRET"), "redirects to another place"),
    "refuses to store": ("POST", (409, "text/plain", b"SECRET"), "refuses to store (HTTP 409)"),
    "stores nothing": (
        "POST",
        (200, "application/dicom+json", b"{}"),
        "but does not list it",
    ),
    "says so": (
        "POST",
        (
            202,
            "application/dicom+json",
            json.dumps(
                {
                    "00081198": {
                        "vr": "SQ",
                        "Value": [{"00081197": {"vr": "US", "Value": [272]}}],
                    }
                }
            ).encode(),
        ),
        "the archive refuses a result (0x0110)",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_it_answers(
    liar: tuple[Liar, str], tmp_path: Path, told: Callable[[], str], name: str
) -> None:
    archive, url = liar
    where, lie, reason = ANSWERS[name]
    files = series(tmp_path / "a", "PATIENT-A", name="SECRET^A")
    archive.add(files)

    def changed(path: str, answer: tuple[int, str, bytes]) -> tuple[int, str, bytes]:
        is_scan = urlsplit(path).path.endswith(f"/series/{uids(files)[1]}")
        if (where == "scan" and is_scan) or (where == "POST" and path.startswith("POST")):
            return lie
        return answer

    archive.lie = changed
    time = Time()
    one = listener(tmp_path / "l", DicomWeb(Access(url=url)), StandIn(), time, attempts=2)
    for _ in range(5):
        one.round()
        time.at += 200
    (row,) = one.ledger.rows()
    assert row.state == "failed"
    assert reason in row.reason
    said = told() + row.reason
    assert not [word for word in SECRETS if word in said]


@pytest.mark.parametrize(
    "lie",
    [
        lambda items: [{**items[0], "0020000D": {"Value": ["../../x"]}}, *items],
        lambda items: [*items, *items],
        lambda items: [*items, {}],
        lambda items: [*items, {"0020000D": {"Value": [{"Alphabetic": "SECRET"}]}}],
    ],
)
def test_a_strange_list_of_studies(
    liar: tuple[Liar, str], tmp_path: Path, lie: Callable[[list[Any]], Any]
) -> None:
    """What cannot be right is left out; the rest is answered."""
    archive, url = liar
    archive.add(series(tmp_path / "a", "P1"))
    archive.announce = lambda items: lie(items) if items and "0020000D" in items[0] else items
    web = DicomWeb(Access(url=url))
    assert len(web.studies()) == 1


@pytest.mark.parametrize("number", range(4))
def test_a_localizer_among_the_slices(liar: tuple[Liar, str], tmp_path: Path, number: int) -> None:
    """Whether a series is answered does not depend on which instance the archive lists first."""
    archive, url = liar
    files = series(tmp_path / "a", "P1")
    dataset = pydicom.dcmread(files[number])
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.save_as(files[number])
    archive.add(files)
    web, inbox = DicomWeb(Access(url=url)), Inbox(tmp_path / "i", Names(how="hash", folder=tmp_path))
    for file in files:
        inbox.put(pydicom.dcmread(file), file.read_bytes())
    for scans in (web, inbox):
        entry = Entry(study=uids(files)[0], series=uids(files)[1], modality="CT", instances=4)
        assert not against(RulesSettings(min_slices=3), scans.describe(entry), 4)


@pytest.mark.parametrize("body", [b"<html>", b"17", b'["SECRET"]', b'{"a": 1}', b"\xff\xfe"])
def test_no_list_at_all(
    liar: tuple[Liar, str], tmp_path: Path, told: Callable[[], str], body: bytes
) -> None:
    archive, url = liar
    archive.add(series(tmp_path / "a", "P1"))
    time, answer = Time(), StandIn()
    one = listener(tmp_path / "l", DicomWeb(Access(url=url)), answer, time)
    archive.lie = lambda path, truth: (200, "application/dicom+json", body)
    one.round()
    said = told()
    assert "SECRET" not in said
    assert said.startswith("warning: ") or body == b'{"a": 1}'
    archive.lie = lambda _, truth: truth
    for _ in range(3):
        one.round()
        time.at += 200
    assert len(answer.looked) == 1


def test_a_token(liar: tuple[Liar, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, url = liar
    archive.add(series(tmp_path / "a", "P1"))
    path = tmp_path / "token.yaml"
    path.write_text("token: hidden-token\n")
    path.chmod(0o600)
    web = DicomWeb(Access(url=url, credentials=path))
    web.studies()
    assert set(archive.asked) == {"Bearer hidden-token"}
    path.write_text("token: the-next\n")  # it expired
    web.studies()
    assert archive.asked[-1] == "Bearer the-next"
    monkeypatch.setenv(TOKEN, "of-the-environment")
    DicomWeb(Access(url=url)).studies()
    assert archive.asked[-1] == "Bearer of-the-environment"
