"""From a probability map to lesions in the patient, described as a radiologist would.

`regions`: which voxels are one finding. `calipers`: its diameters. `depth`: how far the pleura is.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic, write_csv
from voxelscale.findings.calipers import Ends, axial_diameters
from voxelscale.findings.depth import nearest_border
from voxelscale.findings.regions import (
    Voxels,
    components,
    doubtful_regions,
    masked_regions,
    sure_regions,
)
from voxelscale.geometry import Grid, Scan, Triple, equivalent_diameter

__all__ = [
    "LEAST_NODULE_MM3",
    "LUNA16_COLUMNS",
    "Finding",
    "components",
    "find_in_class",
    "find_lesions",
    "lesions_of_mask",
    "ranked",
    "read_findings",
    "read_prediction",
    "write_findings",
]

LEAST_NODULE_MM3 = 14.0
"""Volume of a 3 mm sphere; what is smaller is no nodule (Fleischner Society, Hansell et al. 2008)."""

SOLID_HU = -300.0
"""Above it a part-solid nodule is solid: 90 % sensitive and 88 % specific for what radiologists called so
(Scholten et al., European Radiology 25, 2015)."""

LUNA16_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability")
CLASS_COLUMN = "class"
"""Beside them, where there are several classes."""

FORMAT = 2
"""Of ``findings.json``: an object with facts of the scan beside the findings; 1 was a list of findings."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One lesion, found or true.

    Attributes:
        case: the scan's name.
        x, y, z: centroid, LPS mm.
        index: centroid as fractional voxel (z, y, x) of the scan; ``index_zyx`` in the JSON file.
        diameter_mm: of the sphere of the same volume (`voxelscale.geometry.equivalent_diameter`).
        axial_diameter_mm: maximum extent within one axial slice, from voxel centre to voxel centre, plus
            a pixel (the RECIST measure, to about a pixel).
        volume_mm3: voxels times the voxel's volume.
        mean_hu: mean of the scan within, or None where no scan was given.
        probability: confidence in [0, 1], calibrated where the model is; 1 for a true lesion.
        axial_ends: both ends (x, y, z) of the axial diameter, LPS mm.
        axial_slice: its slice, from 0 along the scan's array axis that runs most nearly along z.
        short_axis_mm: maximum extent in that slice perpendicular to the axial diameter.
        short_axis_ends: both ends of it.
        std_hu: standard deviation of the scan within.
        solid_fraction: share of its voxels above `SOLID_HU`.
        pleura_mm: from its surface to the lungs' nearest border; 0 where it reaches it; None where no lungs
            were found or it lies outside.
        score: confidence before calibration; None for a true lesion, and in files that know none.
        label: its class, where there are several; "" where there is one.
    """

    case: str
    x: float
    y: float
    z: float
    index: Triple
    diameter_mm: float
    axial_diameter_mm: float
    volume_mm3: float
    mean_hu: float | None = None
    probability: float = 1.0
    axial_ends: Ends | None = None
    axial_slice: int | None = None
    short_axis_mm: float | None = None
    short_axis_ends: Ends | None = None
    std_hu: float | None = None
    solid_fraction: float | None = None
    pleura_mm: float | None = None
    score: float | None = None
    label: str = ""


def find_lesions(
    case: str,
    probability: NDArray[Any],
    grid: Grid,
    *,
    threshold: float,
    low: float | None = None,
    candidates: float | None = None,
    merge_mm: float = 0.0,
    min_volume_mm3: float = 0.0,
    largest_only: bool = False,
    image: NDArray[Any] | None = None,
    depth: Scan | None = None,
    keep: Callable[[NDArray[np.int64]], bool] | None = None,
) -> tuple[list[Finding], NDArray[np.uint8]]:
    """The 26-connected components at or above `low` that reach `threshold`, and the candidates.

    A finding's confidence is the mean probability of its most certain 14 mm3, a 3 mm sphere's volume
    and the least that is reported as a nodule; what a smaller component lacks of it counts as 0.

    Args:
        probability: (z, y, x) in [0, 1].
        grid: where its voxels lie; any direction, axes at right angles.
        threshold: a lesion holds a voxel of at least this probability.
        low: voxels of at least this probability that hang together with it belong to it, too; None:
            `threshold`.
        candidates: components at or above this probability without a voxel of a lesion are findings, too,
            so that a reader may choose the operating point; None, or not below `threshold`: there are none.
        merge_mm: lesions whose surfaces are at most this far apart are merged; candidates, too; 0: off.
        min_volume_mm3: smaller ones are dropped.
        largest_only: only the largest lesion stays, and where there is one there are no candidates.
        image: (z, y, x) HU on the same grid, for the density.
        depth: of `voxelscale.findings.depth.lung_depth`, for the distance to the pleura.
        keep: whether a lesion or candidate, given by its voxels (n, 3), is listed; None: all are.

    Returns:
        findings, most confident first; and the mask (z, y, x) of those that reach `threshold`.
    """
    least = min_volume_mm3 / grid.voxel_mm3
    low = threshold if low is None else low
    sure = sure_regions(probability, grid, threshold=threshold, low=low, merge_mm=merge_mm, least=least)
    if largest_only:
        near = [voxels for voxels in sure if keep is None or keep(voxels)]
        sure = [max(near, key=len)] if near else []
    mask = np.zeros(probability.shape, np.uint8)
    for voxels in sure:
        mask[tuple(voxels.T)] = 1
    doubtful = []
    if candidates is not None and candidates < threshold and not (largest_only and sure):
        doubtful = doubtful_regions(
            probability, mask, grid, candidates=candidates, merge_mm=merge_mm, least=least
        )
    if keep is not None:
        doubtful = [voxels for voxels in doubtful if keep(voxels)]
        sure = _kept(sure, [keep(voxels) for voxels in sure], mask)
    about = partial(_found, case, grid, image=image, depth=depth)
    return ranked(about(voxels, probability[tuple(voxels.T)]) for voxels in [*sure, *doubtful]), mask


def find_in_class(
    case: str,
    label: str,
    probability: NDArray[Any],
    mask: NDArray[np.bool_],
    start: Sequence[int],
    grid: Grid,
    *,
    candidates: float | None = None,
    merge_mm: float = 0.0,
    min_volume_mm3: float = 0.0,
    smallest_mm3: float = 0.0,
    largest_only: bool = False,
    image: NDArray[Any] | None = None,
    depth: Scan | None = None,
    keep: Callable[[NDArray[np.int64]], bool] | None = None,
) -> tuple[list[Finding], NDArray[np.bool_]]:
    """Findings of one class of several that exclude each other: the 26-connected components of its mask.

    Further arguments, and a finding's confidence, are as of `find_lesions`.

    Args:
        label: the class's name.
        probability: (z, y, x) in [0, 1], of a box of the scan.
        mask: of the same box, where the class is the most probable one.
        start: the box's first voxel.
        grid: of the whole scan, as `image` is.
        candidates: components at or above this probability without a voxel of the mask are findings, too.
        min_volume_mm3: smaller components are no findings; they stay in the mask.
        smallest_mm3: smaller ones are taken out of the mask, too.
        largest_only: as of `find_lesions`.

    Returns:
        findings; and the mask of the box without what `keep` and the last two rules left out.
    """
    smallest, first = smallest_mm3 / grid.voxel_mm3, np.asarray(start)
    least = max(min_volume_mm3 / grid.voxel_mm3, smallest)
    whole = keep is None and not smallest and not largest_only
    parts = masked_regions(mask, grid, merge_mm=merge_mm, least=least if whole else 0)
    if not whole:
        mask = mask.copy()
        near = [keep is None or keep(voxels + first) for voxels in parts]
        stays = [one and len(voxels) >= smallest for one, voxels in zip(near, parts, strict=True)]
        if largest_only:
            most = max(itertools.compress(parts, stays), key=len, default=None)
            stays = [voxels is most for voxels in parts]
        parts = [voxels for voxels in _kept(parts, stays, mask) if len(voxels) >= least]
    if candidates is not None and not (largest_only and mask.any()):
        rules = {"candidates": candidates, "merge_mm": merge_mm, "least": least}
        doubtful = doubtful_regions(probability, mask, grid, **rules)
        parts += [voxels for voxels in doubtful if keep is None or keep(voxels + first)]
    about = partial(_found, case, grid, image=image, depth=depth, label=label)
    return ranked(about(voxels + first, probability[tuple(voxels.T)]) for voxels in parts), mask


def _kept(parts: Sequence[Voxels], chosen: Sequence[bool], mask: NDArray[Any]) -> list[Voxels]:
    """The chosen parts; the others are taken out of the mask."""
    for voxels in itertools.compress(parts, map(operator.not_, chosen)):
        mask[tuple(voxels.T)] = 0
    return list(itertools.compress(parts, chosen))


def _found(
    case: str,
    grid: Grid,
    voxels: Voxels,
    probability: NDArray[Any],
    *,
    image: NDArray[Any] | None,
    depth: Scan | None,
    label: str = "",
) -> Finding:
    """A finding of voxels (n, 3) with probabilities (n,)."""
    count = math.ceil(LEAST_NODULE_MM3 / grid.voxel_mm3)
    score = float(np.sort(probability.astype(np.float64))[-count:].sum() / count)
    fields = _shape(case, voxels, grid)
    if image is not None:
        fields |= _density(image[tuple(voxels.T)])
    if depth is not None:
        fields["pleura_mm"] = nearest_border(voxels, grid, depth)
    return Finding(**fields, probability=score, score=score, label=label)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Most confident first; equal ones by place."""
    return sorted(findings, key=lambda f: (-f.probability, f.index))


