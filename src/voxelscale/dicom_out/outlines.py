"""From pixels to closed outlines along their edges: filled, they are the same pixels again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Corner = tuple[int, int]
Loop = list[Corner]


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """One closed outline around each piece of a mask, its holes cut out through slits of no width.

    Pixels that touch at a corner only are pieces of their own. So every outline can be filled by the
    even-odd rule, alone, and holds the centres of the mask's pixels and no others (PS3.3 C.8.8.6.3 asks
    for holes to be drawn so).

    Args:
        mask: (row, column).

    Returns:
        (n, 2) corners as (row, column) in pixels, at halves; closed by themselves.
    """
    loops = _loops(mask)
    outer = [loop for loop in loops if _area(loop) > 0]
    holes = sorted((loop for loop in loops if _area(loop) < 0), key=lambda loop: min(c[::-1] for c in loop))
    for hole in holes:
        _cut(outer, hole)
    return [_straight(loop) for loop in outer]


def _loops(mask: NDArray[np.bool_]) -> list[Loop]:
    """The edges between pixels inside and outside as closed loops of corners, the inside on one side.

    Corner (r, c) is the upper left one of pixel (r, c).
    """
    inside = np.pad(mask, 1)
    following: dict[Corner, list[Corner]] = {}

    def edges(there: NDArray[np.bool_], begin: Corner, end: Corner) -> None:
        for r, c in np.argwhere(there).tolist():
            following.setdefault((r + begin[0], c + begin[1]), []).append((r + end[0], c + end[1]))

    core = inside[1:-1, 1:-1]
    edges(core & ~inside[:-2, 1:-1], (0, 0), (0, 1))  # above: to the right
    edges(core & ~inside[1:-1, 2:], (0, 1), (1, 1))  # right: down
    edges(core & ~inside[2:, 1:-1], (1, 1), (1, 0))  # below: to the left
    edges(core & ~inside[1:-1, :-2], (1, 0), (0, 0))  # left: up
    loops = []
    while following:
        first = min(following)
        loop, last, here = [first], first, following[first][0]
        _take(following, first, here)
        while here != first:  # two pixels never touch at the first corner of all
            loop.append(here)
            step = _next(following, last, here)
            _take(following, here, step)
            last, here = here, step
        loops.append(loop)
    return loops


def _take(following: dict[Corner, list[Corner]], begin: Corner, end: Corner) -> None:
    following[begin].remove(end)
    if not following[begin]:
        del following[begin]


def _next(following: dict[Corner, list[Corner]], last: Corner, here: Corner) -> Corner:
    """Where the loop goes on: of two ways the one to the right, which stays at the same pixel."""
    ways = following[here]
    if len(ways) == 1:
        return ways[0]
    step = here[0] - last[0], here[1] - last[1]
    right = here[0] + step[1], here[1] - step[0]
    return right if right in ways else ways[0]


def _area(loop: Loop) -> float:
    """Above 0 of a loop around pixels, below 0 of one around a hole."""
    r, c = np.asarray(loop, np.float64).T
    return float(np.dot(c, np.roll(r, -1)) - np.dot(r, np.roll(c, -1))) / 2


def _cut(outer: list[Loop], hole: Loop) -> None:
    """Join a hole to the loop around it: to the left from its leftmost corner until there is a loop."""
    row, column = min(hole, key=lambda corner: (corner[1], corner[0]))
    best: tuple[int, int, int] | None = None  # column, loop, index
    for number, loop in enumerate(outer):
        for index, (r, c) in enumerate(loop):
            if r == row and c <= column and (best is None or c > best[0]):
                best = (c, number, index)
    assert best is not None  # noqa: S101 - something surrounds a hole
    _, number, index = best
    loop, at = outer[number], hole.index((row, column))
    outer[number] = [*loop[: index + 1], *hole[at:], *hole[: at + 1], *loop[index:]]


def _straight(loop: Loop) -> NDArray[np.float64]:
    """The loop's corners at which it turns, those of pixel centres at whole numbers."""
    points = np.asarray(
        [c for c, last in zip(loop, [loop[-1], *loop], strict=False) if c != last], np.float64
    )
    back, forth = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns = (back[:, 0] * forth[:, 1] != back[:, 1] * forth[:, 0]) | ((back * forth).sum(axis=1) < 0)
    kept: NDArray[np.float64] = points[turns] - 0.5
    return kept
