"""A search's results as an Optuna study in memory, for Optuna's own plots."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from voxelscale.pages.plots import text
from voxelscale.search.results import SearchResults, Value

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


def study_of(results: SearchResults, objectives: int = 1) -> Study:
    """The done trials under their own numbers, by the first objectives.

    Names and choices are escaped for Plotly. The trials that Optuna's plots leave out are empty here.
    """
    import optuna

    ways = optuna.study.StudyDirection
    directions = [ways.MAXIMIZE if more else ways.MINIMIZE for more in results.maximise[:objectives]]
    study = optuna.create_study(directions=directions)
    scales = {
        key: (as_shown(results, key), kind) for key in results.keys if (kind := _distribution(results, key))
    }
    done = {trial.number: trial for trial in results.done}
    empty = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
    for number in range(max(done, default=-1) + 1):
        if number not in done:
            study.add_trial(empty)
            continue
        params = done[number].params
        own = {key: scale for key, scale in scales.items() if key in params}
        study.add_trial(
            optuna.trial.create_trial(
                values=done[number].values[:objectives],
                params={text(key): shown(params[key]) for key, (shown, _) in own.items()},
                distributions={text(key): kind for key, (_, kind) in own.items()},
            )
        )
    return study


def is_number(results: SearchResults, key: str) -> bool:
    """Whether all values of a key are numbers."""
    return all(type(value) in (int, float) for value in _values(results, key))


def as_shown(results: SearchResults, key: str) -> Callable[[Value], Value]:
    """How a key's values are shown: a number as it is, a choice as text; 1 and "1" differ.

    Of a list the numbers: [32, 32, 32] as 32×32×32.
    """
    if is_number(results, key):
        return lambda value: value
    mixed = not all(isinstance(one, str) for one in _values(results, key))

    def choice(value: Value) -> Value:
        said = json.dumps(value) if mixed else str(value)
        return text(said.strip("[]").replace(", ", "×") if said.startswith("[") else said)

    return choice


def _values(results: SearchResults, key: str) -> list[Value]:
    return [trial.params[key] for trial in results.trials if key in trial.params]


def _distribution(results: SearchResults, key: str) -> BaseDistribution | None:
    """Of numbers their range, of all else the choices; None where no trial had the key."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values: list[Any] = [*map(as_shown(results, key), _values(results, key))]
    if not values:
        return None
    if not is_number(results, key):
        return CategoricalDistribution(sorted(set(values), key=_rank))
    low, high = min(values), max(values)
    log = key in results.log and low > 0
    whole = all(isinstance(value, int) for value in values)
    return (IntDistribution if whole else FloatDistribution)(low, high, log=log)


def _rank(choice: Value) -> tuple[list[float], str]:
    """By the numbers in it, then by text."""
    return [float(number) for number in re.findall(r"\d+\.?\d*", str(choice))], str(choice)
