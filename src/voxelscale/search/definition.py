"""A search as it was defined: in its folder for people and workers, in the storage against mix-ups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna import Study
from optuna.trial import TrialState, create_trial

from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, SearchConfig, Triple, dump, load, load_stored, to_dict
from voxelscale.config.renamed import with_first_names
from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic
from voxelscale.search.lease import TO_THE_END
from voxelscale.search.records import IMPORTED, NOTE, OUTCOME, directions, read_results, wanted
from voxelscale.search.results import TrialResult, Value
from voxelscale.search.sampling import make_pruner, make_sampler, rungs
from voxelscale.search.space import OURS, SECTIONS, Space, read_space
from voxelscale.search.storage import open_storage, strip_password
from voxelscale.store import Store, open_store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.recipes import samples_of

DEFINITION = "search.yaml"
STORAGE = "VOXELSCALE_STORAGE"
"""In a worker's environment: the storage's URL, whose password is written to no file."""

FREE = {"trials", "workers", "devices_per_trial", "lease_seconds", "trial_seconds", "memory_gib", "storage"}
"""Keys of ``search`` that may change when a search is resumed; `_devices` says when the devices may not."""

CONSTRAINTS = ("memory", "pooling")
"""Of every trial: 0 or less where it can run (`voxelscale.search.feasible`)."""

BEST_FIRST = 5
"""Trials of an earlier, differing search that are tried first."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search that was started.

    Attributes:
        out: its folder.
        store: what its trials train on.
        config: as defined; what is not searched is every trial's.
        space: what is searched.
        study: in the storage.
        spacing: of the store's images, mm (z, y, x); `channels` is how many they have.
        classes: of its labels.
    """

    out: Path
    store: Path
    config: Config
    space: Space
    study: Study
    spacing: Triple = (1.0, 1.0, 1.0)
    channels: int = 1
    classes: Classes = LESION

    @property
    def samples(self) -> int:
        """Budget of a trial where it is not searched itself."""
        return self.config.search.samples or self.config.train.samples


def begin(config: Config, store: Path, out: Path) -> Search:
    """Start a search, or join or resume the one in `out`, which must be the same.

    Raises:
        VoxelscaleError: the space is faulty, or folder or storage hold another search.
    """
    ranks, each = config.train.ranks, config.search.devices_per_trial
    if ranks not in (0, each):
        hint = f"use --devices-per-trial {ranks}, or set train.ranks=0"
        raise VoxelscaleError(f"config: train.ranks is {ranks}, but a trial has {each} devices", hint)
    space = read_space(config)
    wanted(config.search, space)  # a grid that is too large is refused before a folder is made
    opened = open_fold(store, config.data.fold)
    _claim(config, out)
    digest = str(opened.fingerprint["digest"])
    study = _open_study(config, out, digest)
    search = _on(opened, Search(out=out, store=store, config=config, space=space, study=study))
    _queue_first(search, digest)
    return search


def _on(store: Store, search: Search) -> Search:
    return replace(search, spacing=store.spacing, channels=len(store.channels), classes=store.classes)


def reopen(out: Path, store: Path | None = None) -> Search:
    """The search in a folder, as a worker or a reader.

    Args:
        store: None: for readers, who train nothing.

    Raises:
        VoxelscaleError: there is none.
    """
    path = out / DEFINITION
    if not path.is_file():
        raise VoxelscaleError(f"{out}: no search there", "start one: voxelscale search STORE OUT")
    config = load_stored(path)
    url = os.environ.get(STORAGE) or config.search.storage
    config = replace(config, search=replace(config.search, storage=url))
    study = _open_study(config, out)
    search = Search(out=out, store=store or Path(), config=config, space=read_space(config), study=study)
    return search if store is None else _on(open_store(store), search)


def trial_config(search: Search, params: Mapping[str, Value], ranks: int) -> Config:
    """What a trial is trained with.

    Args:
        params: the searched keys' values.
        ranks: processes, where that is not searched.

    Raises:
        VoxelscaleError: the values do not go together.
    """
    base = replace(search.config, train=replace(search.config.train, samples=search.samples, ranks=ranks))
    config = search.space.apply(base, params)
    before = [mark for mark in rungs(search.config.search, search.samples) if mark < config.train.samples]
    train = replace(config.train, validate_every=0, validate_at=tuple(before))
    return replace(config, train=train, search=SearchConfig())


def marks_of(config: Config) -> tuple[int, ...]:
    """Samples after which a trial's Dice is reported: its rungs and its budget."""
    return (*config.train.validate_at, samples_of(config, config.train.ranks))


