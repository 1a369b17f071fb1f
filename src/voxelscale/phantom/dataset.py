"""Data sets of phantoms, and of scans with nodules put in, as ordinary files.

``images/``, ``labels/``, ``dataset.csv`` (what `voxelscale prepare` reads), ``nodules.csv`` (the truth
about every nodule) and ``phantom.json`` (what shaped them).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from voxelscale.config import Config, PhantomConfig
from voxelscale.dataset import DataSet, Source
from voxelscale.dataset.classes import digested, settled
from voxelscale.dataset.names import KEY_FILE
from voxelscale.dataset.reading import read_case
from voxelscale.dataset.stamps import label_stamp, source_stamp
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic, write_csv
from voxelscale.geometry import Scan
from voxelscale.parallel import map_processes
from voxelscale.phantom import make_phantom
from voxelscale.phantom.contours import open_library
from voxelscale.phantom.cuts import Cuts, open_cuts
from voxelscale.phantom.insertion import copy_with_nodules
from voxelscale.phantom.nodules import Nodule

COLUMNS = ("case", "x", "y", "z", "diameter_mm", "kind", "margin", "place", "hu")
"""Of ``nodules.csv``; ``shape`` besides, where outlines are readers'."""


@dataclass(frozen=True, kw_only=True)
class Copies:
    """What became of `write_copies`.

    Attributes:
        table: ``dataset.csv``.
        done: how many copies it lists.
        nodules: put in, in all of them.
        failed: name, error and hint of each copy that is not.
    """

    table: Path
    done: int
    nodules: int
    failed: tuple[tuple[str, str, str], ...]


def write_phantoms(config: PhantomConfig, out: Path, workers: int = 0) -> Path:
    """Write a data set of `config.cases` phantoms, in parallel; those that are there are kept.

    Returns:
        the path of ``dataset.csv``.

    Raises:
        VoxelscaleError: the folder holds phantoms of another config, or cannot be written.
    """
    if config.crops:
        hint = "give scans to put the nodules into, as --into scan.nii.gz"
        raise VoxelscaleError("phantom.crops is for real nodules in given scans", hint)
    _claim(out, shaping_of(config))
    names = [case_name(case) for case in range(config.cases)]
    todo = [case for case, name in enumerate(names) if not _truth_path(out, name).is_file()]
    work = partial(_write_phantom, config, out)
    for _, made in map_processes(work, todo, label="phantom", name=case_name, workers=workers):
        if isinstance(made, VoxelscaleError):
            raise made
    _write_tables(config, out, {name: name for name in names})
    return out / "dataset.csv"


def write_copies(
    sources: Sequence[Source], config: Config, out: Path, copies: int = 1, originals: bool = False
) -> Copies:
    """Write copies of scans with nodules put into their lungs, in parallel; those that are there are kept.

    A copy keeps its scan's patient, so that all of them stay on one side of a split, and its mask holds
    the scan's own lesions, too.

    Args:
        sources: as `voxelscale.dataset.listing` finds them; without a label a scan counts as healthy.
        config: its ``phantom`` says which nodules, its ``reading`` how labels are read.
        out: the folder to write.
        copies: of each scan.
        originals: whether the scans as they are belong to the data set, too.

    Raises:
        VoxelscaleError: the folder holds other things, or not one copy could be made.
    """
    cuts = _cuts(config)
    _claim(out, shaping_of(config.phantom) | {"into": "scans"} | ({"crops": cuts.digest} if cuts else {}))
    numbers = range(0 if originals else 1, copies + 1)
    jobs = [(source, number) for source in sources for number in numbers]
    todo = [job for job in jobs if _stamp_of(out, copy_name(*job)) != _stamp(config, *job)]
    failed = {}
    work = partial(_write_copy, config, out)
    for job, made in map_processes(
        work, todo, label="insert", name=lambda job: copy_name(*job), workers=config.prepare.workers
    ):
        if isinstance(made, VoxelscaleError):
            failed[copy_name(*job)] = made
    patients = {name: job[0].patient for job in jobs if (name := copy_name(*job)) not in failed}
    if not patients:
        raise next(iter(failed.values()))
    count = _write_tables(config.phantom, out, patients)
    listed = tuple((name, failed[name].message, failed[name].hint) for name in sorted(failed))
    return Copies(table=out / "dataset.csv", done=len(patients), nodules=count, failed=listed)


def _cuts(config: Config) -> Cuts | None:
    """The real nodules that are put in, where the config names some."""
    return open_cuts(Path(config.phantom.crops), config.reading) if config.phantom.crops else None


def sources_into(data_sets: Sequence[DataSet]) -> list[Source]:
    """The scans of several data sets, folders and files, which are to get nodules.

    Raises:
        VoxelscaleError: one of them holds no scan, or two scans have one name.
    """
    sources: dict[str, Source] = {}
    for data in data_sets:
        for source in data.cases_or_scans:
            if source.case in sources:
                hint = "put them into one CSV with a column case, each with its own name"
                raise VoxelscaleError(f"{data.path}: a second scan is named {source.case}", hint)
            sources[source.case] = source
    return list(sources.values())


