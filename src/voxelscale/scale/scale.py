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
from voxelscale.console import count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.shares import share_devices
from voxelscale.files import digest_of, write_atomic
from voxelscale.scale.advice import CostedRow, Prices
from voxelscale.scale.clusters import Cluster, cluster_of
from voxelscale.scale.cost import (
    MODEL,
    Interconnect,
    StepCost,
    TrainingTime,
    compare,
    hidden_share,
    training_time,
)
from voxelscale.scale.links import Link, parse_link
from voxelscale.scale.report import write_results
from voxelscale.scale.study import Row, Trial, claim, plan, run_study
from voxelscale.scale.trials import train_trial
from voxelscale.store import Store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.validation_cases import require_validation

if TYPE_CHECKING:
    from voxelscale.scale.measure import ModelCheck


def scale(config: Config, store_path: Path, out: Path) -> list[CostedRow]:
    """The whole study, into ``<out>/scaling.json``, ``.svg`` and ``.html``.

    Called again it keeps the trainings that are done, and the measurements.

    Raises:
        VoxelscaleError: a training failed, no validation scan has a lesion, the cluster or interconnect is
            unknown, or `out` holds a study of another config or store.
    """
    cluster = cluster_of(config.scale)
    network, notes = _network(config, cluster)
    store = open_fold(store_path, config.data.fold)
    require_validation(store, config)
    trials = plan(config)
    _check_emulation(trials)
    claim(config, out, str(store.fingerprint["digest"]))
    jobs = config.scale.jobs or _devices()
    train_one = partial(train_trial, store=store_path, shares=share_devices(jobs))
    # The parts of a step are timed first, while nothing else runs.
    kinds = {(trial.recipe, trial.workers): trial for trial in trials}  # whatever the seed
    times = {kind: _time(trial, store, network, out) for kind, trial in kinds.items()}
    check = _check(config, store, out)
    rows = run_study(config, out, train_one, jobs)
    findings = _findings(rows, times)
    prices = Prices(
        per_hour=config.scale.price_per_hour, watts=config.scale.watts, node_devices=cluster.devices
    )
    facts = {
        "notes": [*notes, *check["lines"]],
        "cluster": asdict(cluster),
        "machine": _machine(),
        "network": asdict(network),
        "model_check": check,
        "samples": config.train.samples,
        "config": to_dict(config),
    }
    write_results(findings, facts, out, config.scale.target, prices)
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


def _network(config: Config, cluster: Cluster) -> tuple[Interconnect, list[str]]:
    """The interconnect of the cluster, and what a reader must know of it."""
    if config.scale.measure:
        from voxelscale.scale.measure import measure_link

        between = measure_link(2)
    else:
        between = parse_link(cluster.between)
    within = parse_link(cluster.within)
    hidden, gpu = config.scale.hidden, _gpus() > 0
    all_rails = replace(between, beta_bytes_per_second=cluster.rails * between.beta_bytes_per_second)
    network = Interconnect(
        within=all_rails if cluster.devices == 1 else within,
        between=None if cluster.devices == 1 else between,
        per_node=cluster.devices,
        rails=cluster.rails,
        # As many workers as a node has places for, so that a processor has no core to spare.
        hidden=hidden_share(gpu) if hidden is None else hidden,
        compression=0.5 if config.train.compress == "bf16" else 1.0,
    )
    notes = [f"cluster: {cluster.title}; {cluster.source}", f"between nodes: {_in_words(between)}"]
    if cluster.devices > 1:
        notes.append(f"within a node of {cluster.devices}: {_in_words(within)}")
    if cluster.devices > 1 or cluster.rails > 1:
        notes.append(f"{cluster.rails} network adapter{'s' * (cluster.rails > 1)} a node")
    share = f"{100 * network.hidden:.0f} % of communication and reading runs beside the arithmetic"
    rule = f"the rule for a {'GPU' if gpu else 'processor whose cores all compute'}"
    return network, [*notes, f"{share} ({rule if hidden is None else 'scale.hidden'})"]


