"""From scans and masks to the training store: parallel, resumable, and no broken case stops the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from voxelscale.channels import AIR_HU, ONE_CT, Channel
from voxelscale.config import PrepareConfig, ReadingConfig
from voxelscale.config.renamed import with_first_names
from voxelscale.console import count, notice, warn
from voxelscale.dataset.classes import digested
from voxelscale.dataset.folds import Fold, kfold
from voxelscale.dataset.listing import Source
from voxelscale.dataset.reading import read_case, read_image, read_lattice, read_more
from voxelscale.dataset.stamps import label_stamp, source_stamp
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_csv
from voxelscale.geometry import SAME_MM, Grid, Scan, Triple, as_lps, resample
from voxelscale.lungs import lung_field, no_lungs
from voxelscale.parallel import map_processes
from voxelscale.store import (
    VOXELS_PER_LESION,
    CaseInfo,
    Store,
    read_info,
    write_case,
    write_table,
)
from voxelscale.store.channels import Kept, keep
from voxelscale.store.fingerprint import SPLITS, fingerprint
from voxelscale.store.lesions import resample_labels
from voxelscale.store.plausible import about, implausible_hu
from voxelscale.store.spacing import target_spacing

Made = TypeVar("Made")
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
    sources: Sequence[Source],
    out: Path,
    config: PrepareConfig,
    reading: ReadingConfig = READING,
    folds: Sequence[Fold] = (),
) -> Preparation:
    """Read, check, resample and store every case; then the table, the split and the fingerprint.

    Run again with the same arguments it keeps what is whole and unchanged.

    Args:
        sources: the cases, as `voxelscale.dataset.DataSet` lists them.
        out: the store's folder, made where it is not there.
        reading: how the cases are read.
        folds: of the data set itself; (): by `config.folds`.

    Raises:
        VoxelscaleError: no case could be prepared at all, or the channels are not as many as
            `config.normalisation` says.
    """
    sources = [replace(source, channels=_channels(source, config)) for source in sources]
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
    _warn_of_doubts(infos, sources[0].channels[0])
    failures = tuple((case, *failed[case]) for case in sorted(failed))
    if not infos:
        raise _none_prepared(failed)
    infos, folds = divided(infos, sources, config, folds)
    write_csv(out / FINDINGS, _finding_rows(infos))
    write_table(
        Store(
            path=out,
            spacing=spacing,
            fingerprint=fingerprint(infos),
            cases=tuple(infos),
            classes=sources[0].classes,
            channels=sources[0].channels,
            folds=tuple(folds),
        )
    )
    return Preparation(done=tuple(infos), kept=len(kept), failed=failures)


def divided(
    infos: Sequence[CaseInfo], sources: Sequence[Source], config: PrepareConfig, folds: Sequence[Fold]
) -> tuple[list[CaseInfo], list[Fold]]:
    """The cases with their split, and the folds: as the data set says, or else as `config` does.

    Args:
        folds: of the data set. The store's own split is then that of the first, and what is in none of its
            lists is for testing.
    """
    said, order = {source.case: source.split for source in sources}, _order(sources)
    if any(said.values()):
        infos = [replace(info, split=said[info.case]) for info in infos]
        notice("split as the data set's table says")
    elif folds:
        of = folds[0].split_of
        infos = [replace(info, split=of.get(info.case, "test")) for info in infos]
        notice(f"{count(len(folds), 'fold')} as the data set says; data.fold chooses one, null is fold 0")
    else:
        infos = assign_splits(infos, config.split, config.seed, order)
        _warn_of_empty_splits(infos, config.split)
    if not folds and config.folds:
        patients = {info.case: info.patient for info in infos if info.split != "test"}
        folds = kfold(patients, config.folds, config.seed, order)
        notice(f"{count(len(folds), 'fold')} by patient; data.fold chooses one")
    return list(infos), list(folds)


def _channels(source: Source, config: PrepareConfig) -> tuple[Channel, ...]:
    """The source's channels with the normalisation that is asked for.

    Raises:
        VoxelscaleError: it is asked for another number of channels.
    """
    wanted, channels = config.normalisation, source.channels
    if not wanted:
        return channels
    if len(wanted) != len(channels):
        names = ", ".join(channel.name for channel in channels)
        raise VoxelscaleError(
            f"config: prepare.normalisation has {len(wanted)} entries",
            f"give one for each channel: {names}",
        )
    return tuple(replace(one, scheme=scheme) for one, scheme in zip(channels, wanted, strict=True))


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


def _warn_of_doubts(infos: Sequence[CaseInfo], channel: Channel) -> None:
    """Say which scans cannot be CT though they are taken for it, and which masks may hold an organ, too."""
    no_hu = {
        info.case: text
        for info in infos
        if channel.scheme == "ct" and info.scan
        for severity, text in implausible_hu(info.scan["values"])
        if severity == "error"
    }
    if no_hu:
        case, text = next(iter(no_hu.items()))
        of = f"{len(no_hu)} of {count(len(infos), 'scan')}"
        named = f"name what it is, as reading.channels=[MR] (now {channel.name})"
        warn(f"{of} taken for CT but not in HU, such as {case}: {text}; {named}")
    if several := [info for info in infos if info.touching]:
        shown = ", ".join(map(str, several[0].touching[:MOST_SHOWN]))
        of = f"{len(several)} of {count(len(infos), 'mask')}"
        warn(
            f"{of} with values that touch each other, such as {shown} in {several[0].case}: all count as "
            "lesion; where some are organs choose, as reading.labels=[2], or name classes, as "
            "reading.labels={organ: 1, tumour: 2}"
        )


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
    # First: a file that changes meanwhile is noticed next time.
    key = source_key(source, config, reading, spacing)
    as_is = read_image(source, reading)
    axes = axis_codes(as_is.grid)
    image, labels = read_case(source, reading, as_is)
    del as_is  # what was flipped is a copy
    grid = image.grid.with_spacing(spacing)
    stored, kept = on_grid([image, *read_more(source, reading)], source.channels, grid)
    label = resample_labels(labels.mask, grid, source.classes, keep_small=config.keep_small)
    if label.lost and not label.lesions:
        raise VoxelscaleError(f"{source.label_names}: the mask vanishes at {spacing} mm", TO_KEEP)
    voxel = float(np.prod(spacing))
    is_ct = source.channels[0].scheme == "ct"
    lungs = lung_field(Scan(stored[0], grid.affine)) if is_ct else no_lungs(grid.shape, "not a CT")
    of_ct = [
        _intensities(array[label.array > 0]) if channel.scheme == "ct" else {}
        for array, channel in zip(stored, source.channels, strict=True)
    ]
    info = CaseInfo(
        case=source.case,
        patient=source.patient,
        shape=grid.shape,
        affine=tuple(tuple(row) for row in grid.affine.tolist()),
        source_spacing=image.spacing,
        lesion_volumes_mm3=tuple(round(len(flat) * voxel, 3) for flat in label.lesions),
        lesion_classes=() if source.classes.single else tuple(label.classes),
        intensities=of_ct[0],
        channels=() if source.channels == ONE_CT else kept,
        channel_hu=() if len(stored) == 1 else tuple(of_ct),
        key=key,
        lungs=lungs.box if config.lungs and lungs.ok else None,
        findings=tuple(asdict(finding) for finding in labels.findings),
        axes=axes,
        lost=label.lost,
        merged=label.merged,
        cut=label.cut,
        scan=about(image, lungs, source).kept(),
        touching=labels.touching,
    )
    thinned = [_thin(flat) for flat in label.lesions]
    write_case(out, info, np.stack(stored), label.array, thinned, config.chunk)
    return info


def on_grid(
    scans: Sequence[Scan], channels: Sequence[Channel], grid: Grid
) -> tuple[list[NDArray[np.int16]], tuple[Kept, ...]]:
    """The channels of a case as they are stored, at the voxels of a lattice: resampled linearly.

    Args:
        scans: one a channel, each on a lattice of its own; the first's is turned as `grid` is.
    """
    stored = [
        keep(_values_on(scan, channel, grid), channel)
        for scan, channel in zip(scans, channels, strict=True)
    ]
    return [array for array, _ in stored], tuple(kept for _, kept in stored)


def _values_on(scan: Scan, channel: Channel, grid: Grid) -> NDArray[Any]:
    if scan.grid.same_as(grid, SAME_MM):
        return scan.array
    fill = AIR_HU if channel.scheme == "ct" else float(scan.array.min())
    return resample(scan, grid, "linear", fill=fill, as_float=True).array


def resample_hu(image: Scan, spacing: Triple) -> Scan:
    """A CT (LPS) as a network sees it: at `spacing` (z, y, x) mm, linearly, whole HU as int16."""
    grid = image.grid.with_spacing(spacing)
    return Scan(on_grid([image], ONE_CT, grid)[0][0], grid.affine)


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
    undivided = replace(config, split=(1, 0, 0), seed=0, splits="", folds=0)
    sections = {
        "prepare": asdict(replace(undivided, workers=0, plan=False, memory_gib=0)),
        "reading": asdict(reading) | {"names": "", "name_key": ""},
    }
    shaping = {key: value for keys in with_first_names(sections).values() for key, value in keys.items()}
    if not reading.select:
        del shaping["select"]  # of stores from before there was a choice
    classes, in_hu = digested(source.classes, reading), [one.scheme == "ct" for one in source.channels]
    parts = [source_stamp(source), label_stamp(source)], source.patient, source.series, classes
    # What is kept of a channel goes by its kind; one CT is not mentioned, as in earlier stores.
    kinds = [] if in_hu == [True] else [in_hu]
    return digest_of([*parts, list(spacing), shaping, *kinds])[:16]


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
