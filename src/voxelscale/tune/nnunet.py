"""A trained model of nnU-Net as one of ours: its plans, its classes and the weights of its folds.

Read for the plans: ``nnunetv2`` 2.8. What our prediction would not do as nnU-Net does is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxelscale.channels import ONE_CT, Channel, Scheme
from voxelscale.classes import Classes
from voxelscale.config import Config, from_dict
from voxelscale.console import warn
from voxelscale.dataset.channels import said_by
from voxelscale.dataset.classes import of_json
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_model
from voxelscale.model.bundle import MOST_NETWORKS, Bundle, check_bundle, use_of, write_bundle
from voxelscale.model.nnunet import NnunetRules
from voxelscale.model.unet import plan_pooling
from voxelscale.samples.batch import Normalisation
from voxelscale.train.foreign import load_foreign, network_in, renamed

FOLDER = "name the folder of a trained nnU-Net model: it holds plans.json, dataset.json and fold_0/"

MOST_BYTES = 2**24
"""Of a JSON file; plans have thousands."""

SCHEMES: dict[str, Scheme] = {
    "CTNormalization": "ct",
    "ZScoreNormalization": "zscore",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "minmax",
    "RGBTo01Normalization": "rgb",
}

READERS = {"SimpleITKIO": False, "NibabelIO": False, "NibabelIOWithReorient": True}
"""And whether they turn scans to RAS."""

RESAMPLING = "resample_data_or_seg_to_shape"

KNOWN_TRAINERS = r"nnUNetTrainer(_?(\d+(epochs?|hours?)|NoMirroring|onlyMirror01|DA5|NoDeepSupervision))*"
"""Those that train the plans' own network."""

UNUSED = r"decoder\.encoder\..*|.*\.all_modules\..*|decoder\.seg_layers\..*"
"""Weights that are there twice, or only for deep supervision."""

UNSEEN = Normalisation(low=-1024.0, high=3071.0, mean=0.0, std=1000.0)
"""Of models without a channel of CT, which do not use it."""


class Unlike(ValueError):
    """Something that our prediction would do in another way than nnU-Net."""


def import_nnunet(folder: Path, out: Path, folds: Sequence[str] = (), checkpoint: str = "") -> Bundle:
    """Write a trained model folder of nnU-Net as a model file.

    Args:
        folder: with ``plans.json``, ``dataset.json`` and ``fold_<n>/<checkpoint>``.
        out: the file to write, ``*.vxs``.
        folds: which; (): all that have the checkpoint, whose logits are averaged.
        checkpoint: a file's name; "": ``checkpoint_final.pth``.

    Raises:
        VoxelscaleError: something is missing or not understood, or our prediction would not be nnU-Net's.
    """
    if out.suffix != ".vxs" or out.is_dir():
        raise VoxelscaleError(f"{out}: no name for a model file", "name a file that ends in .vxs")
    plans, described = _json(folder / "plans.json"), _json(folder / "dataset.json")
    files = _checkpoints(folder, folds, checkpoint or "checkpoint_final.pth")
    networks: list[Bundle] = []
    for path in files:
        try:
            networks.append(_network(path, load_foreign(path), plans, described, folder))
            if use_of(networks[0]) != use_of(networks[-1]):
                raise Unlike(f"not planned as {files[0]}")
        except VoxelscaleError as error:
            own = error.message.startswith(str(folder))
            raise VoxelscaleError(error.message if own else f"{path}: {error.message}", FOLDER) from None
        except Unlike as error:
            hint = "predict with nnU-Net itself, or train with the default plans and trainer"
            raise VoxelscaleError(f"{path}: {error}, which is not imported", hint) from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise VoxelscaleError(f"{path}: not understood with its plans ({reason})", FOLDER) from None
    first, *others = networks
    bundle = replace(first, others=tuple(others))
    write_bundle(out, bundle)
    return bundle


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise VoxelscaleError(f"{path}: too large to be plans", FOLDER)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VoxelscaleError(f"{path}: cannot be read ({error.strerror})", FOLDER) from None
    except (ValueError, RecursionError):
        raise VoxelscaleError(f"{path}: not JSON", FOLDER) from None
    if not isinstance(content, dict):
        raise VoxelscaleError(f"{path}: no table", FOLDER)
    return content


