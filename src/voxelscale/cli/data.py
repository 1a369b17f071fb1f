"""Commands of data sets: phantom, prepare, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import (
    Annotations,
    ConfigFile,
    Layout,
    Sets,
    data_set,
    print_failed,
    read_config,
    verb,
)
from voxelscale.console import count
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output


@verb("Data", goes_on=True)
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write: images/, labels/, dataset.csv.")],
    cases: Annotated[int | None, typer.Option(help="Number of scans (phantom.cases).")] = None,
    into: Annotated[
        list[Path] | None, typer.Option(help="A scan or a data set to put nodules into; repeatable.")
    ] = None,
    crops: Annotated[
        Path | None,
        typer.Option(help="With --into: a data set whose real nodules are put in (phantom.crops)."),
    ] = None,
    copies: Annotated[int, typer.Option(min=1, help="With --into: copies of each scan.")] = 1,
    originals: Annotated[bool, typer.Option(help="With --into: list the unchanged scans as well.")] = False,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Make synthetic chest CTs, or put nodules into real ones.

    \b
    voxelscale phantom scans/ --cases 20
    voxelscale phantom scans/ --cases 5 --set phantom.seed=7 --set phantom.diameter_mm=[3,10]
    voxelscale phantom more/ --into scan.nii.gz --into LIDC-IDRI/ --copies 3
    voxelscale phantom more/ --into scan.nii.gz --crops nodules/

    Case c depends on phantom.seed and c alone: the same command with more --cases adds to the folder.

    With --into, each copy of a scan gets new nodules in its lungs (phantom.nodules), away from the lesions
    it has. Its mask holds both. nodules.csv has position, size and kind of the new ones. Every other voxel
    keeps its value. With --crops they are real ones, cut by their masks from scans or from crops of a few
    centimetres, with their HU and texture. All copies belong to the scan's patient. Use them as more
    training data, or to measure which nodules a model finds.
    """
    check_output(out)
    from voxelscale.phantom import dataset

    sets = [*(set_ or []), *([f"phantom.cases={cases}"] if cases is not None else [])]
    sets += [f"phantom.crops={json.dumps(str(crops))}"] if crops is not None else []
    settings = read_config(config, sets)
    if not into:
        if originals or copies != 1:
            option = "--originals" if originals else "--copies"
            raise VoxelscaleError(f"{option} without --into", "give the scans: --into scan.nii.gz")
        table = dataset.write_phantoms(settings.phantom, out, settings.prepare.workers)
        print(f"{count(settings.phantom.cases, 'phantom')} in {table}")
        return 0
    sources = dataset.sources_into([data_set(path, settings, layout, annotations, out) for path in into])
    made = dataset.write_copies(sources, settings, out, copies, originals)
    code = print_failed(made.failed, "copied")
    print(f"{count(made.done, 'scan')} with {count(made.nodules, 'nodule')} put in: {made.table}")
    return code


@verb("Data", goes_on=True)
def prepare(
    data: Annotated[
        Path, typer.Argument(help="Folder of a data set, or a CSV with the columns image,label.")
    ],
    store: Annotated[Path, typer.Argument(help="Folder of the training store to write.")],
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Check, resample and store scans and masks.

    \b
    voxelscale prepare scans/ store/
    voxelscale prepare cases.csv store/ --set prepare.spacing=[2,1,1] --set prepare.split=[1,0,0]
    voxelscale prepare Task06_Lung/ store/
    voxelscale prepare scans/ store/ --set "reading.labels={liver: 1, tumour: 2}" --set prepare.folds=5

    DATA is one of: a folder with images/ and labels/; a CSV (image,label and optionally case, patient,
    split, fold; of several channels image_CT,image_PET; paths relative to the CSV); a data set of the
    Medical Segmentation Decathlon, nnU-Net, LIDC-IDRI or LUNA16 as downloaded; any tree of DICOM with
    SEG or RTSTRUCT. The layout is recognised and printed. Images are NIfTI, MetaImage, NRRD, DICOM, PNG or
    TIFF; labels are masks, SEG, RTSTRUCT, LIDC XML or LUNA16 tables.

    Classes, channels and folds are those that the data set names; reading.labels, reading.channels,
    prepare.normalisation and prepare.splits replace them.

    DICOM cases are named by a keyed hash (reading.names), which is the same in all your commands.
    store/names.csv lists the path and series of each case: it identifies patients, do not share it.
    A case that cannot be used is reported and the others are prepared; the exit code is then 2.
    A plan of patch, depth and batch is written to store/plan.yaml, for voxelscale train --config.
    """
    check_output(store)
    from voxelscale.dataset.names_table import write_names
    from voxelscale.store.prepare import prepare as run_prepare

    settings = read_config(config, set_)
    listed = data_set(data, settings, layout, annotations, store)
    write_names(listed.cases, store)
    outcome = run_prepare(listed.cases, store, settings.prepare, settings.reading, listed.folds)
    code = print_failed(outcome.failed, "prepared")
    parts = [f"{sum(c.split == split for c in outcome.done)} {split}" for split in ("train", "val", "test")]
    kept = f", {outcome.kept} of them kept from before" if outcome.kept else ""
    print(f"{count(len(outcome.done), 'case')} in {store} ({', '.join(parts)}){kept}")
    if settings.prepare.plan:
        from voxelscale.train.plan import report_plan

        report_plan(settings, store)
    return code


@verb("Data")
def inspect(
    data: Annotated[Path, typer.Argument(help="Data set, as for prepare, or a store.")],
    page: Annotated[Path | None, typer.Argument(help="Former form of --out.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="HTML page to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Show what a data set holds, and what is wrong with it.

    \b
    voxelscale inspect scans/
    voxelscale inspect scans/ --out scans.html
    voxelscale inspect store/ --json

    Nothing is changed. Problems are listed by severity; they do not change the exit code.
    """
    out = out or page
    if out is not None:
        check_output(out, file=True)
    from voxelscale.report.dataset import headline, text_table, write_dataset_page
    from voxelscale.store.inspect import inspect as run_inspect

    settings = read_config(config, set_)
    found = run_inspect(data_set(data, settings, layout, annotations), settings.prepare.workers)
    if out is not None:
        write_dataset_page(found, data.absolute().name, out)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print("\n".join(text_table(found)))
    for problem in found.problems:
        print(f"{problem.severity}: {problem.case}: {problem.text}")
    print(", ".join(headline(found)))
    if out is not None:
        print(f"page in {out}")
