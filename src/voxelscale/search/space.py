"""The space of a search: which config keys, between what bounds, under what conditions.

Declared in YAML over any key that shapes a training::

    search:
      space:
        model.depth: {int: [2, 5]}
        optim.lr: {float: [1.0e-4, 1.0e-2], log: true}
        optim.name: {categorical: [adamw, sgd]}
        optim.momentum: {float: [0.8, 0.99], if: {optim.name: sgd}}
        data.patch_size: {int: [32, 96], step: 16, shape: [0.5, 1, 1]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from voxelscale.config import Config, from_dict, to_dict
from voxelscale.config.optim import OWN
from voxelscale.config.renamed import new_name
from voxelscale.errors import VoxelscaleError
from voxelscale.search.results import Value
from voxelscale.suggest import meant, nearest_keys

KINDS = ("int", "float", "categorical")
OPTIONS = {
    "int": {"int", "step", "log", "if", "shape"},
    "float": {"float", "step", "log", "if", "points"},
    "categorical": {"categorical", "if"},
}
SECTIONS = ("data", "augment", "model", "loss", "optim", "train", "predict")
NO_LIMIT_AT_0 = {
    "data.cases",
    "data.patches_per_case",
    "optim.max_lr",
    "optim.gradient_clipping",
    "train.validate_cases",
}
"""Keys whose 0 stands for no limit, so that the largest value is the nearest."""

OURS = {
    "train.seed": "seeds are not better or worse; retrain the best with several",
    "train.validate_every": "the pruner's rungs say when to validate",
    "train.validate_at": "the pruner's rungs say when to validate",
    "train.checkpoint_every": "it changes nothing that is found",
    "train.checkpoint_seconds": "it changes nothing that is found",
    "train.keep": "it changes nothing that is found",
    "train.max_restarts": "it changes nothing that is found",
    "train.threads": "workers share the cores out",
}
"""Keys of those sections that are not searched, and why."""

POINTS = 4
"""Of a float in a grid where the space does not say."""

MOST_POINTS = 100_000
"""Maximum of a grid: all points are held in memory and in the storage."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One searched key.

    Attributes:
        key: as ``model.depth``; a search that was started with an old name keeps it.
        distribution: Optuna's; lists among a categorical's choices are their JSON text.
        shape: for a triple (as `data.patch_size`) searched as one whole number: what each axis is
            multiplied by; None for other keys.
        conditions: searched keys and their values, all of which must hold for this one to count.
        points: of a float in a grid.
    """

    key: str
    distribution: BaseDistribution
    shape: tuple[float, float, float] | None = None
    conditions: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    points: int = POINTS

    @property
    def place(self) -> list[str]:
        """The section and the name under which the config has the key today."""
        return new_name(self.key).split(".")

    def active(self, params: Mapping[str, Value]) -> bool:
        """Whether the conditions hold among the values of the keys before it."""
        return all(key in params and params[key] in values for key, values in self.conditions)

    def setting(self, value: Value) -> Any:
        """What the config's key is set to."""
        if self.shape is not None and isinstance(value, int):
            return [max(1, round(value * factor)) for factor in self.shape]
        listed = isinstance(self.distribution, CategoricalDistribution) and isinstance(value, str)
        return json.loads(str(value)) if listed and str(value).startswith("[") else value


