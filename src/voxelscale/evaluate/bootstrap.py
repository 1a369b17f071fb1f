"""Intervals and p-values by bootstrap over patients, all of whose scans are drawn together (Efron 1979)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000

MIN_PATIENTS = 5
"""Fewer give no interval and no p-value. n patients have C(2n - 1, n) different bootstrap samples (Hall,
The Bootstrap and Edgeworth Expansion, 1992, appendix I): 35 of 4, 126 of 5. With fewer than
1 / 2.5 % = 40 the ends of a 95 % interval are little more than the smallest and the largest value."""


Units = NDArray[np.int64] | None
"""(scans,) the number of each scan's patient, from 0; None: each scan is a patient's only one."""


def units_of(patients: Sequence[str]) -> Units:
    """The units of scans that are listed by whose they are."""
    if len(set(patients)) == len(patients):
        return None
    return np.unique(patients, return_inverse=True)[1]


def drawn(scans: int, resamples: int, seed: int, units: Units = None) -> Iterator[NDArray[np.int64]]:
    """The scans of each bootstrap sample: of as many patients as there are, drawn with replacement."""
    random = np.random.Generator(np.random.Philox(key=seed))
    if units is None:
        for _ in range(resamples):
            yield random.integers(0, scans, scans)
        return
    patients = int(units.max()) + 1
    of_patient = [np.flatnonzero(units == patient) for patient in range(patients)]
    for _ in range(resamples):
        yield np.concatenate([of_patient[patient] for patient in random.integers(0, patients, patients)])


def resampled_means(
    values: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = 0, units: Units = None
) -> NDArray[np.float64]:
    """Means over bootstrap samples of scans, the same ones that `voxelscale.evaluate.froc.resampled` draws.

    Args:
        values: (..., scans) a figure of each scan, or several.

    Returns:
        (..., resamples).
    """
    samples = drawn(values.shape[-1], resamples, seed, units)
    return np.stack([values[..., scans].mean(axis=-1) for scans in samples], axis=-1)


def percentile_interval(samples: NDArray[np.float64], patients: int = MIN_PATIENTS) -> list[float] | None:
    """The 95 % percentile interval of samples that are not NaN.

    Args:
        patients: how many the samples were drawn from.

    Returns:
        both ends; None where all samples are NaN, or there are fewer patients than `MIN_PATIENTS`.
    """
    known = samples[~np.isnan(samples)]
    if not len(known) or patients < MIN_PATIENTS:
        return None
    return [float(value) for value in np.percentile(known, [2.5, 97.5])]


def p_value(differences: NDArray[np.float64], patients: int = MIN_PATIENTS) -> float | None:
    """Two-sided, from the samples of a difference; None where `percentile_interval` has none.

    Twice the share of samples on the rarer side of 0, the observed one counted among them, so that it is
    never 0 (Davison and Hinkley 1997, chapters 4 and 5); at most 1.
    """
    # Rounded, as equal means differ by their rounding, which has a sign, too.
    known = np.round(differences[~np.isnan(differences)], 12)
    rarer = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    enough = len(known) and patients >= MIN_PATIENTS
    return min(1.0, 2 * (1 + rarer) / (1 + len(known))) if enough else None
