"""A PostgreSQL server of the tests' own, where Debian's package is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REQUIRED = "VOXELSCALE_REQUIRE_POSTGRESQL"
"""In the environment: a missing server is an error, as in CI."""


@dataclass
class Server:
    """A running server, which can be restarted."""

    bin: Path
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def control(self, *words: str) -> None:
        """``pg_ctl``, which refuses to run as root."""
        command = [str(self.bin / "pg_ctl"), "-D", str(self.folder / "data"), "-w", *words]
        subprocess.run([*_as_user(), *command], check=True, capture_output=True, timeout=60)

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.control("-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self.control("-m", "immediate", "stop")


def _as_user() -> list[str]:
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A fresh server on a free port of the loopback."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        if os.environ.get(REQUIRED):
            pytest.fail("no PostgreSQL server installed: apt-get install postgresql")
        pytest.skip("no PostgreSQL server installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="voxelscale-pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(bin=found[-1].parent, folder=folder, port=port)
    init = [str(server.bin / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "postgres"]
    subprocess.run([*_as_user(), *init], check=True, capture_output=True, cwd=folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
