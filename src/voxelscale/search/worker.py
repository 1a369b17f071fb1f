"""A worker: it asks for a trial, has it trained on its devices, reports the result, and asks again.

Workers know of each other only through the storage. They may be started and killed at any time, on any
machine that sees it and the search's folder; there is no barrier between trials.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from voxelscale.config import Config
from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.search.attempt import Attempt, AttemptResult, copy_run, drop_checkpoints, run_attempt
from voxelscale.search.definition import CONSTRAINTS, Search, marks_of, trial_config
from voxelscale.search.feasible import Cost, constraints, cost_of
from voxelscale.search.lease import (
    CONTINUES,
    EARLIER,
    FAULTS,
    LOSSES,
    Lease,
    Watch,
    hand_over,
    own,
    settle,
    stands,
    superseded,
    worker_name,
)
from voxelscale.search.records import COST, CURVE, ENDED, NOTE, OUTCOME, counted, head_of, latest
from voxelscale.search.results import State, Value
from voxelscale.search.sampling import should_prune
from voxelscale.search.storage import patiently

PATIENCE = 100
"""Proposals in a row that cannot be run before a worker gives up."""

RETRIES = 1
"""How often a training that failed is tried again from its last checkpoint."""

ROOM = 64 * 2**20
"""Bytes; with less left on the disk a failed training is the disk's fault and not its config's."""

MOST_LOSSES = 5
"""A trial whose worker was lost so often may be what kills them, as by taking all memory."""

FAILURES = 3
"""Trainings in a row that fail on one worker before it gives up."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker works.

    Attributes:
        devices: names of its devices, as ``0``; a trial has one rank on each.
        cuda: whether they are GPUs, by ``CUDA_VISIBLE_DEVICES``.
        sharers: workers on this machine, with which the cores and the memory are shared.
    """

    devices: tuple[str, ...]
    cuda: bool
    sharers: int

    @property
    def kind(self) -> str:
        """Of its devices, as PyTorch names it."""
        return "cuda" if self.cuda else "cpu"

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""
        return max(1, (os.cpu_count() or 1) // (self.sharers * len(self.devices)))

    @property
    def environment(self) -> dict[str, str]:
        """For trainings: which devices they see."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.cuda else {}


ENDINGS: dict[str, tuple[State, TrialState]] = {
    "finished": ("done", TrialState.COMPLETE),
    "pruned": ("pruned", TrialState.PRUNED),
    "late": ("failed", TrialState.PRUNED),
    "diverged": ("diverged", TrialState.COMPLETE),
    "failed": ("failed", TrialState.PRUNED),
}


