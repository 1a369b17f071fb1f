"""``voxelscale scale``: train at every number of workers, and say what it does to time and Dice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxelscale.config import Config, to_dict
from voxelscale.config.renamed import with_first_names
from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic
from voxelscale.scale.cost import Interconnect, StepCost, TrainingTime, compare, training_time
from voxelscale.scale.links import Link, parse_link
from voxelscale.scale.report import CostedRow, write_results
from voxelscale.scale.study import Row, Trial, plan, run_study
from voxelscale.scale.trials import share_devices, train_trial
from voxelscale.store import Store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.validation_cases import require_validation

if TYPE_CHECKING:
    from voxelscale.scale.measure import ModelCheck


def scale(config: Config, store_path: Path, out: Path) -> list[CostedRow]:
    """The whole study, into ``<out>/scaling.json``, ``.svg`` and ``.html``.

    Called again it keeps the trainings that are done, and the measurements.

    Raises:
        VoxelscaleError: a training failed, no validation scan has a lesion, the interconnect is unknown,
            or `out` holds another study.
    """
    network, notes = _network(config)
    store = open_fold(store_path, config.data.fold)
    require_validation(store, config)
    trials = plan(config)
    jobs = config.scale.jobs or _devices()
    train_one = partial(train_trial, store=store_path, shares=share_devices(jobs))
    # The parts of a step are timed first, while nothing else runs.
    kinds = {(trial.recipe, trial.workers): trial for trial in trials}  # whatever the seed
    times = {kind: _time(trial, store, network, out) for kind, trial in kinds.items()}
    check = _check(config, store, out)
    rows = run_study(config, out, train_one, jobs)
    findings = _findings(rows, times)
    facts = {
        "notes": [*notes, *check["lines"]],
        "interconnect": asdict(network.between or network.within),
        "model_check": check,
        "samples": config.train.samples,
        "config": to_dict(config),
    }
    write_results(findings, facts, out, config.scale.target)
    return findings


def _findings(rows: Sequence[Row], times: dict[tuple[str, int], TrainingTime]) -> list[CostedRow]:
    alone = {row.recipe: row for row in rows if row.workers == 1}
    found = []
    for row in rows:
        one, time = alone.get(row.recipe), times[row.recipe, row.workers]
        scaling = None
        if one is not None:
            reached = (one.samples_to_target, row.samples_to_target)
            scaling = compare(times[row.recipe, 1], time, reached=reached, dice=(one.dice, row.dice))
        found.append(CostedRow(row=row, time=time, scaling=scaling))
    return found


def _network(config: Config) -> tuple[Interconnect, list[str]]:
    """The interconnect of the config, and what a reader must know of it."""
    scale = config.scale
    if scale.measure:
        from voxelscale.scale.measure import measure_link

        between = measure_link(2)
    else:
        between = parse_link(scale.interconnect)
    compression = 0.5 if config.train.compress == "bf16" else 1.0
    notes = [_in_words(between)]
    if scale.node_devices == 1:
        return Interconnect(within=between, compression=compression), notes
    within = parse_link(scale.node_link)
    notes.append(f"within a node of {scale.node_devices}: {_in_words(within)}")
    network = Interconnect(
        within=within, between=between, per_node=scale.node_devices, compression=compression
    )
    return network, notes


def _in_words(link: Link) -> str:
    alpha, beta = 1e6 * link.alpha_seconds, link.beta_bytes_per_second / 1e9
    return f"interconnect {link.name}: alpha {alpha:.1f} us, beta {beta:.2f} GB/s ({link.source})"


def _time(trial: Trial, store: Store, network: Interconnect, out: Path) -> TrainingTime:
    """The modelled time of a trial; its step is measured once for all numbers of workers."""
    from voxelscale.scale.measure import budget_of

    config = trial.config
    alone = replace(config, train=replace(config.train, ranks=1, virtual_workers=1))
    budget = replace(budget_of(alone, store), updates=trial.updates)
    return training_time(_step(alone, store, out), network, trial.workers, budget)


def _step(config: Config, store: Store, out: Path) -> StepCost:
    tree = with_first_names(to_dict(config))
    # What a step costs does not depend on rates and schedules.
    what = {key: tree[key] for key in ("data", "augment", "model", "loss")}
    what["optim"] = tree["optim"]["name"]
    how = ("batch_size", "precision", "channels_last", "compile", "deterministic")
    what["train"] = [tree["train"].get(key) for key in how]
    path = out / "steps" / f"{digest_of(what)[:8]}.json"
    from voxelscale.scale.measure import measure_step, step_from_dict

    if path.is_file():
        return step_from_dict(json.loads(path.read_text(encoding="utf-8")))
    notice("scale: timing one worker's step")
    step = measure_step(config, store)
    write_atomic(path, json.dumps(asdict(step)))
    return step


def _check(config: Config, store: Store, out: Path) -> dict[str, Any]:
    """The model's prediction for two real ranks on this machine, and what they take."""
    path = out / "model_check.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    from voxelscale.scale.measure import describe, validate_model

    notice("scale: checking the time model against two real ranks")
    try:
        found: ModelCheck = validate_model(config, store)
    except VoxelscaleError as error:
        # The study does not depend on it; it is tried again the next time.
        return {"lines": [f"the time model was not checked: {error.message}; {error.hint}"]}
    facts = {
        "predicted_seconds": found.predicted.total,
        "measured_seconds": found.measured,
        "error_percent": found.error_percent,
        "lines": describe(found).splitlines(),
    }
    write_atomic(path, json.dumps(facts, indent=1))
    return facts


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1
