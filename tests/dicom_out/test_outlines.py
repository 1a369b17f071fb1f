"""Outlines of masks, filled again by Matplotlib and by our own reader of contours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from scipy import ndimage

from voxelscale.dicom_out.outlines import outlines
from voxelscale.labels.contours import inside

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    rows, columns = draw(SHAPES)
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return np.asarray(bits).reshape(rows, columns)


def centres_within(outline: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """By the even-odd rule, Matplotlib's; nudged off the slits of no width, which run along half pixels."""
    index = np.indices(shape).reshape(2, -1).T + 0.013
    return np.asarray(Polygon(outline).contains_points(index)).reshape(shape)


def area(outline: NDArray[Any]) -> float:
    r, c = outline.T
    return float(abs(np.dot(c, np.roll(r, -1)) - np.dot(r, np.roll(c, -1)))) / 2


@given(masks())
def test_an_outline_holds_the_pixels_and_no_others(mask: NDArray[np.bool_]) -> None:
    found = outlines(mask)
    assert len(found) == ndimage.label(mask)[1], "one a piece of pixels that share an edge"
    assert sum(map(area, found)) == mask.sum()
    for outline in found:
        assert np.array_equal(outline * 2, np.rint(outline * 2))
        assert np.array_equal(outline % 1, np.full(outline.shape, 0.5))
    by_others = [centres_within(outline, mask.shape) for outline in found]
    by_us = [inside(outline, mask.shape, uncut=True) for outline in found]
    for filled in (by_others, by_us):
        together = np.sum(filled, axis=0) if filled else np.zeros(mask.shape, int)
        assert np.array_equal(together, mask.astype(int))


@pytest.mark.parametrize("rings", [1, 3])
def test_a_hole_is_cut_out_of_one_outline(rings: int) -> None:
    mask = np.zeros((15, 15), bool)
    mask[1:14, 1:14] = True
    for ring in range(rings):
        mask[3 + 4 * ring : 5 + 4 * ring, 3 + 4 * ring : 5 + 4 * ring] = False
    (outline,) = outlines(mask)
    assert area(outline) == mask.sum()
    assert np.array_equal(inside(outline, (15, 15), uncut=True), mask)


def test_straight_edges_have_two_corners() -> None:
    (outline,) = outlines(np.ones((40, 30), bool))
    assert sorted(map(tuple, outline.tolist())) == [(-0.5, -0.5), (-0.5, 29.5), (39.5, -0.5), (39.5, 29.5)]
