"""The commands predict and export-dicom."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from voxelscale.cli.common import ConfigFile, Layout, Sets, data_set, print_failed, read_config, verb
from voxelscale.console import count, first_of, notice, warn
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output

if TYPE_CHECKING:
    from voxelscale.archive.dicomweb import DicomWeb
    from voxelscale.config import Config
    from voxelscale.dataset import Source
    from voxelscale.model.bundle import Bundle
    from voxelscale.store import Store

USAGE = "voxelscale predict MODEL OUT --dicomweb URL --study UID"

MOST_NAMED = 10
"""Cases that a warning names at most."""


@verb("Prediction", goes_on=True)
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a run, a model file, or starter.")],
    scans: Annotated[
        Path, typer.Argument(help="Scan, DICOM folder, folder of scans, or CSV; not with --dicomweb.")
    ],
    out: Annotated[Path | None, typer.Argument(help="Folder of the predictions.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Predict only the cases in this store's --split.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="With --store: train, val or test, which is the default.")
    ] = None,
    dicom_out: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="Also write DICOM: seg, sr, rtstruct, ..."),
    ] = None,
    dicomweb: Annotated[
        str | None, typer.Option(metavar="URL", help="Fetch the scans from this DICOMweb service.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="UID", help="With --dicomweb: the study; its CT series.")
    ] = None,
    series: Annotated[
        str | None, typer.Option(metavar="UID", help="With --dicomweb: only this series of it.")
    ] = None,
    send: Annotated[
        bool, typer.Option("--send", help="With --dicomweb: send the results back (seg,sr by default).")
    ] = False,
    credentials: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --dicomweb: user and password, or token.")
    ] = None,
    ca_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --dicomweb: certificates to trust, PEM.")
    ] = None,
    layout: Layout = "auto",
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Find lesions in scans; write masks and findings.

    \b
    voxelscale predict starter patient.nii.gz predictions/
    voxelscale predict run/ patient.nii.gz predictions/
    voxelscale predict model.vxs dicom_folder/ predictions/ --set predict.test_time_augmentation=true
    voxelscale predict run/ scans/ predictions/ --store store/ --split test
    voxelscale predict run_of_fold_0/ scans/ predictions/ --store store/ --split val
    voxelscale predict run/ dicom_folder/ predictions/ --dicom-out seg,sr,rtstruct
    voxelscale predict run/ predictions/ --dicomweb https://pacs/dicom-web --study 1.2.3 --send
    torchrun --nproc-per-node 4 -m voxelscale.cli predict run/ scans/ predictions/

    starter is a model of lung nodules that comes with voxelscale (docs/starter.md), unless a file or folder
    is called so. For research, not for diagnosis.

    For each case writes mask.nii.gz (on the scan's own voxels), findings.csv (LUNA16's columns, LPS mm) and
    findings.json (also volume, diameters, mean HU and warnings), and findings.csv of all cases.

    A scan unlike the training scans gets a warning. One that the model cannot be meant for (a mask, grey
    levels, two slices) is an error. A model of chests predicts only in and around the lungs
    (predict.lungs). reading.fill_gaps allows missing slices; reading.select chooses one of several
    acquisitions in a series.

    --dicom-out writes DICOM beside them, for scans that came as DICOM: see voxelscale export-dicom --help.
    --dicomweb fetches a study into OUT/scans, which identifies the patient; credentials are in a file or
    in the environment (docs/hospital.md).

    names.csv lists the path and series of each case: it identifies patients, do not share it.
    """
    archive = _archive(dicomweb, study, series, send, credentials, ca_file)
    if archive is not None:
        if out is not None or store is not None:
            raise VoxelscaleError("--dicomweb takes the place of SCANS and --store", USAGE)
        out, dicom_out = scans, dicom_out or ("seg,sr" if send else None)
    if out is None:
        raise VoxelscaleError("predict: missing argument OUT", "voxelscale predict MODEL SCANS OUT")
    if split is not None and store is None:
        hint = "give the store that has the split: --store store/"
        raise VoxelscaleError("--split without --store", hint)
    split = split or "test"
    check_output(out)
    from voxelscale.dataset.names_table import write_names
    from voxelscale.predict.predict import predict as run_predict
    from voxelscale.predict.predict import with_channels_of
    from voxelscale.predict.record import record_cases
    from voxelscale.predict.text import lines
    from voxelscale.store import open_store
    from voxelscale.store.fingerprint import in_fold

    bundle = _read_model(model)
    settings = read_config(config, set_, bundle.config)
    kinds, fetched = _kinds(dicom_out), None
    if archive is not None:
        from voxelscale.archive.study import fetch_study

        names = data_set(out, settings, keys=out).names
        fetched = fetch_study(archive, study or "", series or "", out, names)
        scans = fetched.folder
    settings = with_channels_of(bundle, settings, scans)
    if "probability" in kinds:
        settings = replace(settings, predict=replace(settings.predict, probabilities=True))
    data = data_set(scans, settings, layout, keys=store or out)
    sources = data.scans
    if fetched is not None:  # an earlier command may have left other studies there
        sources = [source for source in sources if source.series in fetched.entries]
    exported = _came_as_dicom(sources) if kinds else []
    data.names.keep_in(out)
    if store is not None:
        whole = open_store(store)
        opened = in_fold(whole, settings.data.fold)
        wanted = {info.case for info in opened.split(split)}
        sources = [source for source in sources if source.case in wanted]
        if not sources:
            hint = "check --split, and that reading.names is the same as in voxelscale prepare"
            raise VoxelscaleError(f"{scans}: no case of the split {split} of {store}", hint)
        record_cases(out, (source.case for source in sources), split, opened.fingerprint["digest"])
        _record_trained(bundle, whole, {source.case for source in sources}, split, out)
        exported = [source for source in exported if source in sources]
    write_names(sources, out)
    outcome = run_predict(sources, bundle, settings.predict, out, settings.reading)
    if outcome.rank:
        return 0
    code = print_failed(outcome.failed, "predicted")
    print("\n".join(lines(outcome, settings.predict, bundle.classes)))
    print(f"masks and findings in {out}")
    if fetched is not None:
        code = max(code, print_failed(fetched.failed, "fetched"))
    if kinds:
        done = [source for source in exported if source.case in outcome.findings]
        failed, files = _export(out, done, out, kinds, settings)
        code = max(code, failed)
        if send and archive is not None and fetched is not None:
            from voxelscale.archive.study import send_results

            by_series = {s.series: files[s.case] for s in done if s.case in files}
            sent = send_results(archive, fetched, by_series)
            print(f"{count(sent, 'result')} sent to the archive")
    from voxelscale.dicom_out.kinds import warn_of_earlier

    warn_of_earlier(out, outcome.findings)
    return code


