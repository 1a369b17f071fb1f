"""How long the viewer takes to open a large scan in headless Chromium, and the pictures of docs/viewer.md.

python benchmarks/viewer.py open work/             # 512 x 512 x 800 voxels, made where they are missing
python benchmarks/viewer.py pictures work/ docs/   # of a phantom
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.viewer.conftest import chromium, until

from voxelscale.config import ReadingConfig, from_dict
from voxelscale.dataset import DataSet
from voxelscale.dataset.reading import read_image, read_truth
from voxelscale.findings import components, find_lesions, write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, resample
from voxelscale.phantom.dataset import write_phantoms

FACTS = {"warnings": [], "thresholds": {"threshold": 0.5}}


def phantom(folder: Path) -> None:
    """A phantom, and as its prediction its lesions but one, some grown, with two false positives."""
    if (folder / "predictions").is_dir():
        return
    settings = {"cases": 1, "spacing": [1.5, 1.0, 1.0], "nodules": [5, 6], "diameter_mm": [7.0, 20.0]}
    write_phantoms(from_dict({"phantom": settings}).phantom, folder / "scans", workers=1)
    (source,) = DataSet(path=folder / "scans").cases
    image, truth = read_image(source, ReadingConfig()), read_truth(source, ReadingConfig())
    probability = np.zeros(truth.array.shape, np.float32)
    rng = np.random.default_rng(4)
    for voxels in components(truth.array > 0)[1:]:
        for shift in ((0, 0, 0), (0, 1, 0), (0, 0, 1)):
            probability[tuple((voxels + shift).T)] = rng.uniform(0.6, 0.99)
    for place in ((60, 140, 100), (90, 150, 280)):
        z, y, x = np.indices((5, 9, 9)) - np.asarray([2, 4, 4])[:, None, None, None]
        inside = np.argwhere((z / 2) ** 2 + (y / 4) ** 2 + (x / 4) ** 2 <= 1) + place
        probability[tuple(inside.T)] = rng.uniform(0.3, 0.8)
    save(folder, source.case, probability, image)


def save(folder: Path, case: str, probability: Any, image: Scan) -> None:
    """Write findings and mask of a probability map."""
    found, mask = find_lesions(
        case, probability, image.grid, threshold=0.5, candidates=0.1, image=image.array
    )
    here = folder / "predictions" / case
    write_scan(Scan(mask, image.affine), here / "mask.nii.gz")
    write_findings(found, here / "findings.csv", here / "findings.json", FACTS)


def large(folder: Path) -> None:
    """A phantom resampled to 512 x 512 x 800 voxels, with the noise of a thin-slice CT."""
    if (folder / "predictions").is_dir():
        return
    write_phantoms(from_dict({"phantom": {"cases": 1}}).phantom, folder / "small", workers=1)
    (source,) = DataSet(path=folder / "small").cases
    small = read_image(source, ReadingConfig())
    spacing = np.asarray(small.array.shape) * small.spacing / (800, 512, 512)
    scan = resample(small, small.grid.with_spacing(spacing.tolist()))
    rng = np.random.default_rng(0)
    for plane in scan.array:
        plane += rng.normal(0, 20, plane.shape).astype(np.int16)
    probability = np.zeros(scan.array.shape, np.float16)
    for _ in range(12):
        z, y, x = (int(rng.integers(n // 4, 3 * n // 4)) for n in scan.array.shape)
        probability[z - 8 : z + 8, y - 8 : y + 8, x - 8 : x + 8] = rng.uniform(0.3, 0.95)
    write_scan(scan, folder / "scans" / "large.nii.gz")
    save(folder, "large", probability, scan)


def served(folder: Path, scans: str) -> tuple[subprocess.Popen[str], str]:
    """The command ``voxelscale view`` and the address that it prints."""
    words = [
        "view",
        str(folder / "predictions"),
        str(folder / scans),
        "--no-browser",
        "--reader",
        "A. Smith",
    ]
    command = [sys.executable, "-m", "voxelscale.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, next(line for line in process.stdout if line.startswith("open ")).split()[1]


def opening(folder: Path) -> None:
    """Seconds until the planes are seen and until everything is there."""
    large(folder)
    driver = chromium()
    try:
        for attempt in range(3):
            began = time.monotonic()
            process, url = served(folder, "scans")
            printed = time.monotonic() - began
            driver.get("about:blank")
            driver.get(url)
            until(
                lambda: driver.execute_script("return Boolean(window.voxelscale && voxelscale.ready)"), 300
            )
            times = driver.execute_script("return voxelscale.times")
            print(
                f"{attempt + 1}: address printed after {printed:.1f} s; then the planes are seen after "
                f"{times['shown'] / 1000:.1f} s, masks after {times['masks'] / 1000:.1f} s; "
                f"all from the command on {time.monotonic() - began:.1f} s"
            )
            process.terminate()
            process.wait()
    finally:
        driver.quit()


def pictures(folder: Path, out: Path) -> None:
    """The page with a finding measured, and one plane with the brush."""
    from selenium.webdriver import ActionChains

    phantom(folder)
    process, url = served(folder, "scans")
    driver = chromium(1180, 760)

    def keys(*each: str) -> None:
        for key in each:
            ActionChains(driver).send_keys(key).perform()
            driver.execute_async_script("voxelscale.queue.then(arguments[0])")
        time.sleep(5)

    try:
        driver.get(url)
        until(lambda: driver.execute_script("return Boolean(window.voxelscale && voxelscale.ready)"))
        keys("a", "j")
        picture(driver, out / "viewer.png")
        keys("k", "z", "+", "+", "+", "b")
        picture(driver, out / "viewer_brush.png")
    finally:
        driver.quit()
        process.terminate()
        process.wait()


def picture(driver: Any, path: Path) -> None:
    """A screenshot in 40 greys and as many colours as there are: a third of the bytes."""
    from PIL import Image

    driver.save_screenshot(str(path))
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    values = np.asarray(pixels).reshape(-1, 3)
    coloured = values[np.ptp(values.astype(int), axis=1) > 40]
    colours = (
        Image.fromarray(coloured[None]).quantize(160, method=Image.Quantize.MEDIANCUT).getpalette() or []
    )
    greys = [round(v) for v in np.repeat(np.linspace(0, 255, 40), 3)]
    dark = [0x16, 0x1C, 0x25, 0x20, 0x29, 0x36, 0x12, 0x18, 0x20, 0x2A, 0x35, 0x42]  # of the page
    palette = Image.new("P", (1, 1))
    palette.putpalette([*greys, *dark, *colours[: 3 * 160]])
    pixels.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("open", "pictures"))
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs"))
    arguments = parser.parse_args()
    if arguments.what == "open":
        opening(arguments.work / "large")
    else:
        pictures(arguments.work / "phantom", arguments.out)


if __name__ == "__main__":
    main()
