"""What `voxelscale predict` prints of its findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from voxelscale.classes import LESION, Classes
from voxelscale.config import PredictConfig
from voxelscale.console import count
from voxelscale.predict.work import Predictions

SHOWN = 5
"""Findings of a scan that are printed; all are in the files."""


def lines(outcome: Predictions, config: PredictConfig, classes: Classes = LESION) -> Iterator[str]:
    """Each scan's most confident findings, the region that was predicted, and the lowest confidence
    listed."""
    for case, findings in outcome.findings.items():
        yield f"{case}: {count(len(findings), 'finding')}{_looked_at(outcome.facts.get(case, {}))}"
        for f in findings[:SHOWN]:
            place = f"({f.x:.1f}, {f.y:.1f}, {f.z:.1f}) mm"
            named = f"{f.label}  " if f.label else ""
            yield f"  {named}{place}  diameter {f.diameter_mm:.1f} mm  confidence {f.probability:.2f}"
        if len(findings) > SHOWN:
            yield f"  and {len(findings) - SHOWN} less certain ones"
    if not (classes.single or classes.regions):
        yield (
            "a finding is where its class is the most probable one, or else has a probability of at least "
            f"{config.candidates:g} (predict.candidates)"
        )
        return
    what = "lesion probability" if classes.single else "probability"
    yield (
        f"a finding has a {what} of at least {min(config.candidates, config.threshold):g} "
        f"(predict.candidates), one in the mask of {config.threshold:g} (predict.threshold)"
    )


def _looked_at(facts: Mapping[str, Any]) -> str:
    """Which part of a scan the findings come from; "" where its prediction does not say."""
    lungs = facts.get("lungs")
    if not isinstance(lungs, Mapping):
        return " in the whole scan" if "lungs" in facts else ""
    if not lungs.get("found"):
        return " in the whole scan: no lungs found"
    left_out = lungs.get("left_out", 0)
    return " in and around the lungs" + (f", {left_out} elsewhere left out" if left_out else "")
