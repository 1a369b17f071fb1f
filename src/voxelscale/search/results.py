"""What a search has found so far, as plain data: what status, table and report are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float | bool | None
"""Of a searched key; a list (as a patch size) is its JSON text."""

State = Literal["waiting", "running", "done", "pruned", "infeasible", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A time during which devices worked on a trial; a trial that was resumed has several.

    Attributes:
        worker: a short name, the same for all stretches of a worker.
        devices: names of the devices it had, as ``worker/0``.
        begun, ended: start and end, seconds since the epoch; `ended` is None while it runs.
    """

    worker: str
    devices: tuple[str, ...]
    begun: float
    ended: float | None


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial, all its attempts together.

    Attributes:
        number: its first attempt's number, counted from 0.
        state: waiting, running, or how it ended.
        params: value of each searched key that is active in it.
        values: one for each objective; () while there are none.
        curve: (samples, validation Dice), samples rising.
        stretches: when which devices worked on it, in order.
        note: one line on how it ended or was resumed, for people; "" where there is nothing to say.
    """

    number: int
    state: State
    params: Mapping[str, Value]
    values: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    stretches: tuple[Stretch, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """A search.

    Attributes:
        name: of the study.
        objectives: what the trials' values are: ``dice``, ``time`` (s) or ``parameters``.
        maximise: for each, whether more is better.
        keys: the searched keys, in the order of the space.
        log: those of them that are searched on a logarithmic scale.
        target: how many trials are wanted.
        sampler, pruner: their names.
        trials: by number.
        importances: how much each key decides which trials are among the best by the first objective
            (PED-ANOVA), as shares of 1, largest first; {} while there are too few trials.
    """

    name: str
    objectives: tuple[str, ...]
    maximise: tuple[bool, ...]
    keys: tuple[str, ...]
    log: frozenset[str]
    target: int
    sampler: str
    pruner: str
    trials: Sequence[TrialResult]
    importances: Mapping[str, float] = field(default_factory=dict)

    @property
    def done(self) -> list[TrialResult]:
        """The trials that ran to their end and could be used."""
        return [trial for trial in self.trials if trial.state == "done"]

    @property
    def best(self) -> TrialResult | None:
        """The trial that is best by the first objective; None while there is none."""
        sign = 1.0 if self.maximise[0] else -1.0
        return max(self.done, key=lambda trial: sign * trial.values[0], default=None)

    @property
    def front(self) -> list[TrialResult]:
        """The Pareto front: trials that no other matches in every objective and beats in one."""
        signs = [1.0 if more else -1.0 for more in self.maximise]

        def gains(trial: TrialResult) -> list[float]:
            return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

        others = [gains(other) for other in self.done]

        def beaten(trial: TrialResult) -> bool:
            own = gains(trial)
            return any(
                all(o >= v for o, v in zip(other, own, strict=True))
                and any(o > v for o, v in zip(other, own, strict=True))
                for other in others
            )

        return [trial for trial in self.done if not beaten(trial)]
