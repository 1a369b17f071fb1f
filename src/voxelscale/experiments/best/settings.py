"""Threshold, smallest component, largest component only: found on unseen predictions, and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from voxelscale.config import PredictConfig
from voxelscale.evaluate.bootstrap import p_value, percentile_interval
from voxelscale.experiments.best.figures import Metric, figure, or_least, patients_with, samples_of
from voxelscale.experiments.best.unseen import Asked, Scored, Unseen

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMALLEST_MM3 = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
"""What is tried; the settings of the models themselves are tried in any case."""

LEAST_GAIN = 1e-6
"""So much better is better: sums of the same figures in another order differ by their rounding."""

Settings = PredictConfig
Change = Callable[[Settings, Sequence[str]], Settings]
"""What is tried on settings, for some classes."""

Plans = Mapping[int | None, Settings]
"""Settings found on all cases (None), and on those outside each fold."""


def tune(
    unseen: Unseen, members: tuple[int, ...], plain: Scored, metric: Metric, *, kept: bool, seed: int
) -> tuple[Settings, dict[str, Any]]:
    """Find the threshold, then of each class the smallest component and whether only the largest stays.

    Each is kept where it makes the metric better on the unseen predictions. All of it is then done once
    more for each fold without the fold's own cases, and scored on these: what it gives on new scans. Where
    that is no better than without, everything stays as it was.

    Args:
        members: the cross-validations that were chosen.
        plain: (classes, cases) their scores as they are.
        kept: whether there are probabilities; without them the masks are taken, of which only the Dice of
            other components can be known.

    Returns:
        the settings; and plain values: ``found`` on all cases and ``without_fold``; the metric ``before``,
        ``after_on_the_same_cases`` and ``after_on_left_out_folds``, whose ``difference`` to before has an
        ``interval`` and ``p``; whether the settings are ``kept``; or ``tried``, false, and ``why``.
    """
    base = unseen.settings(members)
    if not kept and metric != "dice":
        return base, {"tried": False, "why": "without probabilities there is no CPM of others"}
    start = base if kept else replace(base, threshold=0.5, low_threshold=None, candidates=1.0)
    search, folds = _Search(unseen, members, metric), unseen.folds
    plans: Plans = dict.fromkeys([None, *sorted(set(folds.tolist()))], start)
    if kept and (unseen.classes.single or unseen.classes.regions):
        plans = search.best_threshold(plans)
    plans = search.best_of_classes(plans, [with_smallest(volume) for volume in SMALLEST_MM3])
    plans = search.best_of_classes(plans, [with_largest])
    known = search.scores(list(plans.values()))
    honest = np.empty_like(plain)
    for fold, settings in plans.items():
        if fold is not None:
            honest[:, folds == fold] = known[key_of(settings)][:, folds == fold]
    judged = _judged(unseen, [plain, known[key_of(plans[None])], honest], metric, seed)
    found = {fold: changes(start, settings) for fold, settings in plans.items()}
    better = or_least(judged["after_on_left_out_folds"]) > or_least(judged["before"]) + LEAST_GAIN
    facts = {
        "tried": True,
        "found": found[None],
        **judged,
        "kept": better and bool(found[None]),
        "without_fold": {str(fold): own for fold, own in found.items() if fold is not None},
    }
    return _with(base, found[None]) if better else base, facts


def _judged(unseen: Unseen, scores: Sequence[Scored], metric: Metric, seed: int) -> dict[str, Any]:
    """The metric before, after on the same cases, and after on those that did not choose."""
    patients, (plain, _, honest) = unseen.patients, scores
    before, same, left_out = (figure(each, metric) for each in scores)
    drawn = samples_of(np.stack([honest, plain]), patients, seed)[metric]
    apart, units = drawn[0] - drawn[1], patients_with(plain, patients, metric)
    return {
        "before": before,
        "after_on_the_same_cases": same,
        "after_on_left_out_folds": left_out,
        "difference": None if left_out is None or before is None else left_out - before,
        "interval": percentile_interval(apart, units),
        "p": p_value(apart, units),
    }


def _with(settings: Settings, found: Mapping[str, Any]) -> Settings:
    """The settings with those that were found."""
    values = {key.removeprefix("predict."): value for key, value in found.items()}
    if "largest_only" in values:
        values["largest_only"] = tuple(values["largest_only"])
    return replace(settings, **values)


def changes(base: Settings, settings: Settings) -> dict[str, Any]:
    """The keys of the config that differ from the base's, with their values."""
    keys = ("threshold", "low_threshold", "smallest_mm3", "largest_only")
    found = {key: getattr(settings, key) for key in keys if getattr(settings, key) != getattr(base, key)}
    return {f"predict.{key}": list(v) if isinstance(v, tuple) else v for key, v in found.items()}


