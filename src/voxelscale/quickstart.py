"""The main job from nothing to a report, on synthetic scans: what ``make quickstart`` runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from voxelscale.config import Config, load
from voxelscale.console import duration, notice
from voxelscale.errors import VoxelscaleError

if TYPE_CHECKING:
    from voxelscale.dataset import DataSet


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What it came to.

    Attributes:
        dice: mean over the test scans; None where neither they nor their predictions hold a lesion.
        sensitivity_at_1_fp: lesions found at one false positive per scan; None without a lesion.
        seconds: of each step, by name.
        report: the page.
    """

    dice: float | None
    sensitivity_at_1_fp: float | None
    seconds: dict[str, float]
    report: Path


def quickstart_config(path: Path | None = None, sets: tuple[str, ...] = ()) -> Config:
    """The packaged config, with a YAML file and settings over it."""
    with resources.as_file(resources.files("voxelscale") / "configs" / "quickstart.yaml") as packaged:
        base = load(packaged)
    return load(path, sets, base)


def quickstart(folder: Path, config: Config) -> QuickstartResult:
    """Make phantoms, prepare, train, predict the test scans, evaluate, report; all below `folder`.

    Run again it keeps what is done.

    Raises:
        VoxelscaleError: a step failed, or the training was asked to stop.
    """
    from voxelscale.dataset import DataSet
    from voxelscale.evaluate.evaluate import evaluate_folder
    from voxelscale.phantom.dataset import write_phantoms
    from voxelscale.report.report import write_report
    from voxelscale.store.prepare import prepare
    from voxelscale.train.launch import start

    seconds: dict[str, float] = {}
    started = time.monotonic()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name] = time.monotonic() - started
        notice(f"{name}: {duration(seconds[name])}")
        started = time.monotonic()

    table = write_phantoms(config.phantom, folder / "data", config.prepare.workers)
    data = DataSet(path=table, reading=config.reading)
    lap("phantom")
    for case, message, hint in prepare(data.cases, folder / "store", config.prepare, config.reading).failed:
        raise VoxelscaleError(f"{case}: {message}", hint)
    lap("prepare")
    if not start(config, folder / "store", folder / "run"):
        raise VoxelscaleError(f"{folder / 'run'}: stopped", "the same command resumes from there")
    lap("train")
    _predict_test_scans(data, folder)
    lap("predict")
    summary = evaluate_folder(folder / "predictions", data, folder / "evaluation")
    lap("evaluate")
    report = folder / "report.html"
    write_report(folder / "evaluation", folder / "predictions", data, report, folder / "run")
    lap("report")
    return QuickstartResult(
        dice=summary["dice"]["mean"],
        sensitivity_at_1_fp=summary["sensitivity_at_1_fp"],
        seconds=seconds,
        report=report,
    )


def _predict_test_scans(data: DataSet, folder: Path) -> None:
    from voxelscale.model.bundle import read_bundle
    from voxelscale.predict.predict import predict
    from voxelscale.store import open_store

    unseen = {info.case for info in open_store(folder / "store").split("test")}
    bundle = read_bundle(folder / "run")
    sources = [source for source in data.cases if source.case in unseen]
    predict(sources, bundle, bundle.config.predict, folder / "predictions")
