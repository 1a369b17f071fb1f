"""A whole scan through one network: our sliding window against MONAI's, both on the device."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.gpu_phases.common import Record, Setting, channels_last
from torch import Tensor, nn

from voxelscale.config import IntTriple
from voxelscale.device import seconds_of, to_channels_last
from voxelscale.infer.sliding_window import Windows, gaussian_profile, predict_volume
from voxelscale.model.unet import UNet
from voxelscale.samples.batch import Normalisation

CT = Normalisation(low=-1000, high=400, mean=-300, std=400)
BATCH = 4
SAME = 0.02
"""Largest difference of two probabilities, both in bf16, of windows at the same places."""


def prediction(setting: Setting, record: Record) -> None:
    """Seconds of a scan from main memory to probabilities there, and how far the two are apart."""
    shape = (20, 32, 32) if setting.tiny else (400, 512, 512)
    edge, depth, filters = (16, 3, 4) if setting.tiny else (128, 6, 32)
    patch: IntTriple = (edge, edge, edge)
    model = network(setting, depth, filters)
    random = torch.Generator().manual_seed(0)
    volume = (torch.randn(shape, generator=random) * 150 - 600).to(torch.int16)
    windows = Windows(patch=patch, batch_size=BATCH, precision=torch.bfloat16)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda scan: predict_volume(model, scan, windows, prepare=CT, device=setting.device)
    }
    try:
        inferers: Any = importlib.import_module("monai.inferers")
    except ImportError as error:
        record.put(monai=f"skipped: {error}")
    else:
        ways["MONAI"] = lambda scan: by_monai(inferers, model, scan, patch, setting.device)
    # Where steps of half a window divide the scan both place their windows alike.
    cut = volume[: shape[0] - (shape[0] - edge) % (edge // 2)]
    outputs = {name: look(cut) for name, look in ways.items()}  # not timed: first calls are slower
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if setting.tiny else 2):
        for name, look in ways.items():
            times[name].append(seconds_of(lambda look=look: look(volume), setting.device))  # type: ignore[misc]
            record.put(shape=list(shape), seconds=times)
    if not torch.isfinite(outputs["ours"]).all():
        record.wrong.append("ours: a probability is no number")
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    record.says = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items())
    if "MONAI" in ways:
        apart = float((outputs["ours"] - outputs["MONAI"]).abs().max())
        record.put(apart=apart, spread=float(outputs["ours"].std()))
        record.check("difference from MONAI's", apart, SAME)
        record.says += f", at most {apart:.1e} apart"


def network(setting: Setting, depth: int, filters: int) -> nn.Module:
    """An untrained U-Net whose answers differ from voxel to voxel, as a trained one's do."""
    torch.manual_seed(0)
    model = UNet(depth=depth, filters=filters, prior=0.5).eval()
    nn.init.normal_(model.head.weight, std=1 / filters**0.5)
    return to_channels_last(model.to(setting.device))


def by_monai(
    inferers: Any, model: nn.Module, volume: Tensor, patch: IntTriple, device: torch.device
) -> Tensor:
    """MONAI's sliding window with our weights, all on the device, in bf16 and channels last."""
    z, y, x = (gaussian_profile(n).to(device) for n in patch)
    weight = z[:, None, None] * y[:, None] * x

    def look(windows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits: Tensor = model(channels_last(windows))
        return logits.float()

    with torch.inference_mode():
        image = CT(volume.to(device))[None, None]
        logits = inferers.sliding_window_inference(
            image, patch, BATCH, look, overlap=0.5, roi_weight_map=weight
        )
        probability: Tensor = logits[0, 0].sigmoid().cpu()
    return probability
