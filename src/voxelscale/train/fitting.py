"""Anyone's network, loss and samples through the training engine: `voxelscale.train.fit`."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from voxelscale import __version__
from voxelscale.config import Config
from voxelscale.console import notice
from voxelscale.device import upload
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_sealed
from voxelscale.model.bundle import load_untrusted
from voxelscale.model.norm import SyncBatchNorm
from voxelscale.ranks.faults import restarts
from voxelscale.ranks.place import fill
from voxelscale.ranks.workers import Workers
from voxelscale.samples.order import item_of
from voxelscale.samples.patches import Source
from voxelscale.train.engine import Engine, Result
from voxelscale.train.launch import claim, kept_config
from voxelscale.train.locks import alone_in
from voxelscale.train.log import STOP_FILE
from voxelscale.train.loop import joined, stop_signals
from voxelscale.train.snapshot import recalibrate, snapshot
from voxelscale.train.task import Table, Task

WEIGHTS = "weights.vxs"
"""The best model's weights in a run's folder."""

FORMAT = 1


def fit(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    samples: Source[Any],
    config: Config,
    *,
    run: Path | str | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    collate: Callable[[Sequence[Any]], tuple[Any, Any]] | None = None,
) -> Result:
    """Train any network, data-parallel, on ``config.train.samples`` samples and what the recipe adds.

    ``python script.py`` trains on one device, ``torchrun --nproc-per-node N script.py`` on N;
    ``config.train.virtual_workers`` makes each process emulate several workers. All of them see the same
    samples in the same step. Of the config `optim`, `train`, `data.readers` and `data.prefetch` are used.

    A scaling study or a search needs a function from a config to a score, and `fit` makes it one line::

        def train_one(config: Config) -> float:
            return fit(make_model(), loss, samples, config, validate=dice).best

    Args:
        model: moved to the training device, trained in place in the modes (train or eval) its modules
            are in. Every rank starts from rank 0's weights. Afterwards it holds the trained weights, the
            averaged ones with their own batch statistics where ``optim.ema`` is set.
        loss: output, in float32, and target to a scalar, the mean over the micro-batch. A `Module` is
            moved to the device, too.
        samples: ``samples[i]`` is a pair (input, target) of arrays, tensors or nested tuples and
            dictionaries of them; called from ``data.readers`` threads at once. With a length n, each
            item is seen once every n samples, in a new order each time. Without one, i runs from 0 to
            the budget, for sources that draw sample i from a generator seeded with i. Either way it must
            be a pure function of i, or runs are not repeatable.
        config: the same in all ranks.
        run: folder for checkpoints, log and the best weights (``weights.vxs``, see `load_weights`); a run
            started there is resumed. None: nothing is written.
        validate: the score, greater is better, of a copy of the model in evaluation mode; run by rank 0
            in a thread beside the training, so it must not talk to other ranks.
        collate: what ``samples`` gives, for a micro-batch, to its input and target on the CPU; None:
            PyTorch's own, which stacks.

    Returns:
        How it ended; ``finished=False`` after Ctrl-C, SIGTERM or a file ``stop`` in the run's folder, all
        of which save first.

    Raises:
        VoxelscaleError: the run's folder, a checkpoint, the samples or the config is unfit, another
            training is in the folder, or the loss is not finite.
    """
    folder = None if run is None else Path(run)
    _check_ranks(config)
    _check_weights(config)
    source = _Samples(samples, _count(samples), config.train.seed)
    whole = any(isinstance(module, SyncBatchNorm | nn.SyncBatchNorm) for module in model.modules())
    with kept_config(folder):
        if folder is not None:
            claim(folder, config)
        with (
            joined(config, whole) as (workers, config, batch_size),
            _taken(folder) if workers.rank == 0 else nullcontext(),
            stop_signals() as asked,
        ):
            devices = [workers.device] if workers.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # the engine seeds random layers
                task = _task(model, loss, source, config, workers.device, folder, validate, collate)
                _same_start(model, workers)
                engine = Engine(task, config, folder, workers, batch_size)
                result = engine.go(asked)
                _take_over(model, engine)
            if folder is not None and validate is None and workers.rank == 0:
                _write_weights(folder / WEIGHTS, model, {"samples": result.seen})
    return result


@contextmanager
def _taken(folder: Path | None) -> Iterator[None]:
    """Within it no other training is in the folder; what an earlier one was asked is forgotten."""
    if folder is None:
        yield
        return
    with alone_in(folder):
        if not restarts():
            (folder / STOP_FILE).unlink(missing_ok=True)
        yield


def _check_weights(config: Config) -> None:
    """Raise a VoxelscaleError where the config asks for weights, which only `voxelscale train` reads."""
    hint = "load weights into the model before, and freeze parameters by requires_grad_(False)"
    if config.train.start_from:
        raise VoxelscaleError("fit: train.start_from is for voxelscale train only", hint)
    if config.optim.pretrained_lr != 1:
        raise VoxelscaleError("fit: optim.pretrained_lr is for voxelscale train only", hint)


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """The best model's ``state_dict`` of a run's folder (or of a ``weights.vxs``), on the CPU.

    Nothing from the file is executed, whoever wrote it.

    Raises:
        VoxelscaleError: there is none, or it is damaged or of another kind.
    """
    path = Path(path)
    content = load_untrusted(path / WEIGHTS if path.is_dir() else path)
    if content.get("format") != FORMAT or not isinstance(content.get("weights"), dict):
        raise VoxelscaleError(f"{path}: holds no weights of this version", f"name a run or a {WEIGHTS}")
    weights: dict[str, Tensor] = content["weights"]
    return weights


@dataclass(frozen=True)
class _Drawn:
    """What the source gave for a global index, and under which of its own numbers."""

    index: int
    item: int
    content: Any


@dataclass(frozen=True)
class _Samples:
    """Samples by global index: shuffled where they are `count` items, as they are where that is None."""

    items: Source[Any]
    count: int | None
    seed: int

    def __getitem__(self, index: int) -> _Drawn:
        item = index if self.count is None else item_of(index, self.count, self.seed)
        return _Drawn(index, item, self.items[item])


@dataclass(frozen=True)
class _Score:
    """A user's function as the validation score; rank 0 alone calls it."""

    validate: Callable[[nn.Module], float]
    metric: str = "score"

    def score(self, model: nn.Module, rank: int, ranks: int) -> Table:
        """One row, one number."""
        if rank != 0:
            return [[0.0]]
        with torch.no_grad():
            value = float(self.validate(model))
        return [[-math.inf if math.isnan(value) else value]]

    def summary(self, table: Table) -> dict[str, float]:
        """That number."""
        return {self.metric: table[0][0]}


