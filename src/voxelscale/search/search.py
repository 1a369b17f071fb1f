"""``voxelscale search``: start workers, show their progress, and write the best config."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from optuna.trial import FrozenTrial

from voxelscale.config import Config, load_stored
from voxelscale.console import Progress, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.ranks.place import forget
from voxelscale.search.definition import Search, begin, write_best
from voxelscale.search.lease import OWNER, stretches_of
from voxelscale.search.place import Place, plan_places
from voxelscale.search.process import Started, start_worker
from voxelscale.search.records import (
    ENDED,
    MAXIMISED,
    UNFINISHED,
    counted,
    head_of,
    read_results,
    state_of,
    wanted,
)
from voxelscale.search.report import write_report
from voxelscale.search.results import SearchResults
from voxelscale.search.storage import patiently
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.track import Tracking, tracked_study
from voxelscale.train.validation_cases import require_validation

LOOK = 2.0
"""Seconds between checks of the workers."""

RESTARTS = 3
"""How often a worker that was killed is started again in its place."""


def search(config: Config, store: Path, out: Path) -> SearchResults:
    """Search until ``search.trials`` trials are done; the same call joins or resumes.

    Leaves ``best.yaml`` and ``search.html`` in `out`, also when it is interrupted.

    Raises:
        VoxelscaleError: the definition is faulty, no validation scan has a lesion, or every worker has
            given up.
        KeyboardInterrupt: after all trainings have saved and stopped.
    """
    require_validation(open_fold(store, config.data.fold), config)
    begun = begin(config, store, out)
    places = plan_places(config.search)
    with tracked_study(begun.config, out) as tracking:
        try:
            with _sigterm_as_interrupt():
                _oversee(begun, places)
        finally:
            results = write_results(begun)
            if tracking:
                _tell(tracking, begun, results)
    return results


def _tell(tracking: Tracking, search: Search, results: SearchResults) -> None:
    """Tell the trackers of the best trial so far; each trial's training tells of itself.

    The page is not sent: why trials failed may name a case.
    """
    tracking.done = _complete(search)
    if (best := results.best) is not None:
        values = dict(zip(results.objectives, best.values, strict=True))
        tracking.log({f"best/{name}": value for name, value in values.items()}, len(results.trials))
        tracking.note({f"best/{key}": value for key, value in best.params.items()} | {"best": best.number})


def write_results(search: Search) -> SearchResults:
    """``best.yaml`` and ``search.html``, as far as the search has come."""
    results = read_results(search.study, search.config, search.space)
    if results.best:
        write_best(search, results.best)
    write_report(results, search.out / "search.html", time.time())
    return results


def retrain_best(out: Path, store: Path) -> int:
    """Train the best trial's config on the full budget in ``<out>/best``; the exit code."""
    from voxelscale.train.launch import start

    run = out / "best"
    forget()
    if not start(load_stored(out / "best.yaml"), store, run):
        notice(f"stopped and saved; to resume: the same command, or voxelscale train {store} {run}")
        return 130
    print(f"model in {run / 'model.vxs'}")
    return 0


def _oversee(search: Search, places: list[Place]) -> None:
    """Start the workers and see them through."""
    workers = [start_worker(search, place) for place in places]
    faults: list[VoxelscaleError] = []
    try:
        since, number = time.monotonic(), wanted(search.config.search, search.space)
        with Progress("search", number, done=_finished(search)[0]) as progress:
            while workers:
                time.sleep(LOOK)
                if not _complete(search):
                    since = time.monotonic()
                elif time.monotonic() - since > search.config.search.lease_seconds:
                    _kill(workers)  # suspended or stuck: their trials have been done by others
                _replace_dead(search, workers, faults)
                progress.update(*_finished(search), left=time_left(_trials(search), number, time.time()))
    except KeyboardInterrupt:
        notice("\ntrainings save and stop; once more to stop at once")
        _stop(workers)
        raise
    if faults and not _complete(search):
        raise faults[-1]


def _replace_dead(search: Search, workers: list[Started], faults: list[VoxelscaleError]) -> None:
    """Take workers that have ended off the list, note why, and restart those that were killed."""
    for worker in [w for w in workers if w.process.poll() is not None]:
        workers.remove(worker)
        if worker.process.returncode == 0:
            for line in worker.said():
                notice(line)
            continue
        if _complete(search):
            continue
        faults.append(worker.fault())
        notice(f"warning: {faults[-1].message}")
        if worker.process.returncode < 0 and len(faults) <= RESTARTS:
            workers.append(start_worker(search, worker.place))


def _trials(search: Search) -> list[FrozenTrial]:
    return patiently(lambda: search.study.get_trials(deepcopy=False))


def _complete(search: Search) -> bool:
    """Whether nothing is left to do."""
    states = [state_of(t) for t in counted(_trials(search))]
    least = 1 if search.config.search.sampler == "grid" else search.config.search.trials
    return len(states) >= least and not any(state in UNFINISHED for state in states)


def _finished(search: Search) -> tuple[int, str]:
    """How many trials have ended, and a few words on the best."""
    trials = _trials(search)
    states = [state_of(t) for t in counted(trials)]
    ended = sum(state not in UNFINISHED for state in states)
    return ended, f"{states.count('running')} running{_best(search, trials)}"


def time_left(trials: Sequence[FrozenTrial], wanted: int, now: float) -> float | None:
    """Seconds until so many trials have ended; None while none has.

    The mean of those that have ended, pruned ones included as the next ones will be, for each that has
    not, less what the running ones have done already, shared by the workers at work.

    Args:
        now: seconds since the epoch.
    """
    known = [t for t in counted(trials) if OWNER in t.user_attrs]
    running = [float(t.user_attrs[OWNER]["begun"]) for t in known if state_of(t) == "running"]
    ended = [stretches_of(t, t.user_attrs[ENDED]) for t in known if ENDED in t.user_attrs]
    if not ended:
        return None
    mean = sum(float(s["ended"]) - float(s["begun"]) for trial in ended for s in trial) / len(ended)
    spent = sum(min(mean, now - begun) for begun in running)
    return max(0.0, (wanted - len(ended)) * mean - spent) / max(1, len(running))


def _best(search: Search, trials: list[FrozenTrial]) -> str:
    """A few words on the best trial; "" while there is none."""
    done = [t for t in trials if t.values and state_of(t) == "done"]
    if not done:
        return ""
    name = search.config.search.objectives[0]
    sign = 1.0 if MAXIMISED[name] else -1.0
    best = max(done, key=lambda t: sign * t.values[0])
    return f", best {name} {best.values[0]:.4g} (trial {head_of(trials, best)})"


def _stop(workers: list[Started]) -> None:
    """Ask the workers to stop, and wait until their trainings have saved; a second Ctrl-C kills them."""
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    try:
        for worker in workers:
            worker.process.wait()
    except KeyboardInterrupt:
        _kill(workers)
        raise


def _kill(workers: list[Started]) -> None:
    for worker in workers:
        worker.process.kill()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A batch system asks with SIGTERM."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
