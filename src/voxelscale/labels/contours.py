"""From outlines to voxels."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

DENSE = 2**16
"""Crossings times pixels up to which each pair is looked at: faster than a search, but memory for all."""


def inside(outline: ArrayLike, shape: tuple[int, int], *, uncut: bool = False) -> NDArray[np.bool_]:
    """Which pixel centres of a plane lie inside a closed outline.

    The crossing test of E. Haines, "Point in polygon strategies", Graphics Gems IV (1994), which is
    Matplotlib's, and so pylidc's, in the same order of axes: points on the outline fall on one side of
    it by the same rule.

    Args:
        outline: (n, 2) in pixels, along the plane's first and second axis; closed by itself.
        shape: pixels along both.
        uncut: whether edges that are drawn there and back, as the cut between a region and its hole, do not
            count. Otherwise pixel centres exactly on such a cut may be wrong.
    """
    points = np.asarray(outline, np.float64)
    mask = np.zeros(shape, np.bool_)
    if len(points) < 3:
        return mask
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    first = max(0, int(np.floor(points[:, 0].min())))
    last = min(shape[0], int(np.ceil(points[:, 0].max())) + 1)
    x = np.arange(first, last)
    low, high = max(0, int(np.floor(y0.min()))), min(shape[1], int(np.ceil(y0.max())) + 1)
    if uncut and (kept := _uncut(points)) is not None:
        x0, y0, x1, y1 = x0[kept], y0[kept], x1[kept], y1[kept]
    for y in range(low, high):
        up = y1 >= y
        crossing = np.flatnonzero((y0 >= y) != up)
        edges = _chosen((x0, y0, x1, y1, up), crossing)
        if len(crossing) * len(x) <= DENSE:
            odd = _before(x, y, *_chosen(edges, np.s_[:, None])).sum(axis=0) % 2 == 1
        else:
            odd = _odd_by_search(first, last, y, edges)
        mask[first:last, y] = odd
    return mask


Floats = NDArray[np.float64]
Edges = tuple[Floats, Floats, Floats, Floats, NDArray[np.bool_]]


def _chosen(edges: Edges, which: NDArray[np.intp] | tuple[slice, None]) -> Edges:
    """Every array indexed alike: some of the edges, or all as a column."""
    a, b, c, d, up = edges
    return a[which], b[which], c[which], d[which], up[which]


def _uncut(points: NDArray[np.float64]) -> NDArray[np.intp] | None:
    """The edges, each from a point to the next, that no other edge runs back; None: all of them."""
    begin = np.rint(points * 1000) @ np.array([1, 1j])
    if len(np.unique(begin)) == len(begin):
        return None  # without a point that comes twice there is no way back
    end = np.roll(begin, -1)
    back = (end.real < begin.real) | ((end.real == begin.real) & (end.imag < begin.imag))
    low, high = np.where(back, end, begin), np.where(back, begin, end)
    order = np.lexsort((high.imag, high.real, low.imag, low.real))
    low, high, sign = low[order], high[order], np.where(back, -1, 1)[order]
    group = np.cumsum(np.append(0, (low[1:] != low[:-1]) | (high[1:] != high[:-1])))
    odd, net = np.bincount(group) % 2 == 1, np.bincount(group, sign)
    # Of an edge drawn an odd number of times one is left, in the direction that prevails.
    left = odd[group] & (sign * net[group] > 0)
    _, first = np.unique(group[left], return_index=True)
    return np.sort(order[left][first])


def _before(
    x: NDArray[np.int64], y: int, a: Floats, b: Floats, c: Floats, d: Floats, up: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether the edge from (a, b) to (c, d) crosses line y at or beyond x."""
    before: NDArray[np.bool_] = ((d - y) * (a - c) >= (c - x) * (b - d)) == up
    return before


def _odd_by_search(first: int, last: int, y: int, edges: Edges) -> NDArray[np.bool_]:
    """Which x of [first, last) lie before an odd number of the crossings.

    Of each crossing, what lies before it ends at one x, rounding included: that is where the crossing
    is computed to be, or found by halving where the two pixels around there say otherwise.
    """
    end = _near(first, last, y, edges)
    settled = ((end == first) | _before(end - 1, y, *edges)) & ((end == last) | ~_before(end, y, *edges))
    doubtful = np.flatnonzero(~settled)
    if len(doubtful):
        end[doubtful] = _end_by_halving(first, last, y, _chosen(edges, doubtful))
    ended = np.cumsum(np.bincount(end - first, minlength=last - first + 1))[:-1]
    odd: NDArray[np.bool_] = (len(end) - ended) % 2 == 1
    return odd


def _near(first: int, last: int, y: int, edges: Edges) -> NDArray[np.int64]:
    """The first x in [first, last] beyond each crossing, as far as roundings let it be computed."""
    a, b, c, d, _ = edges
    at = a + (y - b) / (d - b) * (c - a)
    return np.floor(np.clip(at, first - 1, last - 1)).astype(np.int64) + 1


def _end_by_halving(first: int, last: int, y: int, edges: Edges) -> NDArray[np.int64]:
    """Where in [first, last] what lies before each crossing ends."""
    low = np.full(len(edges[0]), first)
    high = np.full(len(edges[0]), last)
    while (undecided := low < high).any():
        middle = (low + high) // 2
        before = _before(middle, y, *edges)
        low = np.where(undecided & before, middle + 1, low)
        high = np.where(undecided & ~before, middle, high)
    return low