def _record_trained(bundle: Bundle, store: Store, cases: set[str], split: str, out: Path) -> None:
    """Record which cases a network of the model was trained on, and warn where the split says otherwise.

    An ensemble of folds has seen all scans but the test split: what one fold validates on, the others
    train on.
    """
    from voxelscale.predict.record import record_cases
    from voxelscale.store.fingerprint import folds_of

    seen = set[str]()
    for each in folds_of(store, {str(one.trained.get("data")) for one in bundle.networks}):
        if trained := cases & {info.case for info in each.split("train")}:
            record_cases(out, trained, "train", each.fingerprint["digest"])
            seen |= trained
    if seen and split != "train":
        warn(
            f"{store.path}: of {count(len(cases), 'scan')} of the split {split} a network of this model "
            f"was trained on {len(seen)}: results there say nothing of new scans; use --split test, or "
            "scans outside the store"
        )


@verb("Prediction", name="export-dicom")
def export_dicom(
    predictions: Annotated[Path, typer.Argument(help="Folder that predict wrote.")],
    scans: Annotated[Path, typer.Argument(help="The scans that were predicted, as DICOM.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the files; default: PREDICTIONS.")] = None,
    kinds: Annotated[
        str, typer.Option(help="What to write: seg, probability, sr, rtstruct, page; with commas.")
    ] = "seg,sr,rtstruct",
    layout: Layout = "auto",
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Write predictions as DICOM, on the slices that the scans came as.

    \b
    voxelscale export-dicom predictions/ dicom_folder/
    voxelscale export-dicom predictions/ dicom_folder/ --out results/ --kinds seg,sr
    voxelscale export-dicom predictions/ dicom_folder/ --set export.segments=class

    \b
    seg           segmentation, one segment a finding or a class (export.segments)
    probability   fractional segmentation; needs a prediction with predict.probabilities=true
    sr            report of the measurements of each finding (TID 1500)
    rtstruct      contours
    page          the findings on one printable page, HTML; names the patient with export.patient_names

    Writes OUT/<case>/<kind>.dcm, and page.html. The same prediction gives the same bytes and UIDs. Patient
    and study are those of the scan: the DICOM files identify the patient. For research, not for diagnosis.
    """
    asked = _kinds(kinds)
    out = out or predictions
    check_output(out)
    if not predictions.is_dir():
        raise VoxelscaleError(f"{predictions}: no such folder", "run voxelscale predict first")
    settings = read_config(config, set_)
    sources = data_set(scans, settings, layout, keys=predictions).scans
    predicted = [s for s in sources if (predictions / s.case / "findings.json").is_file()]
    if not predicted:
        hint = "check that these scans were predicted into this folder"
        raise VoxelscaleError(f"{predictions}: no prediction of a scan of {scans}", hint)
    if absent := len(sources) - len(predicted):
        warn(f"{predictions}: no prediction of {count(absent, 'scan')}, which are left out")
    return _export(predictions, _came_as_dicom(predicted), out, asked, settings)[0]


def _read_model(model: Path) -> Bundle:
    """The model; where its name may mean two, a notice says which one is meant."""
    from voxelscale.model.bundle import read_bundle
    from voxelscale.model.shipped import NOTICE, SHIPPED, shipped

    if shipped(model):
        notice(NOTICE)
    elif str(model) in SHIPPED:
        notice(f"{model}: the one in this folder, not the model that comes with voxelscale")
    return read_bundle(model)


def _archive(
    url: str | None,
    study: str | None,
    series: str | None,
    send: bool,
    credentials: Path | None,
    ca_file: Path | None,
) -> DicomWeb | None:
    """The service that the options name; None where scans come from the disk."""
    if url is None:
        given: dict[str, object] = {"--study": study, "--series": series, "--send": send or None}
        given |= {"--credentials": credentials, "--ca-file": ca_file}
        for option, value in given.items():
            if value is not None:
                raise VoxelscaleError(f"{option} without --dicomweb", USAGE)
        return None
    if study is None:
        raise VoxelscaleError("--dicomweb without --study", USAGE)
    from voxelscale.ranks.place import fill

    fill()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        hint = "predict with one process, or fetch first and predict OUT/scans with several"
        raise VoxelscaleError("--dicomweb with several processes", hint)
    from voxelscale.archive.access import Access
    from voxelscale.archive.dicomweb import DicomWeb

    return DicomWeb(Access(url=url, credentials=credentials, ca_file=ca_file))


def _kinds(text: str | None) -> tuple[str, ...]:
    """What is to be written as DICOM, if that can be done at all."""
    if text is None:
        return ()
    from voxelscale.dicom_out.export import check_installed
    from voxelscale.dicom_out.kinds import kinds_of

    kinds = kinds_of(text)
    check_installed()
    return kinds


def _came_as_dicom(sources: Sequence[Source]) -> list[Source]:
    """Those of the scans that came as DICOM; a warning names the others.

    Raises:
        VoxelscaleError: none did.
    """
    from voxelscale.dicom_out.original import NOT_DICOM, is_dicom_scan

    came = [source for source in sources if is_dicom_scan(source)]
    others = [source.case for source in sources if source not in came]
    if not came:
        raise VoxelscaleError(f"{others[0]}: did not come as DICOM, as no scan here did", NOT_DICOM)
    if others:
        named = first_of(others, MOST_NAMED)
        warn(f"did not come as DICOM, so no DICOM is written of {named}: {NOT_DICOM}")
    return came


def _export(
    predictions: Path, sources: Sequence[Source], out: Path, kinds: Sequence[str], settings: Config
) -> tuple[int, dict[str, list[Path]]]:
    """Exit code, and the files that were written, by case."""
    from voxelscale.dicom_out.export import export_cases

    done = export_cases(predictions, sources, out, kinds, settings.export, settings.reading)
    code = print_failed(done.failed, "written as DICOM")
    files = sum(map(len, done.files.values()))
    print(f"{count(files, 'file')} of {count(len(done.files), 'case')} in {out}")
    return code, done.files
