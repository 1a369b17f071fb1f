"""A real Orthanc, tiny series to put into it, a model's stand-in and a clock that tests advance."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import requests
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian

from voxelscale.archive.health import Meter
from voxelscale.archive.inbox import Inbox
from voxelscale.archive.listen import Clock, Listener
from voxelscale.archive.settings import ArchiveSettings, ListenSettings, RulesSettings
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import Scan
from voxelscale.phantom.series import Person, write_series

REQUIRED = "VOXELSCALE_REQUIRE_ORTHANC"
"""In the environment: a missing Orthanc is an error, as in CI."""

PLUGINS = (
    "/usr/share/orthanc/plugins/libOrthancDicomWeb.so",
    *map(str, Path("/usr/lib").glob("*/orthanc/libOrthancDicomWeb.so*")),
)
USER, PASSWORD = "voxelscale", "pass:wörd"
BEGAN = 1_767_323_700.0
"""2 January 2026, 03:15 UTC: the day after the series' StudyDate."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Orthanc:
    """An archive of the test's own, on loopback."""

    folder: Path
    more: dict[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    dicom_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def web(self) -> str:
        return f"{self.url}/dicom-web"

    def start(self) -> Orthanc:
        self.folder.mkdir(exist_ok=True)
        storage = str(self.folder / "storage")
        config = {
            "Name": "Test",
            "StorageDirectory": storage,
            "IndexDirectory": storage,
            "Plugins": [next(p for p in PLUGINS if Path(p).exists())],
            "HttpPort": self.port,
            "DicomPort": self.dicom_port,
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAlwaysAllowFind": True,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "HttpThreadsCount": 8,
            **self.more,
        }
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(config))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [shutil.which("Orthanc") or "Orthanc", str(path)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(600):
            try:
                self.get("/system")
            except requests.ConnectionError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.05)
            else:
                return self
        raise AssertionError("Orthanc did not start")

    def kill(self) -> None:
        """As a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, by: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(by)
            self.process.wait(30)
            self.process = None

    def ask(self, method: str, path: str, **more: Any) -> Any:
        users = self.more.get("RegisteredUsers", {})
        reply = requests.request(
            method,
            self.url + path,
            auth=next(((u.encode(), p.encode()) for u, p in users.items()), None),
            timeout=20,
            **more,
        )
        reply.raise_for_status()
        return reply.json()

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def add(self, files: Sequence[Path]) -> None:
        for file in files:
            self.ask("POST", "/instances", data=file.read_bytes())

    def headers(self, modality: str) -> list[dict[str, str]]:
        """Tags of all instances of a modality."""
        query = {"Level": "Series", "Query": {"Modality": modality}, "Expand": True}
        found = self.ask("POST", "/tools/find", json=query)
        return [
            self.get(f"/instances/{one}/simplified-tags") for series in found for one in series["Instances"]
        ]


@contextlib.contextmanager
def in_front(port: int, both: Path) -> Iterator[int]:
    """A port that speaks TLS for another one; Debian 12's Orthanc crashes at the first handshake itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)

    class Pass(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as near,
                socket.create_connection(("127.0.0.1", port)) as far,
            ):
                there = threading.Thread(target=_pass, args=(near, far))
                there.start()
                _pass(far, near)
                there.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Pass) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def certificate(folder: Path, name: str = "server") -> Path:
    """A certificate of 127.0.0.1 that signs itself, with its key, in one PEM file."""
    key, cert = folder / f"{name}.key", folder / f"{name}.crt"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    both = folder / f"{name}.pem"
    both.write_text(key.read_text() + cert.read_text())
    return both


def series(
    folder: Path,
    number: str,
    slices: int = 4,
    change: Callable[[Dataset], None] | None = None,
    size: int = 8,
    **person: Any,
) -> list[Path]:
    """A small CT series, its files in the order of its slices."""
    shape = (slices, size, size)
    values = np.random.default_rng(len(number)).integers(-1000, 1000, shape).astype(np.int16)
    files = write_series(
        Scan(values, np.diag([2.5, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]] @ np.eye(4)),
        Person(number=number, **person),
        folder,
    )
    for file in files if change else ():
        dataset = pydicom.dcmread(file)
        assert change is not None
        change(dataset)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(file, enforce_file_format=True)
    return files


def uids(files: Sequence[Path]) -> tuple[str, str]:
    """Study and series."""
    header = pydicom.dcmread(files[0], stop_before_pixels=True)
    return str(header.StudyInstanceUID), str(header.SeriesInstanceUID)


def result_uid(series_uid: str) -> str:
    return "2.25." + str(int(hashlib.sha256(series_uid.encode()).hexdigest()[:30], 16))


def result(header: Dataset) -> bytes:
    """A report on a series, the same each time."""
    report = Dataset()
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID"):
        setattr(report, keyword, header.get(keyword, ""))
    for keyword in ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        setattr(report, keyword, header.get(keyword, ""))
    report.SOPClassUID, report.SOPInstanceUID = BasicTextSRStorage, result_uid(header.SeriesInstanceUID)
    report.SeriesInstanceUID = report.SOPInstanceUID + ".1"
    report.Modality, report.SeriesNumber, report.InstanceNumber = "SR", 900, 1
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID
    content = io.BytesIO()
    pydicom.dcmwrite(content, report, enforce_file_format=True)
    return content.getvalue()


@dataclass
class StandIn:
    """In a model's place; it knows what to do from the series' description."""

    looked: list[str] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    def __call__(self, scan: Path, out: Path) -> list[Path]:
        files = sorted(scan.glob("*.dcm"))
        header = pydicom.dcmread(files[0])
        self.looked.append(str(header.SeriesInstanceUID))
        self.before()
        said = header.get("SeriesDescription", "")
        if "UNFIT" in said:
            raise VoxelscaleError(f"{scan}: not a scan for this model", "give another one")
        if "CRASH" in said:
            raise RuntimeError(f"of {header.PatientName}")
        if "OTHER PATIENT" in said:
            header.PatientID = "somebody else"
        path = out / "report.dcm"
        path.write_bytes(result(header))
        return [path]


@dataclass
class Time:
    """A clock that a test advances; `beside` is called each time that somebody waits."""

    at: float = BEGAN
    beside: Callable[[float], None] = lambda at: None

    def wait(self, seconds: float) -> None:
        self.at += seconds
        self.beside(self.at)

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.at, wait=self.wait)


RULES = RulesSettings(min_slices=3)


def settings(**changes: Any) -> ListenSettings:
    values = {
        "model": "m",
        "folder": "f",
        "rules": RULES,
        "archive": ArchiveSettings(url="http://x"),
        **changes,
    }
    return ListenSettings(**values)


def listener(
    folder: Path, archive: Any, answer: StandIn, time: Time, sink: Any = None, **changes: Any
) -> Listener:
    """A listener at its beginning, or at its next one."""
    names = Names(how="hash", folder=folder)
    scans: Any = Inbox(folder / "inbox", names) if archive is None else archive
    return Listener(settings(**changes), folder, scans, sink or scans, answer, names, time.clock, Meter())


def missing() -> str:
    """Why Orthanc cannot be started; "" where it can."""
    if shutil.which("Orthanc") is None or not any(Path(p).exists() for p in PLUGINS):
        return "no Orthanc with DICOMweb: apt-get install orthanc orthanc-dicomweb"
    return ""


def required() -> bool:
    return bool(os.environ.get(REQUIRED))
