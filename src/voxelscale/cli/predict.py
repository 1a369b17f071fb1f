"""The command predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import ConfigFile, Layout, Sets, data_set, print_failed, read_config, verb
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output


@verb("Prediction", goes_on=True)
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a run, or a model file.")],
    scans: Annotated[Path, typer.Argument(help="Scan, DICOM folder, folder of scans, or CSV.")],
    out: Annotated[Path, typer.Argument(help="Folder of the predictions.")],
    store: Annotated[
        Path | None, typer.Option(help="Predict only the cases in this store's --split.")
    ] = None,
    split: Annotated[str, typer.Option(help="With --store: train, val or test.")] = "test",
    layout: Layout = "auto",
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Find lesions in scans; write masks and findings.

    \b
    voxelscale predict run/ patient.nii.gz predictions/
    voxelscale predict model.vxs dicom_folder/ predictions/ --set predict.test_time_augmentation=true
    voxelscale predict run/ scans/ predictions/ --store store/ --split test
    voxelscale predict run_of_fold_0/ scans/ predictions/ --store store/ --split val
    torchrun --nproc-per-node 4 -m voxelscale.cli predict run/ scans/ predictions/

    For each case writes mask.nii.gz (on the scan's own voxels), findings.csv (LUNA16's columns, LPS mm) and
    findings.json (also volume, diameters, mean HU and warnings), and findings.csv of all cases.

    A scan unlike the training scans gets a warning. One that the model cannot be meant for (a mask, grey
    levels, two slices) is an error. A model of chests predicts only in and around the lungs
    (predict.lungs). reading.fill_gaps allows missing slices; reading.select chooses one of several
    acquisitions in a series.

    names.csv lists the path and series of each case: it identifies patients, do not share it.
    """
    check_output(out)
    from voxelscale.dataset.names_table import write_names
    from voxelscale.model.bundle import read_bundle
    from voxelscale.predict.predict import predict as run_predict
    from voxelscale.predict.predict import with_channels_of
    from voxelscale.predict.record import record_cases
    from voxelscale.predict.text import lines
    from voxelscale.store.fingerprint import open_fold

    bundle = read_bundle(model)
    settings = read_config(config, set_, bundle.config)
    settings = with_channels_of(bundle, settings, scans)
    data = data_set(scans, settings, layout, keys=store or out)
    sources = data.scans
    data.names.keep_in(out)
    if store is not None:
        opened = open_fold(store, settings.data.fold)
        wanted = {info.case for info in opened.split(split)}
        sources = [source for source in sources if source.case in wanted]
        if not sources:
            hint = "check --split, and that reading.names is the same as in voxelscale prepare"
            raise VoxelscaleError(f"{scans}: no case of the split {split} of {store}", hint)
        record_cases(out, (source.case for source in sources), split, opened.fingerprint["digest"])
    write_names(sources, out)
    outcome = run_predict(sources, bundle, settings.predict, out, settings.reading)
    if outcome.rank:
        return 0
    code = print_failed(outcome.failed, "predicted")
    print("\n".join(lines(outcome, settings.predict, bundle.classes)))
    print(f"masks and findings in {out}")
    return code
