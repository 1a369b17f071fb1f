"""A data set of two channels as nnU-Net has it, of classes or regions, some ignored; and predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from voxelscale.channels import Channel
from voxelscale.classes import Classes
from voxelscale.config import Config, ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.evaluate.truth import truth_of
from voxelscale.findings import Finding, lesions_of_mask, write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, Triple, affine_from_itk
from voxelscale.model.bundle import Bundle
from voxelscale.samples.batch import Normalisation

AFFINE = affine_from_itk((-20.0, -30.0, 100.0), (1.0, 1.0, 2.0), np.eye(3))

CLASSES = Classes(names=("<core>", "rim"), values=((1,), (2,)), ignore=(3,))
REGIONS = Classes(names=("whole", "<core>"), values=((1, 2), (2,)), regions=True, order=(1, 2), ignore=(3,))


HU = Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0)


def bundle_of(
    config: Config,
    weights: dict[str, Tensor],
    spacing: Triple,
    classes: Classes,
    channels: tuple[Channel, ...],
) -> Bundle:
    """A model of these weights; CT is normalised by `HU`."""
    return Bundle(
        config=config,
        weights=weights,
        spacing=spacing,
        normalisation=HU,
        trained={},
        classes=classes,
        channels=channels,
        normalisations=tuple(HU if channel.scheme == "ct" else None for channel in channels),
    )


def write_several(folder: Path, classes: Classes, cases: int = 6) -> DataSet:
    """Random images, CT and MRI; in each a box of value 1 around one of 2, and a slab of 3.

    The last case has nothing of value 2.
    """
    random = np.random.default_rng(0)
    for number in range(cases):
        ct = random.integers(-1000, 400, (12, 24, 26)).astype(np.int16)
        mri = random.random((12, 24, 26)).astype(np.float32) * (number + 1)
        mask = np.zeros(ct.shape, np.uint8)
        z, y, x = random.integers(1, 4, 3)
        mask[z : z + 7, y : y + 12, x : x + 12] = 1
        mask[z + 2 : z + 5, y - 1 : y + 13, x - 1 : x + 13] = 1
        if number < cases - 1:
            mask[z + 2 : z + 5, y + 3 : y + 9, x + 3 : x + 9] = 2
        mask[:, 19:] = 3
        images: tuple[NDArray[Any], ...] = (ct, mri)
        for channel, image in enumerate(images):
            write_scan(Scan(image, AFFINE), folder / "imagesTr" / f"c{number}_{channel:04d}.nii.gz")
        write_scan(Scan(mask, AFFINE), folder / "labelsTr" / f"c{number}.nii.gz")
    labels = {
        "background": 0,
        **{
            name: list(values) if classes.regions else values[0]
            for name, values in zip(classes.names, classes.values, strict=True)
        },
        "ignore": 3,
    }
    content = {
        "channel_names": {"0": "CT", "1": "MRI"},
        "labels": labels,
        **({"regions_class_order": list(classes.order)} if classes.regions else {}),
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return DataSet(path=folder)


def write_predictions(data: DataSet, out: Path, shift: int = 1) -> dict[str, tuple[Scan, list[Finding]]]:
    """Each truth moved along x by 0, 1, 2, 0, ... times `shift`, with a wrong box in what is ignored.

    Returns:
        of each case the stored labels and the findings.
    """
    made = {}
    for number, source in enumerate(data.cases):
        truth = truth_of(source, ReadingConfig())
        stored = np.roll(np.maximum(truth.mask.array, 0), shift * (number % 3), axis=2)
        stored[2:5, 21:23, 3:6] = 1
        stored[0, 0:2, 22:25] = 1  # a false positive of the first class
        mask = Scan(data.classes.written(stored), truth.mask.affine)
        # As a written mask tells it: of regions the later ones lie over the earlier ones.
        stored = data.classes.of_written(mask.array)
        found = [
            replace(one, label=name, probability=0.9 - 0.1 * rank - 0.01 * number)
            for name, there in data.classes.each(stored)
            for rank, one in enumerate(lesions_of_mask(source.case, there, mask.grid))
        ]
        folder = out / source.case
        write_scan(mask, folder / "mask.nii.gz")
        write_findings(found, folder / "findings.csv", folder / "findings.json")
        made[source.case] = Scan(stored, mask.affine), found
    return made
