"""From scans and masks to the training store: parallel, resumable, and no broken case stops the rest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from voxelscale.config import PrepareConfig, ReadingConfig
from voxelscale.console import count, notice, warn
from voxelscale.dataset.listing import Source
from voxelscale.dataset.reading import read_case, read_image, read_lattice
from voxelscale.dataset.stamps import label_stamp, source_stamp
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_csv
from voxelscale.geometry import SAME_MM, Grid, Scan, Triple, as_lps, resample, sphere_diameter
from voxelscale.lungs import lung_field
from voxelscale.parallel import map_processes
from voxelscale.store import (
    AIR_HU,
    VOXELS_PER_LESION,
    CaseInfo,
    read_info,
    write_case,
    write_table,
)
from voxelscale.store.lesions import resample_mask
from voxelscale.store.plausible import about, summary
from voxelscale.store.spacing import target_spacing

Made = TypeVar("Made")
SPLITS = ("train", "val", "test")
READING = ReadingConfig()

FINDINGS = "findings.csv"
"""Beside the store's table."""

TO_KEEP = "choose a finer prepare.spacing, or keep a voxel of each: prepare.keep_small=true"
MOST_SHOWN = 5
"""Lost lesions of a case that a warning lists; its entry in the store has all."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What became of a preparation.

    Attributes:
        done: the cases now in the store.
        kept: how many of them were there already.
        failed: case, error and hint of each that is not.
    """

    done: tuple[CaseInfo, ...]
    kept: int
    failed: tuple[tuple[str, str, str], ...]


def prepare(
    sources: Sequence[Source], out: Path, config: PrepareConfig, reading: ReadingConfig = READING
) -> Preparation:
    """Read, check, resample and store every case; then the table, the split and the fingerprint.

    Run again with the same arguments it keeps what is whole and unchanged.

    Args:
        sources: the cases, as `voxelscale.dataset.DataSet` lists them.
        out: the store's folder, made where it is not there.
        reading: how the cases are read.

    Raises:
        VoxelscaleError: no case could be prepared at all.
    """
    failed: dict[str, tuple[str, str]] = {}
    surveyed = (
        [] if config.spacing else _each(sources, partial(survey, reading=reading), "survey", config, failed)
    )
    good = [source for source in sources if source.case not in failed]
    if not good:
        raise _none_prepared(failed)
    spacing, why = config.spacing, "as prepare.spacing says"
    if spacing is None:
        spacing, why = target_spacing([g.spacing for g in surveyed], [g.shape for g in surveyed])
    notice(f"spacing {' x '.join(f'{s:g}' for s in spacing)} mm (z, y, x): {why}")
    kept = {s.case: info for s in good if (info := _kept(s, out, config, reading, spacing))}
    todo = [source for source in good if source.case not in kept]
    work = partial(prepare_case, config=config, reading=reading, out=out, spacing=spacing)
    made = _each(todo, work, "prepare", config, failed)
    infos = sorted([*kept.values(), *made], key=lambda info: info.case)
    for info in infos:
        size, found = " x ".join(map(str, info.shape)), count(len(info.lesion_volumes_mm3), "lesion")
        notice(f"{info.case}: {size} voxels, {found}{', kept' * (info.case in kept)}", level=2)
        if config.lungs and info.lungs is None:
            notice(f"{info.case}: no lungs found; patches are drawn from the whole scan")
        _report_changed(info, spacing, config.keep_small)
    failures = tuple((case, *failed[case]) for case in sorted(failed))
    if not infos:
        raise _none_prepared(failed)
    infos = assign_splits(infos, config.split, config.seed, _order(sources))
    _warn_of_empty_splits(infos, config.split)
    write_csv(out / FINDINGS, _finding_rows(infos))
    write_table(out, spacing, fingerprint(infos), infos)
    return Preparation(done=tuple(infos), kept=len(kept), failed=failures)


