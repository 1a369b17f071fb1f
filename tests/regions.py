"""A data set of two channels, three overlapping regions and an ignore label, as nnU-Net has it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

SHAPE = (20, 28, 28)
REGIONS = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
IGNORE = 4


def write_regions(folder: Path, cases: int = 8, seed: int = 0) -> Path:
    """Nested balls: the first channel shows the whole, the second the core; both the enhancing part.

    The second channel lies on a lattice of its own, the ignored voxels are a slab at one side.
    """
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    names = [f"case_{number:03d}" for number in range(cases)]
    for number, name in enumerate(names):
        one, two, label = case(np.random.default_rng([seed, number]))
        write(one, folder / "imagesTr" / f"{name}_0000.nii.gz")
        write(two, folder / "imagesTr" / f"{name}_0001.nii.gz", shift=0.25)
        write(label, folder / "labelsTr" / f"{name}.nii.gz")
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, **REGIONS, "ignore": IGNORE},
        "regions_class_order": [1, 2, 3],
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    folds = [{"train": [n for n in names if n not in names[at::4]], "val": names[at::4]} for at in range(4)]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    return folder


def case(
    random: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Both channels and the label values, (z, y, x)."""
    axes = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    centre = [random.uniform(8, n - 8) for n in SHAPE]
    apart = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
    radius = random.uniform(6, 8)
    label = np.zeros(SHAPE, np.uint8)
    for value, share in ((1, 1.0), (2, 0.7), (3, 0.4)):
        label[apart < share * radius] = value
    gain, noise = random.uniform(50, 2000), random.normal(0, 0.3, (2, *SHAPE))
    one = gain * (1 + (label > 0) + (label > 2) + noise[0])
    two = 0.01 * gain * (1 + (label > 1) + (label > 2) + noise[1])
    label[:, :, :3] = IGNORE
    return one.astype(np.float32), two.astype(np.float32), label


def write(array: NDArray[np.generic], path: Path, shift: float = 0.0) -> None:
    """A NIfTI of 1 mm voxels whose first one lies `shift` mm off the origin along every axis."""
    image = sitk.GetImageFromArray(array)
    image.SetOrigin((shift, shift, shift))
    sitk.WriteImage(image, str(path))
