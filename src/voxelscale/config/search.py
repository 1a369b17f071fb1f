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
    """Which keys, and between what bounds, as {model.depth: {int: [2, 5]}}; {}: a default space
    (docs/search.md)."""
    trials: int = 50
    """Trials to finish, pruned ones included; those that cannot run at all do not count."""
    samples: int = 0
    """Budget of a trial where it is not searched itself; 0: train.samples."""
    workers: int = 0
    """Worker processes on this machine; 0: as many as its devices allow, one on CPUs."""
    devices_per_trial: int = 1
    """Devices of a worker: GPUs, or on CPUs processes that share the cores."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """Who proposes: tree-structured Parzen estimator, Gaussian process, chance, or a grid."""
    startup: int = 10
    """Trials drawn by chance before tpe or gp proposes."""
    pruner: Literal["asha", "hyperband", "median", "none"] = "asha"
    """Who ends hopeless trials early, by their validation Dice."""
    rungs: int = 3
    """Maximum number of comparisons of a trial with others; asha's first one at samples / factor**rungs."""
    factor: int = 3
    """Of asha's and hyperband's rungs: about 1 of so many goes on to the next."""
    objectives: tuple[Literal["dice", "time", "parameters"], ...] = ("dice",)
    """What is optimised: the Dice of the last validation upwards, seconds and parameters downwards."""
    seed: int = 0
    """Trial k's proposal is drawn from (seed, k) and what is known by then."""
    storage: str = ""
    """Where the trials are kept: a PostgreSQL URL, or "" for a journal file in the search's folder."""
    study: str = "search"
    """Name within the storage."""
    first: tuple[str, ...] = ()
    """Config files to try first, after the config itself."""
    warm_start: str = ""
    """Folder of an earlier search: its trials count as known where data, budget and config are the same,
    else its best five are tried first."""
    lease_seconds: float = 120.0
    """After so long without a sign of life a worker counts as lost and its trial is taken over."""
    trial_seconds: float = 0.0
    """A trial that takes longer is ended; 0: no limit."""
    memory_gib: float = 0.0
    """Memory that a trial may take on each device; 0: what the device has."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("trials", self.trials >= 1, "at least 1"),
            ("samples", self.samples >= 0, "at least 0"),
            ("workers", self.workers >= 0, "at least 0"),
            ("devices_per_trial", self.devices_per_trial >= 1, "at least 1"),
            ("startup", self.startup >= 1, "at least 1"),
            ("rungs", self.rungs >= 1, "at least 1"),
            ("factor", self.factor >= 2, "at least 2"),
            (
                "objectives",
                1 <= len(self.objectives) == len(set(self.objectives)),
                "one or more, each once",
            ),
            ("lease_seconds", self.lease_seconds >= 3, "at least 3"),
            ("trial_seconds", self.trial_seconds >= 0, "at least 0"),
            ("memory_gib", self.memory_gib >= 0, "at least 0"),
        ]