def _report_changed(info: CaseInfo, spacing: Triple, kept: bool) -> None:
    """Say which lesions resampling lost, merged or cut."""
    size = " x ".join(f"{step:g}" for step in spacing)
    if info.lost:
        shown = ", ".join(
            f"{one['diameter_mm']:.1f} mm at ({', '.join(f'{v:.1f}' for v in one['centre'])})"
            for one in info.lost[:MOST_SHOWN]
        )
        more = f" and {len(info.lost) - MOST_SHOWN} more" if len(info.lost) > MOST_SHOWN else ""
        lesions = count(len(info.lost), "lesion")
        if kept:
            notice(f"{info.case}: kept by one voxel each at {size} mm: {lesions}: {shown}{more}")
        else:
            warn(
                f"{info.case}: too small for voxels of {size} mm, lost: {lesions}: {shown}{more}; {TO_KEEP}"
            )
    if info.merged or info.cut:
        joined = f"{info.merged} lie together with another" if info.merged else ""
        parted = f"{info.cut} fall into parts" if info.cut else ""
        changed, left = " and ".join(filter(None, (joined, parted))), len(info.lesion_volumes_mm3)
        notice(f"{info.case}: of the lesions at {size} mm {changed}: {count(left, 'lesion')} in the store")


def _warn_of_empty_splits(infos: Sequence[CaseInfo], shares: Triple) -> None:
    """Say where a share that was asked for got no scan: patients are not divided."""
    filled = {info.split for info in infos}
    empty = [name for name, share in zip(SPLITS, shares, strict=True) if share > 0 and name not in filled]
    if empty:
        scans, patients = count(len(infos), "scan"), count(len({i.patient for i in infos}), "patient")
        warn(
            f"no scan for {' and '.join(empty)}: {scans} of {patients} cannot be split as prepare.split "
            "says; add patients, or name them in a CSV with a column patient"
        )


def _order(sources: Sequence[Source]) -> dict[str, str]:
    """What patients are sorted by: hashed names are another for another key, series UIDs are not."""
    order: dict[str, str] = {}
    for source in sources:
        own = source.series or source.patient
        order[source.patient] = min(own, order.get(source.patient, own))
    return order


def _finding_rows(infos: Sequence[CaseInfo]) -> list[list[object]]:
    """What the labels hold beyond the masks: readers, small nodules, non-nodules, excluded findings."""
    rows: list[list[object]] = [["case", "kind", "x", "y", "z", "diameter_mm", "readers"]]
    for info in infos:
        for one in info.findings:
            size = "" if one["diameter_mm"] is None else round(one["diameter_mm"], 3)
            place = [round(v, 3) for v in one["centre"]]
            rows.append([info.case, one["kind"], *place, size, one["readers"]])
    return rows


def _none_prepared(failed: dict[str, tuple[str, str]]) -> VoxelscaleError:
    case, (message, hint) = min(failed.items())
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return VoxelscaleError(f"no case could be prepared; {case}: {message}{more}", hint)


def survey(source: Source, reading: ReadingConfig) -> Grid:
    """The lattice of a case's image, turned to LPS; only headers are read."""
    return as_lps(read_lattice(source, reading))[2]


def axis_codes(grid: Grid) -> str:
    """Where the x, y and z index axis point, to the nearest direction of the patient; as ``LPS``."""
    order, flipped, _ = as_lps(grid)
    codes = {axis: ("IS", "AP", "RL")[n][n not in flipped] for n, axis in enumerate(order)}
    return "".join(codes[axis] for axis in (2, 1, 0))


