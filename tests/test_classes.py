"""Classes and regions: what is stored of a mask, what is written of it, and contradictions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelscale.classes import IGNORED, LESION, MOST_REGIONS, Classes, UnknownValues

NAMES = ("a", "b", "c", "d", "e")


@st.composite
def exclusive(draw: st.DrawFn) -> Classes:
    """One to five classes of one to three values each, some values ignored, some background."""
    pool = draw(st.lists(st.integers(1, 10**6), min_size=10, max_size=20, unique=True))
    count = draw(st.integers(1, 5))
    groups: list[tuple[int, ...]] = []
    for _ in range(count):
        size = draw(st.integers(1, min(3, len(pool) - (count - len(groups) - 1))))
        groups.append(tuple(pool.pop() for _ in range(size)))
        if len(pool) <= count:
            break
    ignore = tuple(pool.pop() for _ in range(draw(st.integers(0, min(2, len(pool))))))
    background = tuple(pool.pop() for _ in range(draw(st.integers(0, min(2, len(pool))))))
    return Classes(names=NAMES[: len(groups)], values=tuple(groups), ignore=ignore, background=background)


def by_definition(classes: Classes, mask: np.ndarray) -> np.ndarray:
    """Voxel by voxel."""
    out = np.zeros(mask.shape, np.int16)
    for place, value in np.ndenumerate(mask):
        for at, group in enumerate(classes.values):
            if value in group:
                out[place] = out[place] | 1 << at if classes.regions else at + 1
        if value in classes.ignore:
            out[place] = -1
    return out


def of_values(classes: Classes, seed: int) -> np.ndarray:
    known = [0, *classes.numbers, *classes.ignore, *classes.background]
    return np.random.default_rng(seed).choice(known, (3, 4, 5)).astype(np.int32)


@given(classes=exclusive(), seed=st.integers(0, 1000))
def test_classes_are_stored_and_written(classes: Classes, seed: int) -> None:
    mask = of_values(classes, seed)
    stored = classes.stored(mask)
    assert stored.dtype == (np.uint8 if classes.plain else np.int16)
    assert np.array_equal(stored, by_definition(classes, mask))
    for name, where in classes.each(stored):
        values = classes.values[classes.names.index(name)]
        assert np.array_equal(where, np.isin(mask, values))
    kept = np.where(stored == IGNORED, 0, stored)  # what is predicted is never ignored
    written = classes.written(kept)
    assert np.array_equal(classes.of_written(written), kept)
    if not classes.single:
        first = {0: 0} | {at + 1: group[0] for at, group in enumerate(classes.values)}
        assert np.array_equal(written, np.vectorize(first.__getitem__)(kept))
    assert Classes.from_dict(classes.to_dict()) == classes


@given(classes=exclusive(), other=st.integers(1, 10**6), seed=st.integers(0, 1000))
def test_an_unknown_value_is_named(classes: Classes, other: int, seed: int) -> None:
    mask = of_values(classes, seed)
    mask[0, 0, 0] = other
    known = {*classes.numbers, *classes.ignore, *classes.background}
    if other in known:
        classes.stored(mask)
        return
    with pytest.raises(UnknownValues) as caught:
        classes.stored(mask)
    assert caught.value.values == (other,)


@given(sizes=st.lists(st.integers(1, 3), min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_nested_regions_are_stored_and_written(sizes: list[int], seed: int) -> None:
    """Each holds all later ones, as nnU-Net's whole tumour, tumour core and enhancing tumour."""
    values = np.random.default_rng(seed).permutation(np.arange(1, 40))[: sum(sizes)].tolist()
    own = [values[sum(sizes[:at]) : sum(sizes[: at + 1])] for at in range(len(sizes))]
    groups = tuple(tuple(v for group in own[at:] for v in group) for at in range(len(own)))
    order = tuple(group[0] for group in own)
    classes = Classes(names=NAMES[: len(own)], values=groups, regions=True, order=order)
    mask = of_values(classes, seed)
    stored = classes.stored(mask)
    assert np.array_equal(stored, by_definition(classes, mask))
    written = classes.written(stored)
    by_order = np.zeros(mask.shape, int)  # nnU-Net's convert_probabilities_to_segmentation
    for at, value in enumerate(order):
        by_order[np.isin(mask, groups[at])] = value
    assert np.array_equal(written, by_order)
    assert np.array_equal(classes.of_written(written), stored)
    assert np.array_equal(classes.stored(written), stored)