def lesions_of_mask(
    case: str, mask: NDArray[Any], grid: Grid, start: Sequence[int] = (0, 0, 0)
) -> list[Finding]:
    """The 26-connected components of a true mask (above 0 is lesion), each with probability 1.

    Args:
        start: the voxel of `grid` at which the mask begins.
    """
    return [Finding(**_shape(case, voxels + start, grid)) for voxels in components(mask > 0)]


def _shape(case: str, voxels: NDArray[np.int64], grid: Grid) -> dict[str, Any]:
    """Fields of a finding: where it is and how large."""
    centre = voxels.mean(axis=0)
    x, y, z = (float(v) for v in grid.index_to_mm(centre))
    volume = len(voxels) * grid.voxel_mm3
    axial = axial_diameters(voxels, grid)
    return {
        "case": case,
        "x": x,
        "y": y,
        "z": z,
        "index": (float(centre[0]), float(centre[1]), float(centre[2])),
        "diameter_mm": equivalent_diameter(volume, grid.shape, grid.spacing),
        "axial_diameter_mm": axial.long_mm,
        "volume_mm3": volume,
        "axial_ends": axial.long_ends,
        "axial_slice": axial.slice_index,
        "short_axis_mm": axial.short_mm,
        "short_axis_ends": axial.short_ends,
    }


