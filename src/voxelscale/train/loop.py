"""Training a U-Net on a store of scans: what `voxelscale train` does in every rank."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxelscale import __version__
from voxelscale.channels import ONE_CT
from voxelscale.config import Config
from voxelscale.console import count, notice
from voxelscale.device import Arithmetic, choose_precision
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.build import build_loss
from voxelscale.model.bundle import Bundle, write_bundle
from voxelscale.ranks.workers import Workers, join
from voxelscale.samples.batch import (
    Normalisation,
    Normalisations,
    ct_normalisations,
    make_batch,
    normalisations,
)
from voxelscale.samples.patches import PatchSource, Sample
from voxelscale.store import Store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.arithmetic import Trial, Wanted, choose_arithmetic
from voxelscale.train.engine import Engine, Result
from voxelscale.train.locks import alone_in
from voxelscale.train.log import note_out_of_memory
from voxelscale.train.memory import TooLarge, ran_out, require_memory, untrained
from voxelscale.train.pretrained import begin_from
from voxelscale.train.recipes import resolve
from voxelscale.train.task import Task
from voxelscale.train.validate import ScanScoring
from voxelscale.train.validation_cases import validation_cases, warn_of_validation


def train(config: Config, store_path: Path, run: Path) -> Result:
    """Train this rank's share until the budget of samples is spent or a stop is requested.

    Called in every rank; `voxelscale.train.launch` starts them.

    Args:
        config: the same in all ranks.
        store_path: what `prepare` wrote.
        run: the run's folder; if it holds checkpoints the training resumes from the newest.

    Raises:
        VoxelscaleError: the store, a checkpoint or the config is unfit, or the loss is not finite.
    """
    with (
        joined(config, config.model.norm == "sync_batch") as (workers, config, batch_size),
        alone_in(run) if workers.rank == 0 else nullcontext(),
        stop_signals(announce=workers.ranks == 1) as asked,
    ):
        store = open_fold(store_path, config.data.fold)
        config.predict.check_classes(store.classes.names)
        if workers.rank == 0:
            warn_of_validation(store, config)
        with _memory_errors(config, run, workers.device):
            check_memory(config, store, workers)
            settled = settle_arithmetic(config, store, run, workers)
            task = patch_task(settled, store, workers.device)
            task = replace(task, pretrained=begin_from(task.model, config, store, run, workers))
            # What the model is kept with must not tie it to this device's arithmetic.
            task = replace(task, keep=partial(_write_bundle, run / "model.vxs", config, store))
            engine = Engine(task, settled, run, workers, batch_size)
        return engine.go(asked)


@contextmanager
def joined(config: Config, whole: bool) -> Iterator[tuple[Workers, Config, int]]:
    """Take part in the training: who does, the config with its recipe applied, and a worker's batch.

    Args:
        config: of the run.
        whole: whether batch norm's statistics are the global batch's.

    Raises:
        VoxelscaleError: the config's parts do not go together.
    """
    virtual, batch_size = config.train.virtual_workers, config.train.batch_size
    with join(virtual, config.train.threads) as workers:
        config, words = resolve(config, workers.world)
        if workers.rank == 0 and words:
            notice(words)
        if whole and virtual > 1 and config.optim.grow_from:
            raise VoxelscaleError(
                "config: a growing global batch cannot be emulated by virtual workers with sync_batch",
                "set optim.grow_from=0, model.norm=batch or train.virtual_workers=1",
            )
        if whole:
            # A rank's virtual workers must be seen at once.
            workers, batch_size = replace(workers, virtual=1), batch_size * virtual
        yield workers, config, batch_size


def check_memory(config: Config, store: Store, workers: Workers) -> None:
    """Refuse a training that will not fit, before anything large is made; rank 0 looks for all.

    Raises:
        TooLarge: naming batch, patch, and the memory needed and available.
    """
    if workers.rank:
        return
    sharers = 1 if workers.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    require_memory(
        config,
        store.spacing,
        workers.device,
        sharers=sharers,
        channels=len(store.channels),
        classes=store.classes,
    )


@contextmanager
def _memory_errors(config: Config, run: Path, device: torch.device) -> Iterator[None]:
    """Within it too little memory is noted in the run, as the engine does, and raised as one error."""
    try:
        yield
    except (TooLarge, torch.OutOfMemoryError) as error:
        note_out_of_memory(run)
        raise (error if isinstance(error, TooLarge) else ran_out(config, device)) from None


def settle_arithmetic(config: Config, store: Store, run: Path, workers: Workers) -> Config:
    """The config with precision, memory format, compiling and CUDA graph decided, as the run began.

    Rank 0 decides by trial (`trial_arithmetic`) and notes it in ``arithmetic.json``: a resumed run must
    compute as it began.
    """
    found: list[dict[str, Any]] = [{}]
    if workers.rank == 0:
        path = run / "arithmetic.json"
        if path.is_file():
            way = Arithmetic.from_dict(json.loads(path.read_text(encoding="utf-8")))
        else:
            way = trial_arithmetic(config, store, workers.device, workers.ranks)
            write_atomic(path, json.dumps(way.to_dict()))
        found = [way.to_dict()]
    if workers.ranks > 1:
        dist.broadcast_object_list(found, src=0)
    return with_arithmetic(config, Arithmetic.from_dict(found[0]))


def trial_arithmetic(config: Config, store: Store, device: torch.device, ranks: int = 1) -> Arithmetic:
    """What a new training of `config` on this device would compute with; some steps, if it must be tried.

    Args:
        ranks: of the training. A CUDA graph holds no communication, so it is for one.
    """
    wanted = config.train
    trial = Trial(
        make_model=partial(_network, config, store),
        loss=build_loss(config.loss, store.classes),
        # On CPUs one sample is as informative, in half the time or less.
        shape=(
            wanted.batch_size if device.type == "cuda" else 1,
            len(store.channels),
            *config.data.patch_size,
        ),
        device=device,
        optim=config.optim,
    )
    return choose_arithmetic(
        trial,
        Wanted(
            precision=wanted.precision,
            channels_last=wanted.formatted if device.type == "cpu" else wanted.channels_last,
            compile=wanted.compile,
            graph=wanted.cuda_graph if ranks == 1 else False,
            deterministic=wanted.deterministic,
        ),
    )


def with_arithmetic(config: Config, way: Arithmetic) -> Config:
    """The config with what a trial has found in place of what it left open."""
    precision: Literal["fp32", "bf16"] = "bf16" if way.dtype == torch.bfloat16 else "fp32"
    train = replace(
        config.train,
        precision=precision,
        channels_last=way.channels_last,
        compile=way.compile,
        cuda_graph=way.graph,
        deterministic=way.deterministic,
    )
    return replace(config, train=train)


def patch_task(config: Config, store: Store, device: torch.device) -> Task:
    """The config's network, on patches of a store's training scans, validated on its validation scans."""
    normalise = normalisations(store)
    torch.manual_seed(config.train.seed)
    validated = validation_cases(store, config)
    source = PatchSource(store, config.data, config.augment, config.train.seed, config.model.dims)
    return Task(
        model=_network(config, store).to(device),
        loss=build_loss(config.loss, store.classes),
        source=source,
        collate=partial(_collate, config=config, normalise=normalise, device=device),
        describe=lambda sample: f"sample {sample.index} ({sample.case})",
        digest=store.fingerprint["digest"],
        about=_about(config, store, len(source.cases), len(validated)),
        too_large=partial(ran_out, config, device),
        scoring=ScanScoring(
            store=store,
            cases=validated,
            config=config,
            normalise=normalise,
            device=device,
            precision=choose_precision(config.train.precision, device),
        ),
    )


def _about(config: Config, store: Store, trained: int, validated: int) -> str:
    cases = f"{count(trained, 'case')} to train on, {validated} to validate on"
    patch, spacing = config.data.patch_size, (f"{step:.3g}" for step in store.spacing)
    return f"{cases}; patches of {' x '.join(map(str, patch))} voxels of {' x '.join(spacing)} mm (z, y, x)"


def _network(config: Config, store: Store) -> nn.Module:
    return untrained(config, store.spacing, len(store.channels), store.classes)


def _collate(
    samples: Sequence[Sample], config: Config, normalise: Normalisations, device: torch.device
) -> tuple[Tensor, Tensor]:
    image, mask = make_batch(samples, config.data.patch_size, normalise, device)
    if config.train.formatted:
        image = image.contiguous(memory_format=torch.channels_last_3d)
    return image, mask


def _write_bundle(
    path: Path, config: Config, store: Store, model: nn.Module, facts: dict[str, Any]
) -> None:
    # A model goes to others: they need not know paths and servers of this machine.
    begun = Path(config.train.start_from).name
    bundle = Bundle(
        config=replace(config, train=replace(config.train, start_from=begun, track=(), track_to="")),
        weights=model.state_dict(),
        spacing=store.spacing,
        normalisation=Normalisation.of_fingerprint(store.fingerprint["lesion_hu"]),
        classes=store.classes,
        channels=store.channels,
        normalisations=() if store.channels == ONE_CT else ct_normalisations(store),
        trained={
            **facts,
            "voxelscale": __version__,
            "data": store.fingerprint["digest"],
            "data_set": store.kept_by_model,
        },
    )
    write_bundle(path, bundle)


@contextmanager
def stop_signals(announce: bool = True) -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM only set a flag; a second one stops at once.

    In other threads than the main one, which Python gives no signals, nothing is changed.

    Args:
        announce: whether to print that; one of several ranks gets SIGTERM also for a restart.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if announce:
            notice("\nstopping after this step; once more to stop at once")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
