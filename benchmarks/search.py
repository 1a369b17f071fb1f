"""Searching: many asynchronous workers on a surrogate of real trainings, and one real search.

    python benchmarks/search.py                       the simulation, an hour for the Gaussian process alone
                                                      (--methods leaves it out); prints a table, writes JSON
    python benchmarks/search.py --quick               fewer trials and seeds
    python benchmarks/search.py --real DIR            real searches of 30 trials on 2 cores, with TPE and at
                                                      random; their best configs, the default one and one
                                                      made by hand, over 5 seeds each on other phantoms
    python benchmarks/search.py --measure DIR         trains 200 random configs of the space anew and writes
                                                      search_table.csv, which the simulation is made from

The surrogate is a Gaussian process (squared exponential, one length a key) through the measured validation
Dice at every rung and the measured seconds; its leave-one-out error is printed. A trial's Dice is the
surrogate's with the noise that its fit found; what is told of the best trial is without. The clock is
virtual: a proposal takes the seconds that it really took and a trial those that the surrogate says. A
worker asks for the next as soon as it is free; the synchronous baseline asks for a batch when the last
trial of the one before has ended. Samplers and pruners are the search's own. Workers count as busy while
they train, until the last trial is handed out: after that there is nothing more to do.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from machine import machine  # type: ignore[import-not-found]
from numpy.typing import NDArray
from optuna.trial import TrialState
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from voxelscale.config import Config, SearchConfig, load
from voxelscale.dataset.listing import list_sources
from voxelscale.files import write_csv
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.scale.study import t_interval
from voxelscale.search.report import status_table
from voxelscale.search.results import SearchResults, TrialResult, Value
from voxelscale.search.sampling import make_pruner, make_sampler, rungs, should_prune
from voxelscale.search.search import search
from voxelscale.search.space import Space, read_space
from voxelscale.search.timeline import utilisation
from voxelscale.store.prepare import prepare
from voxelscale.train.launch import start
from voxelscale.train.log import read_events

HERE = Path(__file__).parent
TABLE = HERE / "search_table.csv"
WORKERS = (1, 4, 16, 64)
METHODS = ("tpe", "gp", "random", "tpe, synchronous batches", "tpe, asha")
START = 6.0
"""Seconds before a training takes its first step: the interpreter, PyTorch, the first batch."""
OTHERS = 7001
"""`phantom.seed` of the scans that judge a real search's configs."""
REAL = ["optim.name=muon"]
"""Real searches have the default optimiser; the table was measured with AdamW."""
BY_HAND = [*REAL, "optim.lr=1e-2", "train.batch_size=1", "loss.cross_entropy=10"]
"""What a person would try for so short a training, written down before any of it was run: a higher rate,
more updates, and more weight where lesions are rare."""
SEARCHES: dict[str, dict[str, Any]] = {
    "tpe, asha": {},
    "random": {"sampler": "random", "pruner": "none"},
}


@dataclass(frozen=True)
class Measured:
    """The table: points, Dice at each rung and at the end (n, rungs), seconds (n,)."""

    points: list[dict[str, Value]]
    dice: NDArray[np.float64]
    seconds: NDArray[np.float64]


