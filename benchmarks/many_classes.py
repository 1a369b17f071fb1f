"""Peak memory and time of `voxelscale predict` with 117 classes on 300 slices of 512 x 512 voxels.

    python benchmarks/many_classes.py [--classes 117] [--shape 300,512,512] [--sharp 8] [--out F]

The network has 4 filters and is not trained; windows of 96 x 160 x 160 voxels overlap by a quarter. Its
head is multiplied, so that several classes are probable at many voxels: more to keep than a trained
network gives. The scan is smooth noise from air to soft tissue, at the network's own spacing. The figure
includes reading, findings and writing, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import processor  # type: ignore[import-not-found]
from scipy import ndimage

from voxelscale.classes import Classes
from voxelscale.config import from_dict
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, write_bundle
from voxelscale.samples.batch import Normalisation

PATCH = (96, 160, 160)
SPACING = (1.5, 1.0, 1.0)
CONFIG = {
    "model": {"filters": 4, "depth": 3},
    "data": {"patch_size": PATCH},
    "predict": {"overlap": 0.25, "skip_air": False, "min_volume_mm3": 100.0, "refuse_unusable": False},
    "train": {"precision": "fp32"},
}


def write_model(path: Path, count: int, sharp: float) -> None:
    """Write an untrained network of `count` classes."""
    classes = Classes(
        names=tuple(f"class {number}" for number in range(1, count + 1)),
        values=tuple((number,) for number in range(1, count + 1)),
    )
    config = from_dict(CONFIG)
    torch.manual_seed(0)
    weights = build_model(config.model, PATCH, SPACING, outputs=classes.outputs).state_dict()
    weights["head.weight"] *= sharp
    weights["head.bias"] *= 0
    bundle = Bundle(
        config=config,
        weights=weights,
        spacing=SPACING,
        normalisation=Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0),
        trained={},
        classes=classes,
    )
    write_bundle(path, bundle)


def write_image(path: Path, shape: tuple[int, ...]) -> None:
    """Smooth noise, HU."""
    coarse = np.random.default_rng(0).normal(0, 1, [n // 8 + 2 for n in shape])
    fine = ndimage.zoom(coarse.astype(np.float32), 8, order=1)[tuple(slice(0, n) for n in shape)]
    hu = np.clip(-400 + 500 * fine, -1000, 1000).astype(np.int16)
    write_scan(Scan(hu, affine_from_itk((0, 0, 0), SPACING[::-1], np.eye(3))), path)


def main() -> None:
    """Read the arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=117)
    parser.add_argument("--shape", default="300,512,512")
    parser.add_argument("--sharp", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("many_classes.json"))
    options = parser.parse_args()
    shape = tuple(map(int, options.shape.split(",")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model.vxs", options.classes, options.sharp)
        write_image(folder / "scan.nii.gz", shape)
        paths = (folder / "model.vxs", folder / "scan.nii.gz", folder / "out")
        command = [sys.executable, "-m", "voxelscale.cli", "-v", "predict", *map(str, paths)]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        content = json.loads((folder / "out" / "scan" / "findings.json").read_text(encoding="utf-8"))
    model, flags = processor()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    table = {
        "classes": options.classes,
        "shape": shape,
        "peak_gib": round(peak, 2),
        "seconds": round(seconds),
        "findings": len(content["findings"]),
        "processor": model,
        "flags": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(table, indent=1))
    options.out.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
