"""Measuring what the time model needs: one worker's step, the link, and how well the model predicts.

Ranks are real processes under torchrun, which run this module again.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxelscale.config import Config, dump, load_stored
from voxelscale.device import autocast, choose_precision, default_device, policy, to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Training, TrainOnce, train_once
from voxelscale.model.norm import SyncBatchNorm
from voxelscale.ranks.workers import Workers, data_parallel, join
from voxelscale.samples.patches import read_ahead, worker_indices
from voxelscale.scale.cost import (
    Budget,
    Interconnect,
    StepCost,
    UpdateTime,
    hidden_share,
    update_time,
)
from voxelscale.scale.links import Link, fit_link
from voxelscale.store import Store
from voxelscale.store.fingerprint import open_fold
from voxelscale.train.loop import patch_task, trial_arithmetic, with_arithmetic
from voxelscale.train.optim import make_optimizer
from voxelscale.train.validation_cases import validation_cases

SIZES = tuple(4**power for power in range(1, 14))
"""Bytes of the all-reduces that `measure_link` times: 4 to 64 MiB."""

ROUNDS = 32
"""Micro-batches whose passes are timed: what varies among them makes workers wait for each other."""

DRAWS = 64
"""Micro-batches whose making is timed: expensive augmentations are rare, so that a few would miss them."""

_ALONE = Interconnect(within=Link(name="", alpha_seconds=0, beta_bytes_per_second=math.inf, source=""))
"""One worker's, who has nobody to talk to."""

Mark = Any
"""A point in time: seconds on the CPU, an event on a GPU."""


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """The time model against two real ranks.

    Attributes:
        predicted: of one update, from both ranks' steps without communication and the measured link.
        measured: seconds of one update of both ranks.
        error_percent: 100 (predicted - measured) / measured.
        alone: seconds of one update's arithmetic where only one rank works. What both together take
            longer is the machine's (memory, caches, clock) and no communication.
        together: the same while both work.
        link: measured between the two.
        hidden: `Interconnect.hidden`, with which it was predicted.
    """

    predicted: UpdateTime
    measured: float
    error_percent: float
    alone: float
    together: float
    link: Link
    hidden: float


def measure_step(
    config: Config, store: Store, *, rounds: int = ROUNDS, threads: int = 1, validation: bool = True
) -> StepCost:
    """Time one worker's step with the training's own functions; medians over `rounds` micro-batches.

    Args:
        config: of the training; the micro-batch has ``train.batch_size`` samples.
        rounds: micro-batches, after three to warm up.
        threads: CPU threads of the worker, as many as it will have.
        validation: whether to time the validation of one scan, which may take longer than the rest.
    """
    device = default_device()
    with _threads(threads), policy(device, config.train.deterministic):
        worker = _Worker(_settled(config, store, device), store, device)
        step = _step_cost(worker, worker.rounds(rounds))
        return replace(
            step,
            batch_seconds=worker.making_seconds(DRAWS),
            case_seconds=worker.case_seconds() if validation else 0.0,
        )


def measure_start(config: Config, store: Store, step: StepCost, *, train: TrainOnce = train_once) -> float:
    """Seconds of a training beside its updates and validations, from a whole one of a single update.

    It is started as every training of a study is: a process of its own, which imports, opens the store,
    tries and settles its arithmetic, compiles, makes its first update, validates one scan, and writes its
    last checkpoint and its bundle. The update and the scan, as `step` has them, are taken off.

    Raises:
        VoxelscaleError: it failed.
    """
    how = replace(
        config.train,
        samples=config.train.batch_size,
        ranks=1,
        virtual_workers=1,
        validate_every=0,
        validate_at=(),
        validate_cases=1,
    )
    optim = replace(config.optim, grow_from=0)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            config=replace(config, train=how, optim=optim),
            store=store.path,
            run=Path(folder, "run"),
            threads=1,
        )
        started = time.perf_counter()
        result = train(training, lambda: "go on")
        taken = time.perf_counter() - started
    if result.ending != "finished":
        raise result.fault or VoxelscaleError(
            f"a training of one update: {result.ending}", "train it alone"
        )
    return max(0.0, taken - update_time(step, _ALONE, 1).compute - step.case_seconds)