def best_config(search: Search, best: TrialResult) -> Config:
    """What `voxelscale train` is to be given: the best trial's values and the full budget.

    With as many ranks as a trial had: more of them would be another global batch.
    """
    train = replace(search.config.train, ranks=search.config.search.devices_per_trial)
    config = search.space.apply(replace(search.config, train=train), best.params)
    return replace(config, search=SearchConfig())


def write_best(search: Search, best: TrialResult) -> Path:
    """``best.yaml`` in the search's folder."""
    path = search.out / "best.yaml"
    values = ", ".join(
        f"{name} {value:.4g}"
        for name, value in zip(search.config.search.objectives, best.values, strict=True)
    )
    head = f"# Trial {best.number} of the search {search.config.search.study}: {values}.\n"
    write_atomic(path, head + dump(best_config(search, best)))
    return path


def _defined(config: Config) -> dict[str, Any]:
    """What makes two searches the same.

    What is left to the optimiser is there as the value that is used, as in earlier searches; but where
    optimisers are searched it is another value in each trial.
    """
    tree = to_dict(replace(config, optim=config.optim.settled()))
    if "optim.name" in config.search.space:
        tree["optim"] = {k: "own" if v is None else v for k, v in to_dict(config)["optim"].items()}
    kept = {section: tree[section] for section in SECTIONS}
    return {**kept, "search": {k: v for k, v in tree["search"].items() if k not in FREE}}


def _devices(config: Config) -> int | None:
    """Devices of every trial, on which its global batch depends; None where each trial has its own."""
    return None if "train.ranks" in config.search.space else config.search.devices_per_trial


def _claim(config: Config, out: Path) -> None:
    """Note the definition in the folder, or check that it is the one that the search was started with."""
    path = out / DEFINITION
    if path.is_file():
        before = load_stored(path)
        begun, now = _defined(before), _defined(config)
        changed = [f"{s}.{k}" for s in now for k in now[s] if now[s][k] != begun[s].get(k)]
        if _devices(before) != _devices(config):
            changed.append("search.devices_per_trial")
        if changed:
            hint = "choose another folder, or resume with the config that it was started with"
            raise VoxelscaleError(f"{out}: the search was started with another {changed[0]}", hint)
    elif out.is_dir() and any(out.iterdir()):
        raise VoxelscaleError(f"{out}: holds files but no search", "choose an empty or new folder")
    bare = replace(config.search, storage=strip_password(config.search.storage))
    write_atomic(path, dump(replace(config, search=bare)))


def _open_study(config: Config, out: Path, data: str = "") -> Study:
    """The study in the storage, made where it is not there.

    Args:
        data: digest of the data set; "": the study must be there.

    Raises:
        VoxelscaleError: it is there, but of another search.
    """
    search = config.search
    storage = open_storage(search.storage, out)
    samples, defined = search.samples or config.train.samples, digest_of(with_first_names(_defined(config)))
    tools: dict[str, Any] = {"sampler": make_sampler(search), "pruner": make_pruner(search, samples)}
    try:
        if not data:
            return optuna.load_study(study_name=search.study, storage=storage, **tools)
    except KeyError:
        raise VoxelscaleError(f"{out}: its search is not in the storage", "begin it again") from None
    study = optuna.create_study(
        study_name=search.study,
        storage=storage,
        directions=directions(search),
        load_if_exists=True,
        **tools,
    )
    known, facts = study.user_attrs, {"data": data, "defined": defined, "devices": _devices(config)}
    if any(known.get(key, value) != value for key, value in facts.items()):
        raise VoxelscaleError(
            f"the storage holds another search named {search.study}",
            "choose another name: --set search.study=NAME",
        )
    if not facts.items() <= known.items():  # new, or its maker has not come so far yet
        study.set_metric_names(list(search.objectives))
        for key, value in facts.items():
            study.set_user_attr(key, value)
    return study


