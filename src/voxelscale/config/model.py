"""The section `model` of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from voxelscale.config.section import IntTriple, Rule, Section

MOST_BLOCKS = 64
"""Residual blocks of a level."""

RESENC_FILTERS = 32
RESENC_MAX_FILTERS = {2: 512, 3: 320}
RESENC_BLOCKS = (1, 3, 4, 6)
"""Residual blocks of each level of nnU-Net's residual encoders; the last of all further ones."""


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
    downsampling: Literal["max", "strided"] = "max"
    """How the plain encoder halves the resolution: by max-pooling, or by a stride of the next level's first
    convolution, as nnU-Net."""
    kernels: tuple[IntTriple, ...] = ()
    """Kernel (z, y, x) of each level, from the first to the bottom, where they are not model.kernel_size
    throughout; []: they are."""
    blocks: tuple[int, ...] = ()
    """Residual encoder: residual blocks of each level of the encoder, from the first to the bottom (nnU-Net
    has [1, 3, 4, 6, 6, 6]); []: the plain encoder, or that of model.preset."""
    preset: Literal["none", "resenc_m", "resenc_l", "resenc_xl"] = "none"
    """A published network: nnU-Net's residual encoders M, L and XL (32 filters, [1, 3, 4, 6, 6, 6, ...]
    blocks). They differ in the memory that prepare plans their patch for: 8, 24 and 40 GB."""
    deep_supervision: bool = False
    """Whether the loss is also computed at the lower resolutions of the decoder, with half the weight from
    level to level, as in nnU-Net. The trained network is the same."""

    @property
    def settled(self) -> ModelConfig:
        """The same with the values that the preset stands for.

        Source: nnU-Net's ``ResEncUNetPlanner`` (``nnunetv2`` 2.8.1).
        """
        if self.preset == "none":
            return self
        blocks = tuple(RESENC_BLOCKS[min(level, len(RESENC_BLOCKS) - 1)] for level in range(self.depth))
        return replace(
            self,
            preset="none",
            blocks=blocks,
            filters=RESENC_FILTERS,
            max_filters=RESENC_MAX_FILTERS[self.dims],
        )

    def of_depth(self, depth: int) -> ModelConfig:
        """The same with another depth: what is given by level is cut, or goes on as at the bottom."""
        lists = {"kernels": self.kernels, "blocks": self.blocks}
        fitted = {key: (*each[:depth], *each[-1:] * (depth - len(each))) for key, each in lists.items()}
        return replace(self, depth=depth, **fitted)  # type: ignore[arg-type]

    def rules(self) -> Sequence[Rule]:
        each = "[], or one of each level (model.depth)"
        kernels, blocks, preset = self.kernels, self.blocks, self.preset != "none"
        filters = (ModelConfig.filters, RESENC_FILTERS)
        most = (ModelConfig.max_filters, RESENC_MAX_FILTERS[self.dims])
        own = not preset or (self.filters in filters and self.max_filters in most)
        return [
            ("depth", self.depth >= 1, "at least 1"),
            ("filters", self.filters >= 1, "at least 1"),
            ("max_filters", self.max_filters >= 1, "at least 1"),
            ("kernel_size", self.kernel_size >= 1 and self.kernel_size % 2 == 1, "odd"),
            ("kernels", all(edge > 0 and edge % 2 for kernel in kernels for edge in kernel), "odd"),
            ("kernels", len(kernels) in (0, self.depth), each),
            ("blocks", all(1 <= n <= MOST_BLOCKS for n in blocks), f"at least 1, at most {MOST_BLOCKS}"),
            ("blocks", len(blocks) in (0, self.depth), each),
            ("blocks", not (blocks and self.residual), "[] where model.residual is true"),
            (
                "preset",
                not preset or not (blocks or self.residual),
                "none where blocks or residual are set",
            ),
            (
                "downsampling",
                self.downsampling == "max" or not (blocks or preset or self.residual),
                "max where blocks, preset or residual are set",
            ),
            ("preset", not preset or self.norm == "instance", "none where model.norm is not instance"),
            ("preset", own, "none where filters or max_filters are set: it has its own"),
        ]