@dataclass(frozen=True, kw_only=True)
class Space:
    """All searched keys, each after those that its conditions name."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: Trial) -> dict[str, Value]:
        """A value for each key that is active, by Optuna's sampler."""
        params: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.active(params):
                params[parameter.key] = _suggest(trial, parameter)
        return params

    def active(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """Those of the values whose keys are searched and active, in the space's order."""
        kept: dict[str, Value] = {}
        for parameter in self.parameters:
            if parameter.key in params and parameter.active(kept):
                kept[parameter.key] = params[parameter.key]
        return kept

    def apply(self, config: Config, params: Mapping[str, Value]) -> Config:
        """The config with the values set.

        Raises:
            VoxelscaleError: they do not go together.
        """
        if depth := params.get("model.depth"):
            # What the config says of each level, such as a plan's kernels, is fitted to it.
            config = replace(config, model=config.model.of_depth(int(depth)))
        tree = to_dict(config)
        for parameter in self.parameters:
            if parameter.key in params:
                section, name = parameter.place
                tree[section][name] = parameter.setting(params[parameter.key])
        return from_dict(tree, "search.space")

    def values_of(self, config: Config) -> tuple[dict[str, Value], list[str]]:
        """The config's own values as a point of the space.

        Returns:
            the point, and the keys whose values are not in the space and were replaced by the nearest.
        """
        params: dict[str, Value] = {}
        moved: list[str] = []
        for parameter in self.parameters:
            if not parameter.active(params):
                continue
            params[parameter.key] = near = _nearest(config, parameter)
            if not _is_set(config, parameter, near):
                moved.append(parameter.key)
        return params, moved

    def grid(self) -> list[dict[str, Value]]:
        """Every point of the grid: all whole numbers and choices, and `points` of each float.

        Raises:
            VoxelscaleError: they are more than `MOST_POINTS`.
        """
        points: list[dict[str, Value]] = [{}]
        for parameter in self.parameters:
            values = _grid_of(parameter)
            if sum(len(values) if parameter.active(point) else 1 for point in points) > MOST_POINTS:
                hint = "give whole numbers a step, or take another search.sampler"
                raise VoxelscaleError(f"search.space: a grid of more than {MOST_POINTS:,} points", hint)
            points = [
                {**point, parameter.key: value} if parameter.active(point) else point
                for point in points
                for value in (values if parameter.active(point) else values[:1])
            ]
        return points


def read_space(config: Config) -> Space:
    """The space that ``search.space`` declares, or the default one where it is empty.

    Raises:
        VoxelscaleError: naming the key, what is wrong with it, and how to correct it.
    """
    declared = config.search.space or default_space(config)
    parameters = [_parameter(config, key, how) for key, how in declared.items()]
    if len({new_name(key) for key in declared}) < len(declared):
        raise VoxelscaleError("search.space: a key under its old and its new name", "leave out the old one")
    for parameter in parameters:
        _check_values(config, parameter)
    space = Space(parameters=tuple(_in_order(parameters)))
    if any(p.key == "train.ranks" for p in parameters):
        _check_ranks(config, space)
    return space


def default_space(config: Config) -> dict[str, dict[str, Any]]:
    """The keys that matter most for lesions in CT, around the config's own patch.

    Rates lie a decade to both sides of the optimiser's own, and one with momentum has it searched. A search
    that was started before there were such defaults lists its momentum, and keeps the space that it had.
    What a preset or a plan's kernels settle is left out.
    """
    own = config.optim.momentum is None
    rate = OWN[config.optim.name if own else "adamw"].lr
    momentum: dict[str, Any] = {"optim.momentum": {"float": [0.8, 0.99]}}
    edge = max(config.data.patch_size)
    step = max(4, edge // 4 // 4 * 4)
    whole = step * max(2, round(edge / step))
    bounds = [max(step, whole // 2 // step * step), whole // 2 * 3 // step * step]
    shape = [n / edge for n in config.data.patch_size]
    space: dict[str, dict[str, Any]] = {
        "data.patch_size": {"int": bounds, "step": step, "shape": shape},
        "data.patches_per_case": {"categorical": [0, 16, 64, 256]},
        "model.depth": {"int": [2, 5]},
        "model.filters": {"int": [8, 32], "step": 8},
        "model.kernel_size": {"int": [3, 5], "step": 2},
        "model.norm": {"categorical": ["instance", "batch", "group"]},
        "train.batch_size": {"int": [1, 8], "log": True},
        "optim.lr": {"float": [rate / 10, rate * 10], "log": True},
        **(momentum if own and config.optim.name in ("sgd", "lars", "muon") else {}),
        "loss.cross_entropy": {"float": [0.5, 20.0], "log": True},
        "augment.strength": {"float": [0.0, 2.0]},
    }
    settled = {"model.filters", "model.norm"} if config.model.preset != "none" else set[str]()
    settled |= {"model.kernel_size"} if config.model.kernels or settled else set()
    return {key: how for key, how in space.items() if key not in settled}


def _suggest(trial: Trial, parameter: Parameter) -> Value:
    how = parameter.distribution
    if isinstance(how, IntDistribution):
        return trial.suggest_int(parameter.key, how.low, how.high, step=how.step, log=how.log)
    if isinstance(how, FloatDistribution):
        return trial.suggest_float(parameter.key, how.low, how.high, step=how.step, log=how.log)
    assert isinstance(how, CategoricalDistribution)  # noqa: S101
    chosen: Value = trial.suggest_categorical(parameter.key, how.choices)
    return chosen


def _parameter(config: Config, key: str, how: Any) -> Parameter:
    """One entry of the declaration, its form checked."""
    where = f"search.space: {key}"
    _check_key(config, key)
    kinds = [kind for kind in KINDS if isinstance(how, Mapping) and kind in how]
    if len(kinds) != 1:
        hint = "write {int: [2, 5]}, {float: [1.0e-4, 1.0e-2], log: true} or {categorical: [a, b]}"
        raise VoxelscaleError(f"{where} is {how!r}", hint)
    kind = kinds[0]
    how = {option: value for option, value in how.items() if value is not None or option == kind}
    unknown = set(how) - OPTIONS[kind]
    if unknown:
        raise VoxelscaleError(
            f"{where}: unknown option {min(unknown)}",
            f"known for {kind}: {', '.join(sorted(OPTIONS[kind]))}",
        )
    wanted, points = how.get("if", {}), _number(how.get("points", POINTS))
    if not isinstance(wanted, Mapping):
        raise VoxelscaleError(f"{where}: if {wanted!r}", "write if: {optim.name: sgd}")
    if points is None or points < 1 or not points.is_integer():
        hint = "it must be a whole number, at least 1"
        raise VoxelscaleError(f"{where}: points {how['points']!r}", hint)
    conditions = tuple(
        (other, tuple(_plain(v) for v in (values if isinstance(values, list) else [values])))
        for other, values in wanted.items()
    )
    return Parameter(
        key=key,
        distribution=_distribution(kind, how, where),
        shape=_shape(config, key, kind, how, where),
        conditions=conditions,
        points=int(points),
    )


def _check_key(config: Config, key: str) -> None:
    tree = to_dict(config)
    section, _, name = new_name(str(key)).partition(".")
    if section not in SECTIONS or name not in tree.get(section, {}):
        near = nearest_keys(str(key), [f"{s}.{n}" for s in SECTIONS for n in tree[s]])
        hint = meant(near) if near else f"keys of {', '.join(SECTIONS)} can be searched"
        raise VoxelscaleError(f"search.space: unknown key {key}", hint)
    if key in OURS:
        raise VoxelscaleError(f"search.space: {key} cannot be searched", OURS[key])


def _distribution(kind: str, how: Mapping[str, Any], where: str) -> BaseDistribution:
    if kind == "categorical":
        choices = how["categorical"]
        if not isinstance(choices, list) or not choices:
            raise VoxelscaleError(f"{where}: no choices", "write {categorical: [a, b]}")
        return CategoricalDistribution([_plain(choice) for choice in choices])
    bounds, log, step = how[kind], how.get("log", False), _number(how.get("step"))
    low, high = map(_number, bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
    if low is None or high is None or low > high:
        raise VoxelscaleError(f"{where}: bounds {bounds!r}", f"write {{{kind}: [minimum, maximum]}}")
    if log not in (False, True):  # or 0 and 1
        raise VoxelscaleError(f"{where}: log {log!r}", "it must be true or false")
    if log and (low <= 0 or "step" in how):
        raise VoxelscaleError(f"{where}: a logarithmic scale", "needs a minimum above 0 and takes no step")
    if "step" in how and (step is None or step <= 0 or (kind == "int" and not step.is_integer())):
        wanted = "a whole number" if kind == "int" else "a number"
        raise VoxelscaleError(f"{where}: step {how['step']!r}", f"it must be {wanted} above 0")
    if step and not math.isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9):
        raise VoxelscaleError(
            f"{where}: step {how['step']}", "it must divide the distance between the bounds"
        )
    if kind == "int":
        if not (low.is_integer() and high.is_integer()):
            raise VoxelscaleError(f"{where}: bounds {bounds!r}", "they must be whole numbers")
        return IntDistribution(int(low), int(high), log=bool(log), step=int(step or 1))
    return FloatDistribution(low, high, log=bool(log), step=step)


def _number(value: Any) -> float | None:
    """A finite number, also where YAML reads it as a text (1e-3); else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _shape(
    config: Config, key: str, kind: str, how: Mapping[str, Any], where: str
) -> tuple[float, float, float] | None:
    """What a whole number is multiplied by along z, y, x where the key is a triple."""
    section, name = new_name(key).split(".")
    own = to_dict(config)[section][name]
    if not (isinstance(own, list) and len(own) == 3 and kind == "int"):
        if "shape" in how:
            raise VoxelscaleError(f"{where}: shape", "it is for triples, such as data.patch_size")
        return None
    flat = config.model.dims == 2
    shape = how.get("shape", [0.0 if flat else 1.0, 1.0, 1.0])
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(f, int | float) for f in shape):
        raise VoxelscaleError(f"{where}: shape {shape!r}", "write three numbers (z, y, x), as [0.5, 1, 1]")
    z, y, x = (float(factor) for factor in shape)
    return (0.0 if flat else z), y, x


def _check_values(config: Config, parameter: Parameter) -> None:
    """Refuse values that the config would refuse."""
    alone = Space(parameters=(parameter,))
    for value in _some_of(parameter.distribution):
        try:
            alone.apply(config, {parameter.key: value})
        except VoxelscaleError as error:
            problem = error.message.removeprefix("config: ").removeprefix("search.space: ")
            raise VoxelscaleError(f"search.space: {problem}", error.hint) from None


def _check_ranks(config: Config, space: Space) -> None:
    """A worker has so many devices and no more."""
    ranks = next(p.distribution for p in space.parameters if p.key == "train.ranks")
    most = max(int(v or 0) for v in _some_of(ranks))
    if most > config.search.devices_per_trial:
        raise VoxelscaleError(
            f"search.space: train.ranks up to {most}, but a worker has {config.search.devices_per_trial}",
            "raise search.devices_per_trial (--devices-per-trial)",
        )


def _in_order(parameters: Sequence[Parameter]) -> Iterator[Parameter]:
    """Each after those that its conditions name.

    Raises:
        VoxelscaleError: a condition names a key that is not searched, or depends on itself.
    """
    keys, left, given = {p.key for p in parameters}, list(parameters), set[str]()
    for parameter in parameters:
        for other, values in parameter.conditions:
            where = f"search.space: {parameter.key}: if {other}"
            if other not in keys:
                raise VoxelscaleError(f"{where}: not searched itself", "name a key of the space")
            parent = next(p for p in parameters if p.key == other)
            for value in values:
                if not _holds(parent.distribution, value):
                    raise VoxelscaleError(f"{where}: is never {value!r}", "name one of its values")
    while left:
        ready = [p for p in left if all(key in given for key, _ in p.conditions)]
        if not ready:
            circle = ", ".join(p.key for p in left)
            raise VoxelscaleError(f"search.space: {circle} depend on each other", "take one condition out")
        yield from ready
        given |= {p.key for p in ready}
        left = [p for p in left if p.key not in given]


def _holds(distribution: BaseDistribution, value: Value) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    if isinstance(distribution, IntDistribution):
        return value in range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)  # noqa: S101
    return distribution.low <= value <= distribution.high


def _some_of(distribution: BaseDistribution) -> list[Value]:
    """All values of a categorical or of whole numbers (up to a thousand), and a float's bounds."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)  # noqa: S101
    if isinstance(distribution, IntDistribution):
        whole = range(distribution.low, distribution.high + 1, distribution.step)
        return list(whole) if len(whole) <= 1000 else [distribution.low, distribution.high]
    return [distribution.low, distribution.high]


def _grid_of(parameter: Parameter) -> Sequence[Value]:
    distribution = parameter.distribution
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    if not isinstance(distribution, FloatDistribution):
        return _some_of(distribution)
    low, high, count = distribution.low, distribution.high, max(1, parameter.points)
    shares = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    if distribution.step is not None:
        steps = round((high - low) / distribution.step)
        return [low + distribution.step * step for step in range(steps + 1)]
    if distribution.log:
        return [low * (high / low) ** share for share in shares]
    return [low + (high - low) * share for share in shares]


def _set_in(config: Config, parameter: Parameter) -> Any:
    """What the config has for the key; what it leaves to the optimiser is the optimiser's own."""
    section, name = parameter.place
    return to_dict(replace(config, optim=config.optim.settled()))[section][name]


def _is_set(config: Config, parameter: Parameter, value: Value) -> bool:
    """Whether the value sets the key to what the config has, however it is written (1e-3, [15, 15, 30])."""
    try:
        applied = Space(parameters=(parameter,)).apply(config, {parameter.key: value})
    except VoxelscaleError:
        return False
    own, same = (_set_in(one, parameter) for one in (config, applied))
    return bool(same == own or (isinstance(own, float) and same is not None and math.isclose(same, own)))


def _nearest(config: Config, parameter: Parameter) -> Value:
    """The value of the space that sets the key nearest to what the config has."""
    own, distribution = _set_in(config, parameter), parameter.distribution
    unlimited = own == 0 and ".".join(parameter.place) in NO_LIMIT_AT_0
    if isinstance(distribution, CategoricalDistribution):
        for choice in distribution.choices:
            if _is_set(config, parameter, choice):
                return choice
        numbers = [c for c in distribution.choices if isinstance(c, int | float)]
        if isinstance(own, int | float) and numbers:
            return max(numbers) if unlimited else min(numbers, key=lambda choice: abs(choice - own))
        return distribution.choices[0]
    assert isinstance(distribution, IntDistribution | FloatDistribution)  # noqa: S101
    if unlimited:
        return distribution.high
    if own is None:
        return distribution.low
    if isinstance(distribution, IntDistribution):
        if parameter.shape is not None:
            whole = range(distribution.low, distribution.high + 1, distribution.step)
            return min(
                whole, key=lambda v: sum(abs(a - b) for a, b in zip(parameter.setting(v), own, strict=True))
            )
        steps = round((float(own) - distribution.low) / distribution.step)
        return min(max(distribution.low + steps * distribution.step, distribution.low), distribution.high)
    inside = min(max(float(own), distribution.low), distribution.high)
    if distribution.step is not None:
        inside = (
            distribution.low + round((inside - distribution.low) / distribution.step) * distribution.step
        )
    return inside


def _plain(value: Any) -> Value:
    """Optuna's categoricals hold plain values only."""
    return json.dumps(list(value)) if isinstance(value, list | tuple) else value


def keys_of(space: Space) -> tuple[tuple[str, ...], frozenset[str]]:
    """The searched keys, and those of them that are on a logarithmic scale."""
    logs = (p.key for p in space.parameters if getattr(p.distribution, "log", False))
    return tuple(p.key for p in space.parameters), frozenset(logs)
