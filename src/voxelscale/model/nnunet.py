"""What a model from nnU-Net says beyond one of ours, so that it is used as nnU-Net uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voxelscale.config import IntTriple


@dataclass(frozen=True, kw_only=True)
class NnunetRules:
    """How nnU-Net's preprocessor treats a scan (`voxelscale.predict.nnunet`).

    Attributes:
        axes: which axis of the scan's array, as its file has it, is the network's first, second and third
            (``transpose_forward``).
        masked: of each channel whether its mean and standard deviation are of the voxels within the body,
            which is all that is not 0 and its holes, and what is outside stays 0 (``use_mask_for_norm``).
        ras: whether a scan is first turned so that its axes run to the patient's right, front and head;
            otherwise it stays as its file has it.
    """

    axes: IntTriple = (0, 1, 2)
    masked: tuple[bool, ...]
    ras: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"axes": list(self.axes), "masked": list(self.masked), "ras": self.ras}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> NnunetRules:
        """What `to_dict` made.

        Raises:
            ValueError, TypeError, KeyError: it is nothing of the kind.
        """
        axes, masked, ras = tuple(tree["axes"]), tuple(tree["masked"]), tree["ras"]
        if any(isinstance(axis, bool) for axis in axes) or sorted(axes) != [0, 1, 2]:
            raise ValueError(f"no order of three axes: {axes}")
        if not all(isinstance(one, bool) for one in (*masked, ras)):
            raise ValueError(f"neither true nor false: {masked}")
        z, y, x = axes
        return cls(axes=(z, y, x), masked=masked, ras=ras)