def _checkpoints(folder: Path, folds: Sequence[str], name: str) -> list[Path]:
    found = [folder / f"fold_{fold}" / name for fold in folds] or sorted(folder.glob(f"fold_*/{name}"))
    missing = next((path for path in found if not path.is_file()), None)
    if missing or not found:
        trained = ", ".join(sorted(path.name for path in folder.glob("fold_*"))[:10])
        hint = f"name one that is there by --folds and --checkpoint: {trained}" if trained else FOLDER
        raise VoxelscaleError(f"{missing or folder / 'fold_*' / name}: there is no such checkpoint", hint)
    if len(found) > MOST_NETWORKS:
        raise VoxelscaleError(f"{folder}: {len(found)} folds", f"name at most {MOST_NETWORKS} by --folds")
    return found


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a model finds, and where."""

    classes: Classes
    channels: tuple[Channel, ...]
    normalisations: tuple[Normalisation | None, ...]
    outputs: int


def _network(
    path: Path,
    content: Mapping[str, Any],
    plans: Mapping[str, Any],
    described: Mapping[str, Any],
    folder: Path,
) -> Bundle:
    """One fold; raise an `Unlike`, or a KeyError, TypeError, ValueError or the like where it is none."""
    name = content["init_args"]["configuration"]
    plan = _configuration(plans["configurations"], name)
    task = _task(plan, plans, described, folder)
    config = _config(plan, content.get("inference_allowed_mirroring_axes"), path)
    spacing = [float(step) for step in plan["spacing"]]
    if config.model.dims == 2:
        spacing = [float(plans["original_median_spacing_after_transp"][0]), *spacing]
    z, y, x = spacing
    _check_network(plan, config, spacing)
    _check_ways(plan, plans)
    trainer = str(content["trainer_name"])
    if not re.fullmatch(KNOWN_TRAINERS, trainer):
        warn(f"{path}: trained by {trainer[:60]}; its network is taken for that of the plans")
    axes = tuple(int(axis) for axis in plans["transpose_forward"])
    masked = [one is True for one in plan["use_mask_for_norm"]]
    rules = {"axes": axes, "masked": masked, "ras": READERS[plans["image_reader_writer"]]}
    bundle = Bundle(
        config=config,
        weights=_weights(content["network_weights"], config, spacing, task),
        spacing=(z, y, x),
        normalisation=next(filter(None, task.normalisations), UNSEEN),
        trained={"nnunet": f"{plans['dataset_name']}, {name}, {trainer}, {path.parent.name}"[:500]},
        classes=task.classes,
        channels=task.channels,
        normalisations=task.normalisations,
        nnunet=NnunetRules.from_dict(rules),
    )
    check_bundle(bundle)
    return bundle


def _configuration(each: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits; plans before nnU-Net 2.4 under today's names."""
    plan = dict(each[name])
    for _ in range(len(each)):
        if "inherits_from" not in plan:
            break
        parent = plan.pop("inherits_from")
        plan = {**each[parent], **plan}
    if plan.get("previous_stage"):
        raise Unlike("the second stage of a cascade")
    if "architecture" in plan:
        return plan
    kind, stages = plan["UNet_class_name"], plan["n_conv_per_stage_encoder"]
    base, most = int(plan["UNet_base_num_features"]), int(plan["unet_max_num_features"])
    shape = {
        "n_stages": len(stages),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(stages))],
        "kernel_sizes": plan["conv_kernel_sizes"],
        "strides": plan["pool_op_kernel_sizes"],
        "n_blocks_per_stage" if kind == "ResidualEncoderUNet" else "n_conv_per_stage": stages,
        "n_conv_per_stage_decoder": plan["n_conv_per_stage_decoder"],
    }
    return plan | {"architecture": {"network_class_name": kind, "arch_kwargs": shape}}


def _task(
    plan: Mapping[str, Any], plans: Mapping[str, Any], described: Mapping[str, Any], folder: Path
) -> _Task:
    """Classes and channels of a configuration."""
    path = folder / "dataset.json"
    labels, regions = dict(described["labels"]), False
    for value in labels.values():
        regions |= isinstance(value, list) and len(value) > 1
    if not regions:  # its outputs are in the order of the values
        first = {k: int(v[0] if isinstance(v, list) else v) for k, v in labels.items()}
        labels = dict(sorted(first.items(), key=lambda item: item[1]))
        heads = [value for name, value in labels.items() if name != "ignore"]
        if heads != list(range(len(heads))) or len(heads) < 2:
            raise Unlike(f"label values that are not 0, 1, 2 and so on ({str(heads)[:60]})")
    classes = of_json(path, {**described, "labels": labels})
    order = tuple(described.get("regions_class_order") or ())
    if regions and (classes.order or (1,)) != order:
        raise Unlike(f"regions that are written as {str(order)[:60]}")
    names = said_by(path, described.get("channel_names", described.get("modality")))
    schemes = [SCHEMES.get(str(name)) for name in plan["normalization_schemes"]]
    if None in schemes or len(schemes) != len(names):
        raise Unlike(f"normalised by {str(plan['normalization_schemes'])[:100]}")
    channels = tuple(
        Channel(name=name, scheme=scheme) for name, scheme in zip(names, schemes, strict=True) if scheme
    )
    hu = plans["foreground_intensity_properties_per_channel"]
    return _Task(
        classes=classes,
        channels=ONE_CT if schemes == ["ct"] else channels,
        normalisations=tuple(
            Normalisation.of_fingerprint({k: float(v) for k, v in hu[str(at)].items()})
            if scheme == "ct"
            else None
            for at, scheme in enumerate(schemes)
        ),
        outputs=len(classes.names) if regions else len(classes.names) + 1,
    )


