"""A second output for benchmarks/detection.py: a heat map of lesions' centres beside the mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from voxelscale.config import Config
from voxelscale.findings import Finding
from voxelscale.geometry import Grid, Scan, Triple
from voxelscale.infer.sliding_window import Windows, predict_volume
from voxelscale.lungs import lung_field
from voxelscale.model.unet import UNet, plan_pooling
from voxelscale.samples.batch import Normalisation
from voxelscale.samples.patches import Sample
from voxelscale.store import open_store
from voxelscale.train import fit
from voxelscale.train.loop import patch_task

KIND = "-centres"
"""Of a file with a heat map."""
SIGMA_MM = 4.0
WEIGHT = 0.25
"""Of the heat map's loss: at first it is about 4.5, the mask's 1.3."""
LEAST = 0.05
"""Height of a peak that is a finding."""
APART_MM = 6.0
"""Peaks nearer to each other are one."""


def heat_map(mask: NDArray[np.bool_], spacing: Triple) -> NDArray[np.float32]:
    """1 at the centre of every lesion of a patch and a Gaussian around it, the greatest of all lesions'."""
    numbers, count = ndimage.label(mask, np.ones((3, 3, 3)))
    heat = np.zeros(mask.shape, np.float32)
    places = np.indices(mask.shape, np.float32)
    for centre in ndimage.center_of_mass(mask, numbers, range(1, count + 1)):
        offsets = [(p - round(c)) * s for p, c, s in zip(places, centre, spacing, strict=True)]
        squares = sum(o**2 for o in offsets)
        np.maximum(heat, np.exp(-squares / (2 * SIGMA_MM**2)), out=heat)
    return heat


def focal_loss(x: Tensor, heat: Tensor) -> Tensor:
    """Of a heat map's logits (Law and Deng, "CornerNet", 2018), the mean over samples.

    Args:
        x, heat: ``(batch, z, y, x)``, logits and what they should be.
    """
    p = x.sigmoid()
    peak = (heat == 1).float()
    found = peak * (1 - p) ** 2 * nn.functional.logsigmoid(x)
    quiet = (1 - peak) * (1 - heat) ** 4 * p**2 * nn.functional.logsigmoid(-x)
    focal = -(found + quiet).flatten(1).sum(1) / peak.flatten(1).sum(1).clamp_min(1)
    return focal.mean()


def train(config: Config, store_path: Path, run: Path) -> nn.Module:
    """The trained network of two outputs, in evaluation mode."""
    store = open_store(store_path)
    task = patch_task(config, store, torch.device("cpu"))

    def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        image, mask = task.collate(samples)
        heats = [torch.from_numpy(heat_map(one[0].numpy() > 0, store.spacing))[None] for one in mask]
        return image, torch.cat([mask, torch.stack(heats)], 1)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        of_mask = task.loss(logits[:, :1], target[:, :1])[0]
        return of_mask + WEIGHT * focal_loss(logits[:, 1], target[:, 1])

    torch.manual_seed(config.train.seed)
    model = config.model
    pools = plan_pooling(config.data.patch_size, store.spacing, model.depth)
    network = UNet(classes=2, depth=model.depth, filters=model.filters, norm=model.norm, pools=pools)
    fit(network, loss, task.source, config, run=run, collate=collate)
    return network.eval()


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
    box = lung_field(image).slices
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
