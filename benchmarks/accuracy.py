"""As good as MONAI? Ours and MONAI's BasicUNet trained on the same phantoms for the same processor time.

    python benchmarks/accuracy.py DIR [--budget 240] [--seeds 3] [--processes 2] [--out F]

DIR holds, or gets, the phantoms of benchmarks/detection.py. Both networks begin with 8 channels and double
them with every level (ours has four, MONAI's five); 16 x 32 x 32 patches, batches of 4, AdamW with the same
rate and decay, one thread. MONAI's loss is its own (`DiceCELoss`), and once more with the cross-entropy
weighing 5, as ours. MONAI reads, resamples, caches, crops (as many patches at lesions as elsewhere)
and augments with its own transforms; preparing and caching are not counted. The budget is in seconds of the
process's time, so that other work on the machine takes little of it. Findings are made of both probability
maps by the same rules, with "in the lungs" leaving out what lies outside the lungs' box. Prints Dice,
sensitivity and CPM, means and 95 % intervals by Student's t over seeds; writes JSON. Interrupted, the same
command goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import (  # type: ignore[import-not-found]
    DEFAULT,
    WAYS,
    config_of,
    make_data_set,
    parser_of,
    score,
    show,
    summary,
    test_sources,
    truth_of,
)
from monai.data import CacheDataset, DataLoader, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets.basic_unet import BasicUNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    Spacingd,
)
from numpy.typing import NDArray

from voxelscale.config import Config
from voxelscale.geometry import Scan, resample
from voxelscale.lungs import lung_field
from voxelscale.model.bundle import read_bundle
from voxelscale.predict.work import Predictor
from voxelscale.store import open_store
from voxelscale.train.launch import start

PATCH = (16, 32, 32)
SPACING = (3.0, 2.0, 2.0)
RATE = 0.004
PROBE = 400
CONTENDERS = {"ours": 5.0, "MONAI": 1.0, "MONAI, cross-entropy 5": 5.0}
"""By name, the weight of the cross-entropy."""


def ours(folder: Path, seed: int, budget: float, out: Path) -> dict[str, float]:
    """Train ours for the budget, with as many samples as it takes; seconds used and samples seen."""
    torch.set_num_threads(1)
    config = with_patch(config_of(DEFAULT, seed, PROBE))
    seconds = []
    for samples in (PROBE, 4 * PROBE):
        probe = out / f"probe-{samples}"
        shutil.rmtree(probe, ignore_errors=True)  # a run that is there already would take no time
        began = time.process_time()
        start(replace(config, train=replace(config.train, samples=samples)), folder / "store", probe)
        seconds.append(time.process_time() - began)
    # Their difference is samples alone: starting and the validation at the end drop out.
    each = (seconds[1] - seconds[0]) / (3 * PROBE)
    samples = int(budget / each) // 4 * 4
    start(replace(config, train=replace(config.train, samples=samples)), folder / "store", out / "run")
    return {"seconds": samples * each, "samples": samples}


def with_patch(config: Config) -> Config:
    """The ablation's config with a patch that can be halved four times, looking everywhere."""
    return replace(
        config,
        data=replace(config.data, patch_size=PATCH),
        predict=replace(config.predict, lungs=False),
    )


def monai_transforms(keys: list[str]) -> list[Any]:
    """Reading, turning, resampling, scaling: MONAI caches what these give. Axes are x, y, z."""
    modes = ["bilinear", "nearest"][: len(keys)]
    return [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="RAS"),
        Spacingd(keys, pixdim=SPACING[::-1], mode=modes),
        ScaleIntensityRanged(["image"], a_min=-1000, a_max=400, b_min=-1, b_max=1, clip=True),
    ]


def monai(folder: Path, seed: int, budget: float, out: Path, cross_entropy: float) -> dict[str, float]:
    """Train MONAI's network for the budget; seconds used and samples seen."""
    from monai.utils.misc import set_determinism

    torch.set_num_threads(1)
    set_determinism(seed)
    cases = {info.case for info in open_store(folder / "store").split("train")}
    files = [
        {
            "image": str(folder / "scans" / "images" / f"{case}.nii.gz"),
            "label": str(folder / "scans" / "labels" / f"{case}.nii.gz"),
        }
        for case in sorted(cases)
    ]
    crop = RandCropByPosNegLabeld(["image", "label"], "label", PATCH[::-1], pos=1, neg=1, num_samples=4)
    flips = [RandFlipd(["image", "label"], prob=0.5, spatial_axis=axis) for axis in range(3)]
    strength = [
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        RandGaussianNoised("image", prob=0.2, std=0.05),
    ]
    steps = Compose([*monai_transforms(["image", "label"]), crop, *flips, *strength])
    data = CacheDataset(files, steps, cache_rate=1.0, num_workers=1, progress=False)
    loader = DataLoader(data, batch_size=1, shuffle=True, num_workers=0, collate_fn=list_data_collate)
    network = monai_network()
    loss = DiceCELoss(sigmoid=True, lambda_ce=cross_entropy)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE)
    began, seen = time.process_time(), 0
    while (used := time.process_time() - began) < budget:
        for batch in loader:
            used = time.process_time() - began
            if used >= budget:
                break
            for group in optimiser.param_groups:
                group["lr"] = RATE * (1 - used / budget) ** 0.9
            optimiser.zero_grad(set_to_none=True)
            loss(network(batch["image"].as_tensor()), batch["label"].as_tensor()).backward()
            optimiser.step()
            seen += len(batch["image"])
    torch.save(network.state_dict(), out / "monai.pt")
    return {"seconds": used, "samples": seen}