def _check_emulation(trials: Sequence[Trial]) -> None:
    """Raise a VoxelscaleError, before anything is trained, where workers cannot be emulated."""
    for trial in trials:
        model, optim, ranks = trial.config.model, trial.config.optim, trial.config.train.ranks
        real = max(ranks, _gpus(), 1)
        if model.norm == "sync_batch" and optim.grow_from and trial.workers > real:
            raise VoxelscaleError(
                f"scale: recipe {trial.recipe}: its growing batch cannot be emulated with sync_batch, and "
                f"there are {count(real, 'device')} for {count(trial.workers, 'worker')}",
                f"use scale.recipes=[unchanged], or {trial.recipe}:optim.grow_from=0",
            )


def _machine() -> str:
    """Where one worker's step was timed, in words."""
    import torch

    if _gpus():
        return f"this machine's {torch.cuda.get_device_name(0)}"
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may not have it
    # A step of bfloat16 takes 70 times as long where the processor emulates it.
    able = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if known.get(name)]
    processor = f"{known.get('cpu_name', 'processor')} ({', '.join(able)})"
    return f"one core of this machine's {processor}, not a device of the cluster"


def _in_words(link: Link) -> str:
    alpha, beta = 1e6 * link.alpha_seconds, link.beta_bytes_per_second / 1e9
    tree = f" (of a tree {1e6 * link.tree_alpha:.1f})" if link.tree_alpha != link.alpha_seconds else ""
    return f"link {link.name}: alpha {alpha:.1f} us{tree}, beta {beta:.2f} GB/s ({link.source})"


def _time(trial: Trial, store: Store, network: Interconnect, out: Path) -> TrainingTime:
    """The modelled time of a trial; its step is measured once for all numbers of workers."""
    from voxelscale.scale.measure import budget_of

    config = trial.config
    alone = replace(config, train=replace(config.train, ranks=1, virtual_workers=1))
    budget = replace(budget_of(alone, store), stages=trial.clock.stages)
    return training_time(_step(alone, store, out), network, trial.workers, budget)


def _step(config: Config, store: Store, out: Path) -> StepCost:
    tree = with_first_names(to_dict(config))
    # What a step costs does not depend on rates and schedules.
    what = {key: tree[key] for key in ("data", "augment", "model", "loss")}
    what["optim"] = tree["optim"]["name"]
    how = [
        *("batch_size", "precision", "channels_last", "compile", "deterministic"),
        *("checkpoint_activations", "cuda_graph"),
    ]
    what["device"] = _machine()
    what["train"] = [tree["train"].get(key) for key in how]
    what["model of time"] = MODEL
    path = out / "steps" / f"{digest_of(what)[:8]}.json"
    from voxelscale.scale.measure import measure_start, measure_step, step_from_dict

    if path.is_file():
        return step_from_dict(json.loads(path.read_text(encoding="utf-8")))
    notice("scale: timing one worker's step")
    step = measure_step(config, store)
    notice("scale: timing a training's start")
    step = replace(step, fixed_seconds=measure_start(config, store, step))
    write_atomic(path, json.dumps(asdict(step)))
    return step


def _check(config: Config, store: Store, out: Path) -> dict[str, Any]:
    """The model's prediction for two real ranks on this machine, and what they take."""
    path = out / "model_check.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (known.get("model"), known.get("device")) == (MODEL, _machine()):
            return known
    from voxelscale.scale.measure import describe, validate_model

    notice("scale: checking the time model against two real ranks")
    try:
        found: ModelCheck = validate_model(config, store)
    except VoxelscaleError as error:
        # The study does not depend on it; it is tried again the next time.
        return {"lines": [f"the time model was not checked: {error.message}; {error.hint}"]}
    facts = {
        "model": MODEL,
        "device": _machine(),
        "hidden": found.hidden,
        "predicted_seconds": found.predicted.total,
        "measured_seconds": found.measured,
        "error_percent": found.error_percent,
        "lines": describe(found).splitlines(),
    }
    write_atomic(path, json.dumps(facts, indent=1))
    return facts


def _devices() -> int:
    return _gpus() or os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())
