"""Outlines with very many crossings are filled by another way than others, and to the same voxels."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from voxelscale.labels import contours
from voxelscale.labels.contours import inside


@pytest.mark.parametrize("whole", [True, False], ids=["on pixel centres", "between them"])
def test_both_ways_give_the_same_pixels(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    random = np.random.default_rng(0)
    for count in (3, 4, 9, 200):
        outline = random.uniform(-5, 45, (count, 2))
        outline = np.rint(outline) if whole else outline
        monkeypatch.setattr(contours, "DENSE", 2**40)
        pairwise = inside(outline, (40, 36))
        monkeypatch.setattr(contours, "DENSE", 0)
        assert np.array_equal(inside(outline, (40, 36)), pairwise)
        assert count == 3 or pairwise.any()


def test_an_outline_that_goes_to_and_fro_takes_little_memory() -> None:
    teeth = np.linspace(5.25, 200.25, 20_001)
    outline = np.column_stack([teeth, np.where(np.arange(len(teeth)) % 2, 4.5, 60.5)])
    tracemalloc.start()
    found = inside(outline, (256, 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20
    assert found[6:200, 5:60].any()
    assert not found[:5].any()
    assert not found[202:].any()
