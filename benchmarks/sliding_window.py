"""Whole volumes through one network: our sliding window against MONAI's and nnU-Net's.

    python benchmarks/sliding_window.py [--filters 16] [--rounds 3] [--norm instance] [--out F]
    python benchmarks/sliding_window.py --memory [--out F]

One U-Net, one volume (a phantom), 64 x 64 x 64 windows, half overlap, the same Gaussian weights for all;
rounds in turns within one run. MONAI's window positions are ours where sizes divide, as they do here.
"channels last" has MONAI's network and windows put into the format that is faster on CPUs, which a user
would have to do by hand; "bf16" is autocast around the network, which nnU-Net has on GPUs only. nnU-Net
sums in float16, so its output is that much less exact.

--memory: `voxelscale predict` with the default network on a scan of 800 x 512 x 512 voxels at the network's
own spacing, in a process of its own, and the peak of its memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnunetv2.inference.predict_from_raw_data as nnunet
import numpy as np
import torch
from machine import machine  # type: ignore[import-not-found]
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from voxelscale.config import PhantomConfig, from_dict
from voxelscale.device import keep_freed_memory, to_channels_last
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, crop_or_pad
from voxelscale.infer.sliding_window import Windows, gaussian_profile, predict_volume
from voxelscale.lungs import body_field, lung_field
from voxelscale.model.bundle import Bundle, write_bundle
from voxelscale.model.unet import UNet, fold_batch_norms
from voxelscale.phantom import make_phantom
from voxelscale.samples.batch import Normalisation

PATCH = (64, 64, 64)
SHAPE = (96, 160, 224)
CT = Normalisation(low=-1000, high=400, mean=-300, std=400)
Look = Callable[[], Tensor]


def volume() -> Scan:
    """A whole phantom, cropped or padded a little to a size that windows divide."""
    image = make_phantom(PhantomConfig(spacing=(2.6, 1.65, 1.65)), 0).image
    start = [(n - wanted) // 2 for n, wanted in zip(image.array.shape, SHAPE, strict=True)]
    return crop_or_pad(image, start, SHAPE, fill=-1000)


def contenders(network: nn.Module, scan: Scan) -> dict[str, Look]:
    """Probabilities (z, y, x) of the scan by every way."""
    hu = torch.from_numpy(scan.array)
    normal = CT(hu)
    last = to_channels_last(copy.deepcopy(network))
    own = to_channels_last(fold_batch_norms(copy.deepcopy(network)))
    z, y, x = (gaussian_profile(p) for p in PATCH)
    weight = z[:, None, None] * y[:, None] * x
    threads = torch.get_num_threads()
    ours = Windows(patch=PATCH, batch_size=1, threads=threads)
    half = Windows(patch=PATCH, batch_size=1, threads=threads, precision=torch.bfloat16)
    body = torch.from_numpy(body_field(scan))
    lungs = lung_field(scan).slices

    def monai(model: nn.Module, batch: int, low: bool = False) -> Tensor:
        order = torch.channels_last_3d if model is last else torch.contiguous_format

        def look(windows: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                logits: Tensor = model(windows.contiguous(memory_format=order))
            return logits.float()

        with torch.inference_mode():
            logits: Any = sliding_window_inference(
                normal[None, None], PATCH, batch, look, overlap=0.5, roi_weight_map=weight
            )
            probability: Tensor = logits[0, 0].sigmoid()
        return probability

    return {
        "ours": lambda: predict_volume(own, hu, ours, prepare=CT),
        "ours, air skipped": lambda: predict_volume(own, hu, ours, prepare=CT, within=body),
        "ours, lungs' box": lambda: predict_volume(own, hu[lungs], ours, prepare=CT),
        "ours, bf16": lambda: predict_volume(own, hu, half, prepare=CT),
        "MONAI, 1 window": lambda: monai(network, 1),
        "MONAI, 4 windows": lambda: monai(network, 4),
        "MONAI, 1, channels last": lambda: monai(last, 1),
        "MONAI, 4, channels last": lambda: monai(last, 4),
        "MONAI, 1, bf16": lambda: monai(network, 1, low=True),
        "MONAI, 1, last, bf16": lambda: monai(last, 1, low=True),
        "nnU-Net": nnunet_way(network, normal, weight),
        "nnU-Net, bf16": nnunet_way(_Low(network), normal, weight),
    }


class _Low(nn.Module):
    """A network in bfloat16, but for its answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network

    def forward(self, windows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self._network(windows)
        return logits.float()


def nnunet_way(network: nn.Module, normal: Tensor, weight: Tensor) -> Look:
    """nnU-Net's own predictor, given our network and weights."""
    predictor = nnunet.nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=PATCH)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=1)
    nnunet.compute_gaussian = lambda *_, **__: weight
    return lambda: predictor.predict_sliding_window_return_logits(normal[None])[0].float().sigmoid()


