"""MONAI's DynUNet with the recipe of its authors' pipeline (MONAI's tutorials, ``dynunet_pipeline``).

Patch, batch, kernels and strides are those of nnU-Net's plan, as that pipeline has them, and so are the
intensities' statistics for CT; a third of the patches is centred on a lesion's voxel. SGD with momentum
0.99, DiceCELoss at three resolutions, the pipeline's transforms. All cases are cached in memory, which is
not counted. The hippocampus and the cubes have voxels of 1 mm; other scans are resampled to the plan's
spacing, and logits back to theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai import transforms as mt
from monai.data import CacheDataset, set_track_meta
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets.dynunet import DynUNet

from .data import Answer, Case
from .nnunet import plan_of
from .nnunet import prepare as prepare_nnunet
from .protocol import Course, Job, Place, Trained, set_seeds

RATE, MOMENTUM, DECAY = 0.01, 0.99, 3e-5
MOST_FILTERS = 320


def prepare(place: Place) -> None:
    """nnU-Net's plan."""
    prepare_nnunet(place)


def train(job: Job, place: Place, course: Course) -> Trained:
    """Settings: plan=default|small, precision=fp32|bf16, format=as_is|channels_last, mirror=true|false,
    lr, and of the network filters of the first level and heads of the deep supervision."""
    set_seeds(job.seed)
    monai.utils.misc.set_determinism(job.seed)
    set_track_meta(place.data.detect)  # resampling needs to know the spacing
    plans = plan_of(place, job.value("plan", "default"))
    plan = plans["configurations"]["3d_fullres"]
    patch, batch = plan["patch_size"], plan["batch_size"]
    loading = _loading(place, plans)
    data = CacheDataset(
        [
            {"image": str(place.data.cases[name].image), "label": str(place.data.cases[name].label)}
            for name in place.trained_on(job)
        ],
        mt.Compose(
            [
                *loading(["image", "label"]),
                mt.EnsureTyped(["image", "label"], track_meta=False),
                *_augmenting(patch, job.value("mirror", "true") == "true"),
            ]
        ),
        num_workers=None,
        progress=False,
        copy_cache=False,
    )
    set_track_meta(False)
    heads = int(job.value("heads", "2"))
    filters = int(job.value("filters", "32"))
    network = _network(plan, 1 + len(place.data.labels), heads, filters)
    low = job.value("precision", "fp32") == "bf16"
    last = job.value("format", "as_is") == "channels_last"
    layout = torch.channels_last_3d if last else torch.contiguous_format
    network.to(memory_format=layout)
    rate = float(job.value("lr", str(RATE))) * job.rate
    optimiser = torch.optim.SGD(
        network.parameters(), rate, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=plan["batch_dice"])
    weights = np.asarray([0.5**level for level in range(heads + 1)])
    weights /= weights.sum()
    random = np.random.default_rng(job.seed)
    network.train()
    while not course.done:
        for group in optimiser.param_groups:
            group["lr"] = rate * course.decay
        drawn = [data[int(random.integers(len(data)))][0] for _ in range(batch)]
        image, label = (torch.stack([one[key] for one in drawn]) for key in ("image", "label"))
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            found = network(image.contiguous(memory_format=layout))
        parts = found.float().unbind(1) if heads else [found.float()]
        value = sum(weight * loss(part, label) for weight, part in zip(weights, parts, strict=True))
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimiser.step()
        course.tick()
    course.finish()
    network.eval()
    look = mt.Compose(loading(["image"]))

    def predict(case: Case) -> Answer:
        set_track_meta(place.data.detect)
        image = look({"image": str(case.image)})["image"]
        with torch.inference_mode():
            logits = sliding_window_inference(image[None], patch[::-1], 2, network, 0.5, mode="gaussian")[0]
        if place.data.detect:
            logits = back_to(case.image, logits)
        labels = np.asarray(logits.argmax(0)).transpose(2, 1, 0)
        return Answer(labels=labels, probability=np.asarray(logits.softmax(0)[1]).transpose(2, 1, 0))

    return Trained(
        batch=batch,
        predict=predict,
        facts={
            "patch": patch,
            "lr": rate,
            "precision": job.value("precision", "fp32"),
            "parameters": sum(weight.numel() for weight in network.parameters()),
        },
    )


def back_to(image: Path, logits: Any) -> torch.Tensor:
    """Logits (label, x, y, z) with their affine, on an image's own voxels."""
    own = mt.LoadImage(image_only=True, ensure_channel_first=True)(image)
    match = mt.ResampleToMatch(mode="bilinear", padding_mode="border")
    return torch.as_tensor(match(logits, img_dst=own))


def _network(plan: dict[str, Any], outputs: int, heads: int, filters: int) -> DynUNet:
    shape = plan["architecture"]["arch_kwargs"]
    kernels = [kernel[::-1] for kernel in shape["kernel_sizes"]]
    strides = [stride[::-1] for stride in shape["strides"]]
    return DynUNet(
        3,
        1,
        outputs,
        kernels,
        strides,
        strides[1:],
        [min(filters * 2**level, MOST_FILTERS) for level in range(len(strides))],
        deep_supervision=heads > 0,
        deep_supr_num=max(heads, 1),
    )


def _loading(place: Place, plans: dict[str, Any]) -> Any:
    """Reading and normalising; axes are x, y, z."""
    hu = plans["foreground_intensity_properties_per_channel"]["0"]
    if place.data.channel == "CT":
        limits = hu["percentile_00_5"], hu["percentile_99_5"]
        normalise = [
            mt.ScaleIntensityRanged("image", *limits, *limits, clip=True),
            mt.NormalizeIntensityd("image", subtrahend=hu["mean"], divisor=hu["std"]),
        ]
    else:
        normalise = [mt.NormalizeIntensityd("image")]
    spacing = plans["configurations"]["3d_fullres"]["spacing"][::-1]

    def loading(keys: list[str]) -> list[Any]:
        modes = [{"image": "bilinear", "label": "nearest"}[key] for key in keys]
        resample = []
        if place.data.detect:
            resample = [mt.Spacingd(keys, spacing, mode=modes)]
        reading = [mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys, channel_dim="no_channel")]
        return [*reading, *resample, *normalise]

    return loading


def _augmenting(patch: list[int], mirror: bool) -> list[Any]:
    """The pipeline's transforms; patch (z, y, x)."""
    both, size = ["image", "label"], patch[::-1]
    modes = {"mode": ("trilinear", "nearest-exact"), "align_corners": (True, None)}
    return [
        mt.SpatialPadd(both, size),
        mt.FgBgToIndicesd("label"),  # the last that is cached
        mt.RandCropByPosNegLabeld(
            both,
            "label",
            size,
            pos=1,
            neg=2,
            num_samples=1,
            fg_indices_key="label_fg_indices",
            bg_indices_key="label_bg_indices",
        ),
        mt.RandZoomd(both, min_zoom=0.9, max_zoom=1.2, prob=0.15, **modes),
        mt.RandGaussianNoised("image", std=0.01, prob=0.15),
        mt.RandGaussianSmoothd("image", (0.5, 1.15), (0.5, 1.15), (0.5, 1.15), prob=0.15),
        mt.RandScaleIntensityd("image", factors=0.3, prob=0.15),
        *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3 * mirror)),
    ]
