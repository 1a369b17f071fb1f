"""An overview of a data set before it is prepared: what it holds, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.channels import ONE_CT, Channel
from voxelscale.classes import LESION, Classes
from voxelscale.config import ReadingConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.reading import labels_of, read_image, read_more
from voxelscale.errors import VoxelscaleError
from voxelscale.geometry import IntTriple, Scan, Triple, equivalent_diameter, reorient
from voxelscale.labels.stored import MOST_SHOWN
from voxelscale.lungs import lung_field, no_lungs
from voxelscale.parallel import map_processes
from voxelscale.store import CaseInfo, Store, open_store
from voxelscale.store.channels import Kept
from voxelscale.store.fingerprint import SPLITS
from voxelscale.store.lesions import lesion_voxels
from voxelscale.store.plausible import Remark, Severity, Values, about, remarks, spread
from voxelscale.store.prepare import axis_codes
from voxelscale.store.spacing import target_spacing

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
HU_EDGES = tuple(range(-1200, 1801, 50))
"""Of the histogram; what lies outside counts to the first and last bin."""
BINS = 64
"""Of the histogram of a channel that is no CT, from its minimum to its maximum."""
THUMBNAIL = 224
"""Pixels along the longer edge, at most."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that a person should check.

    Attributes:
        severity: ``error``: prepare refuses it, or what is learnt from it is wrong; ``warning``: likely
            a mistake; ``note``: good to know.
        case: whose; "" of the data set as a whole.
        text: what, without the case's name.
    """

    severity: Severity
    case: str
    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Thumbnail:
    """The axial slice that has most of the largest lesion, small.

    Attributes:
        pixels: HU (rows, columns), or the values of what is no CT.
        mask: stored labels of the same shape, every lesion in the slice.
        spacing: mm between rows, and between columns.
        window: values from black to white of what is no CT.
    """

    pixels: NDArray[Any]
    mask: NDArray[Any]
    spacing: tuple[float, float]
    window: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ChannelFacts:
    """What one channel of a case is.

    Attributes:
        name, scheme: as of `voxelscale.channels.Channel`.
        values: minimum, 1st percentile, median, 99th percentile and maximum, in its own unit.
        histogram: counts in `BINS` equal bins from the minimum to the maximum.
    """

    name: str
    scheme: str
    values: Values
    histogram: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one case is.

    Attributes:
        case, patient: as the listing has them; the patient is for grouping only and shown nowhere.
        shape, spacing: voxels and mm (z, y, x), once turned to LPS.
        axes: where the file's own x, y and z axis point, as ``LPS``.
        hu: minimum, 1st percentile, median, 99th percentile and maximum; of the first channel in its own
            unit, where it is no CT.
        labelled: whether there is a mask.
        lesions_mm3: volumes, largest first; of several classes of every component of each.
        all_mm3: volume of all that is of any class; what is in several regions counts once.
        lungs_ml: volume of the lungs, or None where they were not found.
        digest: of the voxels' values, whatever the file or format.
        histogram: counts between `HU_EDGES`; () where the first channel is no CT.
        problems: of this case alone.
        thumbnail: None where the case has no lesion.
        classes: what its labels distinguish.
        classes_mm3: of each of several classes the volumes of its components, largest first.
        channels: of several channels each; of one that is no CT this one; () of one CT.
    """

    case: str
    patient: str
    shape: IntTriple
    spacing: Triple
    axes: str
    hu: tuple[float, float, float, float, float]
    labelled: bool
    lesions_mm3: tuple[float, ...]
    all_mm3: float
    lungs_ml: float | None
    digest: str
    histogram: tuple[int, ...] = field(repr=False)
    problems: tuple[Problem, ...]
    thumbnail: Thumbnail | None = field(repr=False, compare=False)
    classes: Classes = LESION
    classes_mm3: tuple[tuple[float, ...], ...] = ()
    channels: tuple[ChannelFacts, ...] = ()

    @property
    def diameters_mm(self) -> list[float]:
        """Equivalent diameters of the lesions, largest first."""
        return [equivalent_diameter(volume, self.shape, self.spacing) for volume in self.lesions_mm3]

    @property
    def is_ct(self) -> bool:
        """Whether the first channel holds HU."""
        return not self.channels or self.channels[0].scheme == "ct"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a data set is.

    Attributes:
        kind: ``data set`` or ``store``.
        cases: those that could be read, by name.
        problems: the most severe first.
        unreadable: the other cases, each with its error.
    """

    kind: str
    cases: tuple[Facts, ...]
    problems: tuple[Problem, ...]
    unreadable: tuple[Problem, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without pictures and patients."""
        cases = [_plain(facts) for facts in self.cases]
        unreadable = [{"case": problem.case, "error": problem.text} for problem in self.unreadable]
        problems = [asdict(problem) for problem in self.problems]
        return {"kind": self.kind, "cases": cases, "unreadable": unreadable, "problems": problems}


