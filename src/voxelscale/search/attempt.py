"""One attempt at a trial: trained in a folder of its own, and recorded in the study.

Only the worker that owns the trial talks to the study; the training knows nothing of it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from voxelscale.config import Config
from voxelscale.experiments.once import (
    Order,
    Training,
    TrainingResult,
    TrainOnce,
    copy_run,
    drop_checkpoints,
)
from voxelscale.search.definition import Search, marks_of
from voxelscale.search.lease import CONTINUES, EARLIER, TO_THE_END, Lease, end_trial, hand_over, superseded
from voxelscale.search.place import Place
from voxelscale.search.records import CURVE, ENDED, NOTE, OUTCOME
from voxelscale.search.results import State
from voxelscale.search.sampling import only_dice, should_prune
from voxelscale.search.storage import patiently


class Attempt:
    """An attempt at a trial by the worker that owns it.

    Args:
        search: that the trial is of.
        trial: running, and owned by this process.

    Attributes:
        pruned: whether the training was stopped as hopeless.
    """

    def __init__(self, search: Search, trial: Trial) -> None:
        self.search, self.trial, self.pruned = search, trial, False

    @property
    def folder(self) -> Path:
        """Of the training."""
        return _folder(self.search, self.trial.number)

    @cached_property
    def earlier(self) -> list[FrozenTrial]:
        """The attempts that this one continues, the newest first."""
        trials = self.search.study.get_trials(deepcopy=False)
        chain, number = [], self.trial.user_attrs.get(CONTINUES)
        while number is not None:
            chain.append(trials[number])
            number = trials[number].user_attrs.get(CONTINUES)
        return chain

    def train(
        self, config: Config, place: Place, lease: Lease, stopped: Callable[[], bool], train: TrainOnce
    ) -> TrainingResult:
        """Train from where the attempt before this one stopped.

        Args:
            stopped: whether this worker was asked to stop.
            train: trains once.

        Raises:
            VoxelscaleError: the earlier attempt's folder cannot be copied.
        """
        for old in self.earlier:
            copy_run(_folder(self.search, old.number), self.folder)
        limit = self.search.config.search.trial_seconds
        training = Training(
            config=config,
            store=self.search.store,
            run=self.folder,
            threads=place.threads(len(place.devices)),
            environment=place.environment,
            seconds=max(1.0, limit - self._seconds()) if limit else math.inf,
        )
        marks, reported = marks_of(config), set[int]()
        passed = max((samples for old in self.earlier for samples in old.intermediate_values), default=0)

        def order() -> Order:
            return "kill" if lease.lost else "stop" if stopped() else "go on"

        def validated(samples: int, dice: float) -> bool:
            # One that was taken a little later, at the end of a global batch, counts for its rung.
            mark = max((m for m in marks if m <= samples), default=None)
            if mark is None or mark in reported or self.pruned:
                return False
            reported.add(mark)
            hopeless = self._report(mark, dice, whole=mark == marks[-1])
            self.pruned = hopeless and mark > passed  # an earlier attempt was let past the others
            return self.pruned

        return train(training, order, validated)

    def _report(self, samples: int, dice: float, *, whole: bool) -> bool:
        """Report a validation to the study; whether it finds the trial hopeless and may end it.

        Args:
            whole: whether the trial's own budget is spent, so that nothing is left to prune.
        """
        study, trial = self.search.study, self.trial
        try:
            if not only_dice(self.search.config.search):  # a Dice is no value of such a study
                curve = [*trial.user_attrs.get(CURVE, []), [samples, dice]]
                patiently(lambda: trial.set_user_attr(CURVE, curve))
                return False
            patiently(lambda: trial.report(dice, samples))
            if whole or TO_THE_END in trial.user_attrs:
                return False
            trials = study.get_trials(deepcopy=False)
            return should_prune(study, trials[trial.number], sorted(superseded(trials)))
        except UpdateFinishedTrialError:
            return False  # taken over: the lease says so, too

    def hand_over(self, count: str = "") -> None:
        """Let the next worker resume the trial.

        Args:
            count: as of `lease.hand_over`.
        """
        frozen = self.search.study.get_trials(deepcopy=False)[self.trial.number]
        hand_over(self.search.study, frozen, ended=time.time(), count=count)

    def record(
        self,
        state: State,
        limits: Mapping[str, float],
        note: str = "",
        dice: float = 0.0,
        parameters: int = 0,
    ) -> None:
        """End the trial in the study, and drop what only a next attempt would need.

        Samplers learn from all but what failed or was pruned: what diverged or cannot run has the worst
        Dice. (With other objectives what diverged counts as pruned: it was quick, and is no good.) A trial
        that was taken over meanwhile is left as it is.

        Args:
            limits: its constraints (`voxelscale.search.feasible.constraints`).
            note: one line for people.
            dice: of its last validation.
            parameters: of its network.
        """
        study, trial, ended = self.search.study, self.trial, time.time()
        attributes = {OUTCOME: state, NOTE: note, ENDED: ended}
        try:
            for key, value in limits.items():
                patiently(partial(trial.set_constraint, key, value))
            for name, fact in attributes.items():
                patiently(partial(trial.set_user_attr, name, fact))
        except UpdateFinishedTrialError:
            return
        values = {"dice": dice, "time": self._seconds(ended), "parameters": float(parameters)}
        useless = state == "diverged" and not only_dice(self.search.config.search)
        if state in ("failed", "pruned") or useless:
            patiently(lambda: end_trial(study, trial.number, TrialState.PRUNED))
        else:
            wanted = [values[name] for name in self.search.config.search.objectives]
            patiently(lambda: end_trial(study, trial.number, TrialState.COMPLETE, wanted))
        drop_checkpoints(self.folder)
        for old in self.earlier:
            shutil.rmtree(_folder(self.search, old.number), ignore_errors=True)

    def _seconds(self, ended: float | None = None) -> float:
        """Time spent on the trial by earlier attempts, and by this one where it has ended."""
        stretches: Sequence[Mapping[str, float]] = self.trial.user_attrs.get(EARLIER, [])
        now = 0.0 if ended is None else ended - self.trial.user_attrs["owner"]["begun"]
        return now + sum(float(s["ended"]) - float(s["begun"]) for s in stretches)


def _folder(search: Search, number: int) -> Path:
    return search.out / "trials" / f"{number:04d}"