class Process:
    """A Gaussian process with a length of its own for every column of x, fitted by marginal likelihood.

    Attributes:
        error: root mean square of the leave-one-out residuals; `spread`: standard deviation of y; `noise`:
            that of repetitions at one point, as the fit has it.
    """

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        self._x, self._mean, self._scale = x, float(y.mean()), float(y.std()) or 1.0
        z = (y - self._mean) / self._scale
        start = np.concatenate([np.zeros(x.shape[1]), [-2.0]])
        bounds = [(-3.0, 3.0)] * x.shape[1] + [(-6.0, 1.0)]
        found = minimize(self._cost, start, args=(z,), method="L-BFGS-B", bounds=bounds)
        self._lengths = np.exp(found.x[:-1])
        matrix = self._kernel(x, x, self._lengths) + np.exp(found.x[-1]) * np.eye(len(x))
        inverse = np.linalg.inv(matrix)
        self._weights = inverse @ z
        residuals = self._weights / np.diag(inverse) * self._scale
        self.error, self.spread = float(np.sqrt(np.mean(residuals**2))), float(y.std())
        self.noise = float(np.exp(found.x[-1] / 2)) * self._scale

    def __call__(self, x: NDArray[np.float64]) -> float:
        """The mean at one point."""
        return (
            float(self._kernel(x[None], self._x, self._lengths)[0] @ self._weights) * self._scale
            + self._mean
        )

    @staticmethod
    def _kernel(
        a: NDArray[np.float64], b: NDArray[np.float64], lengths: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        apart = ((a[:, None] - b[None]) / lengths) ** 2
        return np.asarray(np.exp(-0.5 * apart.sum(-1)))

    def _cost(self, theta: NDArray[np.float64], z: NDArray[np.float64]) -> float:
        matrix = self._kernel(self._x, self._x, np.exp(theta[:-1])) + np.exp(theta[-1]) * np.eye(len(z))
        factor = cho_factor(matrix)
        return float(0.5 * z @ cho_solve(factor, z) + np.log(np.diag(factor[0])).sum())


@dataclass(frozen=True)
class Surrogate:
    """What a training with a point's settings would come to."""

    space: Space
    dice: Sequence[Process]
    seconds: Process

    def curve(self, params: dict[str, Value]) -> list[float]:
        """Dice at each rung and at the end."""
        x = features(self.space, params)
        return [float(np.clip(process(x), 0, 1)) for process in self.dice]

    def duration(self, params: dict[str, Value]) -> float:
        """Seconds of the whole training."""
        return float(np.exp(self.seconds(features(self.space, params))))


def features(space: Space, params: dict[str, Value]) -> NDArray[np.float64]:
    """A point as numbers between 0 and 1; a categorical has one for each choice."""
    row: list[float] = []
    for parameter in space.parameters:
        how, value = parameter.distribution, params[parameter.key]
        if isinstance(how, optuna.distributions.CategoricalDistribution):
            row += [float(value == choice) for choice in how.choices]
            continue
        low, high, own = float(how.low), float(how.high), float(value or 0)  # type: ignore[attr-defined]
        if how.log:  # type: ignore[attr-defined]
            low, high, own = np.log(low), np.log(high), np.log(own)
        row.append((own - low) / (high - low))
    return np.asarray(row)


def read_table(space: Space, marks: int) -> Measured:
    """The measured table."""
    if not TABLE.is_file():
        raise SystemExit(f"{TABLE} is not there: measure it with --measure DIR")
    with TABLE.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    points = [{p.key: _typed(p.distribution, row[p.key]) for p in space.parameters} for row in rows]
    dice = np.array([[float(row[f"dice_{k}"]) for k in range(marks)] for row in rows])
    return Measured(points, dice, np.array([float(row["seconds"]) for row in rows]))


def _typed(how: optuna.distributions.BaseDistribution, text: str) -> Value:
    if isinstance(how, optuna.distributions.CategoricalDistribution):
        return next(choice for choice in how.choices if str(choice) == text)
    return int(text) if isinstance(how, optuna.distributions.IntDistribution) else float(text)


def fit(space: Space, table: Measured) -> Surrogate:
    """The surrogate through the table."""
    x = np.array([features(space, point) for point in table.points])
    dice = [Process(x, column) for column in table.dice.T]
    return Surrogate(space, dice, Process(x, np.log(table.seconds)))


@dataclass(frozen=True)
class Simulated:
    """One simulated search.

    Attributes:
        best: (virtual seconds, true Dice of the trial that is best by then).
        busy: share of the workers' time, until the last trial was handed out, in which they trained.
        repeated: share of proposals that repeat an earlier one.
        asking: real seconds a proposal took, in the mean.
    """

    best: list[tuple[float, float]]
    busy: float
    repeated: float
    asking: float


def simulate(
    config: Config, surrogate: Surrogate, method: str, workers: int, trials: int, seed: int
) -> Simulated:
    """A search by so many workers in virtual time."""
    sampler, _, how = method.partition(", ")
    settings = replace(
        config.search,
        sampler=sampler,  # type: ignore[arg-type]
        seed=seed,
        pruner="asha" if how == "asha" else "none",
    )
    samples = config.train.samples
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler(settings), pruner=make_pruner(settings, samples)
    )
    run = _Run(study, surrogate, [*rungs(settings, samples), samples], seed)
    events = run.synchronous(workers, trials) if "synchronous" in how else run.asynchronous(workers, trials)
    best = list(events)
    points = [tuple(t.params.items()) for t in study.trials]
    return Simulated(best, run.busy(workers), 1 - len(set(points)) / len(points), run.asked / trials)