def measure_link(ranks: int = 2, *, sizes: Sequence[int] = SIZES, rounds: int = 9) -> Link:
    """Time all-reduces between `ranks` real ranks of this machine and fit alpha and beta.

    NCCL with one GPU a rank where there are GPUs, else Gloo with one thread a rank. ``residual`` says
    how well the line fits.

    Args:
        sizes: bytes, multiples of 4.

    Raises:
        VoxelscaleError: there are GPUs, but fewer than ranks; or the ranks failed.
    """
    facts = _run_ranks(ranks, "link", {"sizes": list(sizes), "rounds": rounds})
    return _fitted(ranks, facts)


def validate_model(config: Config, store: Store, *, rounds: int = 8) -> ModelCheck:
    """Predict an update of two ranks with one thread each, and run it.

    One job of two real ranks takes turns, round by round: one rank steps alone, both step without
    communicating, both train under DistributedDataParallel. Two ranks that keep step wait for the slower in
    every update, so all that varies in a step on this machine counts as straggling. ``sync_batch`` is timed
    as ``batch``, whose arithmetic is the same.

    Raises:
        VoxelscaleError: as `measure_link`.
    """
    if config.model.norm == "sync_batch":
        config = replace(config, model=replace(config.model, norm="batch"))
    config = _settled(config, store, default_device())
    facts = _run_ranks(
        2, "check", {"config": dump(config), "store": str(store.path.absolute()), "rounds": rounds}
    )
    step, link = step_from_dict(facts["step"]), _fitted(2, facts)
    hidden = config.scale.hidden
    if hidden is None:
        hidden = hidden_share(torch.cuda.is_available(), spare_cores=(os.cpu_count() or 1) - 2)
    predicted = update_time(step, Interconnect(within=link, hidden=hidden), workers=2)
    return ModelCheck(
        hidden=hidden,
        predicted=predicted,
        measured=facts["measured"],
        error_percent=100 * (predicted.total / facts["measured"] - 1),
        alone=facts["alone"],
        together=facts["together"],
        link=link,
    )


def describe(check: ModelCheck) -> str:
    """What a person reads of it, two lines."""
    p, link = check.predicted, check.link
    parts = f"compute {1e3 * p.compute:.1f}, waiting for the slower {1e3 * p.straggling:.1f}, "
    parts += f"exposed communication {1e3 * p.exposed:.1f}, input {1e3 * p.input_wait:.1f}"
    fit = f"alpha {1e6 * link.alpha_seconds:.0f} us, beta {link.beta_bytes_per_second / 1e9:.2f} GB/s"
    hidden = f"{100 * check.hidden:.0f} % of communication and reading taken to run beside the arithmetic"
    return (
        f"2 real ranks: {1e3 * p.total:.1f} ms an update predicted ({parts}), "
        f"{1e3 * check.measured:.1f} ms measured: {check.error_percent:+.1f} %; {hidden}\n"
        f"link: {fit}, residual {100 * link.residual:.0f} %; one rank alone {1e3 * check.alone:.1f} ms, "
        f"both without communication {1e3 * check.together:.1f} ms"
    )


def _settled(config: Config, store: Store, device: torch.device) -> Config:
    """With the arithmetic that a training on several ranks would choose here."""
    return with_arithmetic(config, trial_arithmetic(config, store, device, ranks=2))


def budget_of(config: Config, store: Store) -> Budget:
    """What `config` asks of a training on `store`."""
    train = config.train
    every, end = train.validate_every, train.samples
    marks = {
        *(range(every, end, every) if every else ()),
        *(m for m in train.validate_at if 0 < m < end),
        end,
    }
    return Budget(
        samples=train.samples,
        batch_size=train.batch_size,
        micro_batches=train.virtual_workers,
        validations=len(marks),
        cases=len(validation_cases(store, config)),
    )


def step_from_dict(tree: dict[str, Any]) -> StepCost:
    """The StepCost whose ``dataclasses.asdict`` went through JSON."""
    lists = {
        "batch_seconds": tuple(tree["batch_seconds"]),
        "jitter_seconds": tuple(tree["jitter_seconds"]),
        "gradients": tuple((share, size) for share, size in tree["gradients"]),
        "blocking_bytes": tuple(tree["blocking_bytes"]),
    }
    return StepCost(**{**tree, **lists})


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Seconds of one update's parts; `ready`: of each parameter, its share of the backward pass."""

    batch: float
    forward: float
    backward: float
    update: float
    ready: dict[int, float]

    @property
    def total(self) -> float:
        return self.batch + self.forward + self.backward + self.update