def inspect(data: DataSet, workers: int = 0) -> Inspection:
    """Look at every case, in parallel; a broken one becomes a problem and stops nothing.

    Args:
        data: a data set, plain scans, or a store that `prepare` wrote.
        workers: parallel processes; 0: one a core.

    Raises:
        VoxelscaleError: there is no data set.
    """
    facts: list[Facts] = []
    problems: list[Problem] = []
    sources: Sequence[Source] = ()
    path = data.path
    if (path / "dataset.json").is_file() and (path / "cases").is_dir():
        store = open_store(path)
        kind, splits = "store", {name: [c.case for c in store.split(name)] for name in SPLITS}
        results = _gather(partial(look_at_stored, store), store.cases, lambda info: info.case, workers)
    else:
        kind, splits = "data set", declared_split(path)
        sources = data.cases_or_scans
        results = _gather(
            partial(look_at, reading=data.reading), sources, lambda source: source.case, workers
        )
    for name, result in results:
        if isinstance(result, VoxelscaleError):
            problems.append(Problem(severity="error", case=name, text=result.message))
        else:
            facts.append(result)
            problems += result.problems
    facts.sort(key=lambda one: one.case)
    problems += [*duplicates(facts), *across_splits(facts, splits), *_vanishing(facts)]
    # The page may be shared; it must not show where the data are on this machine.
    problems = _without_places(problems, data, sources)
    readable = {one.case for one in facts}
    unreadable = sorted(
        (p for p in problems if p.severity == "error" and p.case and p.case not in readable),
        key=lambda p: p.case,
    )
    problems.sort(key=lambda p: (SEVERITIES.index(p.severity), p.case, p.text))
    return Inspection(kind=kind, cases=tuple(facts), problems=tuple(problems), unreadable=tuple(unreadable))


def _without_places(problems: Sequence[Problem], data: DataSet, sources: Sequence[Source]) -> list[Problem]:
    """The problems with files relative to the data set; cases that are not named after files by name alone.

    Folders of DICOM archives are often named after the patient: no message says where such a case lies.
    """
    renamed = data.reading.names in ("hash", "series")
    hidden = {s.case: s for s in sources if s.files or renamed}
    bare = []
    for problem in problems:
        text, source = problem.text, hidden.get(problem.case)
        if source is not None:
            places = {file: f"file {n} of {source.case}" for n, file in enumerate(source.files, start=1)}
            places[source.image] = source.case
            places |= {label: f"the label of {source.case}" for label in source.labels}
            numbered = enumerate(source.more, start=2)
            places |= {path: f"channel {number} of {source.case}" for number, path in numbered}
            for place in sorted(places, key=lambda path: -len(str(path))):  # one may begin another
                text = text.replace(str(place), places[place])
        bare.append(replace(problem, text=text.replace(f"{data.path}/", "")))
    return bare