@given(
    groups=st.lists(st.sets(st.integers(1, 6), min_size=1, max_size=4), min_size=2, max_size=4),
    order=st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_regions_are_taken_just_where_what_is_written_can_be_read_again(
    groups: list[set[int]], order: list[int]
) -> None:
    values = tuple(tuple(sorted(group)) for group in groups)
    names, given_order = NAMES[: len(groups)], tuple(order[: len(groups)])

    def regions_of(value: int) -> tuple[bool, ...]:
        return tuple(value in group for group in groups)

    def again(value: int) -> tuple[bool, ...]:
        written = 0
        for inside, as_value in zip(regions_of(value), given_order, strict=True):
            written = as_value if inside else written
        return regions_of(written)

    twice = any(one == other for one, other in combinations(groups, 2))
    held = set().union(*groups)
    sound = not twice and all(again(value) == regions_of(value) for value in held)
    try:
        classes = Classes(names=names, values=values, regions=True, order=given_order)
    except ValueError:
        assert not sound
    else:
        assert sound
        mask = of_values(classes, 0)
        assert np.array_equal(classes.stored(classes.written(classes.stored(mask))), classes.stored(mask))


CONTRADICTIONS = {
    "one value, two classes": (dict(names=("a", "b"), values=((1,), (1, 2))), "belongs to both a and b"),
    "one name twice": (dict(names=("a", "a"), values=((1,), (2,))), "two classes have one name"),
    "no values": (dict(names=("a", "b"), values=((1,), ())), "b has no values"),
    "background": (dict(values=((0, 1),)), "0 is no label value"),
    "negative": (dict(values=((-1,),)), "-1 is no label value"),
    "ignored, too": (dict(values=((1,),), ignore=(1,)), "both a class and ignore"),
    "background, too": (dict(values=((1,),), background=(1,)), "both a class and background"),
    "neither": (dict(values=((1,),), background=(2,), ignore=(2,)), "both ignored and background"),
    "no names": (dict(names=(), values=()), "a class needs a name"),
    "no order": (dict(names=("a", "b"), values=((1, 2), (2,)), regions=True), "as many values"),
    "the same region": (
        dict(names=("a", "b"), values=((1, 2), (2, 1)), regions=True, order=(1, 2)),
        "have the same values",
    ),
    "wrong order": (
        dict(names=("a", "b"), values=((2,), (1, 2)), regions=True, order=(2, 1)),
        "writes the value 2 as 1",
    ),
    "many regions": (
        dict(
            names=tuple(map(str, range(MOST_REGIONS + 1))),
            values=tuple((n + 1,) for n in range(MOST_REGIONS + 1)),
            regions=True,
            order=tuple(range(1, MOST_REGIONS + 2)),
        ),
        "at most 15",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions(name: str) -> None:
    arguments, words = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=words):
        Classes(**arguments)  # type: ignore[arg-type]


def test_one_class_is_every_value() -> None:
    mask = np.array([[[0, 1, 7, 70000]]])
    assert LESION.stored(mask).tolist() == [[[0, 1, 1, 1]]]
    assert LESION.stored(mask).dtype == np.uint8
    ignoring = Classes(ignore=(7,))
    assert ignoring.stored(mask).tolist() == [[[0, 1, -1, 1]]]
    assert not ignoring.plain
    assert LESION.written(LESION.stored(mask)).tolist() == [[[0, 1, 1, 1]]]
    with pytest.raises(ValueError, match="0 is no label"):
        Classes.from_dict({**LESION.to_dict(), "ignore": [0]})
    with pytest.raises(TypeError):
        Classes.from_dict({**LESION.to_dict(), "ignore": [True]})
