"""Who proposes the next trial, and who ends a hopeless one.

Sources: TPE, Bergstra et al., "Algorithms for hyper-parameter optimization", NIPS 2011, multivariate
after Falkner, Klein and Hutter 2018; constant liar for pending trials, Ginsbourger et al. 2010; Gaussian
process with expected improvement over pending points, Balandat et al. 2020; ASHA, Li et al., "A system
for massively parallel hyperparameter tuning", MLSys 2020; Hyperband, Li et al., JMLR 2018.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from voxelscale.config import SearchConfig

REDRAWS = 10
"""How often a proposal that would repeat a trial is drawn again."""


def make_sampler(config: SearchConfig) -> BaseSampler:
    """The sampler of ``search.sampler``; for a grid, whose points are all queued in the storage, a random
    one."""
    kinds: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda seed: TPESampler(
            seed=seed, n_startup_trials=config.startup, multivariate=True, constant_liar=True
        ),
        "gp": lambda seed: GPSampler(
            seed=seed, n_startup_trials=config.startup, warn_independent_sampling=False
        ),
    }
    return NumberedSampler(kinds.get(config.sampler, lambda seed: RandomSampler(seed=seed)), config.seed)


def rungs(config: SearchConfig, samples: int) -> list[int]:
    """Samples after which a trial is compared with others, the full budget left out.

    Given outright and the same for all workers: left to itself Optuna guesses the first rung from the
    trials that a process has seen.
    """
    steps = {samples // config.factor**k for k in range(config.rungs, 0, -1)}
    return sorted(step for step in steps if step >= 1)


def only_dice(config: SearchConfig) -> bool:
    """Whether Dice is all that counts, so that a validation's Dice says how good a trial is."""
    return config.objectives == ("dice",)


def make_pruner(config: SearchConfig, samples: int) -> BasePruner:
    """The pruner of ``search.pruner`` for trials of so many samples."""
    marks = rungs(config, samples)
    if config.pruner == "none" or not marks or not only_dice(config):
        return NopPruner()
    if config.pruner == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=0)
    if config.pruner == "hyperband":
        return HyperbandPruner(min_resource=marks[0], max_resource=samples, reduction_factor=config.factor)
    return SuccessiveHalvingPruner(min_resource=marks[0], reduction_factor=config.factor)


def should_prune(study: Study, trial: FrozenTrial, superseded: Sequence[int]) -> bool:
    """Whether the study's pruner would end the trial at its last reported value.

    Args:
        superseded: numbers of attempts that another took over: their values come again with it, and
            would count twice.
    """
    view = copy.copy(study)
    gone = set(superseded)

    def get_trials(deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return [t for t in study.get_trials(deepcopy, states) if t.number not in gone]

    view.get_trials = get_trials  # type: ignore[method-assign]
    return study.pruner.prune(view, trial)


class NumberedSampler(BaseSampler):
    """A sampler whose proposal for trial k is drawn from (seed, k), and that repeats no trial.

    Workers share nothing but the storage, and with equal seeds would all propose the same first trials;
    with seeds of their own a search could not be repeated. The number is the storage's, so it is unique.

    Args:
        make: a fresh sampler from a seed.
        seed: of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._inner = make(seed)
        self._drawn = 0

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Begin the draws of this trial."""
        self._number, self._drawn = trial.number, 0
        self._redraw()
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Of the sampler within."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Of the sampler within, drawn again while it repeats a trial."""
        params = self._inner.sample_relative(study, trial, search_space)
        known = _points(study, trial) if params else []
        while params in known and self._drawn <= REDRAWS:
            self._redraw()
            self._inner.infer_relative_search_space(study, trial)
            params = self._inner.sample_relative(study, trial, search_space)
        # The model proposes only what has been tried: a random proposal finds something new.
        return {} if params in known else params

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Of the sampler within."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Of the sampler within."""
        self._inner.after_trial(study, trial, state, values)

    def _redraw(self) -> None:
        entropy = (self._seed, self._number, self._drawn)
        self._inner = self._make(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        self._drawn += 1


def _points(study: Study, trial: FrozenTrial) -> list[dict[str, Any]]:
    """What has been proposed so far, waiting trials included."""
    others = (t for t in study.get_trials(deepcopy=False) if t.number != trial.number)
    return [t.system_attrs.get("fixed_params", t.params) for t in others]
