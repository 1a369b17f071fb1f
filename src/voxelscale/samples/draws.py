"""The random numbers of one sample's augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from voxelscale.randomness import generator


class Stream(IntEnum):
    """What a training sample's random numbers are for; those of one stream never shift another's.

    A transform that is added to the augmentation takes the next number.
    """

    PLACE = 0
    """Which scan, and where in it."""
    AUGMENT = 1
    """The first seven transforms, together."""
    NOISE = 2
    """Seed of the Gaussian noise."""
    LAYERS = 3
    """Random layers of a network, as dropout."""


class Draws:
    """The numbers in [0, 1) that sample `index` of a run draws for its transforms.

    The first seven transforms share one stream, in which each has places of its own. Every number is drawn
    whether it is used or not, so that changing one probability leaves the other transforms of every sample
    as they were. A transform that is added takes a `stream` of its own, never a place in the shared one: so
    the draws of the others, and with them the weights of a config, stay as they are.

    Attributes:
        coins: one for each transform but mirroring, which decides whether it is applied.
        amounts: how strongly each is applied.
        mirrors: one for each axis (z, y, x).
    """

    def __init__(self, seed: int, index: int) -> None:
        self._seed, self._index = seed, index
        shared = self.stream(Stream.AUGMENT)
        self.coins, self.amounts, self.mirrors = shared.random(6), shared.random(12), shared.random(3)

    def stream(self, stream: int) -> np.random.Generator:
        """The sample's numbers of one stream."""
        return generator(self._seed, self._index, stream)


def between(limits: Sequence[float], share: float) -> float:
    """The number that lies this share of the way between two limits."""
    return float(limits[0] + (limits[1] - limits[0]) * share)
