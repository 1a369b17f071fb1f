"""Fixtures: an Orthanc of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.archive.hospital import Orthanc, missing, required

from voxelscale.console import set_verbosity


@pytest.fixture
def start_orthanc(tmp_path: Path) -> Iterator[Callable[..., Orthanc]]:
    """Start an Orthanc, with more settings of its own; it is stopped afterwards."""
    if why := missing():
        (pytest.fail if required() else pytest.skip)(why)
    started: list[Orthanc] = []

    def start(**more: Any) -> Orthanc:
        server = Orthanc(tmp_path / f"orthanc{len(started)}", more)
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def orthanc(start_orthanc: Callable[..., Orthanc]) -> Orthanc:
    return start_orthanc()


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Everything that was written, at the most talkative level."""
    set_verbosity(2)
    capsys.readouterr()
    return lambda: "".join(capsys.readouterr())