def prepare_case(
    source: Source, config: PrepareConfig, out: Path, spacing: Triple, reading: ReadingConfig = READING
) -> CaseInfo:
    """Read one case, resample it to `spacing`, and write its file.

    The image is turned to LPS, resampled linearly and rounded to int16 HU; the mask by nearest
    neighbour, so that it stays a mask.

    Raises:
        VoxelscaleError: the image or the mask is unfit; the message names the file.
    """
    key = source_key(
        source, config, reading, spacing
    )  # first: a file that changes meanwhile is noticed next time
    as_is = read_image(source, reading)
    axes = axis_codes(as_is.grid)
    image, labels = read_case(source, reading, as_is)
    del as_is  # what was flipped is a copy
    hu = resample_hu(image, spacing)
    target = hu.grid
    label = resample_mask(labels.mask, target, config.keep_small)
    if label.lost and not label.lesions:
        raise VoxelscaleError(f"{source.label_names}: the mask vanishes at {spacing} mm", TO_KEEP)
    voxel = float(np.prod(spacing))
    lungs = lung_field(hu)
    info = CaseInfo(
        case=source.case,
        patient=source.patient,
        shape=target.shape,
        affine=tuple(tuple(row) for row in target.affine.tolist()),
        source_spacing=image.spacing,
        lesion_volumes_mm3=tuple(round(len(flat) * voxel, 3) for flat in label.lesions),
        intensities=_intensities(hu.array[label.array > 0]),
        key=key,
        lungs=lungs.box if config.lungs and lungs.ok else None,
        findings=tuple(asdict(finding) for finding in labels.findings),
        axes=axes,
        lost=label.lost,
        merged=label.merged,
        cut=label.cut,
        scan=about(image, lungs, source).kept(),
    )
    thinned = [_thin(flat) for flat in label.lesions]
    write_case(out, info, hu.array, label.array, thinned, config.chunk)
    return info


def resample_hu(image: Scan, spacing: Triple) -> Scan:
    """A scan (LPS) as a network sees it: at `spacing` (z, y, x) mm, linearly, whole HU as int16."""
    grid = image.grid.with_spacing(spacing)
    values = image.array
    if not image.grid.same_as(grid, SAME_MM):
        values = resample(image, grid, "linear", fill=AIR_HU, as_float=True).array
    hu = np.empty(grid.shape, np.int16)
    for plane, of_plane in zip(hu, values, strict=True):  # a scan's whole would be copied several times
        # Padding outside the scanner's circle comes as -2048 or -3024: air, too.
        plane[:] = np.clip(np.rint(of_plane), AIR_HU, 32767)
    return Scan(hu, grid.affine)


