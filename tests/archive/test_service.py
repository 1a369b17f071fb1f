"""The command `listen`: its file, and the whole of it with a real Orthanc."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
import yaml
from pydicom.uid import CTImageStorage
from pynetdicom import AE
from tests.archive.hospital import (
    PASSWORD,
    USER,
    Orthanc,
    StandIn,
    Time,
    free_port,
    missing,
    required,
    series,
    uids,
)
from tests.conftest import Command

from voxelscale.archive.health import Meter, serve
from voxelscale.archive.listen import Clock
from voxelscale.archive.service import open_service
from voxelscale.archive.settings import (
    ArchiveSettings,
    HealthSettings,
    ListenSettings,
    ReceiveSettings,
    RulesSettings,
    read_settings,
)
from voxelscale.dataset.names import Names
from voxelscale.errors import VoxelscaleError

SMALL = {"model": "m.vxs", "folder": "f", "archive": {"url": "http://127.0.0.1/"}}

DOCS = Path(__file__).parents[2] / "docs" / "hospital.md"


@pytest.mark.parametrize(
    ("changes", "problem", "hint"),
    [
        ({"modle": 1}, "unknown key modle", "model"),
        ({"archive": {"url": "x", "pasword": "y"}}, "unknown key archive.pasword", "known keys here: url"),
        ({"archive": {"days": 1}}, "archive.url is missing", "url"),
        ({"archive": "http://x"}, "archive is a section, not a value", "below 'archive:'"),
        ({"model": None}, "model is None", "a text"),
        ({"rules": {"min_slices": "many"}}, "rules.min_slices is 'many'", "a whole number"),
        ({"rules": {"modality": []}}, "rules.modality is ()", "at least one"),
        ({"rules": {"slice_thickness": [3, 1]}}, "rules.slice_thickness is (3.0, 1.0)", "a minimum"),
        ({"stable": -1}, "stable is -1.0", "at least 0"),
        ({"archive": None}, "neither archive nor receive", "archive: {url"),
        ({"archive": None, "receive": {}}, "nowhere to send results to", "send: {host"),
        ({"receive": {"ae_title": "A" * 17}}, "receive.ae_title is", "16 characters"),
        ({"send": {"host": "x", "ae_title": "A"}}, "send.port is missing", "port"),
        ({"results": ["pdf"]}, "results: pdf", "seg, probability, sr, rtstruct"),
    ],
)
def test_a_wrong_file(tmp_path: Path, changes: dict[str, Any], problem: str, hint: str) -> None:
    path = tmp_path / "hospital.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(VoxelscaleError) as caught:
        read_settings(path)
    assert problem in caught.value.message
    assert hint in caught.value.hint


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    """Is complete, and gives the defaults."""
    (example,) = re.findall(r"```yaml\n(model:.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    path = tmp_path / "hospital.yaml"
    path.write_text(example)
    archive = ArchiveSettings(
        url="https://pacs.example.org/dicom-web", credentials="pacs.yaml", ca_file="hospital-ca.pem"
    )
    assert read_settings(path) == ListenSettings(model="run/", folder="/srv/voxelscale", archive=archive)
    keys = yaml.safe_load(example)
    assert {*keys, "receive", "send"} == set(vars(ListenSettings(model="", folder="")))
    assert set(keys["rules"]) == set(vars(RulesSettings()))
    (dimse,) = re.findall(r"```yaml\n(receive:.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    path.write_text(f"model: run/\nfolder: f\n{dimse}")
    assert read_settings(path).receive == ReceiveSettings(accept=("PACS",))


def test_a_port_that_is_taken() -> None:
    with serve(HealthSettings(port=0), Meter()) as port:
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 503
        with (
            pytest.raises(VoxelscaleError, match="cannot be opened"),
            serve(HealthSettings(port=port), Meter()),
        ):
            pass


@pytest.mark.slow
def test_the_demonstration(trained: Path, tmp_path: Path) -> None:
    """What `make demo-hospital` runs, with a smaller model."""
    if why := missing():
        (pytest.fail if required() else pytest.skip)(why)
    script = DOCS.parents[1] / "examples" / "hospital.py"
    places = [str(script), str(trained), str(tmp_path / "demo")]
    command = [sys.executable, *places, "--scans", "2", "--once"]
    for _ in range(2):  # again, it goes on
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "\n2 of 2 answered." in done.stdout
    service = tmp_path / "demo" / "service"
    assert len(list(service.glob("predictions/*/findings.json"))) == 2
    assert len(list(service.glob("scans/*"))) == 2


@pytest.mark.parametrize("how", ["send", "archive"])
def test_received_and_sent(orthanc: Orthanc, tmp_path: Path, how: str) -> None:
    """The service receives by C-STORE, and sends by C-STORE or STOW-RS."""
    files = series(tmp_path / "a", "P1")
    receive, health = free_port(), free_port()
    to = {"send": {"host": "127.0.0.1", "port": orthanc.dicom_port, "ae_title": "ORTHANC"}}
    to = to if how == "send" else {"archive": {"url": orthanc.web}}
    more = {"receive": {"port": receive}, "health": {"port": health}, "rules": {"min_slices": 3}}
    path = tmp_path / "hospital.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "folder": "service", **to, **more}))
    time, waits, figures = Time(), list[float](), list[str]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        time.at += 200
        if len(waits) == 1:
            entity = AE(ae_title="SCANNER")
            entity.add_requested_context(CTImageStorage)
            association = entity.associate("127.0.0.1", receive, ae_title="VOXELSCALE")
            assert [int(association.send_c_store(file).Status) for file in files] == [0] * 4
            association.release()
        elif len(waits) == 5:
            figures.append(requests.get(f"http://127.0.0.1:{health}/metrics", timeout=10).text)
            raise KeyboardInterrupt

    service, answer = open_service(path), StandIn()
    names = Names(how="hash", folder=service.predictions)
    with pytest.raises(KeyboardInterrupt):
        service.run(answer, names, clock=Clock(now=lambda: time.at, wait=wait))
    assert len(answer.looked) == 1
    assert [report["PatientID"] for report in orthanc.headers("SR")] == ["P1"]
    assert 'voxelscale_listen_instances_total{end="received"} 4\n' in figures[0]
    assert 'voxelscale_listen_steps_total{step="predicted",end="done"} 1\n' in figures[0]
    for port in (receive, health):  # both are closed
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port))


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Start the command in a process of its own; it is ended afterwards."""
    started: list[subprocess.Popen[str]] = []

    def begin(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "voxelscale.cli", "--verbose", "listen", str(path)]
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_the_whole(
    start_orthanc: Callable[..., Orthanc],
    trained: Path,
    chest: list[Path],
    tmp_path: Path,
    voxelscale: Command,
    start: Callable[[Path], subprocess.Popen[str]],
) -> None:
    orthanc = start_orthanc(AuthenticationEnabled=True, RegisteredUsers={USER: PASSWORD})
    orthanc.add(chest)
    gap = series(tmp_path / "gap", "PATIENT8", slices=40, description="of SECRET")
    orthanc.add([*gap[:20], *gap[25:]])
    orthanc.add(series(tmp_path / "size", "PATIENT9", slices=40, change=without_spacing))
    (tmp_path / "keys.yaml").write_text(f'user: {USER}\npassword: "{PASSWORD}"\n', encoding="utf-8")
    (tmp_path / "keys.yaml").chmod(0o600)
    port = free_port()
    path = tmp_path / "hospital.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(trained),
                "folder": "service",
                "archive": {"url": orthanc.web, "credentials": "keys.yaml", "days": 0},
                "every": 0.5,
                "stable": 1,
                "health": {"port": port},
            }
        )
    )
    process = start(path)
    ended = _await(port, lambda health: health["series"] == COUNTS, process)
    assert ended["status"] == "ok"
    figures = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    assert 'voxelscale_listen_series{state="stored"} 1\n' in figures
    assert "voxelscale_listen_results_total 2\n" in figures
    assert voxelscale("listen", path)[2].startswith("error: ")  # one at a time
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("error: interrupted\nhint: the same command resumes where this one stopped\n")
    assert len(orthanc.headers("SEG")) == 1
    (report,) = orthanc.headers("SR")
    assert (report["PatientID"], report["StudyInstanceUID"]) == ("PATIENT7", uids(chest)[0])
    code, said, _ = voxelscale("listen", path, "--ledger")
    assert code == 0
    states = sorted(line.split(",")[1] for line in said.splitlines())
    assert states == ["failed", "failed", "state", "stored"]
    assert "slices without a pixel spacing" in said
    names = "".join(map(str, (tmp_path / "service").rglob("*")))
    everything = out + err + figures + said + names + str(ended)
    assert not [w for w in ("PATIENT", "SECRET", "2.25.", PASSWORD) if w in everything]
    (findings,) = (tmp_path / "service" / "predictions").glob("*/findings.json")
    assert f"{findings.parent.name},stored" in said
    assert "5 slices missing" in said


COUNTS = {"seen": 0, "fetched": 0, "predicted": 0, "stored": 1, "skipped": 0, "failed": 2}


def without_spacing(dataset: pydicom.Dataset) -> None:
    del dataset.PixelSpacing


def _await(
    port: int, enough: Callable[[dict[str, Any]], bool], process: subprocess.Popen[str]
) -> dict[str, Any]:
    """What /health says when it is enough."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        try:
            health: dict[str, Any] = requests.get(f"http://127.0.0.1:{port}/health", timeout=10).json()
        except requests.ConnectionError:
            health = {"series": {}}
        if enough(health):
            return health
        time.sleep(0.2)
    raise AssertionError(health)
