"""Dice on whole scans, shared out over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from voxelscale.config import Config
from voxelscale.data.augment import Normalisation
from voxelscale.data.store import CaseInfo, Store
from voxelscale.predict.sliding_window import predict_volume
from voxelscale.train.distributed import Workers, sum_over_ranks


def validate(
    model: nn.Module,
    store: Store,
    cases: Sequence[CaseInfo],
    config: Config,
    normalise: Normalisation,
    workers: Workers,
    precision: torch.dtype,
) -> tuple[float, float]:
    """Mean Dice over cases, and Dice pooled over all their voxels, by sliding window.

    Dice = 2|A∩B| / (|A| + |B|), 1 where both are empty. Each case is predicted by one rank; the counts
    are summed as integers, so the figures are exact and every rank has them.
    """
    model.eval()
    counts = [[0, 0] for _ in cases]
    for number in range(workers.rank, len(cases), workers.ranks):
        image, mask = store.read(cases[number].case)
        volume = normalise(torch.from_numpy(image).to(workers.device))
        probability = predict_volume(
            model,
            volume,
            config.predict.patch_size or config.data.patch_size,
            overlap=config.predict.overlap,
            batch_size=config.predict.batch_size,
            precision=precision,
        )
        predicted = probability >= config.predict.threshold
        truth = torch.from_numpy(mask).to(workers.device) > 0
        overlap = int((predicted & truth).sum())
        counts[number] = [overlap, int(predicted.sum()) + int(truth.sum())]
    model.train()
    return dice_of_counts(sum_over_ranks(counts, workers))


def dice_of_counts(counts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean and pooled Dice of rows (|A∩B|, |A| + |B|)."""
    each = [2 * overlap / size if size else 1.0 for overlap, size in counts]
    overlap, size = (sum(row[i] for row in counts) for i in (0, 1))
    return sum(each) / len(each), 2 * overlap / size if size else 1.0
