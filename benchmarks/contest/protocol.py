"""What all contenders keep to: a job, its number of updates, and what is noted of it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from machine import machine  # type: ignore[import-not-found]

from .data import Answer, Case, DataSet, Split

POWER = 0.9
"""Of the learning rate's decay to 0, nnU-Net's and of MONAI's DynUNet pipeline."""

Predict = Callable[[Case], Answer]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        rate: factor of the contender's own learning rate.
        settings: of the contender, as key=value.
        on: the cases that are scored: ``choose`` (trained on the others of the fold) or ``judge``.
        budget: seconds of the process's time, at the contender's pace (`contest.pace`).
    """

    data: str
    fold: int
    contender: str
    settings: tuple[str, ...]
    budget: float
    rate: float
    seed: int
    on: Literal["choose", "judge"]

    @property
    def name(self) -> str:
        """A folder's name: readable, and different for different jobs."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.contender}-{self.budget:g}s-x{self.rate:.2f}-seed{self.seed}-{self.on}-{digest}"

    def value(self, key: str, default: str) -> str:
        """Of a setting."""
        return dict(setting.split("=", 1) for setting in self.settings).get(key, default)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job works.

    Attributes:
        shared: of the outer fold, for all jobs: what is prepared once.
        own: of the job.
    """

    data: DataSet
    split: Split
    shared: Path
    own: Path

    def trained_on(self, job: Job) -> tuple[str, ...]:
        """The cases that a job may train on."""
        return self.split.rest if job.on == "choose" else self.split.train


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training.

    Attributes:
        batch: patches of an update.
        facts: patch, batch, learning rate, precision and the like.
    """

    batch: int
    predict: Predict
    facts: dict[str, Any]


class EndedEarly(Exception):
    """A training was ended by its seconds, before its last update: there is no model."""


class Course:
    """A training's updates: how many there are, how far it is, and when each one ended.

    Args:
        updates: all in all; the schedule ends with them.
        seconds: of the process's time after which it ends all the same.
    """

    def __init__(self, updates: int, seconds: float = math.inf) -> None:
        self.updates, self.seconds = updates, seconds
        self.ticks = [time.process_time()]

    @property
    def done(self) -> bool:
        """Whether there is no further update."""
        return len(self.ticks) > self.updates or self.used > self.seconds

    @property
    def used(self) -> float:
        """Seconds of the process's time, all its threads, until the end of the last update."""
        return self.ticks[-1] - self.ticks[0]

    @property
    def decay(self) -> float:
        """What the learning rate of the next update is multiplied by: 1 at first, towards 0 at the end."""
        return float((1 - (len(self.ticks) - 1) / self.updates) ** POWER)

    def tick(self) -> None:
        """An update has ended."""
        self.ticks.append(time.process_time())

    def finish(self) -> None:
        """Raise an EndedEarly where the seconds ended it."""
        if self.used > self.seconds:
            raise EndedEarly


def has_bf16() -> bool:
    """Whether the processor computes in bfloat16."""
    return any(flag in machine()["flags"] for flag in ("avx512_bf16", "amx_bf16"))


def set_seeds(seed: int) -> None:
    """Of all generators that the contenders draw from; one thread."""
    import random

    import torch

    torch.set_num_threads(1)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net draws from it)
    torch.manual_seed(seed)