class _Run:
    """The state of a simulated search; its generators give (virtual seconds, true Dice of the best)."""

    def __init__(self, study: optuna.Study, surrogate: Surrogate, marks: list[int], seed: int) -> None:
        self.study, self.surrogate, self.marks = study, surrogate, marks
        self.noise = np.random.default_rng(seed)
        self.asked = 0.0
        self.spans: list[tuple[float, float]] = []
        self.top, self.true = -1.0, 0.0

    def busy(self, workers: int) -> float:
        """Share of the time until the last trial began, from its batch on where there are batches."""
        last = max(begun for begun, _ in self.spans)
        spent = sum(max(0.0, min(ended, last) - begun) for begun, ended in self.spans)
        return spent / (workers * last) if last else 1.0

    def begin(self) -> tuple[optuna.Trial, list[float], list[float], float, float]:
        """Ask: the trial, its Dice as it will be measured, its seconds at each mark, its true Dice; and how
        long the proposal took.
        """
        started = time.perf_counter()
        trial = self.study.ask()
        params = self.surrogate.space.suggest(trial)
        asking = time.perf_counter() - started
        self.asked += asking
        curve = self.surrogate.curve(params)
        noisy = [
            d + float(self.noise.normal(0, p.noise))
            for d, p in zip(curve, self.surrogate.dice, strict=True)
        ]
        whole = max(1.0, self.surrogate.duration(params) - START)
        seconds = [START + whole * mark / self.marks[-1] for mark in self.marks]
        return trial, noisy, seconds, curve[-1], asking

    def end(self, trial: optuna.Trial, dice: float, true: float) -> None:
        """Tell a trial that ran to its end."""
        self.study.tell(trial, dice)
        if dice > self.top:
            self.top, self.true = dice, true

    def asynchronous(self, workers: int, trials: int) -> Iterator[tuple[float, float]]:
        """Each worker asks as soon as it is free; marks of all trials come in the order of time."""
        heap: list[tuple[float, int, int, float, Any]] = []

        def hand_out(now: float, number: int) -> None:
            job = self.begin()
            start = now + job[4]
            heapq.heappush(heap, (start + job[2][0], number, 0, start, job))

        begun = min(workers, trials)
        for number in range(begun):
            hand_out(0.0, number)
        while heap:
            now, number, mark, start, job = heapq.heappop(heap)
            trial, dice, seconds, true, _ = job
            last = mark == len(self.marks) - 1
            trial.report(dice[mark], self.marks[mark])
            frozen = self.study.get_trials(deepcopy=False)[trial.number]
            if not last and not should_prune(self.study, frozen, []):
                heapq.heappush(heap, (start + seconds[mark + 1], number, mark + 1, start, job))
                continue
            if last:
                self.end(trial, dice[mark], true)
            else:
                self.study.tell(trial, state=TrialState.PRUNED)
            self.spans.append((start, now))
            yield now, self.true
            if begun < trials:
                hand_out(now, begun)
                begun += 1

    def synchronous(self, workers: int, trials: int) -> Iterator[tuple[float, float]]:
        """A batch is asked for when the last trial of the one before has ended."""
        now = 0.0
        for first in range(0, trials, workers):
            jobs = [self.begin() for _ in range(min(workers, trials - first))]
            now += sum(job[4] for job in jobs)
            for trial, dice, seconds, true, _ in jobs:
                self.end(trial, dice[-1], true)
                self.spans.append((now, now + seconds[-1]))
            now += max(job[2][-1] for job in jobs)
            yield now, self.true