def monai_network() -> BasicUNet:
    """Five levels of 8 to 128 channels."""
    return BasicUNet(3, 1, 1, features=(8, 16, 32, 64, 128, 8))


def look_monai(network: BasicUNet, path: Path, image: Scan) -> NDArray[np.float32]:
    """MONAI's probabilities, on its own resampled copy and from there to the scan's voxels."""
    data = Compose(monai_transforms(["image"]))({"image": str(path)})["image"]
    with torch.inference_mode():
        logits = sliding_window_inference(
            data[None].as_tensor(), PATCH[::-1], 4, network, overlap=0.5, mode="gaussian"
        )
    values = torch.as_tensor(logits)[0, 0].sigmoid().numpy()
    ras = np.asarray(data.affine, np.float64)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras[:, [2, 1, 0, 3]]
    there = Scan(np.ascontiguousarray(values.transpose(2, 1, 0)), affine)
    return np.asarray(resample(there, image.grid, "linear", fill=0.0).array, np.float32)


def train_and_look(job: tuple[Path, str, int, float]) -> tuple[str, int, dict[str, float]]:
    """Train one contender with one seed, keep its maps; what it used."""
    folder, name, seed, budget = job
    out = folder / "accuracy" / f"{name}-{seed}"
    if (out / "used.json").is_file():
        return name, seed, json.loads((out / "used.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    train = ours if name == "ours" else partial(monai, cross_entropy=CONTENDERS[name])
    used = train(folder, seed, budget, out)
    torch.set_num_threads(1)
    look: Callable[[Path, Scan], NDArray[np.float32]]
    if name == "ours":
        bundle = read_bundle(out / "run")
        predictor = Predictor(bundle, bundle.config.predict, torch.device("cpu"), torch.float32)
        look = lambda _, image: predictor.probability(image)  # noqa: E731
    else:
        network = monai_network().eval()
        network.load_state_dict(torch.load(out / "monai.pt", weights_only=True))
        look = partial(look_monai, network)
    for source in test_sources(folder):
        values = look(source.image, truth_of(source)[0])
        np.save(out / f"{source.case}.npy", values.astype(np.float16))
    (out / "used.json").write_text(json.dumps(used))
    return name, seed, used


def in_the_lungs(folder: Path, maps: Path) -> Path:
    """The same maps with nothing outside the lungs' box."""
    inside = maps.with_name(f"{maps.name}-lungs")
    inside.mkdir(exist_ok=True)
    for source in test_sources(folder):
        image, _ = truth_of(source)
        box = lung_field(image).slices
        values = np.load(maps / f"{source.case}.npy")
        kept = np.zeros_like(values)
        kept[box] = values[box]
        np.save(inside / f"{source.case}.npy", kept)
    return inside


def main() -> None:
    """Read the arguments, train what is missing, measure, print, write."""
    parser = parser_of(__doc__, "accuracy.json")
    parser.add_argument("--budget", type=float, default=240.0)
    options = parser.parse_args()
    folder = options.folder
    make_data_set(folder)
    jobs = [(folder, name, s, options.budget) for s in range(options.seeds) for name in CONTENDERS]
    used = []
    with ProcessPoolExecutor(options.processes) as pool:
        for name, seed, what in pool.map(train_and_look, jobs):
            print(f"{name} {seed}: {what['seconds']:.0f} s, {what['samples']:.0f} samples", flush=True)
            used.append({"name": name, "seed": seed, **what})
    sources = test_sources(folder)
    truths = [truth_of(source)[1] for source in sources]
    rows = []
    for name in CONTENDERS:
        maps = [folder / "accuracy" / f"{name}-{seed}" for seed in range(options.seeds)]
        for where, these in (
            ("whole scan", maps),
            ("in the lungs", [in_the_lungs(folder, m) for m in maps]),
        ):
            each = [score([one], sources, truths, WAYS["doubtful from 0.05"]) for one in these]
            rows.append({"recipe": name, "way": where, **summary(each)})
    show(rows)
    options.out.write_text(json.dumps({"budget": options.budget, "used": used, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