def compare(filters: int, norm: str, rounds: int) -> dict[str, object]:
    """Seconds of every way, in turns, and how far from ours its output is."""
    torch.manual_seed(0)
    network = UNet(depth=4, filters=filters, norm=norm).eval()
    # A fresh network says the same everywhere; large logits show every difference.
    nn.init.normal_(network.head.weight, std=2.0)
    ways = contenders(network, volume())
    outputs = {name: look() for name, look in ways.items()}  # not timed: first calls are slower
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, look in ways.items():
            start, used = time.perf_counter(), time.process_time()
            look()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    base = statistics.median(wall["ours"])
    rows = []
    for name, output in outputs.items():
        same = output.shape == outputs["ours"].shape and "skipped" not in name
        rows.append(
            {
                "way": name,
                "seconds": statistics.median(wall[name]),
                "least": min(wall[name]),
                "most": max(wall[name]),
                "cpu_seconds": statistics.median(cpu[name]),
                "times_ours": statistics.median(wall[name]) / base,
                "apart": float((output - outputs["ours"]).abs().max()) if same else None,
            }
        )
    return {"filters": filters, "norm": norm, "shape": SHAPE, "patch": PATCH, "rows": rows}


def show(table: dict[str, object]) -> None:
    """Print it."""
    print(f"{table['filters']} filters, {table['norm']} norm, {table['shape']} voxels")
    print(f"{'':24}{'seconds':>10}{'(min to max)':>20}{'CPU s':>8}{'x ours':>8}{'max. diff.':>12}")
    for row in table["rows"]:  # type: ignore[attr-defined]
        spread = f"({row['least']:.2f} to {row['most']:.2f})"
        apart = "" if row["apart"] is None else f"{row['apart']:.1e}"
        print(
            f"{row['way']:24}{row['seconds']:10.2f}{spread:>20}{row['cpu_seconds']:8.2f}"
            f"{row['times_ours']:8.2f}{apart:>12}"
        )


def memory() -> dict[str, object]:
    """The peak of `voxelscale predict` on a large scan, GiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_large_scan(folder / "scan.nii.gz")
        # Without overlap: fewer windows, and the same memory.
        bundle = Bundle(
            config=from_dict({"predict": {"overlap": 0.0}, "train": {"precision": "fp32"}}),
            weights=UNet().state_dict(),
            spacing=(0.7, 0.7, 0.7),
            normalisation=CT,
            trained={},
        )
        write_bundle(folder / "model.vxs", bundle)
        command = [sys.executable, "-m", "voxelscale.cli", "predict", folder / "model.vxs"]
        start = time.perf_counter()
        subprocess.run([*map(str, command), str(folder / "scan.nii.gz"), str(folder / "out")], check=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"800 x 512 x 512 voxels, predicted in {seconds:.0f} s: at most {peak:.2f} GiB")
    return {"shape": [800, 512, 512], "peak_gib": peak, "seconds": seconds}


def write_large_scan(path: Path) -> None:
    """A phantom blown up to 800 x 512 x 512 voxels of 0.7 mm."""
    small = make_phantom(PhantomConfig(spacing=(4.0, 3.0, 3.0)), 0).image.array
    wanted = (800, 512, 512)
    index = [np.arange(n) * m // n for n, m in zip(wanted, small.shape, strict=True)]
    affine = np.zeros((4, 4))
    affine[[2, 1, 0], [0, 1, 2]] = 0.7
    affine[3, 3] = 1
    write_scan(Scan(small[np.ix_(*index)], affine), path)


def main() -> None:
    """Read the arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--norm", default="instance")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("sliding_window.json"))
    options = parser.parse_args()
    keep_freed_memory()
    if options.memory:
        table = memory()
    else:
        table = compare(options.filters, options.norm, options.rounds)
        show(table)
    facts = {**machine(), "threads": torch.get_num_threads()}
    options.out.write_text(json.dumps({"machine": facts, **table}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