def look_at(source: Source, reading: ReadingConfig) -> Facts:
    """Read one case of a data set.

    Raises:
        VoxelscaleError: its image is unfit; a fault of its mask becomes a problem.
    """
    raw = read_image(source, reading)
    image, problems = reorient(raw), []
    mask, more = None, list[Scan]()
    if not source.labels:
        problems.append(Problem(severity="note", case=source.case, text="has no mask"))
    else:
        try:
            labels = labels_of(source, raw, reading)
            mask = reorient(labels.mask).array
            if labels.touching:
                shown = ", ".join(map(str, labels.touching[:MOST_SHOWN]))
                text = f"values {shown} of its mask touch each other, and all count as lesion"
                problems.append(Problem(severity="warning", case=source.case, text=text))
        except VoxelscaleError as error:
            problems.append(Problem(severity="error", case=source.case, text=error.message))
    if len(source.channels) > 1:
        try:
            more = read_more(source, reading, raw.grid)
        except VoxelscaleError as error:
            problems.append(Problem(severity="error", case=source.case, text=error.message))
    names = (source.case, source.patient, axis_codes(raw.grid))
    return describe(
        names,
        image,
        mask,
        problems,
        labelled=bool(source.labels),
        classes=source.classes,
        channels=source.channels,
        more=[scan.array for scan in more],
    )


def look_at_stored(store: Store, info: CaseInfo) -> Facts:
    """Read one case of a store."""
    stored, mask = store.read_channels(info.case)
    kept = info.channels or [None] * len(stored)
    first, *more = (_in_own_unit(array, how) for array, how in zip(stored, kept, strict=True))
    return describe(
        (info.case, info.patient, axis_codes(info.grid)),
        Scan(first, info.grid.affine),
        mask,
        [],
        labelled=True,
        classes=store.classes,
        channels=store.channels,
        more=more,
    )


def _in_own_unit(stored: NDArray[np.int16], kept: Kept | None) -> NDArray[Any]:
    """A channel as it was before it was kept; None: it holds HU."""
    if kept is None or (kept.scale, kept.offset) == (1.0, 0.0):
        return stored
    return (stored * kept.scale + kept.offset).astype(np.float32)


def describe(
    names: tuple[str, str, str],
    image: Scan,
    mask: NDArray[Any] | None,
    problems: Iterable[Problem],
    *,
    labelled: bool,
    classes: Classes = LESION,
    channels: Sequence[Channel] = ONE_CT,
    more: Sequence[NDArray[Any]] = (),
) -> Facts:
    """The facts of a case and what is wrong with it.

    Args:
        names: case, patient, and the axes' codes.
        image: the first channel, turned to LPS.
        mask: stored labels on the image's voxels, or None.
        problems: known already.
        classes: what the labels distinguish.
        channels: what the image's are.
        more: values of the channels after the first that could be read, on their own voxels.
    """
    case, patient, axes = names
    of_class = class_voxels(classes, mask) if mask is not None else [[] for _ in classes.names]
    lesions = sorted((one for own in of_class for one in own), key=lambda one: (-len(one), int(one[0])))
    voxel = image.grid.voxel_mm3
    is_ct = channels[0].scheme == "ct"
    lungs = lung_field(image) if is_ct else no_lungs(image.grid.shape, "not a CT")
    what = about(image, lungs)
    found = [*remarks(what, ct=is_ct), *_of_mask(mask, lesions, classes)]
    if lungs.ok and lesions and classes.single:
        flat = lungs.mask.ravel()
        outside = sum(not flat[voxels].any() for voxels in lesions)
        if outside:
            found.append(("warning", f"{outside} of {len(lesions)} lesions lie outside the lungs"))
    counts = _hu_histogram(image.array) if is_ct else ()
    usual = len(channels) == 1 and is_ct
    return Facts(
        case=case,
        patient=patient,
        shape=image.grid.shape,
        spacing=image.spacing,
        axes=axes,
        hu=what.values,
        labelled=labelled,
        lesions_mm3=_volumes(lesions, voxel),
        all_mm3=round(np.count_nonzero(mask > 0) * voxel, 3) if mask is not None else 0.0,
        lungs_ml=round(lungs.volume_ml, 1) if lungs.ok else None,
        digest=_digest(image.array, *more),
        histogram=counts,
        problems=(*problems, *(Problem(severity=s, case=case, text=t) for s, t in found)),
        thumbnail=_thumbnail(image, mask, lesions[0], what.values, is_ct=is_ct)
        if mask is not None and lesions
        else None,
        classes=classes,
        classes_mm3=() if classes.single else tuple(_volumes(own, voxel) for own in of_class),
        channels=()
        if usual
        else tuple(channel_facts(*pair) for pair in zip(channels, [image.array, *more], strict=False)),
    )


