"""Fixtures: an Orthanc of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.archive.hospital import Orthanc, missing, required

from voxelscale.config import Config
from voxelscale.console import set_verbosity
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, write_bundle
from voxelscale.phantom import make_phantom
from voxelscale.phantom.series import Person, write_series
from voxelscale.samples.batch import Normalisation

SPACING = (5.0, 4.0, 4.0)
"""Of the network, (z, y, x) mm."""


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


@pytest.fixture(scope="session")
def chest(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A phantom as DICOM."""
    folder = tmp_path_factory.mktemp("chest")
    person = Person(number="PATIENT7", name="SECRET^A", description="of SECRET")
    return write_series(make_phantom(tiny.phantom, 0).image, person, folder)


@pytest.fixture(scope="session")
def trained(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody trained, with weights that make it find something."""
    torch.manual_seed(0)
    bundle = Bundle(
        config=replace(tiny, predict=replace(tiny.predict, threshold=0.9, candidates=0.9)),
        weights=build_model(tiny.model, tiny.data.patch_size, SPACING).state_dict(),
        spacing=SPACING,
        normalisation=Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0),
        trained={},
    )
    path = tmp_path_factory.mktemp("model") / "model.vxs"
    write_bundle(path, bundle)
    return path