def with_thresholds(settings: Settings) -> list[Settings]:
    """The settings with each of `THRESHOLDS`; the lower hysteresis threshold at most that."""
    return [
        replace(
            settings,
            threshold=threshold,
            low_threshold=None
            if settings.low_threshold is None
            else min(settings.low_threshold, threshold),
        )
        for threshold in THRESHOLDS
    ]


def with_smallest(volume: float) -> Change:
    """Settings with a minimum volume of the components of these classes, mm3."""

    def changed(settings: Settings, names: Sequence[str]) -> Settings:
        return replace(settings, smallest_mm3={**settings.smallest_mm3, **dict.fromkeys(names, volume)})

    return changed


def with_largest(settings: Settings, names: Sequence[str]) -> Settings:
    """Settings under which only the largest component of these classes stays."""
    return replace(settings, largest_only=tuple(sorted({*settings.largest_only, *names})))


def key_of(settings: Settings) -> str:
    """By which equal settings are known."""
    return repr((settings.threshold, sorted(settings.smallest_mm3.items()), settings.largest_only))


class _Search:
    """Settings tried on the unseen predictions of some cross-validations; each is scored once."""

    def __init__(self, unseen: Unseen, members: tuple[int, ...], metric: Metric) -> None:
        self._unseen, self._members, self._metric = unseen, members, metric
        self._known: dict[str, Scored] = {}

    def scores(self, wanted: Sequence[Settings]) -> Mapping[str, Scored]:
        """(classes, cases) under each of the settings; all that are new in one pass over the cases."""
        new = {key_of(settings): settings for settings in wanted if key_of(settings) not in self._known}
        if new:
            asked = [Asked(members=self._members, settings=settings) for settings in new.values()]
            self._known |= dict(zip(new, self._unseen.score(asked), strict=True))
        return self._known

    def _values(self, tried: Sequence[Settings], fold: int | None, classes: slice) -> list[float]:
        """The metric of some classes under each of the settings, without a fold's cases."""
        known = self.scores(tried)
        cases = np.ones(len(self._unseen.folds), bool) if fold is None else self._unseen.folds != fold
        return [or_least(figure(known[key_of(one)][classes][:, cases], self._metric)) for one in tried]

    def best_threshold(self, plans: Plans) -> Plans:
        """Each plan with the best threshold on its cases, for all classes together."""
        tried = {fold: [settings, *with_thresholds(settings)] for fold, settings in plans.items()}
        self.scores([settings for each in tried.values() for settings in each])
        return {
            fold: each[_first_best(self._values(each, fold, slice(None)))] for fold, each in tried.items()
        }

    def best_of_classes(self, plans: Plans, variants: Sequence[Change]) -> Plans:
        """Each plan with the best variant of each class on its cases.

        What is done to a class changes no other, or regions hardly, so all classes are tried at once.
        """
        names = self._unseen.classes.names
        tried = {
            fold: [settings, *(variant(settings, names) for variant in variants)]
            for fold, settings in plans.items()
        }
        self.scores([settings for each in tried.values() for settings in each])
        best = dict(plans)
        for fold, each in tried.items():
            for at, name in enumerate(names):
                if taken := _first_best(self._values(each, fold, slice(at, at + 1))):
                    best[fold] = variants[taken - 1](best[fold], [name])
        return best


def _first_best(values: Sequence[float]) -> int:
    """The number of the highest value; 0 where none is higher than the first by `LEAST_GAIN`."""
    best = int(np.argmax(values))
    return best if values[best] > values[0] + LEAST_GAIN else 0