def _density(hu: NDArray[Any]) -> dict[str, float]:
    """Fields of a finding: what the scan is within."""
    hu = hu.astype(np.float64)
    return {
        "mean_hu": float(hu.mean()),
        "std_hu": float(hu.std()),
        "solid_fraction": float((hu > SOLID_HU).mean()),
    }


def write_findings(
    findings: Sequence[Finding],
    csv_path: Path,
    json_path: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    *,
    labelled: bool = False,
) -> None:
    """LUNA16's CSV (``seriesuid,coordX,coordY,coordZ,probability``) and a JSON object with all fields.

    LUNA16's coordinates are LPS mm, as ours. A label is written only where there is one.

    Args:
        labelled: whether there are several classes: the CSV then has a sixth column ``class``.
        facts: what the JSON says of the scan and how it was predicted, beside ``findings``
            (`docs/measures.md`, "What predict writes").
    """
    # All digits of the probability: rounded ones could be equal, and the FROC another.
    rows = [[f.case, f"{f.x:.4f}", f"{f.y:.4f}", f"{f.z:.4f}", f"{f.probability!r}"] for f in findings]
    columns = list(LUNA16_COLUMNS)
    if labelled:
        columns.append(CLASS_COLUMN)
        rows = [[*row, f.label] for row, f in zip(rows, findings, strict=True)]
    write_csv(csv_path, [columns, *rows])
    if json_path is not None:
        listed = [
            {
                "index_zyx" if name == "index" else name: value
                for name, value in asdict(f).items()
                if name != "label" or value
            }
            for f in findings
        ]
        content = {"format": FORMAT, **(facts or {}), "findings": listed}
        write_atomic(json_path, json.dumps(content, indent=1))


def read_findings(path: Path) -> list[Finding]:
    """The findings of a JSON file that `write_findings` wrote, of this version or an older one.

    Raises:
        VoxelscaleError: it is missing or no such file.
    """
    return read_prediction(path)[0]


def read_prediction(path: Path) -> tuple[list[Finding], dict[str, Any]]:
    """The findings of a JSON file, and the other facts in it; none in files of older versions.

    Raises:
        VoxelscaleError: it is missing or no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            content = {"format": 1, "findings": content}
        if content["format"] not in (1, FORMAT):
            raise ValueError(f"format {content['format']!r}")
        findings = [_as_finding(row) for row in content.pop("findings")]
        warnings = content.get("warnings", [])
        if not isinstance(warnings, list) or not all(isinstance(text, str) for text in warnings):
            raise TypeError("its warnings are no list of texts")
        return findings, content
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        RecursionError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise VoxelscaleError(
            f"{path}: not a list of findings ({reason})", "run voxelscale predict again"
        ) from None


_ALWAYS = ("x", "y", "z", "diameter_mm", "axial_diameter_mm", "volume_mm3", "probability")


def _as_finding(row: Mapping[str, Any]) -> Finding:
    """Raise a ValueError, TypeError, KeyError or OverflowError where it is none."""
    if not isinstance(row, dict):
        raise TypeError(f"{row!r} is no finding")
    values = {name: value for name, value in row.items() if name not in ("case", "index", "index_zyx")}
    for name in ("axial_ends", "short_axis_ends"):
        if values.get(name) is not None:
            first, second = values[name]
            values[name] = (_triple(first), _triple(second))
    finding = Finding(
        case=row["case"], index=_triple(row["index_zyx" if "index_zyx" in row else "index"]), **values
    )
    if not isinstance(finding.case, str) or not finding.case.isprintable():
        raise ValueError(f"{finding.case!r} is no case's name")
    if not isinstance(finding.label, str) or not finding.label.isprintable():
        raise ValueError(f"{finding.label!r} is no class's name")
    for name, value in asdict(finding).items():
        if name not in ("case", "label", "index", "axial_ends", "short_axis_ends") and value is not None:
            _finite([value])
    if any(getattr(finding, name) is None for name in _ALWAYS):
        raise ValueError("a number is missing")
    return finding


def _triple(values: Iterable[Any]) -> Triple:
    a, b, c = _finite(values)
    return a, b, c


def _finite(values: Iterable[Any]) -> list[float]:
    numbers = list(values)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a number")
    return [float(number) for number in numbers]
