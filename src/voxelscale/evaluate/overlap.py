"""Dice from exact counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Voxels of the truth, of the prediction, and of both; sums of these pool exactly."""

    truth: int
    prediction: int
    both: int

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            truth=self.truth + other.truth,
            prediction=self.prediction + other.prediction,
            both=self.both + other.both,
        )

    @property
    def dice(self) -> float:
        """``2|A∩B| / (|A| + |B|)`` (Dice 1945); 1 where both are empty."""
        size = self.truth + self.prediction
        return 2 * self.both / size if size else 1.0


def overlap(truth: NDArray[Any], prediction: NDArray[Any]) -> Overlap:
    """The counts of two masks of one shape; whatever is not 0 belongs to a mask."""
    if truth.shape != prediction.shape:
        raise ValueError(f"masks of {truth.shape} and {prediction.shape} are not on the same grid")
    a, b = truth != 0, prediction != 0
    return Overlap(
        truth=int(np.count_nonzero(a)),
        prediction=int(np.count_nonzero(b)),
        both=int(np.count_nonzero(a & b)),
    )
