"""Predictions of small scans, one of them oblique, and a real browser where there is one."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.findings import Finding, components, lesions_of_mask, write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan
from voxelscale.viewer.app import Shown, Viewer, build
from voxelscale.viewer.cases import list_predicted
from voxelscale.viewer.guard import Door
from voxelscale.viewer.serve import door_of, listening

REQUIRED = "VOXELSCALE_REQUIRE_CHROMIUM"
"""In the environment: a missing browser is an error, as in CI."""

READER = "A. Smith"


def oblique() -> NDArray[np.float64]:
    """Voxel (z, y, x) to LPS mm: tilted by 20 and 12 degrees, 3 x 0.9 x 0.7 mm, x to the right."""
    a, b = np.radians(20), np.radians(12)
    tilt = np.asarray([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = np.asarray([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    axes = (turn @ tilt)[:, ::-1] * [3.0, 0.9, 0.7]
    axes[:, 2] *= -1
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (31.5, -212.25, 1007.0)
    return affine


def scan_with_nodules(
    shape: tuple[int, int, int], affine: NDArray[np.float64], seed: int
) -> tuple[Scan, Scan]:
    """A scan in which every voxel's HU tells where it is, with four nodules, and their mask."""
    z, y, x = np.indices(shape)
    hu = (-1000 + 7 * z + 3 * y + x + 2 * ((z * y + x) % 5)).astype(np.int16)
    mask, rng = np.zeros(shape, np.uint8), np.random.default_rng(seed)
    for octant in range(4):
        low = np.asarray(shape) * [(octant >> 1) & 1, octant & 1, (octant == 1) or (octant == 2)] // 2
        centre = low + np.asarray(shape) // 4 + rng.integers(-1, 2, 3)
        radii = np.asarray([2 + octant % 2, 4 + octant, 5])
        where = ((np.stack([z, y, x], -1) - centre) ** 2 / radii**2).sum(-1) <= 1
        mask[where], hu[where] = 1, 40 + 10 * octant
    return Scan(hu, affine), Scan(mask, affine)


def probabilities(mask: Scan, findings: Sequence[Finding]) -> NDArray[np.uint8]:
    """Of each finding its confidence at the first voxel, falling to 0.51 at the last; 0.02 elsewhere."""
    values = np.full(mask.array.shape, 5, np.uint8)
    for places in components(mask.array > 0):
        centre = mask.grid.index_to_mm(places.mean(axis=0))
        nearest = min(findings, key=lambda f: float(np.linalg.norm(centre - [f.x, f.y, f.z])))
        values[tuple(places.T)] = np.round(255 * np.linspace(nearest.probability, 0.51, len(places)))
    return values


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans with true masks: a plain one, and an oblique, anisotropic one."""
    folder = tmp_path_factory.mktemp("viewed")
    straight = np.asarray([[0, 0, 0.8, -40], [0, 0.8, 0, -30], [1.5, 0, 0, -20], [0, 0, 0, 1]], np.float64)
    for name, shape, affine in (("a", (30, 60, 64), straight), ("b", (22, 50, 72), oblique())):
        image, mask = scan_with_nodules(shape, affine, len(name))
        write_scan(image, folder / "images" / f"{name}.nii.gz")
        write_scan(mask, folder / "labels" / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def predictions(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each scan three of the four nodules, a false positive with a mask and a candidate without one."""
    folder = tmp_path_factory.mktemp("predictions")
    for source in DataSet(path=scans).cases:
        from voxelscale.dataset.reading import read_image
        from voxelscale.formats import read_label

        image = read_image(source, ReadingConfig())
        mask = read_label(source.labels[0])
        parts = lesions_of_mask(source.case, mask.array, mask.grid)
        missed = parts[3]
        z, y, x = (round(v) for v in missed.index)
        mask.array[z - 3 : z + 4, y - 8 : y + 9, x - 6 : x + 7] = 0
        mask.array[2:4, 3:6, 2:7] = 1
        found = lesions_of_mask(source.case, mask.array, mask.grid)
        assert len(found) == 4
        listed = [replace(f, probability=0.9 - 0.1 * n, mean_hu=1.0) for n, f in enumerate(found)]
        cx, cy, cz = image.grid.index_to_mm((4, 30, 8))
        candidate = replace(listed[0], x=cx, y=cy, z=cz, index=(4, 30, 8), diameter_mm=6.0, probability=0.2)
        here = folder / source.case
        if source.case == "b":
            write_scan(Scan(probabilities(mask, listed), mask.affine), here / "probability.nii.gz")
        write_scan(mask, here / "mask.nii.gz")
        facts = {"warnings": ["a warning"], "thresholds": {"threshold": 0.5}}
        write_findings([*listed, candidate], here / "findings.csv", here / "findings.json", facts)
    return folder


def shown(scans: Path, predictions: Path, reader: str = READER) -> Shown:
    """What is served of them."""
    return Shown(
        cases=list_predicted(predictions, DataSet(path=scans)),
        reading=ReadingConfig(),
        folder=predictions / "readers" / reader,
        reader=reader,
    )


@dataclass
class Served:
    """A running server."""

    door: Door
    viewer: Viewer
    url: str


@pytest.fixture(scope="module")
def served(scans: Path, predictions: Path) -> Iterator[Served]:
    """A real server on a free port."""
    import uvicorn

    listener = listening("127.0.0.1", 0)
    door = door_of("127.0.0.1", listener)
    app, viewer = build(shown(scans, predictions), door)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Served(door, viewer, f"http://127.0.0.1:{listener.getsockname()[1]}/")
    server.should_exit = True
    thread.join(20)
    viewer.close()


def chromium(width: int = 1280, height: int = 800) -> Any:
    """Headless Chromium, whose 3-D is drawn by the processor."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"),
        *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    return driver


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for all tests of a module."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        if os.environ.get(REQUIRED) == "1":
            pytest.fail("chromium or chromedriver is missing")
        pytest.skip("needs Debian's chromium and chromium-driver")
    driver = chromium()
    yield driver
    driver.quit()


def until(check: Callable[[], Any], seconds: float = 60) -> Any:
    """What a check gives once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := check():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")
