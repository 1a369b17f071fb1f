"""nnU-Net's checkpoints: their weights under our names, and the network that they fit.

Read for the names: ``dynamic_network_architectures`` 0.4 (`PlainConvUNet`, `ResidualEncoderUNet`) and the
checkpoint of ``nnunetv2`` 2.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxelscale.dataset.channels import said_by
from voxelscale.errors import VoxelscaleError

NUMBERS: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)},
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]
"""What a checkpoint's log of the training is made of besides plain values."""

PARTS = (
    (r"encoder\.stem\.convs\.0\.(conv|norm)", r"encode.stem.\g<1>1"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv([12])\.(conv|norm)", r"encode.stages.\1.\2.\4\3"),
    (r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d+\.(conv|norm)", r"encode.stages.\1.\2.\g<3>3"),
    (r"encoder\.stages\.(\d+)\.\d+\.convs\.([01])\.(conv|norm)", r"encode.levels.\1.\3+\2"),
    (r"decoder\.stages\.(\d+)\.convs\.([01])\.(conv|norm)", r"decode.levels.\1.level.\3+\2"),
)
"""Their modules and ours; ``+0`` stands for 1, ``+1`` for 2, as they count from 0."""


def load_foreign(path: Path) -> dict[str, Any]:
    """The dictionary of a checkpoint, without ever executing code from it.

    Raises:
        VoxelscaleError: it is damaged, or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler says of a hostile file, the person needs one line
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise VoxelscaleError(
            f"{path}: not loadable ({reason})", "name nnU-Net's checkpoint_final.pth"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("network_weights"), dict):
        raise VoxelscaleError(f"{path}: no checkpoint of nnU-Net", "name its checkpoint_final.pth")
    return content


def renamed(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """nnU-Net's weights under our names; those that ours has not (other blocks) are left out.

    Our decoder has the skip first, and goes up by a 1-wide convolution whose outputs are the voxels of
    their transposed one.
    """
    found: dict[str, Tensor] = {}
    levels = [int(name.split(".")[2]) for name in weights if name.startswith("decoder.seg_layers.")]
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            continue
        module, _, kind = name.rpartition(".")
        if module.startswith("decoder.transpconvs."):
            ours = f"decode.levels.{module.rpartition('.')[2]}.up"
            found[f"{ours}.{kind}"] = _up(weight) if kind == "weight" else weight
        elif levels and module == f"decoder.seg_layers.{max(levels)}":
            found[f"head.{kind}"] = weight
        elif (ours := _module(module)) and kind in ("weight", "bias"):
            first = ours.startswith("decode") and ours.endswith("conv1") and kind == "weight"
            found[f"{ours}.{kind}"] = torch.cat(weight.chunk(2, 1)[::-1], 1) if first else weight
    for name in [name for name in found if name.endswith(".up.bias")]:
        rows = found[name.removesuffix("bias") + "weight"]
        found[name] = found[name].repeat(len(rows) // len(found[name]))
    return found


def _module(theirs: str) -> str:
    for pattern, ours in PARTS:
        if match := re.fullmatch(pattern, theirs):
            return match.expand(ours).replace("+0", "1").replace("+1", "2")
    return ""


def _up(weight: Tensor) -> Tensor:
    """Of (in, out, ...) the rows (voxel and out, in, 1, ...)."""
    rows = weight.movedim(1, -1).reshape(len(weight), -1).T
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2)).contiguous()


def network_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The sections ``model`` and ``data`` of the config whose network a checkpoint's weights fit; {} where
    it does not say."""
    try:
        arguments = content["init_args"]
        return network_in(arguments["plans"]["configurations"][arguments["configuration"]])
    except (KeyError, TypeError, ValueError, IndexError):
        return {}


def network_in(plan: Mapping[str, Any]) -> dict[str, Any]:
    """As `network_of`, of a configuration of nnU-Net's plans.

    Raises:
        KeyError, TypeError, ValueError, IndexError: it is nothing of the kind.
    """
    shape = plan["architecture"]["arch_kwargs"]
    features, blocks = shape["features_per_stage"], shape.get("n_blocks_per_stage", [])
    dims = len(shape["kernel_sizes"][0])
    flat = [1] * (3 - dims)
    return {
        "model": {
            "dims": dims,
            "depth": int(shape["n_stages"]),
            "filters": int(features[0]),
            "max_filters": int(max(features)),
            "downsampling": "max" if blocks else "strided",
            "kernels": [
                [*flat, *kernel] if dims == 3 else [3, *kernel] for kernel in shape["kernel_sizes"]
            ],
            "blocks": [int(count) for count in blocks],
        },
        "data": {"patch_size": [*flat, *map(int, plan["patch_size"])]},
    }


def names_of(content: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Channels, classes after the background in the order of the outputs, () where it does not say; and
    whether these are regions."""
    try:
        described = dict(content["init_args"]["dataset_json"])
    except (KeyError, TypeError, ValueError):
        return (), (), False
    channels: tuple[str, ...] = ()
    with suppress(VoxelscaleError):
        channels = said_by(path, described.get("channel_names", described.get("modality")))
    try:
        labels = {
            name: value if isinstance(value, list) else [value]
            for name, value in described["labels"].items()
        }
        names = [str(name) for name in labels if name not in ("background", "ignore")]
        regions = any(len(labels[name]) > 1 for name in names)
        return (
            channels,
            tuple(names if regions else sorted(names, key=lambda n: int(labels[n][0]))),
            regions,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return channels, (), False