def reached(best: Sequence[tuple[float, float]], seconds: float) -> float:
    """True Dice of the trial that looks best at a time: a later one may only look better."""
    return next((dice for when, dice in reversed(best) if when <= seconds), 0.0)


def simulation(
    config: Config, space: Space, methods: Sequence[str], trials: int, seeds: int, out: Path
) -> None:
    """All methods at all numbers of workers: a table and JSON."""
    marks = len(rungs(config.search, config.train.samples)) + 1
    table = read_table(space, marks)
    surrogate = fit(space, table)
    last = surrogate.dice[-1]
    final = table.dice[:, -1]
    print(f"{len(final)} measured configs; Dice {final.mean():.3f} in the mean, {final.max():.3f} at best")
    print(f"surrogate, leave-one-out: Dice {last.error:.3f} of a spread of {last.spread:.3f}, ", end="")
    print(f"of which noise {last.noise:.3f}; ", end="")
    print(f"log seconds {surrogate.seconds.error:.3f} of {surrogate.seconds.spread:.3f}\n")
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(initializer=_begin_process) as pool:
        jobs = {
            (method, workers): [
                pool.submit(simulate, config, surrogate, method, workers, trials, seed)
                for seed in range(seeds)
            ]
            for method in methods
            for workers in WORKERS
        }
        for method in methods:
            for workers in WORKERS:
                runs = [job.result() for job in jobs[method, workers]]
                rows.append(_row(method, workers, runs, table))
                print(_line(rows[-1]), flush=True)
    out.write_text(json.dumps({"trials": trials, "seeds": seeds, "rows": rows}, indent=1))


def _begin_process() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)


def _row(method: str, workers: int, runs: Sequence[Simulated], table: Measured) -> dict[str, Any]:
    mean = float(table.seconds.mean())
    finals = [run.best[-1][1] for run in runs]
    return {
        "method": method,
        "workers": workers,
        "hours": statistics.mean(run.best[-1][0] for run in runs) / 3600,
        "dice": statistics.mean(finals),
        "dice_low": min(finals),
        "dice_high": max(finals),
        "dice_after": {
            n: statistics.mean(reached(run.best, n * mean) for run in runs) for n in (4, 8, 16, 32)
        },
        "busy": statistics.mean(run.busy for run in runs),
        "repeated": statistics.mean(run.repeated for run in runs),
        "asking_ms": 1e3 * statistics.mean(run.asking for run in runs),
    }


def _line(row: dict[str, Any]) -> str:
    after = "  ".join(f"{dice:.3f}" for dice in row["dice_after"].values())
    return (
        f"{row['method']:26} {row['workers']:3} workers  {row['hours']:6.2f} h  "
        f"Dice {row['dice']:.3f} ({row['dice_low']:.3f} to {row['dice_high']:.3f})  "
        f"after 4, 8, 16, 32 trials' time: {after}  busy {100 * row['busy']:5.1f} %  "
        f"repeated {100 * row['repeated']:4.1f} %  {row['asking_ms']:7.1f} ms a proposal"
    )


def prepared(config: Config, folder: Path) -> Path:
    """The store of the benchmark's phantoms."""
    data = write_phantoms(config.phantom, folder / "scans", config.prepare.workers)
    prepare(list_sources(data), folder / "store", config.prepare)
    return folder / "store"


def measure(config: Config, folder: Path, trials: int) -> None:
    """Train random configs and write the table."""
    settings = replace(config.search, sampler="random", pruner="none", trials=trials, study="table")
    config = replace(config, search=settings)
    results = search(config, prepared(config, folder), folder / "table")
    write_table(results, [*rungs(settings, config.train.samples), config.train.samples])


