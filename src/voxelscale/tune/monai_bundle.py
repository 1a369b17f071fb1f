"""A MONAI bundle around an exported network: its configs, metadata and page, tried by ``monai.bundle run``.

Read for the format: "MONAI Bundle Specification" of MONAI 1.5, and `monai.bundle` itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from voxelscale import __version__
from voxelscale.channels import AIR_HU, Channel
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan
from voxelscale.model.bundle import Bundle
from voxelscale.samples.batch import normalisation_of
from voxelscale.store.channels import keep
from voxelscale.tune.exported import chest_of, facts_of, softmax_of, step_of

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
"""By which ``monai.bundle verify_metadata`` judges; it fetches it."""

SECONDS = 600
"""For the trial."""

WHOLE = 1100
"""Added to the trial's HU, which become whole values above 0 for channels that are no CT."""

ZSCORE = "(x[{0}:{1}] - x[{0}:{1}][x[{0}:{1}] != 0].mean()) / x[{0}:{1}][x[{0}:{1}] != 0].std(correction=0)"
MINMAX = "(x[{0}:{1}] - x[{0}:{1}].min()) / (x[{0}:{1}].max() - x[{0}:{1}].min())"
SAME = "x[{0}:{1}]"


def check_bundle_of_monai(bundle: Bundle) -> None:
    """Raise a VoxelscaleError where MONAI's transforms do not prepare scans as the model wants them."""
    if bundle.nnunet:
        problem = "a model from nnU-Net: MONAI's transforms do not prepare scans as nnU-Net does"
        raise VoxelscaleError(problem, "write --to onnx, torch-export or torchscript")