def _queue_first(search: Search, data: str) -> None:
    """Queue what is to be tried first: the config itself, known-good ones, the grid, an earlier search."""
    settings, space = search.config.search, search.space
    named: list[dict[str, Value]] = []
    others: list[dict[str, Value]] = []
    if settings.sampler == "grid":
        others = space.grid()
    else:
        configs = [(search.config, "the config itself")]
        configs += [(load(Path(path), base=search.config), path) for path in settings.first]
        for config, where in configs:
            point, moved = space.values_of(config)
            if moved:
                notice(f"{where}: {', '.join(moved)} outside the space: the nearest value is tried first")
            if left := _not_searched(search, config):
                notice(
                    f"{where}: {', '.join(left)} not searched: the values of the search's config are taken"
                )
            named.append(point)
    if settings.warm_start:
        others += _warm_points(search, Path(settings.warm_start), data)
    # One that was dropped, as one too many, is tried where more are wanted now.
    known = [
        t.system_attrs.get("fixed_params", t.params)
        for t in search.study.get_trials(deepcopy=False)
        if t.state != TrialState.FAIL
    ]
    for point in (*named, *others):
        if point not in known:
            known.append(point)
            attributes = {TO_THE_END: True} if point in named else {}
            search.study.enqueue_trial(dict(point), user_attrs=attributes)


def _not_searched(search: Search, config: Config) -> list[str]:
    """Keys that another config has otherwise, and that its trial does not take from it."""
    own, other = (to_dict(replace(one, optim=one.optim.settled())) for one in (search.config, config))
    searched = {".".join(parameter.place) for parameter in search.space.parameters}
    ours = searched | {*OURS, "train.samples", "train.ranks"}
    keys = [
        f"{section}.{key}"
        for section in SECTIONS
        for key in own[section]
        if own[section][key] != other[section][key]
    ]
    return [key for key in keys if key not in ours]


def _warm_points(search: Search, folder: Path, data: str) -> list[dict[str, Value]]:
    """Take an earlier search's trials as known where they are ours, too; else its best, to be tried.

    A trial is the same where it was trained with the same config, on as many devices, on the same data,
    for the same objectives.
    """
    earlier = reopen(folder)
    results = read_results(earlier.study, earlier.config, earlier.space)
    same = earlier.study.user_attrs.get("data") == data
    same = same and results.objectives == search.config.search.objectives
    sign, others, taken = 1.0 if results.maximise[0] else -1.0, [], 0
    known = [t.params for t in search.study.get_trials(deepcopy=False)]
    for trial in sorted(results.done, key=lambda t: -sign * t.values[0]):
        config = trial_config(earlier, trial.params, earlier.config.search.devices_per_trial)
        point, _ = search.space.values_of(config)
        if not same or trial_config(search, point, search.config.search.devices_per_trial) != config:
            others.append(point)
        elif point not in known:
            taken += 1
            _import(search, point, trial, folder)
    if taken:
        notice(f"{folder}: {count(taken, 'trial')} taken as known")
    elif others:
        others = others[:BEST_FIRST]
        notice(f"{folder}: other data, budget or config: its best {len(others)} are tried first")
    return [] if taken else others


def _import(search: Search, point: Mapping[str, Value], trial: TrialResult, folder: Path) -> None:
    distributions = {p.key: p.distribution for p in search.space.parameters if p.key in point}
    facts = {OUTCOME: "done", IMPORTED: True, NOTE: f"trial {trial.number} of {folder.name}"}
    search.study.add_trial(
        create_trial(
            state=TrialState.COMPLETE,
            params=dict(point),
            distributions=distributions,
            values=list(trial.values),
            intermediate_values=dict(trial.curve),
            user_attrs=facts,
            constraints=dict.fromkeys(CONSTRAINTS, -1.0),
        )
    )
