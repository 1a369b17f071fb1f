"""Voxelscale, as its command line would train it: `prepare`, its plan, `train`, `predict`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from voxelscale.config import Config, load
from voxelscale.dataset import DataSet as Listed
from voxelscale.formats import read_scan
from voxelscale.model.bundle import read_bundle
from voxelscale.predict.predictor import Predictor
from voxelscale.store import PLAN_FILE
from voxelscale.store.prepare import prepare as prepare_store
from voxelscale.train.engine import Engine, Result
from voxelscale.train.launch import start
from voxelscale.train.plan import report_plan

from .data import Answer, Case
from .nnunet import write_raw
from .protocol import Course, Job, Place, Trained

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


RATE = 1e-3
"""Learning rate of x 1, whatever the default is; Muon's own is x 5."""


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


def train(job: Job, place: Place, course: Course) -> Trained:
    """Settings: keys of the config."""
    store = place.shared / "ours" / job.on
    config = _config(job, store, course)
    run = place.own / "run"
    shutil.rmtree(run, ignore_errors=True)
    _timed(config, store, run, course)
    course.finish()
    bundle = read_bundle(run)
    shutil.rmtree(run / "checkpoints")
    predictor = Predictor(bundle, bundle.config.predict, torch.device("cpu"))

    def predict(case: Case) -> Answer:
        image = read_scan(case.image)
        if place.data.detect:
            probability = predictor.probability(image)
            return Answer(labels=probability >= 0.5, probability=probability)
        return Answer(labels=predictor.see(case.name, image).mask.array)

    facts = json.loads((run / "environment.json").read_text())
    return Trained(
        batch=config.train.batch_size,
        predict=predict,
        facts={
            "patch": config.data.patch_size,
            "lr": config.optim.lr,
            "precision": facts["precision"],
            "parameters": sum(weight.numel() for weight in bundle.weights.values()),
        },
    )


def _config(job: Job, store: Path, course: Course) -> Config:
    fold = ["data.fold=0"] if job.on == "choose" else []
    # The plan is that of all training cases, as nnU-Net's is.
    sets = [*FIXED, *fold, f"train.seed={job.seed}", f"optim.lr={RATE}", *job.settings]
    config = load(store.parent / "judge" / PLAN_FILE, sets)
    samples = course.updates * config.train.batch_size
    return replace(
        config,
        optim=replace(config.optim, lr=config.optim.used.lr * job.rate),
        train=replace(config.train, samples=samples),
    )


def _timed(config: Config, store: Path, run: Path, course: Course) -> None:
    """Train until the end, or the course's limit; each step's end is a tick of the course."""
    go = Engine.go

    def timed(engine: Engine, asked: Callable[[], bool]) -> Result:
        course.ticks = [time.process_time()]

        def ask() -> bool:
            course.tick()
            return asked() or course.used > course.seconds

        return go(engine, ask)

    with patch.object(Engine, "go", timed):
        start(config, store, run)