def _thin(flat: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(flat) <= VOXELS_PER_LESION:
        return flat
    return flat[np.linspace(0, len(flat) - 1, VOXELS_PER_LESION).round().astype(np.int64)]


def _intensities(values: NDArray[np.int16]) -> dict[str, float]:
    if not values.size:
        return {}
    low, mid, high = np.percentile(values, [0.5, 50, 99.5])
    numbers = {
        "count": values.size,
        "mean": values.mean(dtype=np.float64),
        "std": values.std(dtype=np.float64),
        "percentile_00_5": low,
        "percentile_50": mid,
        "percentile_99_5": high,
    }
    return {name: round(float(value), 3) for name, value in numbers.items()}


def fingerprint(cases: Sequence[CaseInfo]) -> dict[str, Any]:
    """What a training needs to know of the data set, from its training cases (all, if there are none).

    ``lesion_hu``: mean, std and percentiles of the lesions' HU, pooled over cases weighted by their
    voxels (percentiles: the minimum and maximum over cases, so that none is clipped);
    ``lesion_volume_mm3``: count and quartiles; ``lesion_diameter_mm`` (of the sphere of the same volume)
    and ``lesions_per_case``: quartiles; ``source_spacing`` and ``extent_mm``: minimum, median and maximum
    (z, y, x) of the scans as they came and of what they cover; ``orientations``: how many files have
    which axes (`axis_codes`); ``scans``: what they are (`voxelscale.store.plausible.summary`); ``digest``:
    of all cases' keys, by which a resumed run knows its data.
    """
    used = [c for c in cases if c.split == "train"] or list(cases)
    volumes = [v for c in used for v in c.lesion_volumes_mm3]
    spacings = np.asarray([c.source_spacing for c in used])
    extents = np.asarray([np.multiply(c.shape, c.grid.spacing) for c in used])
    digest = hashlib.sha256("\n".join(f"{c.case} {c.split} {c.key}" for c in cases).encode()).hexdigest()
    return {
        "cases": {name: sum(c.split == name for c in cases) for name in SPLITS},
        "patients": len({c.patient for c in cases}),
        "lesion_hu": _pooled([c.intensities for c in used if c.intensities]),
        "lesion_volume_mm3": {
            "count": len(volumes),
            "quartiles": _quartiles(volumes),
        },
        "lesion_diameter_mm": _quartiles([sphere_diameter(volume) for volume in volumes]),
        "lesions_per_case": _quartiles([len(c.lesion_volumes_mm3) for c in used]),
        "orientations": dict(sorted(Counter(c.axes for c in used).items())),
        "source_spacing": _range(spacings, 4),
        "extent_mm": _range(extents, 1),
        "scans": summary([c.scan for c in used]),
        "digest": digest[:16],
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    """Minimum, quartiles and maximum; [] of nothing."""
    return [round(float(q), 1) for q in np.percentile(values, [0, 25, 50, 75, 100])] if values else []


def _range(values: NDArray[np.float64], digits: int) -> dict[str, list[float]]:
    return {
        name: [round(float(v), digits) for v in pick(values, axis=0)]
        for name, pick in (("least", np.min), ("median", np.median), ("greatest", np.max))
    }


def _pooled(each: Sequence[dict[str, float]]) -> dict[str, float]:
    if not each:
        # A data set without lesions: lung to soft tissue, so that normalising is still defined.
        return {"mean": -400.0, "std": 400.0, "percentile_00_5": -1000.0, "percentile_99_5": 400.0}
    weights = np.asarray([e["count"] for e in each])
    means, stds = (np.asarray([e[name] for e in each]) for name in ("mean", "std"))
    mean = np.average(means, weights=weights)
    variance = np.average(stds**2 + (means - mean) ** 2, weights=weights)
    return {
        "mean": round(float(mean), 3),
        "std": round(max(float(np.sqrt(variance)), 1.0), 3),
        "percentile_00_5": min(e["percentile_00_5"] for e in each),
        "percentile_99_5": max(e["percentile_99_5"] for e in each),
    }


def assign_splits(
    cases: Sequence[CaseInfo], shares: Triple, seed: int, order: Mapping[str, str] | None = None
) -> list[CaseInfo]:
    """The cases with their split: patients shuffled by `seed`, then dealt out by `shares`.

    Every split with a share above 0 gets at least one patient while there are enough of them,
    training first.

    Args:
        order: what to sort the patients by before they are shuffled, where it is not their name.
    """
    order = order or {}
    patients = sorted({info.patient for info in cases}, key=lambda patient: order.get(patient, patient))
    shuffled = np.random.Generator(np.random.Philox(key=seed)).permutation(len(patients))
    wanted = np.asarray(shares) / sum(shares)
    counts = np.floor(wanted * len(patients)).astype(int)
    while counts.sum() < len(patients):
        unserved = [i for i in range(3) if wanted[i] > 0 and counts[i] == 0]
        short = wanted * len(patients) - counts
        counts[unserved[0] if unserved else int(np.argmax(short))] += 1
    names = np.repeat(SPLITS, counts)
    split_of = {patients[i]: str(name) for i, name in zip(shuffled, names, strict=True)}
    return [replace(info, split=split_of[info.patient]) for info in cases]


def source_key(source: Source, config: PrepareConfig, reading: ReadingConfig, spacing: Triple) -> str:
    """A digest of what shapes a stored case: all files behind image and labels, and the preparation."""
    shaping = asdict(replace(config, split=(1, 0, 0), seed=0, workers=0, plan=False, memory_gib=0))
    shaping |= asdict(reading) | {"names": "", "name_key": ""}
    if not reading.select:
        del shaping["select"]  # of stores from before there was a choice
    files = [source_stamp(source), label_stamp(source)]
    return digest_of([files, source.patient, source.series, source.values, list(spacing), shaping])[:16]


def _kept(
    source: Source, out: Path, config: PrepareConfig, reading: ReadingConfig, spacing: Triple
) -> CaseInfo | None:
    info = read_info(out, source.case)
    return info if info is not None and info.key == source_key(source, config, reading, spacing) else None


def _each(
    sources: Sequence[Source],
    work: Callable[[Source], Made],
    label: str,
    config: PrepareConfig,
    failed: dict[str, tuple[str, str]],
) -> list[Made]:
    """`work(source)` for every source, over processes; faults go to `failed`."""
    results = []
    for source, made in map_processes(
        work, sources, label=label, name=lambda source: source.case, workers=config.workers
    ):
        if isinstance(made, VoxelscaleError):
            failed[source.case] = (made.message, made.hint)
        else:
            results.append(made)
    return results