def class_voxels(classes: Classes, stored: NDArray[Any]) -> list[list[NDArray[np.int64]]]:
    """Of each class flat (C-order) voxel indices of its 26-connected components, largest first."""
    if classes.regions:
        return [lesion_voxels(there.astype(np.uint8)) for _, there in classes.each(stored)]
    groups: list[list[NDArray[np.int64]]] = [[] for _ in classes.names]
    for voxels in lesion_voxels(stored) if (stored > 0).any() else []:
        groups[int(stored.flat[voxels[0]]) - 1].append(voxels)
    return groups


def channel_facts(channel: Channel, values: NDArray[Any]) -> ChannelFacts:
    """What one channel (z, y, x) of a case is, in its own unit."""
    counts, _ = np.histogram(values, BINS)
    return ChannelFacts(
        name=channel.name,
        scheme=channel.scheme,
        values=spread(values),
        histogram=tuple(int(n) for n in counts),
    )


def _hu_histogram(hu: NDArray[Any]) -> tuple[int, ...]:
    counts, _ = np.histogram(np.clip(hu, HU_EDGES[0], HU_EDGES[-1]), HU_EDGES)
    return tuple(int(n) for n in counts)


def _volumes(lesions: Sequence[NDArray[np.int64]], voxel_mm3: float) -> tuple[float, ...]:
    return tuple(round(len(voxels) * voxel_mm3, 3) for voxels in lesions)


def _of_mask(
    mask: NDArray[Any] | None, lesions: Sequence[NDArray[np.int64]], classes: Classes
) -> list[Remark]:
    if mask is None:
        return []
    if not lesions:
        return [("warning", f"an empty mask: no voxel of a {_noun(classes)}")]
    single = sum(len(voxels) == 1 for voxels in lesions)
    what = f"{single} of {len(lesions)} {_noun(classes, of_several='component')}s are a single voxel"
    return [("warning", what)] if single else []


def _noun(classes: Classes, of_several: str = "class") -> str:
    return "lesion" if classes.single else of_several


def duplicates(facts: Sequence[Facts]) -> list[Problem]:
    """Cases that hold the very same voxels under several names."""
    same: dict[str, list[str]] = defaultdict(list)
    for one in facts:
        same[one.digest].append(one.case)
    return [
        Problem(severity="error", case=cases[0], text=f"has the same voxels as {', '.join(cases[1:])}")
        for cases in same.values()
        if len(cases) > 1
    ]


