"""Normalised and augmented micro-batches, on the training device.

Each sample's result depends on that sample alone, so that it is the same in any batch on any rank. A
sample costs what it drew: nothing is computed over the batch that only some of it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from voxelscale.channels import Channel
from voxelscale.config import IntTriple
from voxelscale.device import upload
from voxelscale.samples.patches import Sample
from voxelscale.samples.transforms.affine import warp, warp_labels
from voxelscale.samples.transforms.mirror import mirror
from voxelscale.store import Store
from voxelscale.store.channels import Kept

LEAST_STD = 0.01
"""Steps of stored values; a smaller standard deviation is that of a constant."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """HU to network input: clip to [low, high], subtract the mean, divide by the std (nnU-Net's for CT).

    Attributes:
        low, high, mean, std: HU.
    """

    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of_fingerprint(cls, lesion_hu: dict[str, float]) -> Normalisation:
        """From a store's ``fingerprint["lesion_hu"]``."""
        return cls(
            low=lesion_hu["percentile_00_5"],
            high=lesion_hu["percentile_99_5"],
            mean=lesion_hu["mean"],
            std=lesion_hu["std"],
        )

    def __call__(self, hu: Tensor) -> Tensor:
        """HU of any shape and number type to float32, always a copy."""
        values = hu.to(torch.float32, copy=True)
        return self.standardise(values.clamp_(self.low, self.high))

    def standardise(self, clipped: Tensor) -> Tensor:
        """The second half, in place."""
        return clipped.sub_(self.mean).div_(self.std)


def normalisation_of(channel: Channel, kept: Kept | None, of_ct: Normalisation | None) -> Normalisation:
    """How a case's channel becomes network input, in units of the stored values.

    Args:
        kept: for channels that are no CT.
        of_ct: of the training set's lesions, for channels of CT.

    Raises:
        ValueError: what the channel needs is not there.
    """
    if channel.scheme == "ct":
        if of_ct is None:
            raise ValueError(f"no range of HU for the channel {channel.name}")
        return of_ct
    if kept is None:
        raise ValueError(f"no range of values for the channel {channel.name}")
    span = kept.high - kept.low
    # A constant case, or one that is constant where it is not 0, must not be divided by nothing.
    mean, std = {
        "zscore": (kept.mean, kept.std if kept.std >= LEAST_STD * kept.scale else span),
        "minmax": (kept.low, span),
        "rgb": (0.0, 255.0),
        "none": (0.0, 1.0),
    }[channel.scheme]
    return Normalisation(
        low=-math.inf,
        high=math.inf,
        mean=(mean - kept.offset) / kept.scale,
        std=std / kept.scale or 1.0,
    )


Normalisations = Callable[[str], Sequence[Normalisation]]
"""A case's name to how each of its channels becomes network input."""


def ct_normalisations(store: Store) -> tuple[Normalisation | None, ...]:
    """Of each channel of a store that is CT; None of the others."""
    first = store.fingerprint["lesion_hu"] if store.channels[0].scheme == "ct" else None
    each = store.fingerprint.get("channel_hu", [first])
    return tuple(Normalisation.of_fingerprint(hu) if hu else None for hu in each)


def normalisations(store: Store) -> Normalisations:
    """Of the cases of a store."""
    of_ct, count = ct_normalisations(store), len(store.channels)
    each = {
        info.case: tuple(map(normalisation_of, store.channels, info.channels or [None] * count, of_ct))
        for info in store.cases
    }
    return each.__getitem__


def prepared(each: Sequence[Normalisation]) -> Callable[[Tensor], Tensor]:
    """Stored values ``(batch, c, ...)`` to network input, float32, by the normalisation of each channel."""
    if len(each) == 1:
        return each[0]
    return lambda stored: torch.stack([how(stored[:, at]) for at, how in enumerate(each)], dim=1)


def make_batch(
    samples: Sequence[Sample], patch: IntTriple, normalise: Normalisations, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Samples to the network's input and target.

    Returns:
        images ``(batch, c, z, y, x)`` float32 and stored labels ``(batch, 1, z, y, x)`` float32, 0 and 1 of
        one class; both on `device`.
    """
    channels = len(samples[0].region) - 1
    image = torch.empty((len(samples), channels, *patch), device=device)
    target = torch.zeros((len(samples), 1, *patch), device=device)
    for row, sample in enumerate(samples):
        plan, labels, matrix = sample.augmentation, sample.labels, sample.augmentation.turn
        stored = upload(torch.from_numpy(sample.region if labels else sample.region[:-1]), device)
        for channel, how in enumerate(normalise(sample.case)):
            if matrix is None:
                out = image[row, channel].copy_(mirror(stored[channel], plan.mirrored))
                out = out.clamp_(how.low, how.high)
            else:
                out = warp(stored[channel].float().clamp_(how.low, how.high), matrix, patch)
            out = how.standardise(out)
            for transform in plan.intensity:
                out = transform(out, channel)
            image[row, channel] = out
        if not labels:
            continue
        if matrix is None:
            target[row, 0] = mirror(stored[-1], plan.mirrored)
        else:
            warp_labels(stored[-1], labels, matrix, target[row, 0])
    return image, target
