"""Voxelscale, as its command line would train it: `prepare`, its plan, `train`, `predict`."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from numpy.typing import NDArray

from voxelscale.config import Config, load
from voxelscale.dataset import DataSet as Listed
from voxelscale.formats import read_scan
from voxelscale.model.bundle import read_bundle
from voxelscale.predict.work import Predictor
from voxelscale.store import PLAN_FILE
from voxelscale.store.prepare import prepare as prepare_store
from voxelscale.train.engine import Engine, Result
from voxelscale.train.launch import start
from voxelscale.train.plan import report_plan

from .data import Case
from .nnunet import write_raw
from .protocol import Job, Place, Trained

FIXED = (
    "train.ranks=1",
    "train.virtual_workers=1",
    "train.threads=1",
    "data.readers=1",
    "train.validate_every=0",  # the last model counts, as of the others
    "train.validate_cases=1",
    "train.checkpoint_every=1000000000",
    "train.checkpoint_seconds=0",
)
PROBE_SHARE, PROBE_LEAST = 0.05, 8.0
"""Of the budget, and seconds: how long the time of a step is measured, before the training."""


def prepare(place: Place) -> None:
    """Two stores of the fold's training cases: with the inner split as fold 0, and all to train on."""
    raw = write_raw(place)
    for name, sets in {
        "choose": [f"prepare.splits={raw / 'inner.json'}"],
        "judge": ["prepare.split=[1,0,0]"],
    }.items():
        store = place.shared / "ours" / name
        if (store / "dataset.json").is_file():
            continue
        config = load(None, ["prepare.workers=1", *sets])
        listed = Listed(path=raw, reading=config.reading, splits=config.prepare.splits)
        prepare_store(listed.cases, store, config.prepare, config.reading, listed.folds)
        if name == "judge":
            report_plan(config, store)


def train(job: Job, place: Place) -> Trained:
    """As many samples as the budget takes, by the time of a step that a short run before it measures."""
    store = place.shared / "ours" / job.on
    config = _config(job, store)
    probe = place.own / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    limit = max(PROBE_LEAST, PROBE_SHARE * job.budget)
    ticks = _timed(replace(config, train=replace(config.train, samples=10**7)), store, probe, limit)
    shutil.rmtree(probe)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    updates = max(1, round(job.budget / step))
    samples = updates * config.train.batch_size
    run = place.own / "run"
    shutil.rmtree(run, ignore_errors=True)
    final = replace(config, train=replace(config.train, samples=samples))
    ticks = _timed(final, store, run, math.inf)
    bundle = read_bundle(run)
    shutil.rmtree(run / "checkpoints")
    predictor = Predictor(bundle, bundle.config.predict, torch.device("cpu"))

    def predict(case: Case) -> NDArray[Any]:
        return predictor.see(case.name, read_scan(case.image)).mask.array

    facts = json.loads((run / "environment.json").read_text())
    return Trained(
        seconds=ticks[-1],
        samples=samples,
        updates=updates,
        predict=predict,
        facts={
            "step_of_probe": step,
            "patch": config.data.patch_size,
            "batch": config.train.batch_size,
            "lr": config.optim.lr,
            "precision": facts["precision"],
            "parameters": sum(weight.numel() for weight in bundle.weights.values()),
        },
    )


def _config(job: Job, store: Path) -> Config:
    fold = ["data.fold=0"] if job.on == "choose" else []
    # The plan is that of all training cases, as nnU-Net's is.
    config = load(
        store.parent / "judge" / PLAN_FILE, [*FIXED, *fold, f"train.seed={job.seed}", *job.settings]
    )
    return replace(config, optim=replace(config.optim, lr=config.optim.lr * job.rate))


def _timed(config: Config, store: Path, run: Path, limit: float) -> list[float]:
    """Train until the end, or the limit; processor seconds from the training's start to each step's end."""
    ticks: list[float] = []
    go = Engine.go

    def timed(engine: Engine, asked: Callable[[], bool]) -> Result:
        began = time.process_time()

        def ask() -> bool:
            ticks.append(time.process_time() - began)
            return asked() or ticks[-1] > limit

        return go(engine, ask)

    with patch.object(Engine, "go", timed):
        start(config, store, run)
    return ticks
