"""Whether a scan can be what it is taken for, and whether it is like those that a model was trained on.

`inspect` says it of a data set's scans, `prepare` keeps it for the model, `predict` compares a new scan.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxelscale.geometry import IntTriple, Scan, Triple
from voxelscale.lungs import Lungs

if TYPE_CHECKING:
    from voxelscale.dataset.listing import Source

Severity = Literal["error", "warning", "note"]
Remark = tuple[Severity, str]
Values = tuple[float, float, float, float, float]
"""Minimum, 1st percentile, median, 99th percentile and maximum."""

LARGEST_SAMPLE = 2**22
"""Voxels from which percentiles are taken; more would not change them visibly."""
FLAT_SHARE = 0.5
"""Share of equal neighbours above which whole numbers are labels. Without the background, real CT and MRI
have 0.01 to 0.10, masks and label maps 0.78 to 0.91 (LIDC-IDRI, pyradiomics, TotalSegmentator, MSD)."""
MOST_LABELS = 1000
"""Distinct values of a label map; anatomical atlases have a few hundred."""
ROUNDING = 1e-3
"""By which a label in a file of floating-point numbers may miss its whole number."""
GREATEST_GREY = 255
"""Of a picture with eight bits a pixel."""
BONE_HU = 300.0
"""A CT whose median lies above it shows hardly a body: only bone, metal and contrast medium are denser."""
AIR_HU = -200.0
"""A CT without any voxel below it shows no air, as a chest does inside and outside."""
GAS_HU, LEAST_GAS, DENSEST_GAS_HU = (-1020.0, -200.0), 0.02, -600.0
"""Range of HU between padding and fat, minimum share of voxels in it, and the maximum of its most frequent
value: that is air (-1000) or lungs (-900 to -700). Above the maximum the values are not HU."""
ANISOTROPIC = 5.0
"""Longest over shortest voxel edge above which small lesions are a slice or two thick."""
SHORT_MM = 30.0
"""A scan that covers less shows no organ whole: two of our real test scans are slabs of 15 and 40 mm."""
SLAB_MM = 5.0
"""Below it, or with fewer slices than `FEWEST_SLICES`, a 3-D network sees nothing of its depth."""
FEWEST_SLICES = 3
COARSER, FINER = 1.5, 3.0
"""How much coarser or finer than anything trained on a scan's voxels may be without a word."""
OTHER_EXTENT = 2.0
"""The same factor for what a scan covers."""
MEDIAN_HU = 300.0
"""By which the median may lie outside the trained range; over our real chest CTs it spans 440 HU."""
DARK_HU, BRIGHT_HU = 150.0, 300.0
"""By which the darkest and the brightest hundredth may lie outside the trained range. Air has -1000 HU in
any scanner; how much bone, contrast medium and metal there is varies."""
PADDING_HU = -1024.0
"""Below air: what scanners put around their field of view counts as air here."""
OTHER_SCALE = 4.0
"""Factor between maximum values (99th percentile) that indicates another unit, if values are not HU."""
FEWEST_CASES = 0.5
"""Share of training scans with lungs from which a model is one for chests."""
UNKNOWN_HU = -200.0
"""A model that does not say its values has learnt HU where its lesions reach below this."""
PHANTOMS = "phantom.json"
"""Beside the images that `voxelscale phantom` wrote."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a scan is, as far as a model should know of it.

    Attributes:
        values: HU, or the file's own unit.
        labels: whether it looks like a mask or a label map.
        shape, spacing: voxels and mm (z, y, x), as the scan came, turned to LPS.
        lungs: whether they were found.
        problem: why not, or "".
        modality, body_part: as DICOM says; "" where it does not, and of other formats.
        synthetic: whether `voxelscale phantom` made it.
        gas: the most frequent value between air and fat (`GAS_HU`); None where hardly any lies there.
    """

    values: Values
    labels: bool
    shape: IntTriple
    spacing: Triple
    lungs: bool
    problem: str
    modality: str = ""
    body_part: str = ""
    synthetic: bool = False
    gas: float | None = None

    @property
    def extent_mm(self) -> Triple:
        """What it covers along (z, y, x)."""
        z, y, x = (n * step for n, step in zip(self.shape, self.spacing, strict=True))
        return z, y, x

    def kept(self) -> dict[str, Any]:
        """What a store's table keeps of it, besides what it has already."""
        hidden = ("labels", "shape", "spacing", "problem", "gas")
        return {name: value for name, value in asdict(self).items() if name not in hidden}


