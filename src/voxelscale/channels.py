"""What the channels of an image are, and how each is normalised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Scheme = Literal["ct", "zscore", "minmax", "rgb", "none"]
"""How a channel is normalised.

ct: clipped to the lesions' range of HU over the training set, less its mean, over its standard deviation.
zscore: less the mean of the case, over its standard deviation (of the voxels that are not 0).
minmax: the case's minimum is 0, its maximum 1. rgb: 255 is 1. none: as it is.
"""

AIR_HU = -1024
"""Value beyond the borders of a CT."""

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

_CT = "(cb|ce|hr|ld|nc)?cta?"
"""CT, CTA, and cone-beam, contrast-enhanced, high-resolution, low-dose and non-contrast CT."""

_OF_NNUNET: dict[str, Scheme] = {
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "minmax",
    "rgb_to_0_1": "rgb",
}
"""nnU-Net's names of channels that name a normalisation (its ``default_normalization_schemes``)."""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One channel of an image.

    Attributes:
        name: as the data set calls it.
        scheme: how it is normalised.
    """

    name: str = "CT"
    scheme: Scheme = "ct"

    def to_dict(self) -> dict[str, str]:
        """Plain values."""
        return {"name": self.name, "scheme": self.scheme}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Channel:
        """What `to_dict` made.

        Raises:
            ValueError, KeyError: it is nothing of the kind.
        """
        name, scheme = tree["name"], tree["scheme"]
        if not isinstance(name, str) or not name.isprintable() or scheme not in SCHEMES:
            raise ValueError(f"no channel: {name!r}, {scheme!r}")
        return cls(name=name, scheme=scheme)


ONE_CT = (Channel(),)
"""What a data set has that does not say otherwise."""


def channel_of(name: str) -> Channel:
    """The channel of this name, normalised as nnU-Net chooses: CT by its HU, others by z-score."""
    known = _OF_NNUNET.get(name.strip().casefold())
    is_ct = re.search(rf"(?<![a-z0-9]){_CT}(?![a-z0-9])", name.casefold()) is not None
    return Channel(name=name, scheme=known or ("ct" if is_ct else "zscore"))
