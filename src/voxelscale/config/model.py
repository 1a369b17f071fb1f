"""The section `model` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxelscale.config.section import Rule, Section


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network."""

    name: str = "unet"
    """unet, or a network that an installed package registers (entry points ``voxelscale.models``)."""
    dims: Literal[2, 3] = 3
    """2: slices; 3: volumes."""
    depth: int = 4
    """Resolution levels of the U-Net, including the bottom; each halves the resolution of the one above."""
    filters: int = 16
    """Channels of the first level; each level below has twice as many."""
    max_filters: int = 320
    """Maximum number of channels of a level."""
    kernel_size: int = 3
    """Edge of the convolutions' kernels; odd."""
    norm: Literal["instance", "batch", "sync_batch", "group", "none"] = "instance"
    """Normalisation after each convolution."""
    residual: bool = False
    """Whether each level's two convolutions have a residual (skip) connection around them."""

    def rules(self) -> Sequence[Rule]:
        return [
            ("depth", self.depth >= 1, "at least 1"),
            ("filters", self.filters >= 1, "at least 1"),
            ("kernel_size", self.kernel_size >= 1 and self.kernel_size % 2 == 1, "odd"),
        ]
