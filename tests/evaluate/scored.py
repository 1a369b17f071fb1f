"""One case of one class, scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from voxelscale.evaluate.evaluate import CaseResult, evaluate_classes
from voxelscale.evaluate.nodules import Nodule
from voxelscale.evaluate.truth import Truth
from voxelscale.findings import Finding
from voxelscale.geometry import Scan


def evaluate_case(
    case: str,
    truth: Scan,
    prediction: Scan,
    findings: Sequence[Finding],
    nodules: Sequence[Nodule] = (),
) -> CaseResult:
    """Masks on one lattice, in which what is not 0 is lesion; findings of whatever class count."""
    true, predicted = ((scan.array != 0).astype(np.uint8) for scan in (truth, prediction))
    held = Truth(case=case, mask=Scan(true, truth.affine), ignored=())
    (one,) = evaluate_classes(held, predicted, [replace(f, label="") for f in findings], nodules)
    return one
