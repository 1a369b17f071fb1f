"""The commands: one thin function a verb, no logic."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from voxelscale import __version__
from voxelscale.console import count, duration, notice, set_verbosity
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output
from voxelscale.usage import LEVELS, Commands, RunsByDefault, UsageError, explain

if TYPE_CHECKING:
    from voxelscale.config import Config

app = typer.Typer(
    name="voxelscale",
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _keys() -> list[str]:
    """For the shell's completion of ``--set``."""
    from voxelscale.config import keys

    return [f"{key}=" for key in keys()]


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML with any of the config's keys.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One config key, as train.samples=4000; repeatable.",
        autocompletion=_keys,
    ),
]

Layout = Annotated[
    str, typer.Option(help="How the data set is laid out: csv, folders, msd, nnunet, lidc, luna16, dicom.")
]
Annotations = Annotated[
    Path | None,
    typer.Option(help="Where XML, tables, SEG or RTSTRUCT lie, if elsewhere."),
]


def main() -> None:
    """Entry point; --quiet and --verbose may stand anywhere before a bare ``--``."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    levels = [word for word in words[:end] if word in LEVELS]
    others = [word for word in words[:end] if word not in LEVELS] + words[end:]
    try:
        code = app([*levels, *(others or ["--help"])], prog_name="voxelscale", standalone_mode=False)
    except (VoxelscaleError, UsageError) as error:
        fault = error if isinstance(error, VoxelscaleError) else explain(error)
        tell(fault.message, fault.hint)
        code = 2
    sys.exit(code or 0)


Verb = Callable[..., int | None]


def verb(
    group: str, *, goes_on: bool = False, to: typer.Typer = app, name: str | None = None
) -> Callable[[Verb], Verb]:
    """A command whose errors are two lines and exit code 2, and that ends well on Ctrl-C.

    Args:
        group: under which the help lists it.
        goes_on: whether the same command, given again, keeps what an interrupted one has done.
        to: the commands that it becomes one of.
        name: where it is not the function's.
    """

    def register(command: Verb) -> Verb:
        @functools.wraps(command)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                code = command(*args, **kwargs) or 0
            except VoxelscaleError as error:
                tell(error.message, error.hint)
                code = 2
            except OSError as error:
                # A disk that fails or fills, a share that goes away: not worth a traceback.
                tell(
                    f"{error.filename or 'input or output'}: {error.strerror or error}",
                    "check the disk and its permissions",
                )
                code = 2
            except KeyboardInterrupt:
                again = "goes on where this one stopped" if goes_on else "begins again"
                tell("interrupted", f"the same command {again}")
                code = 130
            raise typer.Exit(code)

        to.command(name, rich_help_panel=group)(guarded)
        return command

    return register


search_app = typer.Typer(cls=RunsByDefault, rich_markup_mode=None)
app.add_typer(
    search_app,
    name="search",
    help="Find better settings by parallel Bayesian optimisation.",
    rich_help_panel="Studies",
)


def tell(message: str, hint: str) -> None:
    """An error on stderr, in two lines."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def tell_failed(failed: Sequence[tuple[str, str, str]], verb: str) -> int:
    """Each failed case with its fault, then how many; the exit code."""
    for _, message, hint in failed:
        tell(message, hint)
    if failed:
        names = ", ".join(case for case, _, _ in failed)
        print(f"{len(failed)} not {verb}: {names}", file=sys.stderr)
    return 2 if failed else 0


