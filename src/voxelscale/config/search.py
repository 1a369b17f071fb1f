"""The section `search` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Section):
    """The search for better values of other keys."""

    space: dict[str, Any] = field(default_factory=dict, hash=False)
    """Search space: keys and their bounds, such as {model.depth: {int: [2, 5]}}; {}: a default space
    (docs/searching.md)."""
    trials: int = 50
    """Number of trials, including pruned and failed ones; proposals that cannot run do not count."""
    samples: int = 0
    """Training samples per trial, unless they are searched themselves; 0: train.samples."""
    workers: int = 0
    """Worker processes on this machine; 0: as many as its devices allow, one on CPUs."""
    devices_per_trial: int = 1
    """Devices per trial: GPUs, or on CPUs processes that share the cores."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """Sampler: tree-structured Parzen estimator, Gaussian process, random, or grid."""
    startup: int = 10
    """Random trials before tpe or gp starts to propose."""
    pruner: Literal["asha", "hyperband", "median", "none"] = "asha"
    """Pruner, which stops bad trials early by their validation Dice."""
    rungs: int = 3
    """Maximum number of rungs, where a trial is compared with others; asha's first is at
    samples / factor**rungs."""
    factor: int = 3
    """Reduction factor of asha and hyperband: about one in this many trials continues to the next rung."""
    objectives: tuple[Literal["dice", "time", "parameters"], ...] = ("dice",)
    """Objectives: maximise the Dice of the last validation; minimise seconds or parameters."""
    seed: int = 0
    """Seed; trial k's proposal depends on (seed, k) and the results known by then."""
    storage: str = ""
    """Storage of the trials: a PostgreSQL URL; "": a journal file in the search's folder."""
    study: str = "search"
    """Name of the study in the storage."""
    first: tuple[str, ...] = ()
    """Config files to try first, after the config itself."""
    warm_start: str = ""
    """Folder of an earlier search: its trials are reused if data, budget and config are the same; otherwise
    its best five are tried first."""
    lease_seconds: float = 120.0
    """A worker without a heartbeat for this long counts as lost, and its trial is taken over."""
    trial_seconds: float = 0.0
    """Maximum time of a trial; 0: no limit."""
    memory_gib: float = 0.0
    """Memory that a trial may use on each device, GiB; 0: what the device has."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("trials", self.trials >= 1, "at least 1"),
            *self.at_least_0("samples", "workers", "seed", "trial_seconds", "memory_gib"),
            ("devices_per_trial", self.devices_per_trial >= 1, "at least 1"),
            ("startup", self.startup >= 1, "at least 1"),
            ("rungs", self.rungs >= 1, "at least 1"),
            ("factor", self.factor >= 2, "at least 2"),
            *self.each_once("objectives"),
            ("lease_seconds", self.lease_seconds >= 3, "at least 3"),
        ]