def about(image: Scan, lungs: Lungs, source: Source | None = None) -> About:
    """The facts of a scan.

    Args:
        image: turned to LPS.
        lungs: what `voxelscale.lungs.lung_field` found in it.
        source: where it comes from; None: unknown.
    """
    modality, body_part = subject(source) if source else ("", "")
    return About(
        values=spread(image.array),
        labels=looks_like_labels(image.array),
        shape=image.grid.shape,
        spacing=image.spacing,
        lungs=lungs.ok,
        problem=lungs.problem,
        modality=modality,
        body_part=body_part,
        synthetic=source is not None and is_phantom(source.image),
        gas=_gas(image.array),
    )


def spread(array: NDArray[Any]) -> Values:
    """The values' minimum and maximum, and percentiles 1, 50 and 99 of at most `LARGEST_SAMPLE` of them."""
    sample = _sample(array)
    one, middle, most = (float(v) for v in np.percentile(sample, [1, 50, 99]))
    return float(array.min()), one, middle, most, float(array.max())


def _sample(array: NDArray[Any]) -> NDArray[Any]:
    flat = array.reshape(-1)
    return flat[:: -(-flat.size // LARGEST_SAMPLE)]


def _gas(array: NDArray[Any]) -> float | None:
    sample = _sample(array)
    counts, edges = np.histogram(sample, bins=41, range=GAS_HU)
    if counts.sum() < LEAST_GAS * sample.size:
        return None
    at = int(np.argmax(counts))
    return float(edges[at] + edges[at + 1]) / 2


def looks_like_labels(array: NDArray[Any]) -> bool:
    """Whether an image (z, y, x) is a mask or a label map: few whole numbers, equal over whole regions."""
    planes = array[:: max(1, len(array) // 32)]
    if planes.min() < -1 or np.abs(planes - np.rint(planes)).max() > ROUNDING:
        return False
    whole = np.rint(planes).astype(np.int64)
    values, counts = np.unique(whole, return_counts=True)
    if len(values) > MOST_LABELS or len(values) < 2:
        return False
    if len(values) <= 3:
        return True
    left, right = whole[..., :-1], whole[..., 1:]
    background = values[np.argmax(counts)]
    pairs = (left != background) | (right != background)
    return bool(pairs.any()) and float((left == right)[pairs].mean()) > FLAT_SHARE


def subject(source: Source) -> tuple[str, str]:
    """Modality and body part as the DICOM of a scan says them; "" where nothing does."""
    from voxelscale.formats.dicom import subject_of

    return subject_of(source.files[0] if source.files else source.image)


def is_phantom(image: Path) -> bool:
    """Whether an image is one of those that `voxelscale phantom` made from nothing."""
    try:
        made = json.loads((image.parent.parent / PHANTOMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(made, dict) and "size_mm" in made and "into" not in made


# ------------------------------------------------------------------ what is wrong with a scan by itself


def remarks(one: About, *, ct: bool = True) -> list[Remark]:
    """What a person should know of a scan.

    Args:
        ct: whether its values are to be HU.
    """
    found = _of_values(one, ct=ct)
    if not any(severity == "error" for severity, _ in found):
        found += of_grid(one.shape, one.spacing)
        if ct and not one.lungs:
            found.append(("note", f"no lungs found: {one.problem}"))
    return found


def _of_values(one: About, *, ct: bool) -> list[Remark]:
    low, _, _, _, high = one.values
    if low == high:
        return [("error", f"every voxel is {low:g}")]
    if one.labels:
        return [("error", f"values from {low:g} to {high:g}: a mask or a label map, not a scan")]
    if not ct:
        return []
    found = implausible_hu(one.values)
    if not found and one.gas is not None and one.gas > DENSEST_GAS_HU:
        found.append(("warning", f"air or lungs at {one.gas:.0f} rather than -1000 to -700: hardly in HU"))
    return found


def implausible_hu(values: Values) -> list[Remark]:
    """What the spread of the values says against Hounsfield units."""
    low, _, middle, _, high = values
    reach = f"values from {low:g} to {high:g}"
    if low >= 0 and high <= GREATEST_GREY:
        return [("error", f"{reach}: a picture in grey levels rather than HU")]
    if low >= 0:
        return [("error", f"{reach}: none below 0, as if the rescale intercept were missing")]
    if low > AIR_HU:
        return [("warning", f"{reach}: no air")]
    if high < AIR_HU or middle > BONE_HU:
        return [("warning", f"{reach}, median {middle:g}: hardly a body in HU")]
    return []


def of_grid(shape: IntTriple, spacing: Triple) -> list[Remark]:
    """What the lattice says: voxels much longer than wide, a scan that covers little."""
    ratio = max(spacing) / min(spacing)
    found: list[Remark] = []
    if ratio > ANISOTROPIC:
        found.append(("note", f"voxels {ratio:.1f} times as long as wide"))
    if min(np.multiply(shape, spacing)) < SHORT_MM:
        found.append(("note", f"covers less than {SHORT_MM:g} mm along an axis"))
    return found


# ------------------------------------------------------------------ what a model was trained on


def summary(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a data set's fingerprint says of its scans, from what its table keeps of each.

    ``values``: the range over the scans of each of `Values`; ``modalities`` and ``body_parts``: how many
    scans say so; ``lungs`` and ``synthetic``: in or of how many of ``known`` scans.
    """
    known = [one for one in each if one]
    if not known:
        return {}
    values = np.asarray([one["values"] for one in known], np.float64)
    return {
        "known": len(known),
        "values": {
            name: [round(float(v), 3) for v in pick(values, axis=0)]
            for name, pick in (("least", np.min), ("median", np.median), ("greatest", np.max))
        },
        "modalities": dict(sorted(Counter(one["modality"] for one in known if one["modality"]).items())),
        "body_parts": dict(sorted(Counter(one["body_part"] for one in known if one["body_part"]).items())),
        "lungs": sum(bool(one["lungs"]) for one in known),
        "synthetic": sum(bool(one["synthetic"]) for one in known),
    }


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What a model was trained on, as far as it says.

    Attributes:
        cases: training scans.
        spacing, extent_mm: minimum and maximum (z, y, x) over the training scans, mm.
        values: minimum and maximum of each of `Values` over them.
        modalities, body_parts: those that DICOM named.
        lungs: share of the scans in which lungs were found.
        synthetic: share of the scans that are phantoms.
    """

    cases: int
    spacing: tuple[Triple, Triple]
    extent_mm: tuple[Triple, Triple]
    values: tuple[Values, Values]
    modalities: tuple[str, ...]
    body_parts: tuple[str, ...]
    lungs: float
    synthetic: float

    @classmethod
    def of(cls, kept: Any) -> TrainedOn | None:
        """From a store's `kept_by_model`; None where there is none, as in old models."""
        try:
            scans, count = kept["scans"], int(kept["scans"]["known"])
            read = cls(
                cases=count,
                spacing=_ends(kept["source_spacing"], 3),
                extent_mm=_ends(kept["extent_mm"], 3),
                values=_ends(scans["values"], 5),
                modalities=tuple(map(str, scans["modalities"])),
                body_parts=tuple(map(str, scans["body_parts"])),
                lungs=float(scans["lungs"]) / count,
                synthetic=float(scans["synthetic"]) / count,
            )
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError):
            return None
        return read if 0 <= read.lungs <= 1 and 0 <= read.synthetic <= 1 else None

    @property
    def chest(self) -> bool:
        """Whether its scans show lungs."""
        return self.lungs >= FEWEST_CASES

    @property
    def ct(self) -> bool:
        """Whether their values are HU: all of them reach down to air."""
        return self.values[1][0] < AIR_HU


def _ends(entry: Any, count: int) -> Any:
    """Minimum and maximum of what a fingerprint says of some quantity."""
    ends = tuple(tuple(float(v) for v in entry[name]) for name in ("least", "greatest"))
    if any(len(end) != count or not all(map(math.isfinite, end)) for end in ends):
        raise ValueError("not a range")
    return ends


def compared(one: About, trained: TrainedOn) -> list[Remark]:
    """How a scan differs from those that a model was trained on; none of it forbids predicting."""
    found: list[str] = []
    if trained.synthetic == 1 and not one.synthetic:
        found.append(
            "the model was trained on synthetic scans only; on real ones it is not to be relied upon"
        )
    if trained.chest and not one.lungs:
        found.append(f"no lungs found ({one.problem}), but the model was trained on chests")
    if one.modality and trained.modalities and one.modality not in trained.modalities:
        found.append(f"modality {one.modality}; the model was trained on {', '.join(trained.modalities)}")
    if one.body_part and trained.body_parts and not _same_part(one.body_part, trained.body_parts):
        found.append(f"body part {one.body_part}; the model was trained on {', '.join(trained.body_parts)}")
    found += _other_values(one, trained)
    for axis, name in enumerate("zyx"):
        step, (least, most) = one.spacing[axis], (end[axis] for end in trained.spacing)
        if not least / FINER <= step <= most * COARSER:
            found.append(
                f"spacing {step:.3g} mm along {name}; the model was trained on {_range(least, most)} mm"
            )
    for axis, name in enumerate("zyx"):
        reach, (least, most) = one.extent_mm[axis], (end[axis] for end in trained.extent_mm)
        if not least / OTHER_EXTENT <= reach <= most * OTHER_EXTENT:
            found.append(
                f"covers {reach:.0f} mm along {name}; the model was trained on {_range(least, most)} mm"
            )
    return [("warning", text) for text in found]


def _same_part(part: str, known: Sequence[str]) -> bool:
    """Scanners write CHEST, THORAX or CHEST_ABDOMEN for much the same: any part of a name will do."""
    names = [name.upper().replace("THORAX", "CHEST") for name in (part, *known)]
    return any(name in names[0] or names[0] in name for name in names[1:])


def _other_values(one: About, trained: TrainedOn) -> list[str]:
    least, greatest = trained.values
    if trained.ct:
        return list(_other_hu(one.values, least, greatest))
    if not least[3] / OTHER_SCALE <= one.values[3] <= greatest[3] * OTHER_SCALE:
        known = _range(least[3], greatest[3])
        return [f"99 % of its values are up to {one.values[3]:g}; of those trained on, up to {known}"]
    return []


def _other_hu(values: Values, least: Values, greatest: Values) -> Iterator[str]:
    """In what the histogram is unlike those trained on: another unit, offset or contrast."""
    named = (
        (1, "darkest 1 % of its voxels: up to", DARK_HU),
        (2, "median", MEDIAN_HU),
        (3, "brightest 1 % of its voxels: from", BRIGHT_HU),
    )
    for at, what, tolerance in named:
        low, value, high = (max(v, PADDING_HU) for v in (least[at], values[at], greatest[at]))
        if not low - tolerance <= value <= high + tolerance:
            yield f"{what} {value:g} HU; the model was trained on scans of {_range(low, high)} HU"


def _range(least: float, most: float) -> str:
    low, high = f"{least:.4g}", f"{most:.4g}"
    return low if low == high else f"{low} to {high}"


def against(one: About, trained: Sequence[TrainedOn | None], *, low: float, depth: int) -> list[Remark]:
    """What speaks against predicting a scan with a model: errors and warnings, each once.

    Args:
        trained: what each of its networks was trained on; None of one that does not say.
        low: the lower clipping value of its first network.
        depth: slices of its windows.
    """
    known = [facts for facts in trained if facts is not None]
    ct = any(facts.ct for facts in known) if known else low < UNKNOWN_HU
    found: list[Remark] = [("error", text) for text in (_too_thin(one, known) if depth > 1 else [])]
    found += [(severity, text) for severity, text in remarks(one, ct=ct) if severity != "note"]
    if any(severity == "error" for severity, _ in found):
        return found
    for facts in known:
        found += compared(one, facts)
    if not known and ct:
        notes = [
            text for severity, text in remarks(one) if severity == "note" and "times as long" not in text
        ]
        found += [("warning", f"{text}; the model does not say what it was trained on") for text in notes]
    return list(dict.fromkeys(found))


def _too_thin(one: About, known: Sequence[TrainedOn]) -> list[str]:
    """Where it has too few slices for a 3-D network that has learnt on larger scans."""
    if any(min(facts.extent_mm[0]) <= min(one.extent_mm) for facts in known):
        return []
    if min(one.shape) < FEWEST_SLICES:
        return [f"{' x '.join(map(str, one.shape))} voxels: too few slices for a 3-D model"]
    if min(one.extent_mm) < SLAB_MM:
        return [f"covers only {min(one.extent_mm):.2g} mm along an axis"]
    return []