class Worker:
    """One worker's loop.

    Args:
        search: what is searched.
        place: where it works.
        stopped: whether it was asked to stop.
    """

    def __init__(self, search: Search, place: Place, stopped: Callable[[], bool]) -> None:
        self.search, self.place, self.stopped = search, place, stopped
        self.study, self.settings = search.study, search.config.search
        self.name = worker_name()
        self.watch = Watch(self.settings.lease_seconds)
        self.available = _available_memory(place, self.settings.memory_gib)
        self._idle, self._why, self._failures = 0, "", 0

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
            if self._idle >= PATIENCE:
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
        trial = self.study.ask()
        own(trial, self.name, self.place.devices)
        params = self.search.space.suggest(trial)
        if reason := self._unwanted(trial, params):
            notice(f"trial {trial.number}: {reason}", level=2)
            settle(self.study, trial.number, TrialState.FAIL)
            self._idle, self._why = self._idle + 1, reason
            return
        try:
            config = trial_config(self.search, params, len(self.place.devices))
            limits = constraints(config, self.search.spacing, self.place.kind, self.available)
        except VoxelscaleError as error:
            self._tell_infeasible(trial, dict.fromkeys(CONSTRAINTS, 1.0), error.message)
            return
        if any(value > 0 for value in limits.values()):
            self._tell_infeasible(trial, limits, _why(limits, self.available))
            return
        cost = cost_of(config, self.search.spacing, self.place.kind)
        if trial.user_attrs.get(LOSSES, 0) >= MOST_LOSSES:
            note = f"its worker was lost {MOST_LOSSES} times"
            self._settle(trial, "failed", TrialState.PRUNED, None, limits, note, time.time())
            return
        self._idle = 0
        trial.set_user_attr(COST, asdict(cost))
        with Lease(trial, self.settings.lease_seconds) as lease:
            outcome = self._train(trial, config, lease)
        if not lease.lost:
            self._tell(trial, outcome, limits, cost)

    def _unwanted(self, trial: Trial, params: dict[str, Value]) -> str:
        """Why a proposal is dropped; "" where it is run."""
        trials = self.study.get_trials(deepcopy=False)
        if not stands(self.study, trials[trial.number]):
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

    def _train(self, trial: Trial, config: Config, lease: Lease) -> AttemptResult:
        """Train a trial's attempt, from where the one before it stopped."""
        run, told = self._run(trial.number), 0
        for old in self._before(trial):
            told = max(told, *old.intermediate_values, 0)
            copy_run(self._run(old.number), run)
        spent = sum(float(s["ended"]) - float(s["begun"]) for s in trial.user_attrs.get(EARLIER, []))
        limit = self.settings.trial_seconds
        attempt = Attempt(
            config=config,
            store=self.search.store,
            run=run,
            marks=marks_of(config),
            threads=self.place.threads,
            environment=self.place.environment,
            seconds=max(1.0, limit - spent) if limit else 0.0,
        )

        def report(samples: int, dice: float) -> bool:
            return self._report(trial, samples, dice, decided=samples <= told)

        return run_attempt(attempt, report, self.stopped, lambda: lease.lost)

    def _run(self, number: int) -> Path:
        return self.search.out / "trials" / f"{number:04d}"

    def _before(self, trial: Trial) -> list[FrozenTrial]:
        """A trial's earlier attempts, the last one first."""
        trials = self.study.get_trials(deepcopy=False)
        chain, number = [], trial.user_attrs.get(CONTINUES)
        while number is not None:
            chain.append(trials[number])
            number = trials[number].user_attrs.get(CONTINUES)
        return chain

    def _report(self, trial: Trial, samples: int, dice: float, decided: bool) -> bool:
        """Note a validation; whether the trial is to be pruned.

        Args:
            decided: whether an earlier attempt was let past this point already.
        """
        try:
            if len(self.settings.objectives) > 1:  # for which Optuna takes no reports
                curve = [*trial.user_attrs.get(CURVE, []), [samples, dice]]
                patiently(lambda: trial.set_user_attr(CURVE, curve))
                return False
            patiently(lambda: trial.report(dice, samples))
            if samples >= self.search.samples:
                return False
            trials = self.study.get_trials(deepcopy=False)
            hopeless = should_prune(self.study, trials[trial.number], sorted(superseded(trials)))
        except UpdateFinishedTrialError:
            return False  # taken over: the lease says so, too
        return hopeless and not decided

    def _tell(self, trial: Trial, outcome: AttemptResult, limits: dict[str, float], cost: Cost) -> None:
        """Tell the study how a trial ended."""
        ended = time.time()
        ending, number = outcome.ending, trial.number
        if ending == "stopped" or (ending == "failed" and self._again(trial, outcome)):
            frozen = self.study.get_trials(deepcopy=False)[number]
            hand_over(self.study, frozen, ended=ended, count=FAULTS if ending == "failed" else "")
            return
        if ending == "out of memory":
            limits = {**limits, "memory": max(0.1, limits["memory"])}
            self._tell_infeasible(trial, limits, "out of memory while it trained")
            return
        self._failures = self._failures + 1 if ending == "failed" else 0
        state, settled = ENDINGS[ending]
        note = outcome.fault.message if outcome.fault else "took too long" if ending == "late" else ""
        values = None
        if settled == TrialState.COMPLETE:
            dice = 0.0 if ending == "diverged" else float(outcome.dice or 0.0)
            values = self._values(trial, dice, cost, ended)
        self._settle(trial, state, settled, values, limits, note, ended)
        drop_checkpoints(self._run(number))
        for old in self._before(trial):
            shutil.rmtree(self._run(old.number), ignore_errors=True)
        if self._failures >= FAILURES and outcome.fault:
            hint = outcome.fault.hint
            raise VoxelscaleError(f"{FAILURES} trainings in a row failed: {outcome.fault.message}", hint)

    def _again(self, trial: Trial, outcome: AttemptResult) -> bool:
        """Whether a training that failed is to be tried again.

        Raises:
            VoxelscaleError: it failed for want of space, after the trial was handed over.
        """
        if shutil.disk_usage(self.search.out).free < ROOM and outcome.fault:
            hand_over(self.study, self.study.get_trials(deepcopy=False)[trial.number], ended=time.time())
            raise outcome.fault
        return int(trial.user_attrs.get(FAULTS, 0)) < RETRIES

    def _values(self, trial: Trial, dice: float, cost: Cost | None, ended: float) -> list[float]:
        """Of the objectives."""
        stretches = [*trial.user_attrs.get(EARLIER, []), {**trial.user_attrs["owner"], "ended": ended}]
        seconds = sum(float(s["ended"]) - float(s["begun"]) for s in stretches)
        known = {"dice": dice, "time": seconds, "parameters": float(cost.parameters if cost else 0)}
        return [known[name] for name in self.settings.objectives]

    def _tell_infeasible(self, trial: Trial, limits: dict[str, float], note: str) -> None:
        """What cannot run has the worst Dice and a broken constraint, from both of which samplers learn."""
        ended = time.time()
        values = self._values(trial, 0.0, None, ended)
        self._settle(trial, "infeasible", TrialState.COMPLETE, values, limits, note, ended)
        self._idle, self._why = self._idle + 1, note

    def _settle(
        self,
        trial: Trial,
        state: State,
        settled: TrialState,
        values: list[float] | None,
        limits: dict[str, float],
        note: str,
        ended: float,
    ) -> None:
        try:
            for key, value in limits.items():
                patiently(partial(trial.set_constraint, key, value))
            for name, told in ((OUTCOME, state), (NOTE, note), (ENDED, ended)):
                patiently(partial(trial.set_user_attr, name, told))
        except UpdateFinishedTrialError:
            return
        patiently(lambda: settle(self.study, trial.number, settled, values))

    def _give_up(self, trials: Sequence[FrozenTrial]) -> None:
        """Leave a space in which nothing new can be run."""
        if counted(trials):
            notice(f"nothing new in the space: of the last {PATIENCE} proposals none was run ({self._why})")
            return
        raise VoxelscaleError(
            f"none of the first {PATIENCE} proposals could be run; the last one: {self._why}",
            "change the search's space, or give the trials more memory (search.memory_gib)",
        )


def _why(limits: dict[str, float], available: int) -> str:
    if limits["pooling"] > 0:
        return "the patch cannot be pooled so often"
    there = available / 2**30
    return f"needs {(1 + limits['memory']) * there:.2f} GiB; {there:.2f} GiB are there"


def _available_memory(place: Place, limit_gib: float) -> int:
    """Bytes that a trial may take on each of a worker's devices."""
    if limit_gib:
        return int(limit_gib * 2**30)
    if place.cuda:
        # In a process of its own: asking makes a context that would hold memory for ever.
        code = "import torch; print(torch.cuda.mem_get_info()[0])"
        asked = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **place.environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(asked.stdout)
    import torch

    from voxelscale.train.memory import available_memory

    return available_memory(torch.device("cpu")) // (place.sharers * len(place.devices))
