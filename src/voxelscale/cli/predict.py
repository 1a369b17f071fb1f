"""The command that looks at scans: predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import ConfigFile, Layout, Sets, read_config, tell_failed, verb
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output


@verb("Prediction", goes_on=True)
def predict(
    model: Annotated[Path, typer.Argument(help="A run's folder, a model.vxs, or an ensemble's file.")],
    scans: Annotated[Path, typer.Argument(help="A scan, a DICOM folder, a folder of scans, or a CSV.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    store: Annotated[Path | None, typer.Option(help="Look only at cases of this store's --split.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    layout: Layout = "auto",
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Find lesions in scans: masks and findings.

    \b
    voxelscale predict run/ patient.nii.gz predictions/
    voxelscale predict model.vxs dicom_folder/ predictions/ --set predict.flips=true
    voxelscale predict run/ scans/ predictions/ --store store/ --split test
    torchrun --nproc-per-node 4 -m voxelscale.cli predict run/ scans/ predictions/

    Writes <case>/mask.nii.gz (voxel on voxel on the scan), <case>/findings.csv (LUNA16's columns, LPS
    mm), <case>/findings.json (volume, diameters, mean HU, warnings, too) and findings.csv of all cases.

    A scan unlike those that the model was trained on gets a warning; one that cannot be a scan for it (a
    mask, grey levels, two slices) is an error. A model of chests looks in and around the lungs only
    (predict.lungs). Slices may be missing as prepare.fill_gaps says; prepare.select chooses one of several
    acquisitions in a series.

    Which path and series each case is stands in names.csv, which is for you alone: do not share it.
    """
    check_output(out)
    from voxelscale.dataset.listing import list_scans
    from voxelscale.dataset.names import names_of
    from voxelscale.dataset.names_table import write_names
    from voxelscale.model.bundle import read_bundle
    from voxelscale.predict.predict import predict as run_predict
    from voxelscale.predict.record import record_cases
    from voxelscale.predict.text import lines
    from voxelscale.store import open_store

    bundle = read_bundle(model)
    settings = read_config(config, set_, bundle.config)
    names = names_of(settings.prepare, store or out)
    sources = list_scans(scans, layout, names)
    names.keep_in(out)
    if store is not None:
        opened = open_store(store)
        wanted = {info.case for info in opened.split(split)}
        sources = [source for source in sources if source.case in wanted]
        if not sources:
            hint = "check --split, and that prepare.names is as it was for prepare"
            raise VoxelscaleError(f"{scans}: no case of the split {split} of {store}", hint)
        record_cases(out, (source.case for source in sources), split, opened.fingerprint["digest"])
    write_names(sources, out)
    outcome = run_predict(sources, bundle, settings.predict, out, settings.prepare)
    if outcome.rank:
        return 0
    code = tell_failed(outcome.failed, "predicted")
    print("\n".join(lines(outcome, settings.predict)))
    print(f"masks and findings in {out}")
    return code
