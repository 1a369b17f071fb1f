"""The training loop, told once.

A run is a folder; everything in it is written atomically or only appended to, so it can be killed at
any instant, and the same command goes on from the last checkpoint with the very next sample.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxelscale import __version__
from voxelscale.config import Config
from voxelscale.console import Progress, notice
from voxelscale.data.augment import Normalisation, make_batch
from voxelscale.data.patches import PatchSource, Sample, read_ahead, worker_indices
from voxelscale.data.store import CaseInfo, Store, open_store
from voxelscale.device import choose_precision, to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.build import build_model
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.predict.bundle import Bundle, write_bundle
from voxelscale.train import checkpoint
from voxelscale.train.distributed import (
    WorkerBuffers,
    Workers,
    average_buffers,
    held_back,
    join,
    parallel,
)
from voxelscale.train.log import STOP_FILE, RunLog, environment
from voxelscale.train.optim import learning_rate, make_optimizer, set_learning_rate
from voxelscale.train.validate import validate

LOG_LINES = 200
"""Training events a run writes to ``metrics.jsonl``, about."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a training ended.

    Attributes:
        seen: samples trained on.
        finished: False where it was asked to stop before its budget was spent.
        best: greatest mean validation Dice, -1 where there was no validation.
    """

    seen: int
    finished: bool
    best: float


def train(config: Config, store_path: Path, run: Path) -> Result:
    """Train this rank's share until the budget of samples is spent or somebody asks to stop.

    Called in every rank; `voxelscale.train.launch` starts them.

    Args:
        config: the same in all ranks.
        store_path: what `prepare` wrote.
        run: the run's folder; if it holds checkpoints the training goes on from the newest.

    Raises:
        VoxelscaleError: the store, a checkpoint or the config is unfit, or the loss is not finite.
    """
    virtual, batch_size = config.train.virtual_workers, config.train.batch_size
    if config.model.norm == "sync_batch":
        # Its statistics are the global batch's, so a rank's virtual workers must be seen at once.
        virtual, batch_size = 1, batch_size * virtual
    with join(virtual, config.train.threads) as workers, _stop_signals() as asked:
        return _Training(config, open_store(store_path), run, workers, batch_size).go(asked)


class _Training:
    """What the steps of one run share."""

    def __init__(self, config: Config, store: Store, run: Path, workers: Workers, batch_size: int) -> None:
        self.config, self.store, self.run, self.workers = config, store, run, workers
        self.batch_size = batch_size
        self.global_batch = workers.world * batch_size
        self.chief = workers.rank == 0
        self.precision = choose_precision(config.train.precision, workers.device)
        self.normalise = Normalisation.of_fingerprint(store.fingerprint["lesion_hu"])
        torch.manual_seed(config.train.seed)
        patch = config.data.patch_size
        self.model = build_model(config.model, patch, store.spacing).to(workers.device)
        if config.train.channels_last:
            to_channels_last(self.model)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.state = checkpoint.load_newest(
            run / "checkpoints", self.model, self.optimizer, store.fingerprint["digest"]
        )
        if self.state.seen % self.global_batch and self.state.seen < config.train.samples:
            hint = "go on with a number of workers and a batch size whose product divides it"
            problem = f"stopped at sample {self.state.seen}, within a batch of {self.global_batch}"
            raise VoxelscaleError(f"{run}: {problem}", hint)
        self.source = PatchSource(store, config.data, config.augment, config.train.seed, config.model.dims)
        self.buffers = WorkerBuffers(self.model, workers.virtual)
        self.wrapped = parallel(self.model, workers)
        if config.train.compile:
            self.wrapped.compile()
        self.meter = _Meter(workers)

    def go(self, asked: Callable[[], bool]) -> Result:
        """All steps from where the run stands."""
        samples, seen = self.config.train.samples, self.state.seen
        steps = range(seen // self.global_batch, math.ceil(samples / self.global_batch))
        if not steps:
            return Result(seen=seen, finished=True, best=self.state.best)
        log = self._open_log() if self.chief else None
        total = steps.stop * self.global_batch
        began = time.monotonic() - self.state.seconds
        stopped = False
        with Progress("train", total, done=seen) if self.chief else _Silent() as progress:
            for step, batches in zip(steps, self._batches(steps), strict=False):
                self._step(step, batches)
                seen = (step + 1) * self.global_batch
                stopped = self.meter.end_step(self.chief and (asked() or self._stop_file()))
                self.state = replace(self.state, seen=seen, seconds=time.monotonic() - began)
                last = seen >= total
                if log:
                    self._report(log, step, progress, last)
                if self._due(self.config.train.validate_every, last):
                    self._validate(step, log, last)
                if self._due(self.config.train.checkpoint_every, last or stopped):
                    self._save()
                if stopped:
                    break
        self.meter.finish()
        if log:
            log.close()
            (self.run / STOP_FILE).unlink(missing_ok=True)
        return Result(seen=seen, finished=seen >= total, best=self.state.best)

    def _batches(self, steps: range) -> Iterator[list[list[Sample]]]:
        """For each step the samples of each of this rank's workers, read ahead."""
        indices = [
            worker_indices(step, worker, self.workers.world, self.batch_size)
            for step in steps
            for worker in self.workers.mine
        ]
        data = self.config.data
        stream = read_ahead(self.source, indices, data.readers, data.prefetch)
        while True:
            started = time.monotonic()
            batches = [batch for _, batch in zip(self.workers.mine, stream, strict=False)]
            self.meter.waited += time.monotonic() - started
            if len(batches) < self.workers.virtual:
                return
            yield batches

    def _step(self, step: int, batches: Sequence[Sequence[Sample]]) -> None:
        """One update: every worker's gradients, averaged, then the optimiser."""
        config = self.config
        rate = learning_rate(config.optim, step * self.global_batch, config.train.samples)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.begin_step()
        for worker, batch in enumerate(batches):
            self.buffers.begin_worker()
            with held_back(self.wrapped, worker < len(batches) - 1):
                loss, dice = self._forward(batch)
                (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            self.buffers.end_worker()
            self.meter.add(loss.detach() / len(batches), dice.mean() / len(batches))
        self.buffers.end_step()
        if config.optim.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip)
        self.optimizer.step()

    def _forward(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        config, device = self.config, self.workers.device
        image, mask = make_batch(batch, config.data.patch_size, self.normalise, device, config.train.seed)
        if config.train.channels_last:
            image = image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision != torch.float32):
            logits = self.wrapped(image)
        weights = config.loss
        return dice_cross_entropy(
            logits, mask, dice=weights.dice, cross_entropy=weights.cross_entropy, smooth=weights.smooth
        )

    def _due(self, every: int, last: bool) -> bool:
        """Whether a multiple of `every` samples was passed in this step, or it is the last."""
        seen = self.state.seen
        return last or (every > 0 and seen // every > (seen - self.global_batch) // every)

    def _report(self, log: RunLog, step: int, progress: Any, last: bool) -> None:
        numbers = self.meter.read(self.global_batch)
        best = f"  val Dice {self.state.best:.3f}" if self.state.best >= 0 else ""
        note = (
            f"loss {numbers['loss']:.3f}  Dice {numbers['dice']:.3f}{best}  "
            f"{numbers['samples_per_second']:.1f} samples/s  input wait {100 * numbers['input_wait']:.1f} %"
        )
        progress.update(self.state.seen, note)
        if self._due(max(1, self.config.train.samples // LOG_LINES), last):
            rate = self.optimizer.param_groups[0]["lr"]
            log.write(
                "train", step=step, samples=self.state.seen, lr=rate, seconds=self.state.seconds, **numbers
            )
            self.meter.restart()

    def _validate(self, step: int, log: RunLog | None, last: bool) -> None:
        """Dice on the validation scans; the best model so far becomes the run's."""
        cases = self._validation_cases()
        average_buffers(self.model, self.workers)
        started = time.monotonic()
        mean, pooled = validate(
            self.model, self.store, cases, self.config, self.normalise, self.workers, self.precision
        )
        better = mean > self.state.best
        self.state = replace(self.state, best=max(mean, self.state.best))
        if log:
            log.write(
                "validation",
                step=step,
                samples=self.state.seen,
                dice=mean,
                dice_pooled=pooled,
                seconds=time.monotonic() - started,
            )
            if better:
                self._write_bundle(mean)
        self.meter.restart()  # its clock is for training alone

    def _validation_cases(self) -> tuple[CaseInfo, ...]:
        # A data set of one patient has none; fitting it is then what there is to see.
        cases = self.store.split("val") or self.store.split("train")
        return cases[: self.config.train.validate_cases or None]

    def _write_bundle(self, dice: float) -> None:
        bundle = Bundle(
            config=self.config,
            weights=self.model.state_dict(),
            spacing=self.store.spacing,
            normalisation=self.normalise,
            trained={
                "samples": self.state.seen,
                "validation_dice": dice,
                "seconds": round(self.state.seconds, 1),
                "voxelscale": __version__,
                "data": self.store.fingerprint["digest"],
            },
        )
        write_bundle(self.run / "model.vxs", bundle)

    def _save(self) -> None:
        average_buffers(self.model, self.workers)
        if self.chief:
            folder = self.run / "checkpoints"
            checkpoint.save(folder, self.model, self.optimizer, self.state, self.config.train.keep)

    def _open_log(self) -> RunLog:
        where = self.workers
        facts = environment(where.device, where.ranks, where.virtual, str(self.precision).split(".")[-1])
        write_atomic(self.run / "environment.json", json.dumps(facts, indent=1))
        parameters = sum(p.numel() for p in self.model.parameters())
        workers = f"{where.world} workers x {self.batch_size} samples on {where.device.type}"
        notice(f"{parameters:,} parameters, {workers}, from sample {self.state.seen}", level=2)
        (self.run / STOP_FILE).unlink(missing_ok=True)
        return RunLog(self.run, self.state.seen)

    def _stop_file(self) -> bool:
        return (self.run / STOP_FILE).exists()


class _Meter:
    """Loss, soft Dice, speed and the wish to stop, the same in all ranks without stalling any.

    A step's sums are reduced in the background and read one step later.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._now = torch.zeros(3, device=workers.device)
        self._flying: tuple[Tensor, Any] | None = None
        self.restart()

    def add(self, loss: Tensor, dice: Tensor) -> None:
        """One worker's share of this step's means."""
        self._now[:2] += torch.stack([loss, dice])

    def end_step(self, stop: bool) -> bool:
        """Send this step's sums off; whether the step before carried a wish to stop."""
        self._now[2] = float(stop)
        landed = self._land()
        work = dist.all_reduce(self._now, async_op=True) if self._workers.ranks > 1 else None
        self._flying = (self._now, work)
        self._now = torch.zeros_like(self._now)
        self._timed += 1
        if self._workers.ranks == 1:
            return self._land()
        return landed

    def finish(self) -> None:
        """Wait for the last step's sums: a process group must not go with a reduction in flight."""
        self._land()

    def _land(self) -> bool:
        if self._flying is None:
            return False
        sums, work = self._flying
        self._flying = None
        if work is not None:
            work.wait()
        loss, dice, stop = sums.tolist()
        loss, dice = loss / self._workers.ranks, dice / self._workers.ranks
        if not math.isfinite(loss):
            hint = "lower optim.lr, or set train.precision=fp32"
            raise VoxelscaleError("the loss is not finite: the training diverged", hint)
        self._loss, self._dice, self._steps = self._loss + loss, self._dice + dice, self._steps + 1
        return bool(stop > 0)

    def read(self, global_batch: int) -> dict[str, float]:
        """Means and speed since `restart`."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        steps = max(self._steps, 1)
        return {
            "loss": self._loss / steps,
            "dice": self._dice / steps,
            "samples_per_second": self._timed * global_batch / elapsed,
            "input_wait": self.waited / elapsed,
        }

    def restart(self) -> None:
        """Begin new means."""
        self._loss = self._dice = self.waited = 0.0
        self._steps = self._timed = 0
        self._since = time.monotonic()


class _Silent:
    """The progress of ranks that show none."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM only set a flag; a second one stops at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        notice("\nstopping after this step; once more to stop at once")

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
