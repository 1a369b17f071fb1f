"""A search's results as an Optuna study in memory, for Optuna's own plots."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from voxelscale.pages.plots import text
from voxelscale.search.results import SearchResults, Value
from voxelscale.search.text import param_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


def study_of(results: SearchResults, objectives: int = 1) -> Study:
    """The done trials under their own numbers, by the first objectives.

    Names and choices are escaped for Plotly. The trials that Optuna's plots leave out are empty here.
    """
    import optuna

    ways = ["maximize" if more else "minimize" for more in results.maximise[:objectives]]
    study = optuna.create_study(directions=ways)
    kinds = {key: kind for key in results.keys if (kind := _distribution(results, key))}
    done = {trial.number: trial for trial in results.done}
    empty = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)
    for number in range(max(done, default=-1) + 1):
        if number not in done:
            study.add_trial(empty)
            continue
        own = {key: kind for key, kind in kinds.items() if key in done[number].params}
        study.add_trial(
            optuna.trial.create_trial(
                values=done[number].values[:objectives],
                params={text(key): shown_value(results, key, done[number].params[key]) for key in own},
                distributions={text(key): kind for key, kind in own.items()},
            )
        )
    return study


def _values(results: SearchResults, key: str) -> list[Value]:
    return [trial.params[key] for trial in results.trials if key in trial.params]


def is_number(results: SearchResults, key: str) -> bool:
    """Whether all values of a key are numbers."""
    return all(type(value) in (int, float) for value in _values(results, key))


def _distribution(results: SearchResults, key: str) -> BaseDistribution | None:
    """Of numbers their range, of all else the choices; None where no trial had the key."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = _values(results, key)
    if not values:
        return None
    if not is_number(results, key):
        choices = sorted(values, key=_rank)
        return CategoricalDistribution(
            list(dict.fromkeys(str(shown_value(results, key, choice)) for choice in choices))
        )
    low, high = min(values), max(values)  # type: ignore[type-var]
    log = key in results.log and low > 0  # type: ignore[operator]
    whole = all(isinstance(value, int) for value in values)
    return (IntDistribution if whole else FloatDistribution)(low, high, log=log)  # type: ignore[arg-type]


def shown_value(results: SearchResults, key: str, value: Value) -> Value:
    """A number itself; a choice as text: [32, 32, 32] as 32×32×32, and 1 and "1" not the same."""
    if is_number(results, key):
        return value
    items = _as_list(value)
    if items:
        return text("×".join(param_text(item) for item in items))
    mixed = not all(isinstance(one, str) for one in _values(results, key))
    return text(json.dumps(value) if mixed else param_text(value))


def _as_list(value: Value) -> list[Value] | None:
    if not isinstance(value, str) or not value.startswith("["):
        return None
    try:
        items = json.loads(value)
    except ValueError:
        return None
    return items if isinstance(items, list) else None


def _rank(value: Value) -> tuple[str, list[float], str]:
    """Numbers and lists of numbers by size, the rest by text."""
    items = _as_list(value) or [value]
    if all(isinstance(item, int | float) for item in items):
        return "", [float(item) for item in items if isinstance(item, int | float)], ""
    return "text", [], str(value)