def across_splits(facts: Sequence[Facts], splits: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Patients, and copies of scans, on several sides of a split: what is measured is then too good."""
    side_of = {case: name for name, cases in splits.items() for case in cases}
    found = []
    for key, what in (("patient", "one patient"), ("digest", "the same voxels")):
        groups: dict[str, list[str]] = defaultdict(list)
        for one in facts:
            if one.case in side_of:
                groups[getattr(one, key)].append(one.case)
        for cases in groups.values():
            if len({side_of[case] for case in cases}) > 1:
                where = ", ".join(f"{case} ({side_of[case]})" for case in cases)
                text = f"{what} on several sides of the split: {where}"
                found.append(Problem(severity="error", case=cases[0], text=text))
    return found


def declared_split(data: Path) -> dict[str, list[str]]:
    """The first fold of nnU-Net's ``splits_final.json`` in the data set's folder, if it is there."""
    path = (data if data.is_dir() else data.parent) / "splits_final.json"
    try:
        if path.stat().st_size > 2**26:
            return {}
        fold = json.loads(path.read_text(encoding="utf-8"))[0]
        return {str(name): [str(case) for case in cases] for name, cases in fold.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _vanishing(facts: Sequence[Facts]) -> list[Problem]:
    """Lesions that take less than a voxel of the spacing that `prepare` would choose."""
    if not facts:
        return []
    spacing, _ = target_spacing([f.spacing for f in facts], [f.shape for f in facts])
    voxel = float(np.prod(spacing))
    found = []
    for one in facts:
        if small := sum(volume < 0.999 * voxel for volume in one.lesions_mm3):
            words = " x ".join(f"{s:g}" for s in spacing)
            noun = _noun(one.classes, of_several="component")
            text = f"{small} {noun}s smaller than a voxel of {words} mm, the data set's planned spacing"
            found.append(Problem(severity="warning", case=one.case, text=text))
    return found


def _thumbnail(
    image: Scan, mask: NDArray[Any], largest: NDArray[np.int64], values: Values, *, is_ct: bool
) -> Thumbnail:
    depth, rows, columns = image.array.shape
    z = int(np.argmax(np.bincount(largest // (rows * columns), minlength=depth)))
    step = max(1, -(-max(rows, columns) // THUMBNAIL))
    there = mask[z]
    missing = [(0, -n % step) for n in there.shape]
    blocks = np.pad(there, missing).reshape(-(-rows // step), step, -(-columns // step), step)
    pixels = image.array[z, ::step, ::step]
    pixels = np.clip(pixels, -2000, 3000).astype(np.int16) if is_ct else pixels.astype(np.float32)
    _, low, _, high, _ = values
    window = None if is_ct else (low, high if high > low else low + 1)
    # The maximum of a block: a lesion of one voxel must not get lost.
    spacing = (image.spacing[1] * step, image.spacing[2] * step)
    return Thumbnail(pixels=pixels, mask=blocks.max(axis=(1, 3)), spacing=spacing, window=window)


def _digest(*arrays: NDArray[Any]) -> str:
    """Of values and shapes; the same for float32 and int16 where the values are."""
    digest = hashlib.sha256()
    for array in arrays:
        whole = np.ascontiguousarray(array, np.float32)
        digest.update(repr(whole.shape).encode() + whole.tobytes())
    return digest.hexdigest()[:16]


def _gather(
    work: Callable[[Any], Facts], items: Sequence[Any], name: Callable[[Any], str], workers: int
) -> list[tuple[str, Facts | VoxelscaleError]]:
    done = map_processes(work, items, label="inspect", name=name, workers=workers)
    return [(name(item), result) for item, result in done]


def _plain(facts: Facts) -> dict[str, Any]:
    """A case as plain values; of one class and one CT channel there is nothing of either."""
    hidden = ("patient", "thumbnail", "problems", "histogram", "classes", "classes_mm3", "channels")
    names = ["values" if name == "hu" and not facts.is_ct else name for name in Facts.__dataclass_fields__]
    values = {
        name: getattr(facts, "hu" if name == "values" else name) for name in names if name not in hidden
    }
    values["diameters_mm"] = [round(diameter, 2) for diameter in facts.diameters_mm]
    if facts.classes_mm3:
        values["classes"] = dict(zip(facts.classes.names, facts.classes_mm3, strict=True))
    if facts.channels:
        values["channels"] = [
            {"name": one.name, "scheme": one.scheme, "values": one.values} for one in facts.channels
        ]
    return values
