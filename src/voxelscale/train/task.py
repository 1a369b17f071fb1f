"""What is trained, separate from how: the interface between a training's subject and its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from voxelscale.errors import VoxelscaleError
from voxelscale.samples.patches import Source

Table = list[list[float]]
"""Counts or scores, a row a case; exact as float64 up to 2^53."""


class Scoring(Protocol):
    """How a model is validated while it is trained."""

    @property
    def metric(self) -> str:
        """The name, in what `summary` returns, of the score that is greatest for the best model."""

    def score(self, model: nn.Module, rank: int, ranks: int) -> Table:
        """This rank's share of the table, zeros elsewhere; each case is scored by exactly one rank.

        It runs beside the training, in a thread, and must not talk to other ranks. The model is a copy
        in evaluation mode.
        """

    def summary(self, table: Table) -> dict[str, float]:
        """The figures of the whole table, the sum over ranks."""


def _too_large() -> VoxelscaleError:
    return VoxelscaleError("a training step needs more memory than there is", "lower train.batch_size")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network with its loss, its samples and its validation.

    Attributes:
        model: on the training device.
        loss: output and target to a scalar, the mean over the micro-batch, or to the scalar and a
            second figure that is shown beside it, ``(batch,)`` or scalar.
        source: samples by global index.
        collate: samples to the network's input and the loss's target, both on the training device.
        describe: a sample's name for a person, without a patient's identity.
        digest: of the data; resuming with other data is refused.
        scoring: None where nothing is validated.
        keep: called by rank 0 with the best model so far and facts about it.
        about: one line for a person on the samples and on the validation; "" for nothing.
        too_large: the error if a step runs out of memory.
        pretrained: names of the parameters that were taken from another model.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]
    source: Source[Any]
    collate: Callable[[Sequence[Any]], tuple[Any, Any]]
    describe: Callable[[Any], str]
    digest: str = ""
    scoring: Scoring | None = None
    keep: Callable[[nn.Module, dict[str, Any]], None] | None = None
    about: str = ""
    too_large: Callable[[], VoxelscaleError] = _too_large
    pretrained: frozenset[str] = frozenset()
