"""A hospital on one machine, to try: an Orthanc with synthetic scans, and `voxelscale listen` for them.

    python examples/hospital.py RUN FOLDER

Everything is on the loopback address and below FOLDER. Ctrl-C ends it; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

from voxelscale.archive.access import Access
from voxelscale.archive.dicomweb import DicomWeb
from voxelscale.model.bundle import read_bundle
from voxelscale.phantom import make_phantom
from voxelscale.phantom.series import Person, write_series

FIRST = 1000
"""Number of the first phantom: the model was trained on others."""

PLUGIN = "libOrthancDicomWeb.so"

HOSPITAL = """\
model: {model}
folder: service
archive: {{url: {url}}}
rules: {{slice_thickness: [0, 10], min_slices: 10}}
every: 2
stable: 5
health: {{port: {health}}}
results: [seg, sr, rtstruct]
keep_scans: true
"""


def main() -> None:
    """Start it all, and wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run on phantoms, such as quickstart/run")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--scans", type=int, default=3, help="number of synthetic scans (3)")
    parser.add_argument("--once", action="store_true", help="end when all scans are answered")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    http, health = free_port(), free_port()
    archive = start_orthanc(folder / "orthanc", http)
    listening = None
    try:
        url = f"http://127.0.0.1:{http}"
        upload(given.run, folder / "scans", given.scans, f"{url}/dicom-web")
        config = folder / "hospital.yaml"
        values = {"model": given.run.absolute(), "url": f"{url}/dicom-web", "health": health}
        config.write_text(HOSPITAL.format(**values), encoding="utf-8")
        command = [sys.executable, "-m", "voxelscale.cli", "listen", str(config)]
        listening = subprocess.Popen(command)
        ends = wait_until_answered(health, given.scans, listening)
        service = folder / "service"
        print(
            f"\n{ends['stored']} of {given.scans} answered."
            f"\nthe archive with scans and results: {url}/app/explorer.html"
            f"\nthe viewer: voxelscale view {service / 'predictions'} {service / 'scans'}"
            f"\nthe ledger: voxelscale listen {config} --ledger"
            f"\nhealth and metrics: http://127.0.0.1:{health}/health and /metrics",
            flush=True,
        )
        if not given.once:
            print("Ctrl-C ends it", flush=True)
            listening.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for process in (listening, archive):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_orthanc(folder: Path, http: int) -> subprocess.Popen[bytes]:
    """Start an Orthanc with DICOMweb on loopback."""
    places = (Path("/usr/share/orthanc/plugins"), *Path("/usr/lib").glob("*/orthanc"))
    plugin = next((p / PLUGIN for p in places if (p / PLUGIN).exists()), None)
    program = shutil.which("Orthanc")
    if program is None or plugin is None:
        print(
            "error: no Orthanc with DICOMweb\nhint: apt-get install orthanc orthanc-dicomweb",
            file=sys.stderr,
        )
        sys.exit(2)
    folder.mkdir(exist_ok=True)
    settings = {
        "Name": "Demo",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(plugin)],
        "HttpPort": http,
        "DicomServerEnabled": False,  # it would listen to other machines, too
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    with (folder / "log").open("ab") as log:
        command = [program, str(folder / "orthanc.json")]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    for _ in range(300):
        if ask(f"http://127.0.0.1:{http}/system") is not None:
            return process
        time.sleep(0.1)
    raise SystemExit(f"error: Orthanc did not start\nhint: see {folder / 'log'}")


def upload(run: Path, scans: Path, count: int, url: str) -> None:
    """Make phantoms like those of the run, write them as CT series, and store them in the archive."""
    config = read_bundle(run).config.phantom
    web = DicomWeb(Access(url=url))
    for number in range(count):
        person = Person(number=f"DEMO{number + 1}", date=f"{date.today():%Y%m%d}")
        place = scans / f"{number + 1}"
        if not place.is_dir():
            print(f"synthetic scan {number + 1} of {count}", flush=True)
            write_series(make_phantom(config, FIRST + number).image, person, place)
        web.send(sorted(place.glob("*.dcm")))


def wait_until_answered(port: int, count: int, listening: subprocess.Popen[bytes]) -> dict[str, int]:
    """Wait until no series is open any more; how many are in each state."""
    while listening.poll() is None:
        health = ask(f"http://127.0.0.1:{port}/health") or {"series": {}}
        states: dict[str, int] = health["series"]
        if sum(states.get(state, 0) for state in ("stored", "skipped", "failed")) >= count:
            return states
        time.sleep(0.5)
    raise SystemExit(listening.returncode)


def ask(url: str) -> Any:
    """What a page says, as JSON; None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)
    except (urllib.error.URLError, ConnectionError):
        return None


if __name__ == "__main__":
    main()
