"""Commands that run many trainings, or choose among them: search, scale, cv, best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import (
    ConfigFile,
    Layout,
    Sets,
    data_set,
    print_failed,
    read_config,
    rows_of,
    search_app,
    verb,
)
from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.files import check_output


@verb("Search", goes_on=True, to=search_app)
def run(
    store: Annotated[Path, typer.Argument(help="Training store, from voxelscale prepare.")],
    out: Annotated[Path, typer.Argument(help="Folder of the search; an unfinished search is resumed.")],
    trials: Annotated[int | None, typer.Option(help="Number of trials.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes on this machine; 0: as many as its devices allow.")
    ] = None,
    devices_per_trial: Annotated[int | None, typer.Option(help="GPUs per trial, or ranks on CPUs.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, gp, random or grid.")] = None,
    pruner: Annotated[str | None, typer.Option(help="asha, hyperband, median or none.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="postgresql://...; by default a journal file in the folder.")
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Then train the best config on the full budget.")
    ] = False,
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Find better settings by parallel Bayesian optimisation.

    \b
    voxelscale search store/ search/ --trials 50
    voxelscale search store/ search/ --workers 4 --devices-per-trial 2 --sampler gp
    voxelscale search store/ search/ --config mine.yaml --set search.samples=4000 --retrain
    voxelscale search status search/ --follow         progress, from any machine
    voxelscale search report search/                  write search/search.html now

    The search space is the config's search.space, such as {model.depth: {int: [2, 5]}}, or a default one.
    The first trial is the config itself. To add workers, run the same command on another machine that sees
    the folder. After Ctrl-C or a crash the same command resumes; no trial is lost or run twice. Writes
    best.yaml, a config for voxelscale train, and search.html.
    """
    check_output(out)
    from voxelscale.config import load_stored
    from voxelscale.search.definition import DEFINITION
    from voxelscale.search.search import retrain_best
    from voxelscale.search.search import search as run_search

    options = {"trials": trials, "workers": workers, "devices_per_trial": devices_per_trial}
    options |= {"sampler": sampler, "pruner": pruner, "storage": storage}  # type: ignore[dict-item]
    sets = [f"search.{key}={value}" for key, value in options.items() if value is not None]
    begun = out / DEFINITION
    base = load_stored(begun) if begun.is_file() else None
    settings = read_config(config, [*(set_ or []), *sets], base)
    results = run_search(settings, store, out)
    best = results.best
    if best is None:
        raise VoxelscaleError(f"{out}: no trial finished", f"voxelscale search status {out} shows why")
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
        bool, typer.Option("--follow", help="Repeat every few seconds until the search is done.")
    ] = False,
) -> None:
    """Show running, done, pruned and failed trials, and the best so far.

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
    """Write search.html and best.yaml from the trials so far.

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
    store: Annotated[Path, typer.Argument(help="Training store, from voxelscale prepare.")],
    out: Annotated[Path, typer.Argument(help="Folder of the study; an unfinished study is resumed.")],
    workers: Annotated[str | None, typer.Option(help="Numbers of workers, such as 1,8,64.")] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Recipes; the first is the reference for the others.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, such as 0,1,2.")] = None,
    interconnect: Annotated[
        str | None, typer.Option(help="infiniband-edr, ethernet-10g, ... or alpha=5us,beta=12GB/s.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="reedbush-h, reedbush-l, dgx-a100, dgx-h100, ethernet or laptop.")
    ] = None,
    measure: Annotated[
        bool | None, typer.Option(help="Measure the link between ranks here instead.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Trainings at a time; 0: one per core or GPU.")] = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Measure what N workers do to time and Dice.

    \b
    voxelscale scale store/ study/ --workers 1,8,64 --seeds 0
    voxelscale scale store/ study/ --recipes unchanged,auto --cluster dgx-a100
    voxelscale scale store/ study/ --recipes "unchanged,muon,muon:optim.momentum=0.95"

    Trains with every number of workers on the same samples; the recipe muon adds some. Workers without a
    device are emulated: the updates are those of real ones. The time of N workers is modelled from a
    measured step and the interconnect; the model is checked against two real ranks and its error printed.
    Writes scaling.json, scaling.svg and scaling.html. Ctrl-C saves; the same command resumes.
    """
    check_output(out)
    from voxelscale.scale.report import table
    from voxelscale.scale.scale import scale as run_scale

    lists = {"workers": workers, "recipes": recipes, "seeds": seeds}
    sets = [f"scale.{key}=[{value}]" for key, value in lists.items() if value is not None]
    single = {"cluster": cluster, "interconnect": interconnect, "jobs": jobs, "measure": measure}
    sets += [f"scale.{key}={value}" for key, value in single.items() if value is not None]
    findings = run_scale(read_config(config, [*(set_ or []), *sets]), store, out)
    print(table(findings))
    print(f"figure in {out / 'scaling.html'}")


@verb("Studies", goes_on=True)
def cv(
    store: Annotated[Path, typer.Argument(help="Training store with folds: prepared with prepare.folds.")],
    scans: Annotated[Path, typer.Argument(help="Data set that the store was prepared from.")],
    out: Annotated[Path, typer.Argument(help="Folder of the study; an unfinished study is resumed.")],
    folds: Annotated[str | None, typer.Option(help="Only these folds, such as 0,1; default: all.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Folds at a time; 0: as many as there are GPUs.")] = 0,
    layout: Layout = "auto",
    config: ConfigFile = None,
    set_: Sets = None,
) -> int:
    """Cross-validate: train every fold, predict what it has not seen, evaluate all of it.

    \b
    voxelscale prepare scans/ store/ --set prepare.folds=5
    voxelscale cv store/ scans/ cv/ --config store/plan.yaml
    voxelscale cv store/ scans/ cv/ --jobs 2                 two folds at a time
    voxelscale cv store/ scans/ cv/ --folds 2                only fold 2, as in a job of its own
    sbatch examples/slurm/folds.sh store/ scans/ cv/         each fold a job

    Trains OUT/fold_0/run and so on, and predicts each fold's validation scans. With several GPUs each fold
    has its own (train.ranks of them); --jobs 1 trains one fold at a time on all. When all folds are there,
    their predictions are put together in OUT/predictions and evaluated as one: Dice of each class with
    intervals, FROC and CPM over all scans, each predicted by a model that was not trained on it. With
    train.validate_every=0 the last model of a fold counts; otherwise that of its best validation, which
    the same scans chose. Ctrl-C saves; the same command resumes. Writes cv.json and evaluation/.
    """
    check_output(out)
    from voxelscale.evaluate.text import text_summary
    from voxelscale.experiments.at_once import jobs_for, run_at_once
    from voxelscale.experiments.folds import evaluate_folds, log_figures, missing_folds, run_folds
    from voxelscale.store import open_store
    from voxelscale.train.track import tracked_study

    settings = read_config(config, set_)
    data = data_set(scans, settings, layout, keys=store)
    wanted = _numbers(folds) if folds is not None else range(len(open_store(store).folds))
    if not wanted:
        raise VoxelscaleError(f"{store}: has no folds", "prepare with prepare.folds=5")
    jobs = min(jobs or jobs_for(settings, len(wanted)), len(wanted))
    with tracked_study(settings, out, ["cv.json"]) as tracking:
        done = (
            run_at_once(settings, store, data, out, wanted, jobs)
            if jobs > 1
            else run_folds(settings, store, data, out, wanted)
        )
        if not done:
            notice("stopped and saved; the same command resumes")
            return 130
        if missing := missing_folds(store, data, out):
            print(f"{count(len(missing), 'fold')} to go: {', '.join(map(str, missing))}")
            return 0
        summary, rows = evaluate_folds(store, data, out)
        if tracking:
            log_figures(tracking, rows, summary)
    for row in rows:
        dice = "no Dice, as all masks are empty" if row["dice"] is None else f"Dice {row['dice']:.3f}"
        print(f"fold {row['fold']}: {count(row['cases'], 'case')}, {dice}")
    print("\n".join(text_summary(summary)))
    print(f"predictions of all folds in {out / 'predictions'}")
    return print_failed(rows_of(summary), "evaluated")


@verb("Studies")
def best(
    studies: Annotated[list[Path], typer.Argument(help="Folders that voxelscale cv wrote, one or more.")],
    scans: Annotated[Path, typer.Argument(help="Data set with the true masks.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    metric: Annotated[str, typer.Option(help="What is compared and tuned: dice or cpm.")] = "dice",
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the bootstrap.")] = 0,
    layout: Layout = "auto",
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Choose the best of cross-validated configurations, and find its settings.

    \b
    voxelscale cv store/ scans/ small/ --set predict.probabilities=true
    voxelscale cv store/ scans/ large/ --set predict.probabilities=true --set model.filters=32
    voxelscale best small/ large/ scans/ best/
    voxelscale predict best/model.vxs new_scans/ predictions/

    Compares the configurations, and the average of each two, on what their folds predicted of unseen scans:
    mean Dice, CPM and sensitivity at 1 false positive per scan, with 95 % intervals and p-values by paired
    bootstrap over patients. The single one with the highest mean Dice (--metric cpm: CPM) is chosen; an
    average instead only where it is better with p < 0.05. Then looks for the threshold, the smallest
    component, and the classes of which only the largest component stays, and says what they give on folds
    that did not choose them. Writes OUT/model.vxs with all folds' networks and these settings, best.json
    and best.html. Averages and thresholds need probabilities.
    """
    check_output(out)
    from voxelscale.experiments.best.best import best as run_best
    from voxelscale.experiments.best.figures import METRICS
    from voxelscale.experiments.best.page import text

    if metric not in METRICS:
        raise VoxelscaleError(f"--metric {metric}: no such metric", f"choose {' or '.join(METRICS)}")
    data = data_set(scans, read_config(config, set_), layout)
    result = run_best(studies, data, out, "cpm" if metric == "cpm" else "dice", seed)
    print("\n".join(text(result)))
    print(f"model of {count(result['networks'], 'network')} in {out / 'model.vxs'}")
    print(f"report in {out / 'best.html'}")


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise VoxelscaleError(f"--folds {text}: not numbers", "write --folds 0,1") from None
