"""Validating a model while it is trained: whole scans, shared out over ranks, beside the training."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from voxelscale.classes import IGNORED
from voxelscale.config import Config
from voxelscale.device import stream_of, upload
from voxelscale.errors import VoxelscaleError
from voxelscale.infer.labels import predict_labels
from voxelscale.infer.sliding_window import Windows, WindowTooLarge
from voxelscale.ranks.workers import Workers, sum_over_ranks
from voxelscale.samples.batch import Normalisations, prepared
from voxelscale.store import CaseInfo, Store
from voxelscale.train.checkpoint import State
from voxelscale.train.snapshot import recalibrate
from voxelscale.train.task import Scoring, Table, Task
from voxelscale.train.validation_cases import has_lesions


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One validation, running in a thread beside the training.

    Attributes:
        model: a copy that is not trained.
        state: where the run stood when the copy was taken.
        scoring: how it is scored.
        share: this rank's rows and the seconds they took, once they are there.
        unwanted: set when its result is no longer needed.
    """

    model: nn.Module
    state: State
    scoring: Scoring
    share: Future[tuple[Table, float]]
    unwanted: threading.Event

    def ready(self) -> bool:
        """Whether this rank's share is done."""
        return self.share.done()

    def cancel(self) -> None:
        """End the thread at its next window: a process that ends waits for its threads."""
        self.unwanted.set()

    def figures(self, workers: Workers) -> dict[str, float]:
        """Wait, and add the shares of all ranks; every rank must call it."""
        table, seconds = self.share.result()
        return {**self.scoring.summary(sum_over_ranks(table, workers)), "seconds": seconds}


def start_validation(
    task: Task, model: nn.Module, workers: Workers, precision: torch.dtype, state: State, samples: int
) -> Validation | None:
    """Start to validate a model that is not trained; None if the task has no validation.

    Args:
        samples: for batch norm's statistics; 0: as they are.
    """
    if (scoring := task.scoring) is None:
        return None

    unwanted = threading.Event()

    def stop_if_unwanted(*_: object) -> None:
        if unwanted.is_set():
            raise CancelledError

    def work() -> tuple[Table, float]:
        started = time.monotonic()
        hook = model.register_forward_pre_hook(stop_if_unwanted)
        with side, _memory_errors(workers.device):
            recalibrate(model, task.source, task.collate, samples, precision)
            table = scoring.score(model, workers.rank, workers.ranks)
        hook.remove()
        return table, time.monotonic() - started

    side = side_stream(workers.device)
    pool = ThreadPoolExecutor(1, thread_name_prefix="validation")
    share = pool.submit(work)
    pool.shutdown(wait=False)
    return Validation(model=model, state=state, scoring=scoring, share=share, unwanted=unwanted)


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """Within it running out of memory is the validation's error, not one of the training's step."""
    try:
        yield
    except (torch.OutOfMemoryError, WindowTooLarge):
        problem = f"the validation needs more memory than the training beside it leaves on {device}"
        hint = "lower predict.patch_size, or train.batch_size"
        raise VoxelscaleError(problem, hint) from None


def side_stream(device: torch.device) -> AbstractContextManager[None]:
    """Where a thread computes beside the one that calls this; to be entered by that thread.

    On a GPU that is a stream of its own, of the lowest priority. It waits for what the caller's stream has
    been given up to now; a training's stream goes first (`voxelscale.device.TRAINING_PRIORITY`). It is left
    when all of its own work is done: then the caller may use or free what was used.
    """
    if device.type != "cuda":
        return nullcontext()
    before = torch.cuda.Event()  # type: ignore[no-untyped-call]
    before.record(torch.cuda.current_stream(device))
    return _on_stream(device, stream_of(device, 0), before)


@contextmanager
def _on_stream(device: torch.device, stream: torch.cuda.Stream, before: torch.cuda.Event) -> Iterator[None]:
    torch.cuda.set_device(device)  # of this thread: it begins with the first one
    stream.wait_event(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


@dataclass(frozen=True, kw_only=True)
class ScanScoring:
    """Dice on whole scans by sliding window.

    Dice = 2|A∩B| / (|A| + |B|), 1 where both are empty. The counts are summed as whole numbers, so the
    figures are exact and do not depend on the number of ranks. Of several classes it is the mean over
    classes, each the mean over the cases that have it, in truth or prediction. Ignored voxels do not count.

    Attributes:
        store, cases: what is predicted.
        config: windows and threshold.
        normalise: stored values to network input.
        device, precision: of the arithmetic.
    """

    store: Store
    cases: Sequence[CaseInfo]
    config: Config
    normalise: Normalisations
    device: torch.device
    precision: torch.dtype
    metric: str = "dice"

    def score(self, model: nn.Module, rank: int, ranks: int) -> Table:
        """Rows (|A∩B|, |A| + |B|, the same of the next class, ...), a row a case."""
        rows: Table = [[0, 0] * len(self.store.classes.names) for _ in self.cases]
        for number in range(rank, len(self.cases), ranks):
            rows[number] = self._case(model, self.cases[number].case)
        return rows

    def _case(self, model: nn.Module, case: str) -> list[float]:
        image, labels = self.store.read_channels(case)
        predict, data = self.config.predict, self.config.data
        windows = Windows(
            patch=predict.patch_size or data.patch_size,
            overlap=predict.overlap,
            batch_size=predict.batch_size,
            precision=self.precision,
        )
        prepare, classes = prepared(self.normalise(case)), self.store.classes
        predicted = predict_labels(
            model,
            torch.from_numpy(image),
            windows,
            classes,
            predict.threshold,
            prepare=prepare,
            device=self.device,
        )
        truth = upload(torch.from_numpy(labels), self.device)
        predicted.masked_fill_(truth == IGNORED, 0)
        counts = []
        for at in range(len(classes.names)):
            here, true = classes.where(predicted, at), classes.where(truth, at)
            counts += [(here & true).sum(), here.sum() + true.sum()]
        return list(torch.stack(counts).tolist())  # the only wait for a GPU

    def summary(self, table: Table) -> dict[str, float]:
        """Mean Dice over cases, and Dice pooled over all their voxels; NaN where no case has a lesion."""
        names = self.store.classes.names
        if not has_lesions(tuple(self.cases)):
            return {"dice": math.nan, "dice_pooled": math.nan}
        if len(names) == 1:
            mean, pooled = dice_of_counts(table)
            return {"dice": mean, "dice_pooled": pooled}
        each = {}
        for at, name in enumerate(names):
            rows = [row[2 * at : 2 * at + 2] for row in table]
            if there := [row for row in rows if row[1]]:
                each[name] = dice_of_counts(there)
        return {
            "dice": fmean(mean for mean, _ in each.values()),
            "dice_pooled": fmean(pooled for _, pooled in each.values()),
            **{f"dice_{name}": mean for name, (mean, _) in each.items()},
        }


def dice_of_counts(counts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and pooled Dice of rows (|A∩B|, |A| + |B|)."""
    each = [2 * overlap / size if size else 1.0 for overlap, size in counts]
    overlap, size = (sum(row[i] for row in counts) for i in (0, 1))
    return sum(each) / len(each), 2 * overlap / size if size else 1.0
