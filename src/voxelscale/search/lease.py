"""Who owns a trial, how the loss of an owner is seen, and how another takes its trial over.

Optuna's own heartbeats exist for relational databases only, and only within ``Study.optimize``. Here the
owner counts a heartbeat up in the trial's attributes. A worker that sees no change of the count for the
length of a lease, by its own clock, or knows that the owner's process is gone, takes the trial over: a
successor with the same parameters is put into the queue, and the old trial is marked as failed.

Fencing rests on one thing that every storage does atomically: a finished trial cannot be changed. An
owner that comes back after its lease cannot report anything, and of several processes
that take over one trial only the lowest-numbered successor is run.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from voxelscale.search.storage import is_storage_trouble

OWNER, BEAT, CONTINUES, EARLIER = "owner", "beat", "continues", "earlier"
"""Attributes of a trial: who works on it since when; its beats (count, seconds since the epoch); the
number of the attempt before it; that one's and earlier ones' stretches of work."""

LOSSES, FAULTS = "losses", "faults"
"""Attributes: how often, over all attempts, its worker was lost and its training failed."""

TO_THE_END = "to the end"
"""Attribute of a trial that no pruner ends: the config itself, and what `search.first` names. Others are
held against them, so they must have a final Dice."""

BEATS = 4
"""In a lease."""


def process_name() -> str:
    """This process, so that others on the same machine can check whether it still runs.

    Machine and process namespace are identified by the kernel's random identifiers, not by the host's name.
    """
    return f"{_machine()}:{os.getpid()}:{_started(os.getpid())}"


def is_gone(process: str) -> bool:
    """Whether a process is known to have ended; False where it runs or is on another machine."""
    machine, _, rest = process.rpartition(":")
    machine, _, pid = machine.rpartition(":")
    if machine != _machine() or not pid.isdigit():
        return False
    return _started(int(pid)) != rest


def worker_name() -> str:
    """A short name for a worker, unlike any other's."""
    return uuid.uuid4().hex[:6]


class Watch:
    """Which running trials have lost their owners, by this process's own clock.

    Args:
        lease_seconds: how long a heartbeat may be absent.
        clock: seconds, monotonic.
    """

    def __init__(self, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease, self._clock = lease_seconds, clock
        self._seen: dict[int, tuple[object, float]] = {}

    def lost(self, trial: FrozenTrial) -> bool:
        """Look at a running trial: whether it is to be taken over."""
        owner, beat, now = trial.user_attrs.get(OWNER), trial.user_attrs.get(BEAT), self._clock()
        if owner and is_gone(owner["process"]):
            return True
        known = self._seen.get(trial.number)
        if known is None or known[0] != beat:
            self._seen[trial.number] = beat, now
            return False
        return now - known[1] > self._lease


class Lease:
    """Keeps a trial this process's own while it is within, by beats from a thread.

    Attributes:
        lost: whether another has taken the trial over; nothing may be reported of it then.
    """

    def __init__(self, trial: Trial, lease_seconds: float) -> None:
        self.lost = False
        self._trial, self._every = trial, lease_seconds / BEATS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(self._every):
            count += 1
            try:
                self._trial.set_user_attr(BEAT, [count, time.time()])
            except UpdateFinishedTrialError:
                self.lost = True
                return
            except Exception as error:
                # What is out of reach may be back before the lease is over; if not, another takes over.
                if not is_storage_trouble(error):
                    raise


def own(trial: Trial, worker: str, devices: Sequence[str]) -> None:
    """Write down who works on a trial from now on."""
    trial.set_user_attr(
        OWNER,
        {"worker": worker, "process": process_name(), "devices": list(devices), "begun": time.time()},
    )


def hand_over(study: Study, trial: FrozenTrial, *, ended: float | None = None, count: str = "") -> None:
    """Let the next worker resume a running trial whose owner is lost or leaves.

    First a successor is queued, then the trial is ended. A process may be killed between the two, and
    several may do this at once. Either leaves one successor too many, which `is_valid` finds out; the
    other order could lose the trial.

    Args:
        ended: when the owner left, seconds since the epoch; None: at its last beat.
        count: `LOSSES` or `FAULTS`, if this is one more.
    """
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    # Without parameters it was lost before it had drawn any: there is nothing to go on with.
    if params and not _successors(study, trial.number):
        counts = {name: trial.user_attrs.get(name, 0) + (name == count) for name in (LOSSES, FAULTS)}
        kept = {TO_THE_END: True} if TO_THE_END in trial.user_attrs else {}
        attributes = {**counts, **kept, CONTINUES: trial.number, EARLIER: stretches_of(trial, ended)}
        study.enqueue_trial(params, user_attrs=attributes)
    end_trial(study, trial.number, TrialState.FAIL)


def is_valid(study: Study, trial: FrozenTrial) -> bool:
    """Whether a trial taken from the queue is to be run: it continues none, or it alone continues one.

    A takeover that was cut off before it ended the old trial is completed.
    """
    before = trial.user_attrs.get(CONTINUES)
    if before is None:
        return True
    end_trial(study, before, TrialState.FAIL)
    ended_well = study.get_trials(deepcopy=False)[before].state != TrialState.FAIL
    return not ended_well and min(_successors(study, before)) == trial.number


def end_trial(study: Study, number: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
    """End a trial; False if another worker has ended it before."""
    try:
        study.tell(number, values, state)
    except UpdateFinishedTrialError:
        return False
    except ValueError:
        if study.get_trials(deepcopy=False)[number].state.is_finished():
            return False
        raise
    return True


def superseded(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of the attempts that another continues."""
    before = {t.user_attrs[CONTINUES] for t in trials if CONTINUES in t.user_attrs}
    return {number for number in before if trials[number].state == TrialState.FAIL}


def valid_attempts(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials' last attempts; proposals that were dropped, and successors that do not count, are out."""
    gone, first = superseded(trials), dict[int, int]()
    for trial in trials:
        first.setdefault(trial.user_attrs.get(CONTINUES, -1), trial.number)

    def counts(trial: FrozenTrial) -> bool:
        before = trial.user_attrs.get(CONTINUES)
        return before is None or (before in gone and first[before] == trial.number)

    return [t for t in trials if t.state != TrialState.FAIL and counts(t)]


def stretches_of(trial: FrozenTrial, ended: float | None = None) -> list[dict[str, Any]]:
    """The times of work on a trial and its earlier attempts, for its attributes.

    Args:
        ended: of the last; None: at its last beat.
    """
    earlier: list[dict[str, Any]] = list(trial.user_attrs.get(EARLIER, []))
    owner = trial.user_attrs.get(OWNER)
    if owner is None:
        return earlier
    last = trial.user_attrs.get(BEAT, [0, owner["begun"]])[1]
    kept = {key: owner[key] for key in ("worker", "devices", "begun")}
    return [*earlier, {**kept, "ended": last if ended is None else ended}]


def _successors(study: Study, number: int) -> list[int]:
    trials = study.get_trials(deepcopy=False)
    return [t.number for t in trials if t.user_attrs.get(CONTINUES) == number]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}".replace(":", "")
    except OSError:
        return f"{uuid.getnode():x}"


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; "" where there is none (a zombie has ended, too)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
