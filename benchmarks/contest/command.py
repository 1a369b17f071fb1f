"""The command: which jobs there are, running those that are missing, and the tables."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from machine import machine  # type: ignore[import-not-found]

from .data import DATA_SETS, score, split_of
from .protocol import Job, Place, has_bf16
from .table import best_rate, show

MODULES = {"ours": "contest.ours", "nnunet": "contest.nnunet", "dynunet": "contest.dynunet"}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LOOKS = Path(__file__).resolve().parents[1] / "results" / "looks.jsonl"
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS")


def main(text: str) -> None:
    """Read the arguments; train what is missing; print."""
    options = _parser(text).parse_args()
    if options.job:
        _run_here(Job(**json.loads(options.job)), options)
        return
    contenders = [_contender(word) for word in options.contenders]
    jobs = [
        _job(options, name, settings, budget, rate, options.seeds[0], "choose")
        for budget in options.budget
        for rate in options.rates
        for name, settings in contenders
    ]
    _run_missing(jobs, options)
    results = _results(options)
    show(results, options.data, options.fold, "choose")
    if options.judge:
        frozen = [
            _job(options, name, settings, budget, best_rate(results, name, settings, budget), seed, "judge")
            for budget in options.budget
            for name, settings in contenders
            for seed in options.seeds
        ]
        _note_look(frozen)
        _run_missing(frozen, options)
        results = _results(options)
        show(results, options.data, options.fold, "judge")
    if options.out:
        options.out.write_text("".join(f"{json.dumps(result)}\n" for result in results))


def _parser(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what is prepared and what came out")
    parser.add_argument("--data", choices=DATA_SETS, default="hippocampus")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--contenders", nargs="+", default=_defaults(), metavar="NAME[:key=value;...]")
    parser.add_argument("--budget", type=float, nargs="+", default=[240.0], help="processor seconds")
    parser.add_argument("--rates", type=float, nargs="+", default=[1 / 3, 1.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one chooses rates")
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time")
    parser.add_argument("--judge", action="store_true", help="train on all cases, look at the judge cases")
    parser.add_argument("--out", type=Path, help="write all results of the data set and fold, a line each")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the data sets")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def _defaults() -> list[str]:
    low = "bf16" if has_bf16() else "fp32"
    return ["ours", *(f"{name}:plan=small;precision={low}" for name in ("nnunet", "dynunet"))]


def _contender(word: str) -> tuple[str, tuple[str, ...]]:
    name, _, settings = word.partition(":")
    if name not in MODULES:
        raise SystemExit(f"{name}: is none of {', '.join(MODULES)}")
    return name, tuple(sorted(setting for setting in settings.split(";") if setting))


def _job(
    options: argparse.Namespace,
    contender: str,
    settings: tuple[str, ...],
    budget: float,
    rate: float,
    seed: int,
    on: Literal["choose", "judge"],
) -> Job:
    return Job(
        data=options.data,
        fold=options.fold,
        contender=contender,
        settings=settings,
        budget=budget,
        rate=rate,
        seed=seed,
        on=on,
    )


def _where(options: argparse.Namespace, job: Job) -> Path:
    return Path(options.folder).absolute() / f"{job.data}-{job.fold}" / "jobs" / job.name


def _place(options: argparse.Namespace, job: Job) -> Place:
    data = DATA_SETS[job.data](options.shared)
    own = _where(options, job)
    return Place(data=data, split=split_of(data, job.fold), shared=own.parents[1], own=own)


def _run_missing(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Each in a process of its own; what failed is reported and left."""
    missing = [job for job in jobs if not (_where(options, job) / "result.json").is_file()]
    if not missing:
        return
    for name in dict.fromkeys(job.contender for job in missing):
        module = import_module(MODULES[name])
        module.prepare(_place(options, missing[0]))
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(lambda job: _run_apart(job, options), missing))


def _run_apart(job: Job, options: argparse.Namespace) -> None:
    own = _where(options, job)
    own.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, sys.argv[0], str(options.folder), "--shared", str(options.shared)]
    words += ["--job", json.dumps(asdict(job))]
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
    with (own / "log.txt").open("a") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        print(f"{job.name} failed: {own / 'log.txt'}", flush=True)
        return
    found = json.loads((own / "result.json").read_text())
    dice = np.mean(found["score"]["dice"])
    words = [f"{time.strftime('%H:%M')} {job.name} {' '.join(job.settings)}: Dice {dice:.4f}"]
    words += [f"{found['seconds']:.0f} s", f"{found['samples']} samples"]
    print(", ".join(words), flush=True)


def _run_here(job: Job, options: argparse.Namespace) -> None:
    """Train, predict, score, and write what came out."""
    job = replace(job, settings=tuple(job.settings))
    place, before = _place(options, job), machine()
    lock = (place.own / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        raise SystemExit("another process trains this") from None
    trained = import_module(MODULES[job.contender]).train(job, place)
    names = place.split.choose if job.on == "choose" else place.split.judge
    masks = {name: trained.predict(place.data.cases[name]) for name in names}
    scored = score(place.data, names, masks)
    np.savez_compressed(
        place.own / "masks.npz", **{name: mask.astype(np.uint8) for name, mask in masks.items()}
    )
    found: dict[str, Any] = {
        "job": asdict(job),
        "seconds": trained.seconds,
        "samples": trained.samples,
        "updates": trained.updates,
        "facts": trained.facts,
        "score": scored,
        "machine": {**before, "threads": 1},
        "load_after": os.getloadavg(),
    }
    part = place.own / "result.part"
    part.write_text(json.dumps(found, indent=1))
    part.rename(place.own / "result.json")


def _results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of all jobs that are there, of this data set and fold."""
    folder = Path(options.folder).absolute() / f"{options.data}-{options.fold}" / "jobs"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]


def _note_look(jobs: Sequence[Job]) -> None:
    """Every look at judge cases leaves a line, before it is taken."""
    what = [asdict(job) for job in jobs]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    LOOKS.parent.mkdir(exist_ok=True)
    with LOOKS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"date": date.today().isoformat(), "digest": digest, "jobs": what}) + "\n")
