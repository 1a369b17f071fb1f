"""The command: which jobs there are, running those that are missing, and the tables."""

from __future__ import annotations

import argparse
import contextlib
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
from .pace import ROUNDS, SECONDS, Paces, smallest_mean
from .protocol import Course, EndedEarly, Job, Place, has_bf16
from .table import best_rate, show

MODULES = {"ours": "contest.ours", "nnunet": "contest.nnunet", "dynunet": "contest.dynunet"}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).resolve().parents[1] / "results"
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS")


def main(text: str) -> None:
    """Read the arguments; train what is missing; print."""
    options = _parser(text).parse_args()
    if options.job:
        job = Job(**json.loads(options.job))
        _run_here(replace(job, settings=tuple(job.settings)), options)
        return
    contenders = [_contender(word) for word in options.contenders]
    jobs = [
        _job(options, name, settings, budget, rate, options.seeds[0], "choose")
        for budget in ([] if options.rates_of else options.budget)
        for rate in options.rates
        for name, settings in contenders
    ]
    _run_missing(jobs, options)
    results = _results(options)
    show(results, options.data, options.fold, "choose")
    if options.judge:
        frozen = [
            _job(options, name, settings, budget, rate, seed, "judge")
            for budget in options.budget
            for name, settings in contenders
            for rate in [best_rate(results, name, settings, options.rates_of or budget)]
            for seed in options.seeds
        ]
        _note_look(frozen, options.results)
        _run_missing(frozen, options)
        results = _results(options)
        show(results, options.data, options.fold, "judge")


def _parser(text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what is prepared and what came out")
    parser.add_argument("--data", choices=DATA_SETS, default="hippocampus")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--contenders", nargs="+", default=_defaults(), metavar="NAME[:key=value;...]")
    parser.add_argument("--budget", type=float, nargs="+", default=[240.0], help="processor seconds")
    parser.add_argument("--rates", type=float, nargs="+", default=[1 / 3, 1.0, 3.0])
    parser.add_argument("--rates-of", type=float, metavar="BUDGET", help="judge with the rates of this one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the first one chooses rates")
    parser.add_argument("--processes", type=int, default=1, help="jobs at a time")
    parser.add_argument("--judge", action="store_true", help="train on all cases, look at the judge cases")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of paces, results and looks")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of the data sets")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--updates", type=int, help=argparse.SUPPRESS)
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
    data = DATA_SETS[job.data](options.shared, Path(options.folder).absolute())
    own = _where(options, job)
    return Place(data=data, split=split_of(data, job.fold), shared=own.parents[1], own=own)


def _run_missing(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    """Each in a process of its own; what failed is reported and left."""
    known = {result["name"] for result in _results(options)}
    missing = [job for job in jobs if job.name not in known]
    if not missing:
        return
    for name in dict.fromkeys(job.contender for job in missing):
        module = import_module(MODULES[name])
        module.prepare(_place(options, missing[0]))
    paces = _measured(missing, options)
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(lambda job: _train(job, paces.updates(job), options), missing))


def _measured(jobs: Sequence[Job], options: argparse.Namespace) -> Paces:
    """The paces of all contenders; those that are missing are measured in turn."""
    paces = Paces(options.results / "accuracy_paces.json")
    missing = paces.missing(jobs)
    rounds: dict[Job, list[float]] = {job: [] for job in missing}
    for _ in range(ROUNDS):
        for job in missing:
            if found := _apart(job, options, 0):
                rounds[job].append(smallest_mean(found["ticks"]))
    for job, means in rounds.items():
        if not means:
            raise SystemExit(f"{job.name}: its pace could not be measured")
        paces.add(job, means, machine())
        print(f"{job.contender} {' '.join(job.settings)}: {min(means):.4f} s an update, rounds {means}")
    return paces


def _train(job: Job, updates: int, options: argparse.Namespace) -> None:
    """In a process of its own; a line of the results comes of it."""
    found = _apart(job, options, updates)
    if found is None:
        return
    line = f"{json.dumps(found)}\n"
    with (options.results / f"accuracy_{job.data}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line)
    dice = np.mean(found["score"]["dice"])
    words = [f"{time.strftime('%H:%M')} {job.name} {' '.join(job.settings)}: Dice {dice:.4f}"]
    words += [f"{updates} updates in {found['seconds']:.0f} s"]
    print(", ".join(words), flush=True)


def _apart(job: Job, options: argparse.Namespace, updates: int) -> dict[str, Any] | None:
    """What a process with one thread finds out; 0 updates: only their ticks, for `SECONDS`."""
    own = _where(options, job)
    own.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, sys.argv[0], str(options.folder), "--shared", str(options.shared)]
    words += ["--job", json.dumps(asdict(job)), "--updates", str(updates)]
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
    with (own / "log.txt").open("a") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        print(f"{job.name} failed: {own / 'log.txt'}", flush=True)
        return None
    found: dict[str, Any] = json.loads((own / "result.json").read_text())
    return found


def _run_here(job: Job, options: argparse.Namespace) -> None:
    """Train, predict, score, and write what came out; or measure a pace."""
    place, before = _place(options, job), machine()
    lock = (place.own / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        raise SystemExit("another process trains this") from None
    train = import_module(MODULES[job.contender]).train
    if not options.updates:
        course = Course(10**7, SECONDS)
        with contextlib.suppress(EndedEarly):
            train(job, place, course)
        _write(place, {"ticks": course.ticks})
        return
    course = Course(options.updates)
    trained = train(job, place, course)
    names = place.split.choose if job.on == "choose" else place.split.judge
    answers = {name: trained.predict(place.data.cases[name]) for name in names}
    scored = score(place.data, answers)
    masks = {name: answer.labels.astype(np.uint8) for name, answer in answers.items()}
    np.savez_compressed(place.own / "masks.npz", **masks)
    found: dict[str, Any] = {
        "name": job.name,
        "job": asdict(job),
        "seconds": course.used,
        "updates": options.updates,
        "batch": trained.batch,
        "facts": trained.facts,
        "score": scored,
        "machine": {**before, "threads": 1},
        "load_after": os.getloadavg(),
    }
    _write(place, found)


def _write(place: Place, found: dict[str, Any]) -> None:
    part = place.own / "result.part"
    part.write_text(json.dumps(found))
    part.rename(place.own / "result.json")


def _results(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of all jobs that are there, of this data set and fold."""
    path = options.results / f"accuracy_{options.data}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [result for line in lines if (result := json.loads(line))["job"]["fold"] == options.fold]


def _note_look(jobs: Sequence[Job], results: Path) -> None:
    """Every look at judge cases leaves a line, before it is taken."""
    what = [asdict(job) for job in jobs]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    with (results / "looks.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"date": date.today().isoformat(), "digest": digest, "jobs": what}) + "\n")