def write_table(results: SearchResults, marks: Sequence[int]) -> None:
    """The measured configs as CSV."""
    rows: list[list[object]] = [[*results.keys, *(f"dice_{k}" for k in range(len(marks))), "seconds"]]
    for trial in results.done:
        curve = dict(trial.curve)
        dice = [f"{curve[mark]:.4f}" for mark in marks]
        rows.append([*(_short(trial.params[key]) for key in results.keys), *dice, f"{_seconds(trial):.1f}"])
    write_csv(TABLE, rows)
    print(f"{len(rows) - 1} configs in {TABLE}")


def _seconds(trial: TrialResult) -> float:
    """That it was trained, all stretches together."""
    return sum((s.ended or s.begun) - s.begun for s in trial.stretches)


def _short(value: Value) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def real(config: Config, folder: Path, trials: int, seeds: int) -> None:
    """Real searches, and their best against the default config and one made by hand: all are trained on
    phantoms that no search has seen, with fresh seeds, and judged by all validation scans of these."""
    others = replace(config, phantom=replace(config.phantom, seed=OTHERS))
    store, other = prepared(config, folder), prepared(others, folder / "others")
    by_hand = load(HERE / "search.yaml", BY_HAND)
    configs, facts = {"default": config, "by hand": by_hand}, {}
    for name, how in SEARCHES.items():
        settings = replace(config.search, trials=trials, study="real", **how)
        results = search(replace(config, search=settings), store, folder / name)
        print(status_table(results, time.time()))
        configs[name] = load(folder / name / "best.yaml")
        facts[name] = {
            "busy": utilisation(results, time.time()),
            "trials": len(results.trials),
            "seconds": sum(_seconds(trial) for trial in results.trials),
        }
    dice = {
        name: _over_seeds(whole, other, folder / "confirm" / name, seeds) for name, whole in configs.items()
    }
    for name, values in dice.items():
        gains = [value - first for value, first in zip(values, dice["by hand"], strict=True)]
        print(f"{name:10} Dice {_with_limits(values)}; less by hand {_with_limits(gains)}")
    whole = {"machine": machine(), "searches": facts, "dice": dice}
    (folder / "real.json").write_text(json.dumps(whole, indent=1))


def _with_limits(values: Sequence[float]) -> str:
    low, high = t_interval(values)
    return f"{statistics.mean(values):.3f} (95 % {low:.3f} to {high:.3f})"


def _over_seeds(config: Config, store: Path, folder: Path, seeds: int) -> list[float]:
    """Validation Dice on all scans of trainings with seeds that no search has seen."""
    found = []
    for seed in range(100, 100 + seeds):
        train = replace(config.train, seed=seed, validate_cases=0)
        run = folder / str(seed)
        start(replace(config, train=train, search=SearchConfig()), store, run)
        found.append(float([e for e in read_events(run) if e["event"] == "validation"][-1]["dice"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="48 trials, 2 seeds")
    parser.add_argument("--trials", type=int, default=0, help="of each simulated or real search")
    parser.add_argument("--seeds", type=int, default=0, help="of each simulated search, or to confirm with")
    parser.add_argument("--methods", default=";".join(METHODS), help="of the simulation, as 'tpe;gp'")
    parser.add_argument("--json", type=Path, default=Path("search.json"), help="file to write")
    parser.add_argument("--real", type=Path, metavar="DIR", help="a real search in this folder")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="measure the table anew in this folder")
    arguments = parser.parse_args()
    config = load(HERE / "search.yaml")
    if arguments.measure:
        measure(config, arguments.measure, arguments.trials or 200)
    elif arguments.real:
        real(load(HERE / "search.yaml", REAL), arguments.real, arguments.trials or 30, arguments.seeds or 5)
    else:
        trials, seeds = (48, 2) if arguments.quick else (192, 5)
        simulation(
            config,
            read_space(config),
            arguments.methods.split(";"),
            arguments.trials or trials,
            arguments.seeds or seeds,
            arguments.json,
        )


if __name__ == "__main__":
    main()
