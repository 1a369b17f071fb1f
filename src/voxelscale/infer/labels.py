"""Which classes a network sees at every voxel of a volume."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from voxelscale.classes import Classes
from voxelscale.infer.sliding_window import Windows, predict_boxes


def predict_labels(
    model: nn.Module,
    volume: Tensor,
    windows: Windows,
    classes: Classes,
    threshold: float,
    *,
    prepare: Callable[[Tensor], Tensor] = Tensor.float,
    device: torch.device | None = None,
) -> Tensor:
    """Stored labels (`voxelscale.classes.Classes`), (z, y, x) int16, where the network is.

    Args:
        model: ``(batch, channel, z, y, x)`` to logits ``(batch, classes.outputs, z, y, x)``.
        volume: ``(channel, z, y, x)``, any number type.
        threshold: probability from which on one class, or a region, is there. Of classes that exclude each
            other the most probable one is, background among them.
        prepare, device: as `voxelscale.infer.sliding_window.predict_volume` takes them.
    """
    found = torch.zeros(volume.shape[1:], dtype=torch.int16, device=device or volume.device)

    def decide(logits: Tensor) -> Tensor:
        if not (classes.single or classes.regions):
            return logits.argmax(0)
        there = (logits.sigmoid_() >= threshold).to(torch.int16)
        bits = torch.arange(len(there), dtype=torch.int16, device=there.device)
        return (there << bits[:, None, None, None]).sum(0)

    boxes = predict_boxes(
        model,
        volume,
        windows,
        classes.outputs,
        finish=lambda logits: decide(logits)[None],
        prepare=prepare,
        device=device,
    )
    for box, labels in boxes:
        found[box] = labels[0].to(torch.int16)
    return found