def write_texts(bundle: Bundle, folder: Path, *, free: bool) -> None:
    """Everything of a bundle but ``models/model.ts``."""
    for name, content in (
        ("configs/inference.json", json.dumps(inference_of(bundle), indent=2)),
        ("configs/metadata.json", json.dumps(metadata_of(bundle, free=free), indent=2)),
        ("docs/README.md", _page(bundle)),
        ("LICENSE", _licence()),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n", encoding="utf-8")


def inference_of(bundle: Bundle) -> dict[str, Any]:
    """``configs/inference.json``: scans of a folder to masks on their own lattices."""
    dims, several = bundle.config.model.dims, len(bundle.channels) > 1
    first = "@dataset_dir + '/*_0000.nii.gz'" if several else "@dataset_dir + '/*.nii.gz'"
    each = "sorted(glob.glob(f[:-11] + '????.nii.gz'))" if several else "f"
    to_air = all(channel.scheme == "ct" for channel in bundle.channels)
    window = {
        "roi_size": list(bundle.patch[-dims:]),
        "sw_batch_size": bundle.config.predict.batch_size,
        "overlap": bundle.config.predict.overlap,
        "mode": "gaussian",
        "sigma_scale": 0.125,
        "padding_mode": "constant" if to_air else "replicate",
        **({"cval": AIR_HU} if to_air else {}),
    }
    inferer = (
        {"_target_": "SlidingWindowInferer"}
        if dims == 3
        else {"_target_": "SliceInferer", "spatial_dim": 0}
    )
    return {
        "imports": ["$import glob", "$import functools", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/masks'",
        "datalist": f"$[{each} for f in sorted(glob.glob({first}))]",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "network": "$@network_def.eval()",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(bundle)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": inferer | window,
        "to_mask": _to_mask(bundle),
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "Lambdad", "keys": "pred", "func": "@to_mask"},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "mask",
                    "output_dtype": None,
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def _preprocessing(bundle: Bundle) -> list[dict[str, Any]]:
    """As our prediction: axes (z, y, x) along LPS, the model's spacing, then the image's statistics."""
    z, y, x = bundle.spacing
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "SPL"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": [z, y, x], "scale_extent": True},
    ]
    if any(channel.scheme in ("zscore", "minmax") for channel in bundle.channels):
        ways = {"zscore": ZSCORE, "minmax": MINMAX}
        parts = [ways.get(c.scheme, SAME).format(at, at + 1) for at, c in enumerate(bundle.channels)]
        func = f"$lambda x: torch.cat([{', '.join(parts)}])"
        steps.append({"_target_": "Lambdad", "keys": "image", "func": func})
    return [*steps, {"_target_": "EnsureTyped", "keys": "image", "device": "@device"}]


def _to_mask(bundle: Bundle) -> str:
    """Probabilities (output, ...) to the data set's values (1, ...)."""
    classes, threshold = bundle.classes, bundle.config.predict.threshold
    values = list(classes.written_values)
    kind = "torch.uint8" if max(values) <= 255 else "torch.int32"
    if classes.single:
        return f"$lambda p: (p >= {threshold}).to({kind})"
    there = f"p[k:k+1] >= {threshold}" if classes.regions else "p.argmax(0, keepdim=True) == k + 1"
    last = f"lambda m, k: torch.where({there}, {values}[k], m)"
    return f"$lambda p: functools.reduce({last}, range({len(values)}), torch.zeros_like(p[:1])).to({kind})"


def metadata_of(bundle: Bundle, *, free: bool) -> dict[str, Any]:
    """``configs/metadata.json``."""
    facts, dims = facts_of(bundle, free=free), bundle.config.model.dims
    names = ", ".join(bundle.classes.names)
    channels = [channel.name for channel in bundle.channels]
    shape: list[Any] = list(bundle.patch[-dims:])
    if free:
        shape = [f"{step}*n" for step in step_of(bundle)]
    ct = bundle.of_ct
    both = {"type": "image", "spatial_shape": shape, "dtype": "float32", "is_patch_data": True}
    packages = {name: version(name) for name in ("nibabel", "pytorch-ignite")}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by Voxelscale {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": packages,
        "optional_packages_version": packages,
        "name": f"Segmentation of {names}"[:200],
        "task": f"Segmentation of {names} in {', '.join(channels)}"[:500],
        "description": "A U-Net trained by Voxelscale; models/model.ts is its network with normalisation.",
        "authors": "those who trained the model",
        "copyright": "of those who trained the model",
        "intended_use": facts["notice"],
        "network_data_format": {
            "inputs": {
                "image": both
                | {
                    "format": "hounsfield" if ct else "magnitude",
                    "modality": "CT" if ct else channels[0],
                    "num_channels": len(channels),
                    "value_range": [],
                    "channel_def": {str(at): name for at, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": both
                | {
                    "format": "labels" if softmax_of(bundle) else "classes",
                    "num_channels": bundle.classes.outputs,
                    "value_range": [0, 1],
                    "channel_def": {str(at): name for at, name in enumerate(facts["outputs"])},
                }
            },
        },
        "voxelscale": facts,
    }


def _page(bundle: Bundle) -> str:
    names, several = ", ".join(bundle.classes.names), len(bundle.channels) > 1
    files = (
        f"one file a channel, `<case>_0000.nii.gz` and so on ({', '.join(c.name for c in bundle.channels)})"
        if several
        else "one `.nii.gz` a scan"
    )
    return f"""# Segmentation of {names}

Exported by Voxelscale {__version__}. For research only; not a medical device.

    python -m monai.bundle run --bundle_root . --config_file configs/inference.json \\
        --meta_file configs/metadata.json --dataset_dir scans --output_dir masks

Takes {files},
and writes a mask on each scan's own lattice. It needs MONAI, pytorch-ignite, fire and nibabel, but not
Voxelscale. The network in `models/model.ts` takes windows of {list(bundle.patch)} voxels (z, y, x) at
{list(bundle.spacing)} mm and gives probabilities; `configs/metadata.json` says more under `voxelscale`."""


def _licence() -> str:
    return (
        "The weights in models/ are under the licence of those who trained the model: put it here.\n"
        " The configs are under the Apache License 2.0, as Voxelscale is."
    )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A scan as large as one window, and what the exported network is to be given of it.

    Attributes:
        files: of each channel.
        values: (batch, channel, ...) of the window, or of each slice.
    """

    files: tuple[Path, ...]
    values: NDArray[np.float32]


def write_trial(bundle: Bundle, folder: Path) -> Trial:
    """A synthetic chest at the model's spacing, in LPS."""
    shape = bundle.patch if bundle.config.model.dims == 3 else (4, *bundle.patch[1:])
    chest = chest_of(shape)
    affine = np.zeros((4, 4))
    for axis, step in enumerate(bundle.spacing):
        affine[2 - axis, axis] = step
    affine[3, 3] = 1
    files, values = [], []
    for at, channel in enumerate(bundle.channels):
        given = chest + at if channel.scheme == "ct" else chest + WHOLE + at
        given = np.clip(given // 8, 0, 255) if channel.scheme == "rgb" else given
        name = f"trial_{at:04}.nii.gz" if len(bundle.channels) > 1 else "trial.nii.gz"
        write_scan(Scan(given, affine), folder / name)
        files.append(folder / name)
        values.append(_as_given(given, channel))
    stack = np.stack(values)
    batch = stack[None] if bundle.config.model.dims == 3 else stack.swapaxes(0, 1)
    return Trial(files=tuple(files), values=batch.astype(np.float32))


def _as_given(values: NDArray[Any], channel: Channel) -> NDArray[Any]:
    """What an exported network takes of a channel."""
    if channel.scheme not in ("zscore", "minmax"):
        return values
    stored, kept = keep(values, channel)
    normalised: NDArray[Any] = normalisation_of(channel, kept, None)(torch.from_numpy(stored)).numpy()
    return normalised


def run_bundle(folder: Path, scans: Path, out: Path, *more: str) -> None:
    """``python -m monai.bundle run`` on a folder of scans.

    Raises:
        VoxelscaleError: it failed.
    """
    configs = folder / "configs"
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", str(folder)]
    command += ["--config_file", str(configs / "inference.json")]
    command += ["--meta_file", str(configs / "metadata.json")]
    command += ["--dataset_dir", str(scans), "--output_dir", str(out), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise VoxelscaleError(
            f"monai.bundle run: took over {SECONDS} s", "write --to torchscript"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip() or "no word why").splitlines()[-1][:200]
        raise VoxelscaleError(
            f"monai.bundle run: failed ({reason})", "pip install -U monai pytorch-ignite fire"
        )


def probabilities_by_monai(bundle: Bundle, folder: Path, trial: Trial, work: Path) -> NDArray[np.float32]:
    """What the bundle gives of a trial, of the shape that `Trial.values` leads to."""
    import nibabel

    run_bundle(folder, trial.files[0].parent, work, "--to_mask", "$lambda p: p")
    (path,) = work.glob("*.nii.gz")
    found = np.asarray(nibabel.load(path).dataobj, np.float32)
    found = found.reshape(*found.shape[:3], -1).transpose(3, 2, 1, 0)
    return found[None] if bundle.config.model.dims == 3 else found.swapaxes(0, 1)