def rows_of(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The failed cases of a summary, as `tell_failed` takes them."""
    return [(f["case"], f["error"], f["hint"]) for f in summary["failed"]]


def read_config(path: Path | None, sets: list[str] | None, base: Config | None = None) -> Config:
    """The config of the command line."""
    from voxelscale.config import load

    return load(path, sets or (), base)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"voxelscale {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Details, too.")] = False,
) -> None:
    """From a folder of CT scans to a model that finds lesions.

    \b
    voxelscale inspect scans/ scans.html              what is there, and what is wrong with it
    voxelscale prepare scans/ store/                  check, resample and store scans and masks
    voxelscale train store/ run/                      train a U-Net; Ctrl-C saves, again goes on
    voxelscale search store/ search/                  find better settings, on all devices at once
    voxelscale scale store/ study/                    what N workers do to time and Dice
    voxelscale predict run/ new_scans/ predictions/   masks and findings in patient mm
    voxelscale evaluate predictions/ scans/           Dice, surfaces, sensitivity, FROC
    voxelscale compare predictions/ others/ scans/    whether one model is better than another
    voxelscale froc findings.csv --annotations ...    a submission scored as LUNA16 does
    voxelscale calibrate run/ val/ scans/             confidence that means what it says
    voxelscale refine run/ store/                     a second look at every finding
    voxelscale ensemble all.vxs run1/ run2/           several models as one
    voxelscale report predictions/ scans/ --run run/  one HTML page

    No scans at hand: voxelscale phantom scans/ makes synthetic ones, and voxelscale quickstart does
    all of it in a few minutes. Every parameter is a key of one config tree; voxelscale config prints it.
    """
    set_verbosity(0 if quiet else 2 if verbose else 1)


@verb("Data", goes_on=True)
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write: images/, labels/, dataset.csv.")],
    cases: Annotated[int | None, typer.Option(help="How many scans (phantom.cases).")] = None,
    into: Annotated[
        list[Path] | None, typer.Option(help="A real scan, or a data set of them, to put nodules into.")
    ] = None,
    copies: Annotated[int, typer.Option(min=1, help="With --into: how many of each scan.")] = 1,
    originals: Annotated[bool, typer.Option(help="With --into: list the scans as they are, too.")] = False,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Make synthetic chest CTs with nodules, or put nodules into real ones.

    \b
    voxelscale phantom scans/ --cases 20
    voxelscale phantom scans/ --cases 5 --set phantom.seed=7 --set phantom.diameter_mm=[3,10]
    voxelscale phantom more/ --into scan.nii.gz --into LIDC-IDRI/ --copies 3

    Case c is a pure function of (phantom.seed, c). Run again with more --cases it adds to the folder.

    With --into each copy of a scan gets phantom.nodules nodules in its lungs, clear of the lesions it has;
    its mask holds both, nodules.csv says where the new ones are, how large and of which kind. Everywhere
    else the copy is the scan, voxel by voxel. All copies keep the scan's patient. Use them as more
    training data, or to measure which nodules a model finds.
    """
    check_output(out)
    from voxelscale.data.phantom import dataset

    sets = [*(set_ or []), *([f"phantom.cases={cases}"] if cases is not None else [])]
    settings = read_config(config, sets)
    if not into:
        table = dataset.write_phantoms(settings.phantom, out, settings.prepare.workers)
        print(f"{count(settings.phantom.cases, 'phantom')} in {table}")
        return 0
    from voxelscale.data.names import names_of

    sources = dataset.sources_into(into, layout, annotations, names_of(settings.prepare, out))
    made = dataset.write_copies(sources, settings, out, copies, originals)
    code = tell_failed(made.failed, "copied")
    print(f"{count(made.done, 'scan')} with {count(made.nodules, 'nodule')} put in: {made.table}")
    return code


@verb("Data", goes_on=True)
def prepare(
    data: Annotated[Path, typer.Argument(help="CSV with the columns image,label, or a data set's folder.")],
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

    DATA is a CSV (image,label and optionally case,patient; paths from the CSV's folder), a folder with
    images/ and labels/, or a data set as the Medical Segmentation Decathlon, nnU-Net, LIDC-IDRI or LUNA16
    deliver it, or any tree of DICOM series with SEG or RTSTRUCT. What was recognised is said. Images:
    NIfTI, MetaImage, NRRD, DICOM; labels: masks, SEG, RTSTRUCT, LIDC's XML, LUNA16's tables.

    DICOM cases are called by a keyed hash (prepare.names), the same in every command of a user. Which
    path and series each case is stands in store/names.csv, which is for you alone: do not share it.
    A case that cannot be used is named with its fault and the others go on; the exit code is then 2.
    Patch, depth and batch are planned into store/plan.yaml, for voxelscale train --config.
    """
    check_output(store)
    from voxelscale.data.listing import list_sources
    from voxelscale.data.names import names_of
    from voxelscale.data.names_table import write_names
    from voxelscale.data.prepare import prepare as run_prepare

    settings = read_config(config, set_)
    sources = list_sources(data, layout, annotations, names_of(settings.prepare, store))
    write_names(sources, store)
    outcome = run_prepare(sources, store, settings.prepare)
    code = tell_failed(outcome.failed, "prepared")
    parts = [f"{sum(c.split == split for c in outcome.done)} {split}" for split in ("train", "val", "test")]
    kept = f", {outcome.kept} of them kept from before" if outcome.kept else ""
    print(f"{count(len(outcome.done), 'case')} in {store} ({', '.join(parts)}){kept}")
    if settings.prepare.plan:
        from voxelscale.train.plan import tell_plan

        tell_plan(settings, store, unchanged=outcome.kept == len(outcome.done))
    return code


@verb("Data")
def inspect(
    data: Annotated[Path, typer.Argument(help="A data set as for prepare, or a store.")],
    out: Annotated[Path | None, typer.Argument(help="HTML page to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Look at a data set: what is there, and what is wrong with it.

    \b
    voxelscale inspect scans/
    voxelscale inspect scans/ scans.html
    voxelscale inspect store/ --json

    Nothing is changed. Problems are listed by severity and the exit code is 0 all the same.
    """
    if out is not None:
        check_output(out, file=True)
    from voxelscale.data.inspect import inspect as run_inspect
    from voxelscale.report.dataset import headline, text_table, write_dataset_page

    found = run_inspect(data, read_config(config, set_).prepare, layout, annotations)
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


@verb("Training", goes_on=True)
def train(
    store: Annotated[Path, typer.Argument(help="What voxelscale prepare wrote.")],
    run: Annotated[Path, typer.Argument(help="Folder of the run; if it has begun, it goes on.")],
    fit_memory: Annotated[
        bool,
        typer.Option("--fit-memory", help="Take the largest patch of its shape that fits."),
    ] = False,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Train a U-Net on any number of processes.

    \b
    voxelscale train store/ run/
    voxelscale train store/ run/ --set train.samples=20000 --set model.filters=16
    voxelscale train store/ run/ --set train.ranks=2          two processes on this machine
    voxelscale train store/ run/ --fit-memory                 the largest patch that fits
    torchrun --nnodes 2 --nproc-per-node 8 --no-python voxelscale train store/ run/

    The budget is in samples (patches). Ctrl-C saves; killed or not, the same command goes on with the
    very next sample. The best model on the validation scans is run/model.vxs; metrics.jsonl and
    tensorboard/ have the curves.
    """
    check_output(run)
    from voxelscale.config import load
    from voxelscale.train.launch import fit_to_memory, start

    begun = run / "config.yaml"
    settings = read_config(config, set_, load(begun) if begun.is_file() else None)
    if fit_memory and not begun.is_file():
        settings = fit_to_memory(settings, store)
    if not start(settings, store, run):
        notice(f"stopped and saved; to go on: voxelscale train {store} {run}")
        return 130
    print(f"model in {run / 'model.vxs'}")
    return 0


@verb("Search", goes_on=True, to=search_app)
def run(
    store: Annotated[Path, typer.Argument(help="What voxelscale prepare wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder of the search; if it has begun, it goes on.")],
    trials: Annotated[int | None, typer.Option(help="Trials to finish.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes here; 0: as many as there are devices for.")
    ] = None,
    devices_per_trial: Annotated[
        int | None, typer.Option(help="GPUs, or ranks on CPUs, of a trial.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, gp, random or grid.")] = None,
    pruner: Annotated[str | None, typer.Option(help="asha, hyperband, median or none.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="postgresql://...; without it a journal file in the folder.")
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train the best on the full budget.")] = False,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Find better settings by parallel Bayesian optimisation.

    \b
    voxelscale search store/ search/ --trials 50
    voxelscale search store/ search/ --workers 4 --devices-per-trial 2 --sampler gp
    voxelscale search store/ search/ --config mine.yaml --set search.samples=4000 --retrain
    voxelscale search status search/ --follow         where it stands, from any machine
    voxelscale search report search/                  write search/search.html now

    What is searched is the config's search.space, as {model.depth: {int: [2, 5]}}; without it a default
    space. The first trial is the config itself. The same command on another machine that sees the folder
    joins; killed or stopped by Ctrl-C, the same command goes on, and no trial is lost or run twice.
    Leaves best.yaml, which voxelscale train takes as it is, and search.html.
    """
    check_output(out)
    from voxelscale.config import load
    from voxelscale.search.definition import DEFINITION
    from voxelscale.search.search import retrain_best
    from voxelscale.search.search import search as run_search

    options = {"trials": trials, "workers": workers, "devices_per_trial": devices_per_trial}
    options |= {"sampler": sampler, "pruner": pruner, "storage": storage}  # type: ignore[dict-item]
    sets = [f"search.{key}={value}" for key, value in options.items() if value is not None]
    begun = out / DEFINITION
    base = load(begun) if begun.is_file() else None
    settings = read_config(config, [*(set_ or []), *sets], base)
    results = run_search(settings, store, out)
    best = results.best
    if best is None:
        raise VoxelscaleError(f"{out}: no trial came to its end", "voxelscale search status tells why")
    values = ", ".join(f"{n} {v:.4g}" for n, v in zip(results.objectives, best.values, strict=True))
    print(f"best trial {best.number}: {values}")
    for key, value in best.params.items():
        print(f"  {key}: {value}")
    print(f"report in {out / 'search.html'}")
    if retrain:
        return retrain_best(out, store)
    print(f"to train it: voxelscale train {store} run/ --config {out / 'best.yaml'}")
    return 0


@verb("Search", to=search_app)
def status(
    out: Annotated[Path, typer.Argument(help="Folder of the search.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Again every few seconds until it is done.")
    ] = False,
) -> None:
    """Show where a search stands: running, done, pruned and failed trials, and the best so far.

    \b
    voxelscale search status search/
    voxelscale search status search/ --follow
    """
    from voxelscale.search.status import follow_status

    follow_status(out, forever=follow)


@verb("Search", to=search_app, name="report")
def report_search(
    out: Annotated[Path, typer.Argument(help="Folder of the search.")],
) -> None:
    """Write search.html and best.yaml of a search as it stands now.

    \b
    voxelscale search report search/
    """
    check_output(out)
    from voxelscale.search.definition import reopen
    from voxelscale.search.search import write_results

    write_results(reopen(out))
    print(f"report in {out / 'search.html'}")


@verb("Studies", goes_on=True)
def scale(
    store: Annotated[Path, typer.Argument(help="What voxelscale prepare wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder of the study; if it has begun, it goes on.")],
    workers: Annotated[str | None, typer.Option(help="Numbers of workers, as 1,8,64.")] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Recipes, the first being the one to compare with.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, as 0,1,2.")] = None,
    interconnect: Annotated[
        str | None, typer.Option(help="infiniband-edr, ethernet-10g, ... or alpha=5us,beta=12GB/s.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure the link between ranks here instead.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Trainings at a time; 0: one a core or GPU.")] = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Say what N workers do to time and Dice.

    \b
    voxelscale scale store/ study/ --workers 1,8,64 --seeds 0
    voxelscale scale store/ study/ --recipes unchanged,large_batch --interconnect infiniband-hdr
    voxelscale scale store/ study/ --recipes "unchanged,large_batch,large_batch:optim.warmup=0"

    Trains at every number of workers with the same samples, each worker emulated where there is no device
    for it: the updates are those of real ones. The time of N workers is modelled from a measured step and
    the interconnect; the model is checked against two real ranks, and its error printed. Writes
    scaling.json, scaling.svg and scaling.html. Ctrl-C saves; the same command goes on.
    """
    check_output(out)
    from voxelscale.scale.report import table
    from voxelscale.scale.scale import scale as run_scale

    lists = {"workers": workers, "recipes": recipes, "seeds": seeds}
    sets = [f"scale.{key}=[{value}]" for key, value in lists.items() if value is not None]
    single = {"interconnect": interconnect, "jobs": jobs, "measure": measure or None}
    sets += [f"scale.{key}={value}" for key, value in single.items() if value is not None]
    findings = run_scale(read_config(config, [*(set_ or []), *sets]), store, out)
    print(table(findings))
    print(f"figure in {out / 'scaling.html'}")


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
    from voxelscale.data.listing import list_scans
    from voxelscale.data.names import names_of
    from voxelscale.data.names_table import write_names
    from voxelscale.data.store import open_store
    from voxelscale.model.bundle import read_bundle
    from voxelscale.predict.predict import predict as run_predict
    from voxelscale.predict.record import record_cases
    from voxelscale.predict.text import lines

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


@verb("Training", goes_on=True)
def refine(
    run: Annotated[Path, typer.Argument(help="A trained run's folder, or its model.vxs.")],
    store: Annotated[Path, typer.Argument(help="The store that it was trained on.")],
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Train a second look at what a model finds.

    \b
    voxelscale refine run/ store/
    voxelscale refine run/ store/ --set refine.samples=30000

    The model looks at its own training scans; a second, small network learns from crops around what it
    found there, and around the lesions, to tell them apart. It becomes part of the model: predict then
    gives each finding the geometric mean of both confidences, and also lists what only reaches
    refine.candidates. Masks stay. Calibrate afterwards. Ctrl-C saves; the same command goes on.
    """
    check_output(run.parent if run.is_file() else run)
    from voxelscale.model.bundle import read_bundle
    from voxelscale.tune.refine import refine as run_refine

    settings = read_config(config, set_, read_bundle(run).config)
    found = run_refine(run, store, settings)
    if found is None:
        notice(f"stopped and saved; to go on: voxelscale refine {run} {store}")
        return 130
    lesions = count(len(found.lesions), "lesion")
    others = count(len(found.others), "candidate that is", "candidates that are")
    print(f"trained on {lesions} and {others} none")
    print(f"the second look is in {run if run.is_file() else run / 'model.vxs'}")
    return 0


@verb("Training")
def ensemble(
    out: Annotated[Path, typer.Argument(help="The model file to write, as all.vxs.")],
    models: Annotated[list[Path], typer.Argument(help="Runs' folders, or model files; two or more.")],
) -> None:
    """Put several models into one file.

    \b
    voxelscale train store/ run1/ --set train.seed=1
    voxelscale train store/ run2/ --set train.seed=2
    voxelscale ensemble all.vxs run1/ run2/
    voxelscale predict all.vxs scans/ predictions/

    The networks' probabilities are averaged; they may differ in size, patch and spacing. Windows and
    thresholds are the first one's. Finds more than each alone, in so many times the time; calibrate it
    anew, since the networks' own calibrations are left behind.
    """
    check_output(out, file=True)
    from voxelscale.tune.ensemble import ensemble as run_ensemble

    bundle = run_ensemble(models, out)
    print(f"{count(len(bundle.networks), 'network')} in {out}")


@verb("Evaluation")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="What voxelscale predict wrote.")],
    data: Annotated[Path, typer.Argument(help="The data set with the true masks, as for prepare.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; PREDICTIONS where not said.")] = None,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Score cases without a prediction, too: nothing was found there.")
    ] = False,
) -> int:
    """Score predictions: Dice, surfaces, sensitivity, FROC.

    \b
    voxelscale evaluate predictions/ scans/

    Dice, surface Dice and HD95 of each case; lesions by size, and synthetic ones by kind, margin and place;
    FROC by LUNA16's rule; components matched by IoU. docs/measures.md says how each is counted.
    Writes evaluation.json and cases.csv. Cases without a true mask are left out, or are healthy with
    prepare.allow_empty=true. A case that predict was asked for and that has no prediction is an error.
    """
    check_output(out or predictions)
    from voxelscale.evaluate.evaluate import evaluate_folder
    from voxelscale.evaluate.text import text_summary

    settings = read_config(config, set_).prepare
    folder = out or predictions
    summary = evaluate_folder(
        predictions, data, folder, settings, layout, annotations, missing_is_empty=all_
    )
    print("\n".join(text_summary(summary)))
    return tell_failed(rows_of(summary), "evaluated")


@verb("Training")
def calibrate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a model.vxs.")],
    predictions: Annotated[Path, typer.Argument(help="What voxelscale predict wrote with it.")],
    data: Annotated[Path, typer.Argument(help="The data set with the true masks, as for prepare.")],
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Make a model's confidence mean what it says.

    \b
    voxelscale predict run/ scans/ val/ --store store/ --split val
    voxelscale calibrate run/ val/ scans/

    Fits a rising map from a finding's score to the share of such findings that are lesions, and writes it
    into model.vxs; from then on predict gives it as the confidence. Which finding goes before which, and
    so the FROC, stays as it is. Use at least 5 scans that the model was not trained on, with
    10 lesions found and 10 false findings; fewer are refused, below 100 of each there is a warning. Beside
    the model calibration.json and calibration.svg (reliability diagram) are written.
    """
    check_output(model.parent if model.is_file() else model)
    from voxelscale.tune.calibrate import calibrate_run

    settings = read_config(config, set_).prepare
    summary = calibrate_run(model, predictions, data, settings, layout, annotations)
    found, scans = count(summary["findings"], "finding"), count(summary["scans"], "scan")
    print(f"{found} of {scans}, {summary['hits']} of them lesions")
    print(
        f"ECE {summary['ece_before']:.3f} before, {summary['ece_after']:.3f} after "
        f"({summary['method']}, cross-validated by scans)"
    )
    print(f"calibrated model in {model}, reliability diagram in calibration.svg beside it")
    return tell_failed(rows_of(summary), "read")


@verb("Evaluation")
def compare(
    predictions_a: Annotated[Path, typer.Argument(help="What voxelscale predict wrote.")],
    predictions_b: Annotated[Path, typer.Argument(help="The same of another model.")],
    data: Annotated[Path, typer.Argument(help="The data set with the true masks, as for prepare.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the bootstrap.")] = 0,
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Say whether one model is better than another.

    \b
    voxelscale compare predictions/ other_predictions/ scans/
    voxelscale compare predictions/ other_predictions/ scans/ --json

    On the cases that both predicted: the difference of mean Dice, of CPM and of sensitivity at 1 FP/scan,
    A less B, with 95 % intervals and two-sided p-values by paired bootstrap over scans; of Dice by
    Wilcoxon's signed ranks, too.
    """
    if out is not None:
        check_output(out, file=True)
    from voxelscale.evaluate.compare import compare_folders, text_table

    result = compare_folders(
        predictions_a,
        predictions_b,
        data,
        config=read_config(config, set_).prepare,
        layout=layout,
        annotations=annotations,
        out=out,
        seed=seed,
    )
    print(json.dumps(result) if as_json else "\n".join(text_table(result)))
    return tell_failed(rows_of(result), "compared")


@verb("Evaluation")
def froc(
    submission: Annotated[Path, typer.Argument(help="CSV: seriesuid,coordX,coordY,coordZ,probability.")],
    annotations: Annotated[Path, typer.Option(help="CSV of the nodules, with diameter_mm.")],
    series: Annotated[Path, typer.Option(help="The scans, a SeriesInstanceUID a line.")],
    excluded: Annotated[
        Path | None, typer.Option(help="CSV of findings that neither count nor hurt.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Another submission, to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, too.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the bootstrap.")] = 0,
) -> None:
    """Score a submission to LUNA16 as the challenge does.

    \b
    voxelscale froc findings.csv --annotations annotations.csv --excluded annotations_excluded.csv \\
        --series seriesuids.csv
    voxelscale froc a.csv --against b.csv --annotations annotations.csv --series seriesuids.csv --json

    Sensitivity at 1/8 to 8 false positives per scan, their mean (CPM) and the challenge's counts, with
    95 % intervals by bootstrap over scans. --against adds the difference of CPM, its interval and p.
    """
    if out is not None:
        check_output(out, file=True)
    from voxelscale.evaluate.luna16 import score_submission, text_table

    result = score_submission(
        submission,
        annotations=annotations,
        series=series,
        excluded=excluded,
        against=against,
        out=out,
        seed=seed,
    )
    print(json.dumps(result) if as_json else "\n".join(text_table(result)))


@verb("Evaluation")
def report(
    predictions: Annotated[Path, typer.Argument(help="What voxelscale predict wrote.")],
    data: Annotated[Path, typer.Argument(help="The scans, or the data set with true masks.")],
    evaluation: Annotated[Path | None, typer.Option(help="Where evaluation.json is, if elsewhere.")] = None,
    run: Annotated[Path | None, typer.Option(help="The training's folder, for its curves.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    layout: Layout = "auto",
    annotations: Annotations = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Write one self-contained HTML page.

    \b
    voxelscale report predictions/ scans/ --run run/ --out report.html
    voxelscale report predictions/ dicom_folder/              findings alone, of scans without masks

    With true masks it shows what voxelscale evaluate measured: curves, intervals, the best and the worst
    case, the most confident false positive and the largest missed lesion. Without them it lists each scan's
    findings with their positions and shows the most confident ones.
    """
    check_output(out, file=True)
    from voxelscale.report.report import write_report

    settings = read_config(config, set_).prepare
    write_report(evaluation, predictions, data, out, run, settings, layout, annotations)
    print(f"report in {out}")


@verb("Help", goes_on=True)
def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder for everything.")] = Path("quickstart"),
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Do all of it on synthetic scans, in minutes.

    \b
    voxelscale quickstart
    voxelscale quickstart trial/ --set train.samples=2000

    The last line printed is JSON with dice, sensitivity_at_1_fp, seconds and report.
    """
    check_output(out)
    from voxelscale.evaluate.text import text_value
    from voxelscale.quickstart import quickstart as run_quickstart
    from voxelscale.quickstart import quickstart_config

    result = run_quickstart(out, quickstart_config(config, tuple(set_ or ())))
    total = sum(result.seconds.values())
    laps = ", ".join(f"{name} {duration(seconds)}" for name, seconds in result.seconds.items())
    print(f"Dice on scans never seen: {text_value(result.dice)}")
    print(f"sensitivity at 1 false positive per scan: {text_value(result.sensitivity_at_1_fp)}")
    print(f"time: {duration(total)} ({laps})")
    print(f"report: {result.report}")
    summary = {
        "dice": _rounded(result.dice),
        "sensitivity_at_1_fp": _rounded(result.sensitivity_at_1_fp),
        "seconds": round(total, 1),
        "report": str(result.report),
    }
    print(json.dumps(summary))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@verb("Help")
def config(
    config: ConfigFile = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of all keys and defaults (docs/config.md).")
    ] = False,
    set_: Sets = None,
) -> None:
    """Print the whole config tree as YAML, with a comment on every key.

    \b
    voxelscale config > mine.yaml
    voxelscale train store/ run/ --config mine.yaml
    """
    from voxelscale import config_docs

    print(config_docs.markdown() if markdown else config_docs.commented(read_config(config, set_)), end="")


if __name__ == "__main__":
    main()