def _config(plan: Mapping[str, Any], mirrored: Iterable[int] | None, path: Path) -> Config:
    """The network, its patch, and prediction by nnU-Net's defaults: mirrored, and all that is found."""
    tree = network_in(plan)
    letters = "zyx"[3 - tree["model"]["dims"] :]
    axes = "".join(letters[axis] for axis in sorted(set(mirrored or ())))
    shape = plan["architecture"]["arch_kwargs"]
    whole = {
        **tree,
        "augment": {"flip": bool(axes), "flip_axes": axes or "zyx"},
        "train": {"precision": "fp32"},
        "predict": {
            "test_time_augmentation": bool(axes),
            "candidates": 0.5,
            "min_volume_mm3": 0.0,
            "skip_air": False,
        },
    }
    if len(shape["features_per_stage"]) != tree["model"]["depth"]:
        raise ValueError("as many features as stages are needed")
    return from_dict(whole, str(path))


def _check_network(plan: Mapping[str, Any], config: Config, spacing: Sequence[float]) -> None:
    """Raise an `Unlike` where the planned network is none of ours."""
    built = plan["architecture"]
    shape, model, dims = built["arch_kwargs"], config.model, config.model.dims
    kind = str(built["network_class_name"]).rpartition(".")[2]
    if kind != ("ResidualEncoderUNet" if model.blocks else "PlainConvUNet"):
        raise Unlike(f"the network {kind[:60]}")
    features = [min(model.filters * 2**level, model.max_filters) for level in range(model.depth)]
    convolutions = [2] * model.depth, [1 if model.blocks else 2] * (model.depth - 1)
    pools = plan_pooling(config.data.patch_size[-dims:], spacing[-dims:], model.depth)
    wanted = {
        "features_per_stage": features,
        "n_conv_per_stage": None if model.blocks else convolutions[0],
        "n_conv_per_stage_decoder": convolutions[1],
        "strides": [[1] * dims, *map(list, pools)],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
    }
    for key, value in wanted.items():
        given = shape.get(key, value)
        if isinstance(given, int) and isinstance(value, list):
            given = [given] * len(value)
        if given != value:
            raise Unlike(f"a network whose {key} are {str(given)[:100]}")
    for key, name in (("norm_op", f"InstanceNorm{dims}d"), ("nonlin", "LeakyReLU")):
        if str(shape.get(key, name)).rpartition(".")[2] != name:
            raise Unlike(f"a network with {str(shape[key])[:60]}")
    if (shape.get("nonlin_kwargs") or {}).get("negative_slope", 0.01) != 0.01:
        raise Unlike("another slope of its leaky ReLU")


def _check_ways(plan: Mapping[str, Any], plans: Mapping[str, Any]) -> None:
    """Raise an `Unlike` where scans are prepared in ways that `voxelscale.predict.nnunet` does not know."""
    if plans["image_reader_writer"] not in READERS:
        raise Unlike(f"scans read by {str(plans['image_reader_writer'])[:60]}")
    for key, value in (("preprocessor_name", "DefaultPreprocessor"), ("label_manager", "LabelManager")):
        given = (plans if key in plans else plan).get(key) or value
        if given != value:
            raise Unlike(f"the {key} {str(given)[:60]}")
    for key, order in (("data", 3), ("probabilities", 1)):
        wanted = {"is_seg": False, "order": order, "order_z": 0, "force_separate_z": None}
        given = plan[f"resampling_fn_{key}_kwargs"]
        if plan[f"resampling_fn_{key}"] != RESAMPLING or wanted | given != wanted:
            raise Unlike(
                f"the {key} resampled by {str(plan[f'resampling_fn_{key}'])[:60]} {str(given)[:80]}"
            )


def _weights(
    theirs: Mapping[str, Any], config: Config, spacing: Sequence[float], task: _Task
) -> dict[str, Tensor]:
    """A checkpoint's weights under our names; biases before a norm, which it takes out again, are left out.

    Of one class the softmax of two outputs is the sigmoid of their difference.
    """
    theirs = {re.sub(r"^(module|_orig_mod)\.", "", name): weight for name, weight in theirs.items()}
    ours = renamed(theirs)
    single = task.classes.single and task.outputs == 2
    if single:
        ours |= {name: ours[name][1:2] - ours[name][:1] for name in ("head.weight", "head.bias")}
    with torch.device("meta"):
        channels, outputs = len(task.channels), task.classes.outputs
        wanted = build_model(config.model, config.data.patch_size, spacing, channels, outputs).state_dict()
    taken = {name for name in theirs if not re.fullmatch(UNUSED, name)}
    kinds = {name.rpartition(".")[2] for name in taken}
    if kinds != {"weight", "bias"}:
        raise Unlike(f"weights of another network ({', '.join(sorted(kinds - {'weight', 'bias'}))[:60]})")
    found = {name: ours[name].float().clone() for name in wanted if name in ours}
    left = {name for name in ours if name not in wanted and not re.search(r"\.conv\d\.bias$", name)}
    heads = {name for name in theirs if name.startswith("decoder.seg_layers.")}
    if left or len(ours) != len(taken) + min(2, len(heads)) or len(found) != len(wanted):
        raise Unlike("weights of another network")
    return found
