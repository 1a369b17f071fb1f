"""Validating a model while it is trained: whole scans, shared out over ranks, beside the training."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from voxelscale.config import Config
from voxelscale.infer.sliding_window import Windows, predict_volume
from voxelscale.ranks.workers import Workers, sum_over_ranks
from voxelscale.samples.batch import Normalisation
from voxelscale.store import CaseInfo, Store
from voxelscale.train.checkpoint import State
from voxelscale.train.judges import has_lesions
from voxelscale.train.snapshot import recalibrate
from voxelscale.train.task import Scoring, Table, Task


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
        recalibrate(model, task.source, task.collate, samples, precision)
        table = scoring.score(model, workers.rank, workers.ranks)
        hook.remove()
        return table, time.monotonic() - started

    pool = ThreadPoolExecutor(1, thread_name_prefix="validation")
    share = pool.submit(work)
    pool.shutdown(wait=False)
    return Validation(model=model, state=state, scoring=scoring, share=share, unwanted=unwanted)


@dataclass(frozen=True, kw_only=True)
class ScanScoring:
    """Dice on whole scans by sliding window.

    Dice = 2|A∩B| / (|A| + |B|), 1 where both are empty. The counts are summed as whole numbers, so the
    figures are exact and do not depend on the number of ranks.

    Attributes:
        store, cases: what is predicted.
        config: windows and threshold.
        normalise: HU to network input.
        device, precision: of the arithmetic.
    """

    store: Store
    cases: Sequence[CaseInfo]
    config: Config
    normalise: Normalisation
    device: torch.device
    precision: torch.dtype
    metric: str = "dice"

    def score(self, model: nn.Module, rank: int, ranks: int) -> Table:
        """Rows (|A∩B|, |A| + |B|), a row a case."""
        rows: Table = [[0, 0] for _ in self.cases]
        for number in range(rank, len(self.cases), ranks):
            rows[number] = self._case(model, self.cases[number].case)
        return rows

    def _case(self, model: nn.Module, case: str) -> list[float]:
        image, mask = self.store.read(case)
        predict, data = self.config.predict, self.config.data
        windows = Windows(
            patch=predict.patch_size or data.patch_size,
            overlap=predict.overlap,
            batch_size=predict.batch_size,
            precision=self.precision,
        )
        hu = torch.from_numpy(image).to(self.device)
        probability = predict_volume(model, hu, windows, prepare=self.normalise)
        predicted = probability >= predict.threshold
        truth = torch.from_numpy(mask).to(self.device) > 0
        return [int((predicted & truth).sum()), int(predicted.sum()) + int(truth.sum())]

    def summary(self, table: Table) -> dict[str, float]:
        """Mean Dice over cases, and Dice pooled over all their voxels; NaN where no case has a lesion."""
        if not has_lesions(tuple(self.cases)):
            return {"dice": math.nan, "dice_pooled": math.nan}
        mean, pooled = dice_of_counts(table)
        return {"dice": mean, "dice_pooled": pooled}


def dice_of_counts(counts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and pooled Dice of rows (|A∩B|, |A| + |B|)."""
    each = [2 * overlap / size if size else 1.0 for overlap, size in counts]
    overlap, size = (sum(row[i] for row in counts) for i in (0, 1))
    return sum(each) / len(each), 2 * overlap / size if size else 1.0
