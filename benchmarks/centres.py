"""A network that keeps its heat map of lesions' centres, for benchmarks/detection.py: do peaks find more?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from voxelscale.config import Config
from voxelscale.data.augment import Normalisation, centre_maps, make_batch
from voxelscale.data.lungs import lung_field
from voxelscale.data.patches import PatchSource, Sample
from voxelscale.data.store import open_store
from voxelscale.geometry import Grid, Scan
from voxelscale.model.build import build_model
from voxelscale.model.losses import centre_loss, dice_cross_entropy
from voxelscale.predict.findings import Finding
from voxelscale.predict.sliding_window import Windows, predict_volume
from voxelscale.train import fit

KIND = "-centres"
"""Of a file with a heat map."""
LEAST = 0.05
"""Height of a peak that is a finding."""
APART_MM = 6.0
"""Peaks nearer to each other are one."""


def train(config: Config, store_path: Path, run: Path) -> nn.Module:
    """The trained network with both outputs."""
    store = open_store(store_path)
    normalise = Normalisation.of_fingerprint(store.fingerprint["lesion_hu"])
    patch, cpu = config.data.patch_size, torch.device("cpu")

    def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        image, mask = make_batch(samples, patch, normalise, cpu, config.train.seed)
        return image, torch.cat([mask, centre_maps(samples, patch, store.spacing, cpu)], 1)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        of_mask, _ = dice_cross_entropy(
            logits[:, :1], target[:, :1], cross_entropy=config.loss.cross_entropy
        )
        return of_mask + config.loss.centres * centre_loss(logits[:, 1:], target[:, 1:])

    torch.manual_seed(config.train.seed)
    network = build_model(config.model, patch, store.spacing, centres=True)
    source = PatchSource(store, config.data, config.augment, config.train.seed)
    fit(network, loss, source, config, run=run, collate=collate)
    return network.train()  # in evaluation there is no heat map; instance norm is the same


class _Output(nn.Module):
    """One channel of a network's output."""

    def __init__(self, network: nn.Module, channel: int) -> None:
        super().__init__()
        self.network, self.channel = network, channel

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, ...)`` to the same shape."""
        return self.network(x)[:, self.channel, None]  # type: ignore[no-any-return]


def look(
    network: nn.Module, config: Config, store_path: Path, image: Scan
) -> dict[str, NDArray[np.float32]]:
    """Mask ("") and heat map (`KIND`) of a scan that has the store's spacing, in the lungs' box."""
    normalise = Normalisation.of_fingerprint(open_store(store_path).fingerprint["lesion_hu"])
    start, shape = lung_field(image).box
    box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    windows = Windows(patch=config.data.patch_size, overlap=config.predict.overlap)
    volume = torch.from_numpy(np.ascontiguousarray(image.array[box]))
    maps = {}
    for channel, kind in enumerate(("", KIND)):
        whole = np.zeros(image.array.shape, np.float32)
        whole[box] = predict_volume(_Output(network, channel), volume, windows, prepare=normalise).numpy()
        maps[kind] = whole
    return maps


def peaks_of(
    findings: Sequence[Finding], heat: NDArray[np.float32], grid: Grid, case: str
) -> list[Finding]:
    """Every peak of the heat map as a finding, in the place of the mask's finding that is near it."""
    reach = [2 * round(APART_MM / 2 / step) + 1 for step in grid.spacing]
    peaks = np.argwhere((heat == ndimage.maximum_filter(heat, reach)) & (heat >= LEAST))
    there = []
    for peak in peaks:
        place = np.asarray(grid.index_to_mm(peak), np.float64)
        near = [p for f in findings if np.linalg.norm((p := np.array([f.x, f.y, f.z])) - place) <= APART_MM]
        x, y, z = (float(v) for v in (near[0] if near else place))
        there.append(
            Finding(
                case=case,
                x=x,
                y=y,
                z=z,
                index=(float(peak[0]), float(peak[1]), float(peak[2])),
                diameter_mm=APART_MM,
                axial_diameter_mm=APART_MM,
                volume_mm3=0.0,
                probability=float(heat[tuple(peak)]),
            )
        )
    return there
