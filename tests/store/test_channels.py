"""A channel as it is stored, and as the network gets it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from voxelscale.channels import SCHEMES, Channel, Scheme
from voxelscale.geometry import Scan
from voxelscale.samples.batch import Normalisation, normalisation_of
from voxelscale.store.channels import Kept, fill_of, keep
from voxelscale.store.prepare import resample_hu

OF_CT = Normalisation(low=-500, high=300, mean=-100, std=200)


def as_input(values: NDArray[Any], scheme: Scheme) -> NDArray[np.float32]:
    channel = Channel(name="a", scheme=scheme)
    stored, kept = keep(values, channel)
    return normalisation_of(channel, kept, OF_CT)(torch.from_numpy(stored)).numpy()


volumes = arrays(
    st.sampled_from([np.float32, np.float64]),
    array_shapes(min_dims=3, max_dims=3, max_side=5),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
)


@given(volumes)
def test_fifteen_bits_of_the_range_are_kept(values: NDArray[Any]) -> None:
    stored, kept = keep(values, Channel(name="T1", scheme="zscore"))
    again = stored.astype(np.float64) * kept.scale + kept.offset
    span = float(values.max()) - float(values.min())
    rounding = 1e-15 * float(np.abs(values).max())  # of float64
    assert np.abs(again - values).max() <= span / 2**15 / 2 + rounding + 1e-30
    assert kept.low == values.min()
    assert kept.high == values.max()
    assert fill_of(Channel(name="T1", scheme="zscore"), kept) == stored.min()
    assert Kept.from_dict(asdict(kept)) == kept


@given(
    arrays(np.int32, (3, 4, 5), elements=st.integers(-32768, 32767)), st.sampled_from(["<i4", "f4", "i2"])
)
def test_whole_numbers_stay_as_they_are(values: NDArray[Any], kind: str) -> None:
    stored, kept = keep(values.astype(kind), Channel(name="T1", scheme="zscore"))
    assert stored.dtype == np.int16
    assert np.array_equal(stored, values)
    assert (kept.scale, kept.offset) == (1, 0)
    some = values[values != 0] if values.any() else values
    assert kept.mean == pytest.approx(some.mean(dtype=np.float64), abs=1e-6)
    assert kept.std == pytest.approx(some.std(dtype=np.float64), abs=1e-6)


def test_ct_is_what_a_scan_of_hu_always_was() -> None:
    random = np.random.default_rng(0)
    values = random.normal(-600, 2000, (4, 9, 8)).astype(np.float32)
    stored, kept = keep(values, Channel())
    assert np.array_equal(stored, resample_hu(Scan(values, np.eye(4)), (1, 1, 1)).array)
    assert stored.min() == -1024 == fill_of(Channel(), kept)
    assert normalisation_of(Channel(), kept, OF_CT) == OF_CT
    with pytest.raises(ValueError, match="CT"):
        normalisation_of(Channel(), kept, None)


@pytest.mark.parametrize("kind", ["f4", "u2", "i2", "f8"])
def test_every_scheme_by_its_definition(kind: str) -> None:
    random = np.random.default_rng(1)
    values = random.uniform(0, 32000 if kind == "i2" else 60000, (5, 20, 20)).astype(kind)
    values[:2] = 0
    real = values.astype(np.float64)
    some = real[real != 0]
    wanted = {
        "zscore": (real - some.mean()) / some.std(),
        "minmax": (real - real.min()) / (real.max() - real.min()),
        "rgb": real / 255,
        "none": real,
    }
    for scheme, target in wanted.items():
        ours = as_input(values, scheme)  # type: ignore[arg-type]
        assert np.abs(ours - target).max() <= np.ptp(target) / 2**15, scheme


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -3e-40, 1e9 / 3])
@pytest.mark.parametrize("beside", [False, True])
def test_a_constant_case_is_not_divided_by_nothing(scheme: Scheme, value: float, beside: bool) -> None:
    values = np.full((3, 4, 5), value, np.float64)
    values[0] *= not beside
    given = as_input(values, scheme)
    assert np.isfinite(given).all()
    if scheme in ("zscore", "minmax"):
        assert np.abs(given).max() <= 1.001


def test_what_a_table_says_of_a_channel_is_checked() -> None:
    kept = Kept(mean=1.0, std=2.0, low=0.0, high=3.0)
    for wrong in ({"scale": 0}, {"std": -1}, {"mean": float("nan")}, {"low": "a"}):
        with pytest.raises((ValueError, TypeError)):
            Kept.from_dict({**asdict(kept), **wrong})
    with pytest.raises(KeyError):
        Kept.from_dict({})
