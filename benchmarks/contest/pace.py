"""How many updates a budget of processor time is: measured once, kept beside the results.

A processor's cores share caches, memory and power, so a training beside other work takes more processor
time for the same updates. The pace is therefore measured apart, for all contenders in turn, as the smallest
mean over a few seconds. Every training then makes the same number of updates, whatever else the machine
does, and a comparison may go on on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Job

ROUNDS = 3
SECONDS = 25.0
"""Of a round, of the process's time."""
BLOCK = 5.0
"""Seconds of the updates whose mean is taken."""
SKIPPED = 3
"""Updates before the first block: the first ones choose kernels and fill caches."""


def smallest_mean(ticks: Sequence[float]) -> float:
    """Seconds per update, of the fastest `BLOCK` seconds, from the seconds at which updates ended."""
    ends = np.asarray(ticks[SKIPPED:])
    after = np.searchsorted(ends, ends + BLOCK)
    means = [(ends[j] - ends[i]) / (j - i) for i, j in enumerate(after) if j < len(ends)]
    if not means:
        raise SystemExit(f"no {BLOCK:g} seconds of updates were measured")
    return float(min(means))


class Paces:
    """The file of paces, by data set, contender and settings."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    @staticmethod
    def _key(job: Job) -> str:
        return " ".join([job.data, job.contender, *job.settings])

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """One job of each pace that has not been measured."""
        return list({self._key(job): job for job in jobs if self._key(job) not in self._known}.values())

    def add(self, job: Job, rounds: Sequence[float], machine: dict[str, Any]) -> None:
        """Keep the fastest of the rounds, each in seconds per update."""
        self._known[self._key(job)] = {
            "seconds_per_update": min(rounds),
            "rounds": list(rounds),
            "machine": machine,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._known, indent=1) + "\n")

    def updates(self, job: Job) -> int:
        """Of the job's budget."""
        each = float(self._known[self._key(job)]["seconds_per_update"])
        return max(1, round(job.budget / each))
