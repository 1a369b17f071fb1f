"""Branching trees that fill a lung: the tubes that look like nodules in cross-section.

Terminals are spread over the lung and joined one by one to the tree so that both the way to the
nearest branch and the way to the root stay short (the balanced minimum spanning tree of Cuntz et
al., PLoS Comput Biol 2010); radii follow Murray's law, r^3 = sum of the branches' r^3 (1926).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxelscale.phantom.canvas import Point

BALANCE = 0.35
STEP_MM = 5.0


@dataclass(frozen=True)
class Tree:
    """Points in mm, each with its parent's number (the root's is -1) and its radius in mm."""

    points: NDArray[np.float64]
    parents: NDArray[np.int64]
    radii: NDArray[np.float64]

    def tubes(self, least: float = 0.0) -> list[tuple[Point, Point, float, float]]:
        """Its segments of at least this radius, for `Canvas.tubes`."""
        return [
            (self.points[parent], self.points[i], float(self.radii[parent]), float(self.radii[i]))
            for i, parent in enumerate(self.parents)
            if parent >= 0 and self.radii[i] >= least
        ]


def grow(random: np.random.Generator, root: Point, terminals: NDArray[np.float64], thinnest: float) -> Tree:
    """A tree from `root` to all `terminals` (n, 3), whose twigs have radius `thinnest`, mm."""
    capacity = 1 + len(terminals) * 40
    points, ways = np.empty((capacity, 3)), np.empty(capacity)
    parents = np.full(capacity, -1)
    points[0], ways[0], count = root, 0.0, 1
    # Near ones first, so that trunks exist before the twigs that hang on them.
    for number in np.argsort(np.linalg.norm(terminals - root, axis=1)):
        goal = terminals[number]
        apart = np.linalg.norm(points[:count] - goal, axis=1)
        start = int(np.argmin(apart + BALANCE * (ways[:count] + apart)))
        steps = min(max(1, int(apart[start] / STEP_MM)), 39)
        bend = random.normal(0, 0.06 * apart[start], 3)
        origin, parent = points[start].copy(), start
        for t in np.linspace(0, 1, steps + 1)[1:]:
            points[count] = origin + t * (goal - origin) + np.sin(np.pi * t) * bend
            ways[count] = ways[parent] + np.linalg.norm(points[count] - points[parent])
            parents[count], parent, count = parent, count, count + 1
    return Tree(points[:count], parents[:count], _murray(parents[:count], thinnest))


def _murray(parents: NDArray[np.int64], thinnest: float) -> NDArray[np.float64]:
    twigs = np.ones(len(parents))
    twigs[parents[parents >= 0]] = 0
    # Children always come after their parents.
    for i in range(len(parents) - 1, 0, -1):
        twigs[parents[i]] += twigs[i]
    radii: NDArray[np.float64] = thinnest * np.cbrt(twigs)
    return radii
