"""A worker: it asks for a trial, has it trained on its devices, reports the result, and asks again.

Workers know of each other only through the storage. They may be started and killed at any time, on any
machine that sees it and the search's folder; there is no barrier between trials.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from optuna.trial import FrozenTrial, Trial, TrialState

from voxelscale.config import Config
from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Ending, TrainingResult, TrainOnce, train_once
from voxelscale.search.attempt import Attempt
from voxelscale.search.definition import CONSTRAINTS, Search, trial_config
from voxelscale.search.feasible import constraints, cost_of
from voxelscale.search.lease import (
    CONTINUES,
    FAULTS,
    LOSSES,
    Lease,
    Watch,
    end_trial,
    hand_over,
    is_valid,
    own,
    superseded,
    worker_name,
)
from voxelscale.search.place import Place
from voxelscale.search.records import COST, counted, head_of, latest
from voxelscale.search.results import State, Value
from voxelscale.search.storage import patiently

PATIENCE = 100
"""Proposals in a row that cannot be run before a worker gives up."""

RETRIES = 1
"""How often a training that failed is tried again from its last checkpoint."""

FULL = 64 * 2**20
"""Bytes; with less left on the disk a failed training is the disk's fault and not its config's."""

MAX_LOSSES = 5
"""A trial whose worker was lost so often may be what kills them, as by taking all memory."""

MAX_FAILURES = 3
"""Trainings in a row that fail on one worker before it gives up."""

STATES: dict[Ending, State] = {
    "finished": "done",
    "late": "failed",
    "diverged": "diverged",
    "out of memory": "infeasible",
    "failed": "failed",
}
"""Of a trial, by how its training ended."""


class Worker:
    """One worker's loop.

    Args:
        search: what is searched.
        place: where it works.
        stopped: whether it was asked to stop.
        train: trains a trial once.
    """

    def __init__(
        self, search: Search, place: Place, stopped: Callable[[], bool], train: TrainOnce = train_once
    ) -> None:
        self.search, self.place, self.stopped, self.train = search, place, stopped, train
        self.study, self.settings = search.study, search.config.search
        self.name = worker_name()
        self.watch = Watch(self.settings.lease_seconds)
        self.available = place.available_memory(self.settings.memory_gib)
        self._rejected, self._reason, self._failures = 0, "", 0

    def go(self) -> None:
        """Work until the search is done, or it is asked to stop.

        Raises:
            VoxelscaleError: nothing in the space can be run, trainings keep failing, or the storage is
                out of reach.
        """
        while not self.stopped():
            trials = patiently(lambda: self.study.get_trials(deepcopy=False))
            running = [t for t in latest(trials) if t.state == TrialState.RUNNING]
            lost = [t for t in running if self.watch.lost(t)]
            for trial in lost:
                notice(f"trial {head_of(trials, trial)}: its worker is lost; it is taken over", level=2)
                hand_over(self.study, trial, count=LOSSES)
            if self._rejected >= PATIENCE:
                return self._give_up(trials)
            if lost or self._wanted(trials):
                # What is cut off half-way is taken over like any lost trial, after its lease.
                patiently(self._next)
            elif not running:
                return
            else:  # a worker that is still running may be lost yet
                time.sleep(min(2.0, self.settings.lease_seconds / 4))

    def _wanted(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether a trial waits, or fewer have started than are wanted."""
        waiting = any(t.state == TrialState.WAITING for t in trials)
        grid = self.settings.sampler == "grid"
        return waiting or (not grid and len(counted(trials)) < self.settings.trials)

    def _next(self) -> None:
        """Ask for a trial. Drop it where it is not wanted, record it where it cannot run, else run it."""
        trial = self.study.ask()
        own(trial, self.name, self.place.devices)
        params = self.search.space.suggest(trial)
        if reason := self._unwanted(trial, params):
            notice(f"trial {trial.number}: {reason}", level=2)
            end_trial(self.study, trial.number, TrialState.FAIL)
            self._rejected, self._reason = self._rejected + 1, reason
            return
        try:
            config = trial_config(self.search, params, len(self.place.devices))
            limits = constraints(
                config,
                self.search.spacing,
                self.place.kind,
                self.available,
                channels=self.search.channels,
                classes=self.search.classes,
            )
        except VoxelscaleError as error:
            config, limits, reason = None, dict.fromkeys(CONSTRAINTS, 1.0), error.message
        else:
            reason = _infeasible(limits, self.available)
        if config is None or reason:
            Attempt(self.search, trial).record("infeasible", limits, reason)
            self._rejected, self._reason = self._rejected + 1, reason
            return
        self._rejected = 0
        self._run(trial, config, limits)

    def _unwanted(self, trial: Trial, params: dict[str, Value]) -> str:
        """Why a proposal is dropped; "" where it is run."""
        trials = self.study.get_trials(deepcopy=False)
        if not is_valid(self.study, trials[trial.number]):
            return "continued by another already"
        if CONTINUES in trial.user_attrs:
            return ""
        gone = superseded(trials)
        same = [t for t in trials[: trial.number] if t.state != TrialState.FAIL or t.number in gone]
        if any(t.params == params for t in same):
            return "the same as an earlier one"
        before = [t for t in counted(trials) if head_of(trials, t) < trial.number]
        grid = self.settings.sampler == "grid"
        return "" if grid or len(before) < self.settings.trials else "one too many"

    def _run(self, trial: Trial, config: Config, limits: dict[str, float]) -> None:
        """Train a feasible trial while holding its lease, and record what came of it."""
        attempt = Attempt(self.search, trial)
        if trial.user_attrs.get(LOSSES, 0) >= MAX_LOSSES:
            attempt.record("failed", limits, f"its worker was lost {MAX_LOSSES} times")
            return
        channels, classes = self.search.channels, self.search.classes
        cost = cost_of(config, self.search.spacing, self.place.kind, channels=channels, classes=classes)
        trial.set_user_attr(COST, asdict(cost))
        with Lease(trial, self.settings.lease_seconds) as lease:
            result = attempt.train(config, self.place, lease, self.stopped, self.train)
        if not lease.lost:
            self._record(attempt, result, limits, cost.parameters)

    def _record(
        self, attempt: Attempt, result: TrainingResult, limits: dict[str, float], parameters: int
    ) -> None:
        """Record how a training ended; one that was stopped, or is worth a retry, is handed over."""
        if result.ending == "stopped" and not attempt.pruned:
            return attempt.hand_over()
        if result.ending == "failed" and not attempt.pruned and self._again(attempt, result):
            return attempt.hand_over(FAULTS)
        state = "pruned" if attempt.pruned else STATES[result.ending]
        note = result.fault.message if result.fault and not attempt.pruned else ""
        if state == "failed" and result.ending == "late":
            note = "took too long"
        elif state == "infeasible":
            limits = {**limits, "memory": max(0.1, limits["memory"])}
            note, parameters = "out of memory while it trained", 0
        dice = float(result.dice or 0.0) if state == "done" else 0.0
        attempt.record(state, limits, note, dice, parameters)
        self._failures = self._failures + 1 if result.ending == "failed" else 0
        if self._failures >= MAX_FAILURES and result.fault:
            problem = f"{MAX_FAILURES} trainings in a row failed: {result.fault.message}"
            raise VoxelscaleError(problem, result.fault.hint)

    def _again(self, attempt: Attempt, result: TrainingResult) -> bool:
        """Whether a training that failed is to be tried again.

        Raises:
            VoxelscaleError: it failed because the disk is full, after the trial was handed over.
        """
        if shutil.disk_usage(self.search.out).free < FULL and result.fault:
            attempt.hand_over()
            raise result.fault
        return int(attempt.trial.user_attrs.get(FAULTS, 0)) < RETRIES

    def _give_up(self, trials: Sequence[FrozenTrial]) -> None:
        """Leave a space in which nothing new can be run."""
        if counted(trials):
            notice(
                f"nothing new in the space: of the last {PATIENCE} proposals none was run ({self._reason})"
            )
            return
        raise VoxelscaleError(
            f"none of the first {PATIENCE} proposals could be run; the last one: {self._reason}",
            "change the search's space, or give the trials more memory (search.memory_gib)",
        )


def _infeasible(limits: dict[str, float], available: int) -> str:
    """Why a trial cannot be run, for people; "" where it can."""
    if limits["pooling"] > 0:
        return "the patch cannot be pooled so often"
    if limits["memory"] <= 0:
        return ""
    there = available / 2**30
    return f"needs {(1 + limits['memory']) * there:.2f} GiB; {there:.2f} GiB are there"