class _Worker:
    """One worker's network, data and optimiser, as the training has them."""

    def __init__(self, config: Config, store: Store, device: torch.device, rank: int = 0) -> None:
        self.config, self.device, self.rank = config, device, rank
        self.precision = choose_precision(config.train.precision, device)
        self.task = patch_task(config, store, device)
        self.cases = len(validation_cases(store, config))
        self.model = to_channels_last(self.task.model) if config.train.formatted else self.task.model
        if config.train.compile:
            self.model.compile()
        self.optimizer = make_optimizer(self.model, config.optim)
        self._read = 0

    def batches(self, count: int) -> Iterator[list[Any]]:
        """The next micro-batches, read ahead as in training."""
        first, size = self._read, self.config.train.batch_size
        self._read += count
        indices = [
            worker_indices(step * 2 * size, self.rank, 2, size) for step in range(first, first + count)
        ]
        return read_ahead(self.task.source, indices, self.config.data.readers, self.config.data.prefetch)

    def update(self, net: nn.Module, samples: Sequence[Any]) -> _Parts:
        """One update on one micro-batch, its parts timed."""
        device, clip = self.device, self.config.optim.gradient_clipping
        marks = [_mark(device)]
        image, mask = self.task.collate(samples)
        marks.append(_mark(device))
        with autocast(device, self.precision):
            logits = net(image)
        loss, *_ = self.task.loss(logits, mask)
        marks.append(_mark(device))
        with _gradient_marks(self.model, device) as ready:
            loss.backward()
        marks.append(_mark(device))
        if clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(_mark(device))
        batch, forward, backward, update = (_between(a, b) for a, b in itertools.pairwise(marks))
        shares = {number: _between(marks[2], mark) / backward for number, mark in ready.items()}
        return _Parts(batch=batch, forward=forward, backward=backward, update=update, ready=shares)

    def rounds(self, count: int, warm: int = 3) -> list[_Parts]:
        """`count` updates after `warm` others."""
        return [self.update(self.model, samples) for samples in list(self.batches(warm + count))][warm:]

    def reading_seconds(self, count: int = 12) -> float:
        """Reading a micro-batch, when nothing else is done."""
        started = time.perf_counter()
        for _ in self.batches(count):
            pass
        return (time.perf_counter() - started) / count

    def making_seconds(self, count: int) -> tuple[float, ...]:
        """Making the network's input, for each of several micro-batches."""
        taken = []
        for samples in self.batches(count):
            # The minimum of three: the draws are the same each time, other load on the machine is not.
            taken.append(min(self._making_seconds(samples) for _ in range(3)))
        return tuple(taken)

    def _making_seconds(self, samples: Sequence[Any]) -> float:
        started = _mark(self.device)
        self.task.collate(samples)
        return _between(started, _mark(self.device))

    def case_seconds(self) -> float:
        """Validating one scan."""
        if self.task.scoring is None:
            return 0.0
        cases = self.cases
        started = time.perf_counter()
        # The last of so many ranks has one scan.
        self.task.scoring.score(copy.deepcopy(self.model).eval(), cases - 1, cases)
        return time.perf_counter() - started


def _step_cost(worker: _Worker, parts: Sequence[_Parts]) -> StepCost:
    sizes = {n: p.numel() * p.element_size() for n, p in enumerate(worker.model.parameters())}
    shares = {n: statistics.median(part.ready[n] for part in parts) for n in parts[0].ready}
    last = max(shares.values())  # the pass ends with its last gradient, but for bookkeeping
    norms = [m for m in worker.model.modules() if isinstance(m, SyncBatchNorm)]
    forward = statistics.median(part.forward for part in parts)
    backward = statistics.median(part.backward for part in parts)
    return StepCost(
        forward_seconds=forward,
        backward_seconds=backward,
        update_seconds=statistics.median(part.update for part in parts),
        input_seconds=worker.reading_seconds(),
        batch_seconds=tuple(part.batch for part in parts),
        jitter_seconds=tuple(part.forward + part.backward - forward - backward for part in parts),
        gradients=tuple(sorted((share / last, sizes[n]) for n, share in shares.items())),
        # Once in the forward and once in the backward pass.
        blocking_bytes=tuple(4 * (2 * m.num_features + 1) for m in norms for _ in range(2)),
    )


