"""Tiny phantoms, and a store prepared from them, shared by the tests of a worker process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from hypothesis import settings

from tests import warm
from voxelscale import cli
from voxelscale.config import Config, ReadingConfig, from_dict
from voxelscale.console import set_verbosity
from voxelscale.dataset.listing import Source, list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.geometry import Scan
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.store import Store, open_store
from voxelscale.store.prepare import prepare

# A busy machine makes any deadline a coin toss.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real scans beside the checkout, where there are any."""

CASES = SHARED.parent / "cases"
"""Generators of inputs that once failed, where there are any."""


Command = Callable[..., tuple[int, str, str]]
"""Runs a command: exit code, stdout, stderr."""


def assert_same_place(mask: sitk.Image, scan: sitk.Image) -> None:
    """Two images lie voxel on voxel, as SimpleITK reads them."""
    assert mask.GetSize() == scan.GetSize()
    assert mask.GetOrigin() == pytest.approx(scan.GetOrigin(), abs=1e-4)
    assert mask.GetSpacing() == pytest.approx(scan.GetSpacing(), abs=1e-4)
    assert mask.GetDirection() == pytest.approx(scan.GetDirection(), abs=1e-4)


def read_pair(image: Path, label: Path, values: tuple[int, ...] | None = None) -> tuple[Scan, Scan]:
    """A scan and its mask, as `prepare` reads them."""
    source = Source(case="case", patient="case", image=image, labels=(label,))
    scan, labels = read_case(source, ReadingConfig(labels=values))
    return scan, labels.mask


@pytest.fixture(scope="session", autouse=True)
def _warm_starts() -> None:
    """But for the slow tests, whose processes are really started."""
    if "VOXELSCALE_COLD_STARTS" not in os.environ:
        warm.install(warm.Starter())
        # Workers of pools within a test's own process.
        multiprocessing.set_forkserver_preload(list(warm.FOR_POOLS))
        forkserver.ensure_running()


@pytest.fixture
def cold_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are really started, with all that they import."""
    monkeypatch.setattr(subprocess, "_fork_exec", warm.REAL)


@pytest.fixture
def voxelscale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["voxelscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def reported(tmp_path: Path) -> Callable[..., Path]:
    """Write an input that once failed: ``reported(name, *arguments)`` returns its folder."""

    def write(name: str, *arguments: str) -> Path:
        script = CASES / f"{name}.py"
        if not script.is_file():
            pytest.skip(f"no {script.name} beside the checkout")
        out = tmp_path / name
        subprocess.run([sys.executable, script, out, *arguments], check=True, capture_output=True)
        return out

    return write


@pytest.fixture(autouse=True, scope="session")
def settings_of_a_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a user's settings, in which the key of names is made."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("settings")
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def quiet() -> None:
    set_verbosity(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Config:
    """A config whose whole main job takes seconds."""
    return from_dict(
        {
            "phantom": {
                "cases": 5,
                "spacing": [5.0, 4.0, 4.0],
                "size_mm": [180.0, 200.0, 260.0],
                "diameter_mm": [14.0, 30.0],
                "nodules": [1, 3],
            },
            "prepare": {"spacing": [5.0, 4.0, 4.0], "split": [0.6, 0.2, 0.2], "workers": 1},
            "data": {"patch_size": [16, 16, 16], "readers": 1},
            "model": {"depth": 2, "filters": 4},
            "train": {
                "samples": 40,
                "batch_size": 2,
                "precision": "fp32",
                "threads": 1,
                "ranks": 1,
                "validate_every": 0,
                "checkpoint_every": 8,
            },
            "predict": {"overlap": 0.25},
        }
    )


@pytest.fixture(scope="session")
def scans(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of five tiny phantoms."""
    folder = tmp_path_factory.mktemp("scans")
    write_phantoms(tiny.phantom, folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def store(tiny: Config, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store prepared from them."""
    folder = tmp_path_factory.mktemp("store")
    prepare(list_sources(scans), folder, tiny.prepare)
    return open_store(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB of the test's own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