def case_name(case: int) -> str:
    """What a phantom's files are called."""
    return f"phantom_{case:04d}"


def copy_name(source: Source, copy: int) -> str:
    """What a copy's files are called; the scan's own name where nothing is put in."""
    return f"{source.case}_with{copy:02d}" if copy else source.case


def shaping_of(config: PhantomConfig) -> dict[str, Any]:
    """The config as far as it shapes a phantom; a database of outlines by its content, not its place."""
    shaping = asdict(replace(config, cases=1))
    del shaping["shapes"], shaping["crops"]
    return shaping | ({"shapes": open_library(Path(config.shapes)).digest} if config.shapes else {})


def _claim(out: Path, shaping: dict[str, Any]) -> None:
    """See to it that a folder is new, or holds what was made in the same way."""
    text = json.dumps(shaping, indent=1)
    stamp = out / "phantom.json"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != text:
        raise VoxelscaleError(f"{out}: holds phantoms of another config", "choose another folder")
    # A key of names may be there before the first file is.
    others = out.is_dir() and any(path.name != KEY_FILE for path in out.iterdir())
    if others and not stamp.is_file():
        raise VoxelscaleError(f"{out}: holds other files", "choose an empty or new folder")
    write_atomic(stamp, text)


def _write_phantom(config: PhantomConfig, out: Path, case: int) -> None:
    phantom = make_phantom(config, case)
    _write_case(config, out, case_name(case), phantom.image, phantom.label, phantom.nodules)


def _write_copy(config: Config, out: Path, job: tuple[Source, int]) -> None:
    source, number = job
    image, labels = read_case(source, config.reading, empty=True)
    if not settled(source.classes, config.reading).plain or len(source.channels) > 1:
        hint = "say which values are lesions, as reading.labels=[1], and give CT alone"
        raise VoxelscaleError(f"{source.image}: has several classes or channels", hint)
    made = copy_with_nodules(source.case, image, labels.mask, config.phantom, number, _cuts(config))
    _write_case(
        config.phantom,
        out,
        copy_name(source, number),
        made.image,
        made.label,
        made.nodules,
        stamp=_stamp(config, source, number),
    )


def _write_case(
    config: PhantomConfig,
    out: Path,
    name: str,
    image: Scan,
    label: Scan,
    nodules: Sequence[Nodule],
    stamp: str = "",
) -> None:
    from voxelscale.formats import write_scan

    write_scan(image, out / "images" / f"{name}.{config.format}")
    write_scan(label, out / "labels" / f"{name}.{config.format}")
    # Last, so that its being there says that the case is whole.
    truth = {"stamp": stamp, "nodules": [_row(name, nodule) for nodule in nodules]}
    write_atomic(_truth_path(out, name), json.dumps(truth))


def _row(name: str, nodule: Nodule) -> dict[str, Any]:
    return {
        "case": name,
        **{axis: round(float(v), 3) for axis, v in zip("xyz", nodule.centre, strict=True)},
        "diameter_mm": round(nodule.diameter_mm, 3),
        "kind": nodule.kind,
        "margin": nodule.margin,
        "place": nodule.place,
        "hu": round(nodule.hu, 1),
        **({} if nodule.posed is None else {"shape": nodule.posed.shape.name}),
    }


def _write_tables(config: PhantomConfig, out: Path, patients: dict[str, str]) -> int:
    """Both tables, from the cases' own truths; the number of nodules."""
    truths = [_read_truth(out, name)["nodules"] for name in patients]
    columns = [*COLUMNS, *(["shape"] if config.shapes or config.crops else [])]
    lines = [[row[c] for c in columns] for truth in truths for row in truth]
    write_csv(out / "nodules.csv", [columns, *lines])
    end = config.format
    rows = [[n, p, f"images/{n}.{end}", f"labels/{n}.{end}"] for n, p in patients.items()]
    write_csv(out / "dataset.csv", [["case", "patient", "image", "label"], *rows])
    return len(lines)


def _truth_path(out: Path, name: str) -> Path:
    return out / "truth" / f"{name}.json"


def _read_truth(out: Path, name: str) -> dict[str, Any]:
    path = _truth_path(out, name)
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        return {"stamp": str(truth["stamp"]), "nodules": list(truth["nodules"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise VoxelscaleError(f"{path}: damaged or missing", "delete it and run again") from None


def _stamp_of(out: Path, name: str) -> str:
    """What a copy was made from, or "" where it is not there or not whole."""
    try:
        return str(_read_truth(out, name)["stamp"])
    except VoxelscaleError:
        return ""


def _stamp(config: Config, source: Source, copy: int) -> str:
    """A digest of everything that a copy is made from."""
    rules = config.reading
    reading = [
        rules.labels,
        rules.consensus,
        rules.fill_gaps,
        digested(source.classes, rules),
        *rules.select,
    ]
    return digest_of([source_stamp(source), label_stamp(source), reading, copy])[:16]
