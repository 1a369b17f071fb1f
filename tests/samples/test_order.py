from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from voxelscale.samples.order import item_of, permute


@given(items=st.integers(1, 700), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_every_item_comes_once(items: int, seed: int, epoch: int) -> None:
    order = [item_of(epoch * items + position, items, seed) for position in range(items)]
    assert sorted(order) == list(range(items))


@given(items=st.integers(1, 2**62), share=st.floats(0, 1, exclude_max=True), seed=st.integers())
def test_large_sets_stay_in_range(items: int, share: float, seed: int) -> None:
    position = min(int(share * items), items - 1)
    assert 0 <= permute(position, items, seed) < items


def test_orders_of_four_items_are_equally_likely() -> None:
    epochs = 24 * 100
    counts = Counter(tuple(permute(p, 4, 7, epoch) for p in range(4)) for epoch in range(epochs))
    expected = epochs / 24
    distance = sum((counts[o] - expected) ** 2 / expected for o in itertools.permutations(range(4)))
    assert chi2.sf(distance, 23) > 1e-3


def test_seed_and_epoch_change_the_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [permute(p, 100, seed, epoch) for p in range(100)]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    # Two independent orders of a hundred items agree in one place on average.
    assert all(sum(map(int.__eq__, a, b)) < 10 for a, b in itertools.combinations(orders, 2))


def test_positions_outside_are_refused() -> None:
    with pytest.raises(IndexError, match="not within 5"):
        permute(5, 5, seed=0)
