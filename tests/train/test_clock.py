"""Every sample once, whatever the number of workers, and whoever computes it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelscale.errors import VoxelscaleError
from voxelscale.train.clock import Clock

runs = st.tuples(
    st.integers(1, 3000), st.sampled_from([1, 2, 3, 6, 8, 64]), st.integers(1, 4), st.integers(0, 16)
)


@given(runs, st.floats(0.05, 0.9))
def test_every_sample_once(run: tuple[int, int, int, int], share: float) -> None:
    samples, workers, batch, grow_from = run
    clock = Clock(samples, workers, batch, grow_from, share)
    steps = list(clock.steps(0))
    dealt = [i for step in steps for slot in range(step.slots) for i in step.indices(slot)]
    assert sorted(dealt) == list(range(clock.end))
    assert samples <= clock.end < samples + workers * batch
    assert [step.number for step in steps] == list(range(clock.updates))
    sizes = [step.slots for step in steps]
    assert sizes == sorted(sizes)
    assert all(workers % slots == 0 for slots in sizes)


@given(runs, st.sampled_from([1, 2, 3, 4]))
def test_ranks_share_an_update_with_weights_of_one(run: tuple[int, int, int, int], ranks: int) -> None:
    samples, virtual, batch, grow_from = run
    world = ranks * virtual
    for step in list(Clock(samples, world, batch, grow_from, 0.5).steps(0))[:20]:
        weights: Counter[int] = Counter()
        for rank in range(ranks):
            share = step.share(range(rank * virtual, (rank + 1) * virtual))
            assert sum(weight for _, weight in share) == pytest.approx(1)
            for indices, weight in share:
                for index in indices:
                    weights[index] += weight / ranks  # type: ignore[assignment]
        # Averaged over ranks every sample weighs the same.
        assert set(weights) == set(range(step.first, step.end))
        assert list(weights.values()) == pytest.approx([1 / step.slots] * len(weights))


def test_growing_by_hand() -> None:
    """40 % of 600 samples at 4 and 8 of 16 workers: 20 updates each, then 360 samples by 16."""
    clock = Clock(600, 16, 1, grow_from=4, grow_share=0.4)
    sizes = [step.slots for step in clock.steps(0)]
    assert sizes == [4] * 20 + [8] * 20 + [16] * 23
    assert clock.updates == 63
    assert clock.end == 240 + 23 * 16


def test_going_on_at_any_update() -> None:
    clock = Clock(600, 16, 1, grow_from=4, grow_share=0.4)
    steps = list(clock.steps(0))
    for at in (0, 1, 25, 41, 60):
        assert list(clock.steps(steps[at].first)) == steps[at:]
    assert list(clock.steps(clock.end)) == []
    with pytest.raises(VoxelscaleError, match="within a batch of 4"):
        clock.steps(2)
