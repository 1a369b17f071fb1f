"""From stored scans to augmented batches, patches a second on one core: ours, MONAI's and nnU-Net's.

    pip install --no-deps -c constraints.txt monai batchgeneratorsv2 batchgenerators acvl_utils \\
        dynamic-network-architectures pandas python-dateutil pytz tzdata six \\
        scikit-image lazy-loader imageio tifffile
    python benchmarks/input_pipeline.py [--out input.json] [--scan IMAGE MASK] [--patch 64]

(`--no-deps`, as nnU-Net's packages ask for a torchvision and with it for another torch.)

Every contender sees the same prepared volumes, draws half of its patches on lesions, and augments with
the same transformations at the same probabilities and ranges: rotation and zoom, noise, blur,
brightness, low resolution, gamma, mirroring. They take turns, in one process bound to one core, with one
thread each; time is the process's CPU time, so that what else the machine does counts little. What
each is given:

- ours reads the compressed store with one reading thread, which counts;
- MONAI holds normalised volumes and the indices of their foreground in memory and copies no cached
  volume (``copy_cache=False``; with the default each patch would copy its whole volume, see
  "as documented"); metadata is not tracked; it rotates the bare patch, so corners repeat the border;
- nnU-Net's transforms (batchgeneratorsv2) get a larger region, by its rule for its ranges of rotation,
  from normalised float32 volumes, memory-mapped, plain (.npy) or in its compressed form (.b2nd);
  rotating and zooming are drawn apart there, so each has the probability that makes 0.3 of either.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import blosc2
import monai
import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from monai import transforms as mt
from monai.data import CacheDataset, set_track_meta
from torch import Tensor

from voxelscale.config import AugmentConfig, DataConfig, IntTriple, PhantomConfig, PrepareConfig
from voxelscale.dataset.listing import Source, list_sources
from voxelscale.phantom.dataset import write_phantoms
from voxelscale.samples import batch as batches
from voxelscale.samples.batch import Normalisations, make_batch, normalisations
from voxelscale.samples.patches import PatchSource, read_ahead
from voxelscale.samples.transforms import affine
from voxelscale.store import Store, open_store
from voxelscale.store.prepare import prepare

ROUNDS, BATCHES = 9, 12
AUGMENT = AugmentConfig()
CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]
Volume = tuple[Tensor, Tensor]
"""Normalised float32 and mask uint8 of a whole case, (1, z, y, x)."""


@dataclass(frozen=True)
class Task:
    """What all contenders do."""

    store: Store
    normalise: Normalisations
    volumes: list[Volume]
    patch: IntTriple
    batch_size: int


def make_task(scan: list[Path] | None, patch: int, batch_size: int, folder: Path) -> Task:
    """Two phantoms, or a scan and its mask, prepared."""
    if scan:
        sources = [Source(case="scan", patient="scan", image=scan[0], labels=(scan[1],))]
        config = PrepareConfig(split=(1, 0, 0), workers=1)
    else:
        spacing = (1.5, 1.0, 1.0)
        write_phantoms(PhantomConfig(cases=2, spacing=spacing), folder / "scans", workers=1)
        sources = list_sources(folder / "scans")
        config = PrepareConfig(spacing=spacing, split=(1, 0, 0), workers=1)
    prepare(sources, folder / "store", config)
    store = open_store(folder / "store")
    normalise = normalisations(store)
    volumes = []
    for info in store.cases:
        hu, mask = store.read(info.case)
        volumes.append((normalise(info.case)[0](torch.from_numpy(hu))[None], torch.from_numpy(mask)[None]))
    return Task(store, normalise, volumes, (patch, patch, patch), batch_size)


def ours(task: Task) -> Iterator[Batch]:
    source = PatchSource(task.store, DataConfig(patch_size=task.patch), AUGMENT, 0)
    indices = (range(i, i + task.batch_size) for i in range(0, 10**9, task.batch_size))
    for samples in read_ahead(source, indices, readers=1, prefetch=2):
        yield make_batch(samples, task.patch, task.normalise, CPU)


def monai_transforms(patch: IntTriple) -> Any:
    both, a = ["image", "label"], AUGMENT
    angles = tuple(np.radians(a.rotate_deg))
    zoom = [(a.scale[0] - 1, a.scale[1] - 1)] * 3
    brightness = (a.brightness[0] - 1, a.brightness[1] - 1)
    sigma = a.blur_sigma
    affine = {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
    indices = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
    return mt.Compose(
        [
            mt.FgBgToIndicesd("label"),  # the last that is cached
            mt.RandCropByPosNegLabeld(both, "label", patch, pos=1, neg=1, num_samples=1, **indices),
            mt.RandAffined(both, prob=a.p_affine, rotate_range=angles, scale_range=zoom, **affine),
            mt.RandGaussianNoised("image", prob=a.p_noise, std=a.noise_std),
            mt.RandGaussianSmoothd("image", sigma, sigma, sigma, prob=a.p_blur),
            mt.RandScaleIntensityd("image", factors=brightness, prob=a.p_brightness),
            mt.RandSimulateLowResolutiond("image", prob=a.p_low_resolution, zoom_range=a.low_resolution),
            mt.RandAdjustContrastd("image", prob=a.p_gamma, gamma=a.gamma),
            *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )


def monai_cached(task: Task, copy_cache: bool) -> Iterator[Batch]:
    set_track_meta(False)
    cases = [{"image": image, "label": mask} for image, mask in task.volumes]
    data = CacheDataset(cases, monai_transforms(task.patch), progress=False, copy_cache=copy_cache)
    random = np.random.default_rng(0)
    while True:
        patches = [data[int(random.integers(len(data)))][0] for _ in range(task.batch_size)]
        yield torch.stack([p["image"] for p in patches]), torch.stack([p["label"] for p in patches])


def nnunet_transforms(patch: IntTriple) -> Any:
    a = AUGMENT
    apart = 1 - (1 - a.p_affine) ** 0.5
    angles = np.radians(a.rotate_deg)

    def rotation(dim: int, **_: Any) -> float:
        return float(np.random.default_rng(np.random.randint(2**31)).uniform(-angles[dim], angles[dim]))  # noqa: NPY002

    spatial = SpatialTransform(
        patch, 0, False, p_rotation=apart, rotation=rotation, p_scaling=apart, scaling=a.scale
    )
    noise = GaussianNoiseTransform((0, a.noise_std), 1, True)
    blur = GaussianBlurTransform(a.blur_sigma, False, False, 1, benchmark=True)
    brightness = MultiplicativeBrightnessTransform(BGContrast(a.brightness), False, 1)
    coarse = SimulateLowResolutionTransform(a.low_resolution, False, True, None, None, 1)
    gamma = GammaTransform(BGContrast(a.gamma), 0, False, 1, 1)
    return ComposeTransforms(
        [
            spatial,
            RandomTransform(noise, a.p_noise),
            RandomTransform(blur, a.p_blur),
            RandomTransform(brightness, a.p_brightness),
            RandomTransform(coarse, a.p_low_resolution),
            RandomTransform(gamma, a.p_gamma),
            MirrorTransform((0, 1, 2)),
        ]
    )


def nnunet_region(patch: IntTriple) -> IntTriple:
    """nnU-Net's rule: the patch's corners rotated about one axis at a time, and its zoom of 0.85."""
    z, y, x = patch
    sizes = np.array(patch, float)
    for angle, (i, j) in zip(np.radians(AUGMENT.rotate_deg), ((1, 2), (0, 2), (0, 1)), strict=True):
        turned = np.array(patch, float)
        turned[i] = patch[i] * np.cos(angle) + patch[j] * np.sin(angle)
        turned[j] = patch[j] * np.cos(angle) + patch[i] * np.sin(angle)
        sizes = np.maximum(sizes, turned)
    z, y, x = (int(n) for n in sizes / 0.85)
    return z, y, x


def nnunet_files(task: Task, folder: Path) -> None:
    """Image float32 and segmentation int8 of each case, plain and compressed."""
    folder.mkdir(exist_ok=True)
    packing = {"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1}
    layout = {"chunks": (1, 64, 64, 64), "blocks": (1, 16, 16, 32), "cparams": packing, "mode": "w"}
    for number, (image, mask) in enumerate(task.volumes):
        for name, array in ((f"{number}", image.numpy()), (f"{number}_seg", mask.numpy().astype(np.int8))):
            np.save(folder / f"{name}.npy", array)
            blosc2.asarray(array, urlpath=str(folder / f"{name}.b2nd"), **layout)


def nnunet(task: Task, folder: Path, compressed: bool) -> Iterator[Batch]:
    """Its loader's way: files opened for each patch, half of the patches on a foreground voxel."""
    transform, random = nnunet_transforms(task.patch), np.random.default_rng(0)
    size = nnunet_region(task.patch)
    foreground = [np.argwhere(mask[0].numpy()) for _, mask in task.volumes]
    while True:
        done = []
        for _ in range(task.batch_size):
            case = int(random.integers(len(task.volumes)))
            centre = foreground[case][random.integers(len(foreground[case]))]
            image, mask = (nnunet_open(folder / f"{case}{part}", compressed) for part in ("", "_seg"))
            spare = [n - k for n, k in zip(image.shape[1:], size, strict=True)]
            low, high = [min(0, m) // 2 for m in spare], [max(m, m // 2) for m in spare]
            start = [int(random.integers(a, max(a, b) + 1)) for a, b in zip(low, high, strict=True)]
            if random.random() < DataConfig().foreground:
                wanted = [int(c) - k // 2 for c, k in zip(centre, size, strict=True)]
                start = [max(a, w) for a, w in zip(low, wanted, strict=True)]
            region = torch.from_numpy(cut(image, start, size, 0)).float()
            labels = torch.from_numpy(cut(mask, start, size, -1)).to(torch.int16)
            done.append(transform(image=region, segmentation=labels))
        yield torch.stack([d["image"] for d in done]), torch.stack([d["segmentation"] for d in done])


def nnunet_open(path: Path, compressed: bool) -> Any:
    if compressed:
        return blosc2.open(f"{path}.b2nd", mode="r", mmap_mode="r", dparams={"nthreads": 1})
    return np.load(f"{path}.npy", mmap_mode="r")


def cut(array: Any, start: list[int], size: IntTriple, fill: int) -> Any:
    """A window of (1, z, y, x) that may reach beyond the borders."""
    ends = [s + k for s, k in zip(start, size, strict=True)]
    low = [max(s, 0) for s in start]
    high = [min(e, n) for e, n in zip(ends, array.shape[1:], strict=True)]
    inside = np.ascontiguousarray(array[(slice(None), *map(slice, low, high))])
    missing = [(a - s, e - b) for a, s, e, b in zip(low, start, ends, high, strict=True)]
    if not any(any(pair) for pair in missing):
        return inside
    return np.pad(inside, [(0, 0), *missing], constant_values=fill)


def measure(task: Task, folder: Path) -> list[dict[str, Any]]:
    """CPU milliseconds a patch, over rounds in which the contenders take turns."""
    nnunet_files(task, folder)
    streams = {
        "ours": ours(task),
        "MONAI, in memory": monai_cached(task, copy_cache=False),
        "MONAI, as documented": monai_cached(task, copy_cache=True),
        "nnU-Net, .npy": nnunet(task, folder, compressed=False),
        "nnU-Net, .b2nd": nnunet(task, folder, compressed=True),
    }
    times: dict[str, list[float]] = {name: [] for name in streams}
    for name, stream in streams.items():
        for _ in range(4):
            image, mask = next(stream)
            assert image.shape == mask.shape == (task.batch_size, 1, *task.patch), name
            assert torch.isfinite(image).all(), name
    for _ in range(ROUNDS):
        for name, stream in streams.items():
            # Copying whole volumes takes ten times longer; a few batches show it.
            batches = BATCHES if name != "MONAI, as documented" else 2
            started = time.process_time()
            for _ in range(batches):
                next(stream)
            times[name].append((time.process_time() - started) / (batches * task.batch_size) * 1e3)
    return [row(name, t, times["ours"]) for name, t in times.items()]


def row(name: str, ms: list[float], own: list[float]) -> dict[str, Any]:
    ratios = [theirs / mine for theirs, mine in zip(ms, own, strict=True)]
    return {
        "pipeline": name,
        "ms": round(statistics.median(ms), 3),
        "least_ms": round(min(ms), 3),
        "greatest_ms": round(max(ms), 3),
        "patches_per_second": round(1e3 / statistics.median(ms), 1),
        "times_ours": round(statistics.median(ratios), 2),
        "least_times_ours": round(min(ratios), 2),
        "greatest_times_ours": round(max(ratios), 2),
    }


def breakdown(task: Task, patches: int = 240) -> dict[str, float]:
    """CPU milliseconds a patch of ours: reading and decompressing, affine, the rest."""
    source = PatchSource(task.store, DataConfig(patch_size=task.patch), AUGMENT, 0)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            started = time.process_time()
            result = work(*arguments)
            spent[name] += time.process_time() - started
            return result

        return wrapped

    read = timed("read", lambda indices: [source[i] for i in indices])
    batch = timed("all", lambda samples: make_batch(samples, task.patch, task.normalise, CPU))
    with (
        patch.object(batches, "warp", timed("affine", affine.warp)),
        patch.object(batches, "warp_labels", timed("affine", affine.warp_labels)),
    ):
        for first in range(0, patches, task.batch_size):
            batch(read(range(first, first + task.batch_size)))
    spent["rest"] = spent.pop("all") - spent["affine"]
    return {name: round(seconds / patches * 1e3, 3) for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--scan", type=Path, nargs=2, metavar=("IMAGE", "MASK"), help="instead of phantoms")
    parser.add_argument("--patch", type=int, default=64, help="edge of a patch in voxels")
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    with tempfile.TemporaryDirectory() as name:
        task = make_task(arguments.scan, arguments.patch, arguments.batch_size, Path(name))
        rows, parts = measure(task, Path(name) / "nnunet"), breakdown(task)
    shapes = [tuple(image.shape[1:]) for image, _ in task.volumes]
    print(f"volumes {shapes}, {arguments.patch}^3 patches in batches of {arguments.batch_size}, one core")
    print(f"{'pipeline':22} {'patches/s':>9} {'ms/patch':>9} {'range':>16} {'x ours':>7} {'range':>16}")
    for r in rows:
        spread = f"{r['least_ms']:.2f} to {r['greatest_ms']:.2f}"
        ratios = f"{r['least_times_ours']:.1f} to {r['greatest_times_ours']:.1f}"
        print(
            f"{r['pipeline']:22} {r['patches_per_second']:9.1f} {r['ms']:9.2f} {spread:>16}"
            f" {r['times_ours']:7.2f} {ratios:>16}"
        )
    print("ours, ms/patch: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items()))
    if arguments.out:
        versions = {m.__name__: m.__version__ for m in (torch, monai, blosc2, np)}
        facts = {
            "shapes": shapes,
            "patch": arguments.patch,
            "batch_size": arguments.batch_size,
            "python": platform.python_version(),
            "versions": versions,
            "rows": rows,
            "breakdown_ms": parts,
        }
        arguments.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