def _mark(device: torch.device) -> Mark:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def _gradient_marks(model: nn.Module, device: torch.device) -> Iterator[dict[int, Mark]]:
    """Filled, within it, with the time at which each parameter's gradient was there."""
    marks: dict[int, Mark] = {}

    def hook(number: int) -> Callable[[Tensor], None]:
        return lambda _: marks.__setitem__(number, _mark(device))

    handles = [
        p.register_post_accumulate_grad_hook(hook(number))  # type: ignore[no-untyped-call]
        for number, p in enumerate(model.parameters())
        if p.requires_grad
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fitted(ranks: int, facts: dict[str, Any]) -> Link:
    name = f"measured, {ranks} {facts['backend']} ranks"
    source = f"all-reduces of {min(facts['sizes'])} to {max(facts['sizes'])} bytes timed on this machine"
    return fit_link(name, ranks, facts["sizes"], facts["seconds"], source)


def _run_ranks(ranks: int, role: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run this module in `ranks` ranks of torchrun; what rank 0 found."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        problem = f"{ranks} ranks need as many GPUs; here {torch.cuda.device_count()}"
        raise VoxelscaleError(problem, "hide the GPUs (CUDA_VISIBLE_DEVICES=) to use Gloo")
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "task.json"), Path(folder, "found.json")
        asked.write_text(json.dumps(task))
        engine = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"]
        engine += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command = [*engine, "-m", "voxelscale.scale.measure", role, str(asked), str(found)]
        process = subprocess.Popen(command, env=environment)
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # the engine ends its ranks
            process.wait()
            raise
        if code != 0:
            raise VoxelscaleError(f"{ranks} ranks could not be measured", "see the error above")
        result: dict[str, Any] = json.loads(found.read_text())
        return result


def _link_rank(workers: Workers, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Median seconds of an all-reduce of each size, the sizes taking turns."""
    tensors = [torch.zeros(size // 4, device=workers.device) for size in sizes]
    times: list[list[float]] = [[] for _ in sizes]
    for turn in range(rounds + 1):
        for number, tensor in enumerate(tensors):
            repeats = max(1, min(20, 2**20 // sizes[number]))
            dist.barrier()
            started = _mark(workers.device)
            for _ in range(repeats):
                dist.all_reduce(tensor)
            seconds = _between(started, _mark(workers.device)) / repeats
            if turn:  # the first warms up
                times[number].append(seconds)
    # The minimum: other load on the machine only ever adds.
    fastest = [min(t) for t in times]
    return {"backend": dist.get_backend(), "sizes": list(sizes), "seconds": fastest}


def _check_rank(workers: Workers, config: Config, store: Store, rounds: int) -> dict[str, Any]:
    """Steps alone, together and under DistributedDataParallel, in turns; and the link."""
    worker = _Worker(config, store, workers.device, workers.rank)
    net = data_parallel(worker.model, workers)
    for samples in worker.batches(4):  # DDP settles its buckets in the second step
        worker.update(net, samples)
    alone: list[float] = []
    together: list[_Parts] = []
    trained: list[float] = []
    for _ in range(rounds):
        dist.barrier()
        if workers.rank == 0:
            alone += [part.total for part in worker.rounds(2, warm=1)]
        dist.barrier()
        together += worker.rounds(2, warm=1)
        dist.barrier()
        trained.append(_seconds_an_update(worker, net, 5))
    facts = _link_rank(workers, SIZES, rounds=5)
    dist.barrier()
    return {
        **facts,
        "step": asdict(_step_cost(worker, together)),
        "alone": statistics.mean(alone) if alone else 0.0,
        "together": statistics.mean(part.total for part in together),
        "measured": statistics.mean(trained),
    }


def _seconds_an_update(worker: _Worker, net: nn.Module, count: int) -> float:
    """The mean over `count` updates that follow one another, reading included."""
    started = 0.0
    for number, samples in enumerate(worker.batches(count + 1)):
        if number == 1:  # the first had to wait for its samples
            started = time.perf_counter()
        worker.update(net, samples)
    return (time.perf_counter() - started) / count


def _main(role: str, asked: Path, found: Path) -> None:
    task = json.loads(asked.read_text())
    with join(1, 1) as workers:
        if role == "link":
            facts = _link_rank(workers, task["sizes"], task["rounds"])
        else:
            settings = asked.with_name(f"config_{workers.rank}.yaml")
            settings.write_text(task["config"])
            asked_for = load_stored(settings)
            store = open_fold(Path(task["store"]), asked_for.data.fold)
            with policy(workers.device, asked_for.train.deterministic):
                facts = _check_rank(workers, asked_for, store, task["rounds"])
        if workers.rank == 0:
            found.write_text(json.dumps(facts))
        dist.barrier()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