def _check_ranks(config: Config) -> None:
    fill()
    if "RANK" in os.environ:
        return
    command = "torchrun --nproc-per-node"
    if config.train.ranks > 1:
        hint = f"start the script with {command} {config.train.ranks}"
        raise VoxelscaleError(f"train.ranks is {config.train.ranks}, but this is one process", hint)
    if torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        notice(f"training on one of {count} GPUs; on all of them with {command} {count}")


def _count(samples: Any) -> int | None:
    """How many items there are, None where they have no end."""
    if isinstance(samples, IterableDataset) or not hasattr(samples, "__getitem__"):
        hint = "give an object with samples[i], as a list or a map-style Dataset"
        raise VoxelscaleError(f"samples: a {type(samples).__name__} has no samples by number", hint)
    try:
        count = len(samples)
    except TypeError:
        return None
    if count == 0:
        raise VoxelscaleError("samples: there are none", "check where they are read from")
    return count


def _task(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    source: _Samples,
    config: Config,
    device: torch.device,
    run: Path | None,
    validate: Callable[[nn.Module], float] | None,
    collate: Callable[[Sequence[Any]], tuple[Any, Any]] | None,
) -> Task:
    if isinstance(loss, nn.Module):
        loss.to(device)
    place = partial(_placed, device=device, channels_last=config.train.formatted)
    return Task(
        model=model.to(device),
        loss=lambda output, target: loss(_mapped(output, _as_float32), target),
        source=source,
        collate=partial(_collated, collate=collate or _stacked, place=place),
        describe=lambda one: f"sample {one.index}" + f" (item {one.item})" * (source.count is not None),
        digest="" if source.count is None else f"{source.count} items",
        scoring=_Score(validate) if validate else None,
        keep=partial(_write_weights, run / WEIGHTS) if run else None,
    )


def _same_start(model: nn.Module, workers: Workers) -> None:
    """Rank 0's weights and statistics in every rank, however each came to its own."""
    if workers.ranks > 1:
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def _take_over(model: nn.Module, engine: Engine) -> None:
    """Put what the training would keep now into the user's model."""
    train, task = engine.config.train, engine.task
    kept = snapshot(engine.trained, engine.workers)
    samples = train.recalibrate
    recalibrate(kept, task.source, task.collate, samples, engine.precision)
    model.load_state_dict(kept.state_dict())


def _write_weights(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(
        {"format": FORMAT, "weights": weights, "trained": facts | {"voxelscale": __version__}}, buffer
    )
    write_sealed(path, buffer.getvalue())


def _stacked(contents: Sequence[Any]) -> tuple[Any, Any]:
    for content in contents:
        if not (isinstance(content, tuple | list) and len(content) == 2):
            hint = "let samples[i] return (input, target), or give fit a collate of your own"
            raise VoxelscaleError(f"samples: a sample is a {type(content).__name__}, not a pair", hint)
    inputs, target = default_collate(list(contents))
    return inputs, target


def _collated(
    batch: Sequence[_Drawn],
    collate: Callable[[Sequence[Any]], tuple[Any, Any]],
    place: Callable[[Tensor], Tensor],
) -> tuple[Any, Any]:
    inputs, target = collate([drawn.content for drawn in batch])
    return _mapped(inputs, place), _mapped(target, place)


def _placed(tensor: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    tensor = upload(tensor, device)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if channels_last and tensor.ndim in formats:
        return tensor.contiguous(memory_format=formats[tensor.ndim])
    return tensor


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples, lists and dictionaries with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(value, change) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree
