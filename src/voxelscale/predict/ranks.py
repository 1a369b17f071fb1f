"""Predicting in several processes that torchrun or srun started.

Each rank gets as many whole scans as every other. Of those that remain, fewer than there are ranks, each
gets a group of ranks, which predict it together, each a part of the windows. A single scan is predicted by
all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from voxelscale.config import PredictConfig, ReadingConfig
from voxelscale.dataset.listing import Source
from voxelscale.model.bundle import Bundle
from voxelscale.predict.work import Predictions, Together, Work
from voxelscale.ranks.workers import Workers, join


def predict_in_ranks(
    sources: Sequence[Source], bundle: Bundle, config: PredictConfig, out: Path, reading: ReadingConfig
) -> Predictions:
    """This rank's part of `voxelscale.predict.predict.predict`; on rank 0 what became of all scans."""
    with join(virtual=1, threads=0) as workers:
        work = Work(bundle, config, out, workers.device, reading)
        if workers.ranks == 1:
            return work.each(sources)
        # What is there already, rank 0 says: another rank might look later, and see what was just written.
        done = _from_first([work.is_done(source) for source in sources] if workers.rank == 0 else None)
        new = [source for source, there in zip(sources, done, strict=True) if not there]
        whole = len(new) // workers.ranks * workers.ranks
        own = new[:whole][workers.rank :: workers.ranks]
        if workers.rank == 0:
            own = [source for source, there in zip(sources, done, strict=True) if there] + own
        outcomes = [work.each(own)]
        if shared := new[whole:]:
            # Processes that time the precisions separately could choose differently.
            work.predictor.precisions = _from_first(work.predictor.precisions)
            group = workers.rank % len(shared)
            outcomes.append(work.each([shared[group]], _group(workers, len(shared))))
        return _gathered(outcomes, sources, workers.rank, workers.ranks)


def _from_first(value: Any) -> Any:
    """Rank 0's value, in every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _group(workers: Workers, groups: int) -> Together:
    """This rank's share within its group; rank r is of group r modulo their number."""
    # Every rank makes all groups, in the same order, as torch.distributed asks for.
    members = [list(range(number, workers.ranks, groups)) for number in range(groups)]
    made = [dist.new_group(ranks) for ranks in members]
    own = workers.rank % groups
    group, ranks = made[own], members[own]

    def combine(sums: Tensor) -> None:
        dist.reduce(sums, dst=ranks[0], group=group)

    def all_well(well: bool) -> bool:
        flag = torch.tensor([float(well)], device=workers.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        return bool(flag.item())

    return Together(part=ranks.index(workers.rank), parts=len(ranks), combine=combine, all_well=all_well)


def _gathered(
    outcomes: Sequence[Predictions], sources: Sequence[Source], rank: int, ranks: int
) -> Predictions:
    """On rank 0 what became of all ranks' scans, in their order; on others of their own."""
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, outcomes)
    every: list[Predictions] = [
        outcome for part in (parts if rank == 0 else [outcomes]) for outcome in part
    ]
    found = {case: found for outcome in every for case, found in outcome.findings.items()}
    return Predictions(
        findings={s.case: found[s.case] for s in sources if s.case in found},
        kept=sum(outcome.kept for outcome in every),
        failed=tuple(sorted(fault for outcome in every for fault in outcome.failed)),
        rank=rank,
        facts={case: facts for outcome in every for case, facts in outcome.facts.items()},
    )
