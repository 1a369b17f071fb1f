"""The training loop, for any network, loss and source of samples, on any number of workers.

A run is a folder; everything in it is written atomically or only appended to, so it can be killed at
any instant, and the same command resumes from the last checkpoint with the next sample.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxelscale.config import Config
from voxelscale.config.renamed import with_first_names
from voxelscale.console import Progress, count, duration, notice, warn
from voxelscale.device import TRAINING_PRIORITY, choose_precision, other_stream, policy, to_channels_last
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of, write_atomic
from voxelscale.randomness import generator
from voxelscale.ranks.workers import WorkerBuffers, Workers, average_buffers, data_parallel, held_back
from voxelscale.samples.ahead import Made, on_device
from voxelscale.samples.draws import Stream
from voxelscale.samples.patches import read_ahead
from voxelscale.train.checkpoint import State, Trained, Writer, load_newest
from voxelscale.train.clock import Clock, Step
from voxelscale.train.log import STOP_FILE, RunLog, environment, note_out_of_memory
from voxelscale.train.meter import Meter, Signals
from voxelscale.train.optim import AveragedWeights, learning_rate, make_optimizer, set_learning_rate
from voxelscale.train.passes import TrainingPass
from voxelscale.train.snapshot import snapshot
from voxelscale.train.task import Task
from voxelscale.train.track import Tracking
from voxelscale.train.validate import Validation, start_validation

Batch = TypeVar("Batch")

LOG_LINES = 200
"""Training events a run writes to ``metrics.jsonl``, about."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a training ended.

    Attributes:
        seen: samples trained on.
        finished: False where it was asked to stop before its budget was spent.
        best: highest validation score, -1 where there was no validation, NaN if it has no value.
    """

    seen: int
    finished: bool
    best: float


class Engine:
    """One rank's part of a training.

    Args:
        task: what is trained.
        config: of the run; `optim`, `train`, and `data`'s reading ahead.
        run: the run's folder, or None where nothing is to be written.
        workers: who takes part.
        batch_size: samples of one worker per step.

    Raises:
        VoxelscaleError: a checkpoint is unfit.
    """

    def __init__(
        self, task: Task, config: Config, run: Path | None, workers: Workers, batch_size: int
    ) -> None:
        self.task, self.config, self.run, self.workers = task, config, run, workers
        optim = config.optim
        self.clock = Clock(
            config.train.samples, workers.world, batch_size, optim.grow_from, optim.grow_share
        )
        self.chief = workers.rank == 0
        self.precision = choose_precision(config.train.precision, workers.device)
        self.model = to_channels_last(task.model) if config.train.formatted else task.model
        share = config.optim.ema
        self.trained = Trained(
            model=self.model,
            optimizer=make_optimizer(self.model, config.optim, task.pretrained),
            average=AveragedWeights(self.model, share) if share else None,
        )
        self.state = State(digest=task.digest)
        # What an update is; it must be the same when the run is resumed.
        self.update: dict[str, Any] = {
            "global_batch": workers.world * batch_size,
            "optim": digest_of(with_first_names({"optim": asdict(optim)})["optim"]),
        }
        self.writer: Writer | None = None
        if run is not None:
            self.state = load_newest(run / "checkpoints", self.trained, task.digest)
            self.writer = Writer(run / "checkpoints", config.train.keep) if self.chief else None
        skip = config.train.not_finite == "skip"
        self.buffers = WorkerBuffers(self.model, workers.virtual, undo=skip)
        self.wrapped = data_parallel(self.model, workers, config.train.compress)
        if config.train.compile:
            self.wrapped.compile()
        cuda = workers.device.type == "cuda"
        self.graph = cuda and workers.ranks == 1 and config.train.cuda_graph is True
        self.training_pass = TrainingPass(
            self.wrapped, task.loss, self.precision, workers.device, self.graph
        )
        self.meter = Meter(workers)
        self.validation: Validation | None = None
        self.log: RunLog | None = None
        self._saved_at = time.monotonic()
        self._shown = ""
        self._score: float | None = None
        self._recent: deque[list[tuple[Sequence[Any], Tensor]]] = deque(maxlen=2)

    def go(self, asked: Callable[[], bool]) -> Result:
        """All steps from the present state of the run, until the budget is spent or `asked` to stop; once.

        Raises:
            VoxelscaleError: what a person must fix; the run resumes from its last checkpoint.
        """
        steps = self.clock.steps(self.state.seen)
        try:
            if self.state.seen < self.clock.end or self._validation_missed():
                self._check_update()
                self.log = self._open_log()
                device, strict = self.workers.device, self.config.train.deterministic
                with policy(device, strict), other_stream(device, TRAINING_PRIORITY):
                    self._all_steps(steps, asked)
        except torch.OutOfMemoryError:
            if self.run is not None:
                note_out_of_memory(self.run, self.state.seen)
            raise self.task.too_large() from None
        finally:
            if self.validation:
                self.validation.cancel()
            if self.writer:
                self.writer.close()
            if self.log:
                self.log.close(self.state.seen >= self.clock.end)
            # It must go before its process group: as the group's last holder it would end it with the
            # interpreter locked, which Gloo's threads may be waiting for.
            del self.wrapped, self.training_pass
        return Result(
            seen=self.state.seen, finished=self.state.seen >= self.clock.end, best=self.state.best
        )

    def _check_update(self) -> None:
        """A resumed run must keep its updates, however many processes share them.

        Raises:
            VoxelscaleError: the global batch, or what the recipe makes of the optimiser, has changed.
        """
        begun, now = self.state, self.workers.world * self.clock.batch_size
        words = f"{self.run}: was started with"
        if begun.global_batch not in (0, now):
            how = f"{count(self.workers.world, 'worker')} x {self.clock.batch_size}"
            hint = (
                "keep train.ranks x train.virtual_workers x train.batch_size, or train into another folder"
            )
            raise VoxelscaleError(
                f"{words} a global batch of {begun.global_batch}, not {now} ({how})", hint
            )
        if begun.optim not in ("", self.update["optim"]):
            hint = (
                "resume with as many workers and the recipe as before (auto once was large_batch), "
                "or train into another folder"
            )
            raise VoxelscaleError(f"{words} other settings of the optimiser (train.recipe)", hint)
        self.state = replace(begun, **self.update)

    def _all_steps(self, steps: Iterator[Step], asked: Callable[[], bool]) -> None:
        began, total = time.monotonic() - self.state.seconds, self.clock.end
        if self._validation_missed():
            self._begin_validation()
        quiet = contextlib.nullcontext()
        with (
            contextlib.closing(self._micro_batches()) as stream,
            Progress("train", total, done=self.state.seen, rate=False) if self.chief else quiet as progress,
        ):
            for step in steps:
                self._step(step, stream)
                self.state = replace(self.state, seen=step.end, seconds=time.monotonic() - began)
                signals = self._end_step(step.global_batch, asked)
                self._report(step, progress, step.end >= total)
                if signals.ready:
                    self._end_validation()
                due = self._validation_due(step)
                if due or signals.save or self._due(self.config.train.checkpoint_every, step):
                    self._save()  # before it is validated: the best model's checkpoint is kept
                if due:
                    self._begin_validation()
                if signals.stop:
                    break
            if self.validation and progress:
                progress.update(self.state.seen, f"{self._shown}  validating")
            self._end_validation()
            if progress:
                progress.update(self.state.seen, self._shown + self._scores())
        self._save()
        if self.writer:
            self.writer.finish()
        if self.log and self.run:
            (self.run / STOP_FILE).unlink(missing_ok=True)

    def _micro_batches(self) -> Generator[Made, None, None]:
        """The micro-batches that are left to this rank, in order: samples, and input and target of them."""
        left = self.clock.steps(self.state.seen)
        indices = (indices for step in left for indices, _ in step.share(self.workers.mine))
        data, device = self.config.data, self.workers.device
        samples = read_ahead(self.task.source, indices, data.readers, data.prefetch)
        if device.type == "cpu":  # which makes them itself: that is arithmetic, not waiting
            return on_device(self._timed(samples), self.task.collate, device)
        return self._timed(on_device(samples, self.task.collate, device))

    def _timed(self, stream: Iterator[Batch]) -> Generator[Batch, None, None]:
        """The same; the time until the next is there counts as waiting for input."""
        while True:
            started = time.monotonic()
            try:
                batch = next(stream)
            except StopIteration:
                return
            finally:
                self.meter.waited += time.monotonic() - started
            yield batch

    def _step(self, step: Step, stream: Iterator[Made]) -> None:
        """One update: every worker's gradients, averaged, then the optimiser."""
        optim, budget = self.config.optim, self.config.train.samples
        rate = learning_rate(optim, step.first, budget, step.global_batch)
        set_learning_rate(self.trained.optimizer, rate)
        self.training_pass.clear_gradients()
        self.buffers.begin_step()
        share = step.share(self.workers.mine)
        losses: list[tuple[Sequence[Any], Tensor]] = []
        for number, (indices, weight) in enumerate(share, start=1):
            samples, (inputs, target) = next(stream)
            self.buffers.begin_worker()
            _seed_layers(self.config.train.seed, indices[0])
            with held_back(self.wrapped, number < len(share)):
                loss, measure = self.training_pass(inputs, target, weight)
            self.buffers.end_worker(weight)
            losses.append((samples, loss))
            self.meter.add(loss * weight, measure * weight)
        self._recent.append(losses)
        if self._gradients_sound():
            self.buffers.end_step()
            self.trained.optimizer.step()
        else:
            self.buffers.undo_step()
            self._report_skipped(step)
        if self.trained.average:
            self.trained.average.update(self.model, step.end, step.global_batch, budget)

    def _gradients_sound(self) -> bool:
        """Clip the gradients' norm; False where they are not finite and that is to be skipped.

        The gradients are those of all ranks, so every rank comes to the same.
        """
        clip, skip = self.config.optim.gradient_clipping, self.config.train.not_finite == "skip"
        if not (clip or skip):
            return True
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip or math.inf)
        return not skip or bool(torch.isfinite(norm))

    def _report_skipped(self, step: Step) -> None:
        names = self._not_finite_samples(1)
        if self.chief:
            warn(f"update {step.number} left out: not finite at {names}")
        if self.log:
            self.log.write("skipped", step=step.number, samples=step.end, where=names)

    def _not_finite_samples(self, steps: int) -> str:
        """The samples, of all ranks, whose loss was not finite in the first such of the last `steps`."""
        mine: list[list[str]] = []
        for losses in list(self._recent)[-steps:]:
            bad = [batch for batch, loss in losses if not bool(torch.isfinite(loss))]
            # The sample whose input is not finite, if there is one; else the whole micro-batch.
            faulty = [s for batch in bad for s in batch if not _finite(self.task.collate([s])[0])]
            mine.append([self.task.describe(s) for s in faulty or [s for batch in bad for s in batch]])
        ranks: list[list[list[str]]] = [mine]
        if self.workers.ranks > 1:
            ranks = [[] for _ in range(self.workers.ranks)]
            dist.all_gather_object(ranks, mine)
        by_step = [[name for names in step for name in names] for step in zip(*ranks, strict=True)]
        names = next((names for names in by_step if names), [])
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return shown or "no single sample: the gradients are too large"

    def _end_step(self, samples: int, asked: Callable[[], bool]) -> Signals:
        """Exchange sums and signals.

        Raises:
            VoxelscaleError: the loss was not finite and that is not to be skipped.
        """
        after = self.config.train.checkpoint_seconds
        signals = self.meter.end_step(
            samples,
            stop=asked() or (self.chief and self._stop_file()),
            save=self.chief and 0 < after <= time.monotonic() - self._saved_at,
            ready=self.validation is not None and self.validation.ready(),
        )
        self._check_finite(signals)
        return signals

    def _check_finite(self, signals: Signals) -> None:
        if not signals.finite and self.config.train.not_finite == "stop":
            hint = "lower optim.lr, set train.precision=fp32, or skip such updates: train.not_finite=skip"
            where = self._not_finite_samples(2)
            if self.log:
                self.log.write("diverged", samples=self.state.seen, where=where)
            raise VoxelscaleError(f"the training diverged: the loss is not finite at {where}", hint)

    def _check_weights(self) -> None:
        """A finite loss may have had a gradient that was not, and no checkpoint may hold the outcome."""
        finite = [torch.isfinite(weight).all() for weight in self.model.parameters()]
        if not bool(torch.stack(finite).all()):
            hint = "lower optim.lr, or set train.precision=fp32; the checkpoints before are sound"
            problem = f"the weights are not finite after {self.state.seen} samples"
            if self.log:
                self.log.write("diverged", samples=self.state.seen, where=problem)
            raise VoxelscaleError(f"the training diverged: {problem}", hint)

    def _due(self, every: int, step: Step) -> bool:
        """Whether a multiple of `every` samples was passed in this step."""
        return every > 0 and step.end // every > step.first // every

    def _validation_due(self, step: Step) -> bool:
        return self.task.scoring is not None and self._due_between(step.first, step.end)

    def _validation_missed(self) -> bool:
        """Whether the run stopped between a checkpoint and its validation, however many workers it had."""
        seen, validated = self.state.seen, self.state.validated
        return self.task.scoring is not None and seen > validated and self._due_between(validated, seen)

    def _due_between(self, first: int, end: int) -> bool:
        """Whether a validation is due at a number of samples above `first` and up to `end`."""
        every, at = self.config.train.validate_every, self.config.train.validate_at
        regular = every > 0 and end // every > first // every
        return end >= self.clock.end or regular or any(first < mark <= end for mark in at)

    def _report(self, step: Step, progress: Any, last: bool) -> None:
        if not self.chief:
            return
        if last:
            self.meter.land()  # the last step's loss, which no step after it would bring
        numbers = self.meter.read()
        loss = "" if math.isnan(numbers["loss"]) else f"loss {numbers['loss']:.3f}  "
        dice = "" if math.isnan(numbers["dice"]) else f"Dice {numbers['dice']:.3f}  "
        self._shown = (
            f"{loss}{dice}{numbers['samples_per_second']:.1f} samples/s  "
            f"input wait {100 * numbers['input_wait']:.1f} %"
        )
        seen = self.state.seen
        progress.update(seen, self._shown + self._scores())
        every = max(1, self.config.train.samples // LOG_LINES)
        if last or self._due(every, step):
            rate = self.trained.optimizer.param_groups[0]["lr"]
            finite = {k: v for k, v in numbers.items() if math.isfinite(v)}
            facts = {"samples": seen, "lr": rate, "seconds": self.state.seconds, **finite}
            if self.log:
                self.log.write("train", step=step.number, **facts)
            self.meter.restart()

    def _scores(self) -> str:
        """The last validation, at which sample it was, and the best one."""
        state, metric = self.state, self.task.scoring.metric if self.task.scoring else ""
        if not state.validated or math.isnan(state.best if self._score is None else self._score):
            return ""  # not yet, or on scans without a lesion, which is warned of
        if self._score is None:  # of an earlier process, which left the best only
            return f"  best validation {metric} {state.best:.3f}"
        best = f" (best {state.best:.3f})" if self._score < state.best else ""
        return f"  validation {metric} {self._score:.3f} at sample {state.validated}{best}"

    def _begin_validation(self) -> None:
        """Validate a copy of the model beside the training."""
        self._end_validation()
        copy = snapshot(self.trained, self.workers)
        samples = self.config.train.recalibrate
        self.validation = start_validation(
            self.task, copy, self.workers, self.precision, self.state, samples
        )

    def _end_validation(self) -> None:
        """Wait for the pending validation; its model is kept if it is the best.

        If all scores are NaN, because the scans have no lesion, the last model is kept.
        """
        pending, self.validation = self.validation, None
        if pending is None:
            return
        figures = pending.figures(self.workers)
        score = figures[pending.scoring.metric]
        at, first = pending.state, not self.state.validated  # a first score may be of any sign
        better = first or math.isnan(self.state.best) or score > self.state.best
        best = score if better else self.state.best
        self._score = score
        self.state = replace(self.state, validated=at.seen, best=best)
        if self.log:
            self.log.write(
                "validation",
                samples=at.seen,
                training_seconds=at.seconds,
                **{name: value for name, value in figures.items() if not math.isnan(value)},
            )
        if better and self.chief and self.task.keep:
            scored = {} if math.isnan(score) else {f"validation_{pending.scoring.metric}": score}
            facts = {"samples": at.seen, **scored, "seconds": round(at.seconds, 1)}
            self.task.keep(pending.model, facts)
        if better and self.writer:
            self.writer.keep_best(at.seen)

    def _save(self) -> None:
        """Write a checkpoint; all ranks come here together.

        Waits for a pending validation: a run resumed from here could not repeat it.
        """
        self._end_validation()
        self._check_finite(self.meter.land())
        self._check_weights()
        self.meter.clear()
        self._saved_at = time.monotonic()
        if self.run is not None:
            average = self.trained.average
            average_buffers(self.model, self.workers, average.weights if average else {})
            if self.writer:
                self.writer.save(self.trained, self.state)

    def _open_log(self) -> RunLog | None:
        where, run = self.workers, self.run
        if not self.chief or run is None:
            return None
        facts = environment(where.device, where.ranks, where.virtual, str(self.precision).split(".")[-1])
        write_atomic(run / "environment.json", json.dumps(facts, indent=1))
        self._introduce(facts)
        return RunLog(run, self.state.seen, self.state.validated, self._tracking(run, facts))

    def _tracking(self, run: Path, facts: dict[str, Any]) -> Tracking | None:
        if not self.config.train.track:
            return None
        tracking = Tracking(self.config, run)
        tracking.note(facts)
        return tracking

    def _introduce(self, facts: dict[str, Any]) -> None:
        """Say what is trained, on what, and from where on."""
        where, seen, end = self.workers, self.state.seen, self.clock.end
        parameters = sum(p.numel() for p in self.model.parameters())
        threads = f", {count(facts['threads_per_rank'], 'thread')}" if where.device.type == "cpu" else ""
        ways = {"channels last": self.config.train.formatted, "compiled": bool(self.config.train.compile)}
        if where.device.type == "cuda":
            ways["as a CUDA graph"] = self.graph
            ways["deterministic"] = self.config.train.deterministic
        how = ", ".join([facts["precision"], *(words for words, used in ways.items() if used)])
        notice(f"train: {facts['device']}{threads}, {how}; {parameters:,} parameters")
        if self.task.about:
            notice(f"train: {self.task.about}")
        virtual = f" x {count(where.virtual, 'virtual worker')}" * (where.virtual > 1)
        each = count(self.clock.batch_size, "patch", "patches")
        update = f"an update: {each} x {count(where.ranks, 'rank')}{virtual}"
        left = duration(self.state.seconds)
        begin = f"resumes after {seen} of {end} samples ({left} of training)" if seen else "a new run"
        notice(f"train: {update}; {count(end, 'sample')} in all; {begin}")

    def _stop_file(self) -> bool:
        return self.run is not None and (self.run / STOP_FILE).exists()


def _seed_layers(seed: int, index: int) -> None:
    """Dropout and its like follow the sample clock, too: the same for real, virtual and resumed workers."""
    torch.manual_seed(int(generator(seed, index, Stream.LAYERS).integers(2**63)))


def _finite(inputs: Any) -> bool:
    return not isinstance(inputs, Tensor) or bool(torch.isfinite(inputs).all())
