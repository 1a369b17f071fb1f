"""Predictions made by hand, as `voxelscale predict` writes them, and DICOM series of every kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.classes import LESION, Classes
from voxelscale.config import PredictConfig, ReadingConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import read_image
from voxelscale.findings import find_lesions, ranked, write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan
from voxelscale.predict.case import stamp_of

Ball = tuple[float, float, float, float]
"""Centre as shares of the scan along (z, y, x), and radius in mm."""

MODEL = "0123456789abcdef"


def source_of(path: Path, reading: ReadingConfig | None = None) -> Source:
    """The only scan of a path, as predict lists it."""
    (source,) = DataSet(path=path, reading=reading or ReadingConfig()).scans
    return source


def ball(scan: Scan, one: Ball, peak: float = 0.95) -> NDArray[np.float32]:
    """Probability that falls off from the centre; a half at the radius."""
    z, y, x, radius = one
    index = np.asarray([z, y, x]) * (np.asarray(scan.array.shape) - 1)
    centre = scan.grid.index_to_mm(index)
    places = scan.grid.index_to_mm(np.moveaxis(np.indices(scan.array.shape), 0, -1))
    apart = np.linalg.norm(places - centre, axis=-1)
    falling = np.clip(0.5 + (radius - apart) / (2 * radius), 0, peak)
    return np.asarray(falling * (apart < 2 * radius), np.float32)


def predict_by_hand(
    predictions: Path,
    source: Source,
    balls: Sequence[Sequence[Ball]],
    classes: Classes = LESION,
    reading: ReadingConfig | None = None,
    *,
    probabilities: bool = False,
    config: PredictConfig | None = None,
) -> Path:
    """A case's folder of predictions: of each class, or of each region, some balls."""
    reading, config = reading or ReadingConfig(), config or PredictConfig()
    scan = read_image(source, reading)
    folder = predictions / source.case
    stored = np.zeros(scan.array.shape, np.int16)
    findings: list[Any] = []
    for at, (name, some) in enumerate(zip(classes.names, balls, strict=True)):
        probability = np.zeros(scan.array.shape, np.float32)
        for number, one in enumerate(some):
            np.maximum(probability, ball(scan, one, 0.95 - 0.05 * number), out=probability)
        found, mask = find_lesions(
            source.case,
            probability,
            scan.grid,
            threshold=config.threshold,
            candidates=config.candidates,
            merge_mm=config.merge_mm,
            image=scan.array,
        )
        findings += [f if classes.single else type(f)(**{**f.__dict__, "label": name}) for f in found]
        if classes.regions:
            stored |= mask.astype(np.int16) << at
        else:
            stored[mask > 0] = at + 1
        if probabilities:
            file = "probability.nii.gz" if classes.single else f"probability_{at + 1}.nii.gz"
            write_scan(Scan(np.rint(probability * 255).astype(np.uint8), scan.affine), folder / file)
    named = {"class": classes.names[0]} if classes.single else {"classes": classes.to_dict()}
    facts = {
        "case": source.case,
        "warnings": [],
        "looked_at": 1.0,
        "lungs": {"found": True},
        "fill_gaps": reading.fill_gaps,
        "select": list(reading.select),
        "merge_mm": config.merge_mm,
        "model": MODEL,
        "voxelscale": "0.0.test",
        **named,
    }
    write_scan(Scan(classes.written(stored), scan.affine), folder / "mask.nii.gz")
    paths = folder / "findings.csv", folder / "findings.json"
    write_findings(ranked(findings), *paths, facts, labelled=not classes.single)
    (folder / "case.json").write_text(json.dumps({"key": "k", "scan": stamp_of(source), "model": MODEL}))
    return folder
