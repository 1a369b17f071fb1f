"""Models of nnU-Net as ours: against nnU-Net's own predictor, and against what it wrote down once."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from tests.conftest import SHARED, Command
from torch import nn

from voxelscale.api import Model
from voxelscale.channels import Channel
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan, resample
from voxelscale.infer.sliding_window import gaussian_profile, window_starts
from voxelscale.model.bundle import read_bundle, write_bundle
from voxelscale.predict.nnunet import as_written, coarse_axis, on_scan, prepare
from voxelscale.tune.export import export_model
from voxelscale.tune.nnunet import import_nnunet

PLAIN, RESIDUAL = (
    "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
)
MRI, CT, PET = ("MRI", "ZScoreNormalization"), ("CT", "CTNormalization"), ("PET", "ZScoreNormalization")
HU = {"mean": 20.0, "std": 180.0, "percentile_00_5": -700.0, "percentile_99_5": 500.0}


def plans_of(
    dims: int = 3,
    kind: str = PLAIN,
    channels: tuple[tuple[str, str], ...] = (MRI,),
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    patch: tuple[int, ...] = (16, 24, 16),
    strides: tuple[tuple[int, ...], ...] = ((1, 1, 1), (2, 2, 2)),
    masked: bool = False,
) -> dict[str, Any]:
    """Plans as nnU-Net's planner writes them, of a network with two stages."""
    resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    name, stages = f"{dims}d", len(strides)
    shape: dict[str, Any] = {
        "n_stages": stages,
        "features_per_stage": [4 * 2**stage for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{name}",
        "kernel_sizes": [[3] * dims] * stages,
        "strides": [list(stride) for stride in strides],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{name}",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if kind == RESIDUAL:
        shape |= {"n_blocks_per_stage": [1] * stages, "n_conv_per_stage_decoder": [1] * (stages - 1)}
        del shape["n_conv_per_stage"]
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(at): HU for at in range(len(channels))},
        "configurations": {
            "base": {
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch),
                "normalization_schemes": [scheme for _, scheme in channels],
                "use_mask_for_norm": [masked] * len(channels),
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resample,
                "resampling_fn_seg_kwargs": {**resample, "is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {**resample, "order": 1},
                "batch_dice": False,
            },
            "mine": {
                "inherits_from": "base",
                "spacing": list(spacing),
                "architecture": {
                    "network_class_name": kind,
                    "arch_kwargs": shape,
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            },
        },
    }


def described(
    labels: dict[str, Any], channels: tuple[tuple[str, str], ...] = (MRI,), **more: Any
) -> dict[str, Any]:
    names = {str(at): name for at, (name, _) in enumerate(channels)}
    return {"channel_names": names, "labels": labels, "file_ending": ".nii.gz", "numTraining": 2, **more}


TWO = {"background": 0, "front": 1, "back": 2}


class Saved:
    """A folder as nnU-Net leaves it, without nnU-Net."""

    def __init__(self, folder: Path, plans: dict[str, Any], dataset: dict[str, Any]) -> None:
        self.folder, self.plans, self.dataset = folder, plans, dataset
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        (self.folder / "plans.json").write_text(json.dumps(self.plans))
        (self.folder / "dataset.json").write_text(json.dumps(self.dataset))

    def fold(
        self, number: int, weights: dict[str, Any], mirrored: tuple[int, ...] | None, **more: Any
    ) -> Path:
        path = self.folder / f"fold_{number}" / "checkpoint_final.pth"
        path.parent.mkdir(exist_ok=True)
        content = {
            "network_weights": weights,
            "init_args": {"configuration": "mine", "plans": self.plans, "dataset_json": self.dataset},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": mirrored,
        }
        torch.save(content | more, path)
        return path


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net, where it is installed."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("nnUNet_compile", "f")
    pytest.importorskip("nnunetv2")


def network_of(saved: Saved, outputs: int, seed: int) -> dict[str, Any]:
    """The weights of nnU-Net's own network, sure of itself."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    planned = saved.plans["configurations"]["mine"]["architecture"]
    channels = len(saved.dataset["channel_names"])
    torch.manual_seed(seed)
    arguments = (planned["network_class_name"], planned["arch_kwargs"], planned["_kw_requires_import"])
    network: nn.Module = get_network_from_plans(*arguments, channels, outputs, deep_supervision=True)
    for name, weight in network.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.3)
        if "seg_layers" in name and name.endswith("weight"):
            nn.init.normal_(weight, std=2.0)
    return dict(network.state_dict())


def by_nnunet(folder: Path, folds: tuple[int, ...], images: list[Path]) -> NDArray[Any]:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images(list(map(str, images)))
    found = np.asarray(predictor.predict_single_npy_array(image, properties))
    reader.write_seg(found, str(images[0].with_name("theirs.nii.gz")), properties)
    return read_scan(images[0].with_name("theirs.nii.gz")).array


def smooth(seed: int, shape: tuple[int, ...], spacing: tuple[float, ...], low: float = 0.0) -> Scan:
    """Smooth values in a body, 0 around it, with axes as no standard has them."""
    random = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(random.normal(0, 1, shape), 2)
    values = 300 * values / values.std() + 500 + low
    values[:, :3] = values[..., -2:] = 0
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]]) * spacing
    return Scan(values.astype(np.float32), affine)


def agreement(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Dice of what is in both of the same class."""
    return float(2 * ((one == other) & (one > 0)).sum() / ((one > 0).sum() + (other > 0).sum()))


REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, tuple[int, ...] | None]] = {
    "classes-mirrored": (plans_of(), described(TWO), 3, (0, 1, 2)),
    "one-class-ct": (
        plans_of(channels=(CT,), spacing=(1.2, 0.9, 1.1)),
        described({"background": 0, "lesion": 1, "ignore": 2}, (CT,)),
        2,
        None,
    ),
    "regions-resenc": (
        plans_of(kind=RESIDUAL, channels=(CT, PET), spacing=(1.5, 1.0, 1.0)),
        described(REGIONS, (CT, PET), regions_class_order=[1, 2]),
        2,
        (0,),
    ),
    "coarse-masked": (
        plans_of(spacing=(4.0, 1.0, 1.0), patch=(7, 24, 24), strides=((1, 1, 1), (1, 2, 2)), masked=True)
        | {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]},
        described(TWO),
        3,
        (1, 2),
    ),
    "flat": (
        plans_of(dims=2, spacing=(1.1, 0.9), patch=(24, 16), strides=((1, 1), (2, 2)), masked=True),
        described(TWO),
        3,
        (0, 1),
    ),
    "ras": (plans_of() | {"image_reader_writer": "NibabelIOWithReorient"}, described(TWO), 3, None),
}


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("name", CASES)
def test_masks_are_nnunets(name: str, tmp_path: Path) -> None:
    plans, dataset, outputs, mirrored = CASES[name]
    saved = Saved(tmp_path / "trained", plans, dataset)
    for fold in (0, 1):
        saved.fold(fold, network_of(saved, outputs, fold), mirrored)
    images = []
    for at, (channel, _) in enumerate(dataset["channel_names"].items()):
        scan = smooth(at, (21, 37, 26), (1.3, 1.0, 0.8), -700 if channel == "0" and "ct" in name else 0)
        images.append(tmp_path / f"case_{at:04}.nii.gz")
        write_scan(scan, images[-1])
    import_nnunet(saved.folder, tmp_path / "model.vxs", ["0", "1"])
    theirs = by_nnunet(saved.folder, (0, 1), images)
    mask = Model.load(tmp_path / "model.vxs").predict(*images).mask
    ours = mask.array
    assert (theirs == 1).sum() + (theirs == 2).sum() == (theirs > 0).sum() > 300
    assert theirs.shape == ours.shape
    assert agreement(ours, theirs) >= 0.999


THICK = plans_of(spacing=(4.0, 1.0, 1.0), patch=(7, 24, 24), strides=((1, 1, 1), (1, 2, 2)))


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("spacing", [(1.0, 4.0, 1.0), (1.0, 4.0, 4.0)])
def test_logits_go_back_as_nnunets_where_other_axes_are_coarse(
    spacing: tuple[float, ...], tmp_path: Path
) -> None:
    saved = Saved(tmp_path / "trained", THICK, described(TWO))
    saved.fold(0, network_of(saved, 3, 0), None)
    write_scan(smooth(0, (40, 12, 16), spacing), tmp_path / "case_0000.nii.gz")
    import_nnunet(saved.folder, tmp_path / "model.vxs")
    ours = Model.load(tmp_path / "model.vxs").predict(tmp_path / "case_0000.nii.gz").mask.array
    theirs = by_nnunet(saved.folder, (0,), [tmp_path / "case_0000.nii.gz"])
    assert agreement(ours, theirs) >= 0.999


def rotated(scan: Scan) -> Scan:
    """The same voxels in a patient who lies askew."""
    (a, b), affine = (-0.2, 0.35), np.eye(4)
    around_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    around_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine[:3, :3] = around_z @ around_x
    return Scan(scan.array, affine @ scan.affine)


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_masks_of_rotated_scans_are_nnunets(reader: str, tmp_path: Path) -> None:
    plans = plans_of(spacing=(1.3, 1.5, 1.5)) | {
        "image_reader_writer": reader,
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
    }
    saved = Saved(tmp_path / "trained", plans, described(TWO))
    saved.fold(0, network_of(saved, 3, 0), (0, 1, 2))
    # Two axes are equally coarse, but for the rounding of the rotation.
    write_scan(rotated(smooth(0, (11, 24, 11), (5.0, 1.0, 5.0))), tmp_path / "case_0000.nii.gz")
    import_nnunet(saved.folder, tmp_path / "model.vxs")
    ours = Model.load(tmp_path / "model.vxs").predict(tmp_path / "case_0000.nii.gz").mask.array
    assert agreement(ours, by_nnunet(saved.folder, (0,), [tmp_path / "case_0000.nii.gz"])) >= 0.999


@pytest.mark.usefixtures("peers")
@pytest.mark.parametrize("name", CASES)
def test_inputs_are_nnunets(name: str, tmp_path: Path) -> None:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, dataset, outputs, mirrored = CASES[name]
    saved = Saved(tmp_path / "trained", plans, dataset)
    saved.fold(0, network_of(saved, outputs, 0), mirrored)
    bundle = import_nnunet(saved.folder, tmp_path / "model.vxs")
    count = len(dataset["channel_names"])
    images = [tmp_path / f"case_{at:04}.nii.gz" for at in range(count)]
    for spacing in ((1.3, 1.0, 0.8), (0.5, 2.0, 1.7), (1.0, 1.0, 1.0)):
        for at, path in enumerate(images):
            write_scan(smooth(at, (15, 21, 24), spacing, -700 * (at == 0)), path)
        manager = PlansManager(copy.deepcopy(plans))
        reader = manager.image_reader_writer_class()
        data, properties = reader.read_images(list(map(str, images)))
        preprocessor, chosen = DefaultPreprocessor(verbose=False), manager.get_configuration("mine")
        wanted, _, _ = preprocessor.run_case_npy(data, None, properties, manager, chosen, dataset)
        found = prepare([read_scan(path) for path in images], bundle).values
        assert found.shape == wanted.shape
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.usefixtures("peers")
def test_windows_and_weights_are_nnunets() -> None:
    from nnunetv2.inference import sliding_window_prediction as theirs

    for size, patch in ((100, 40), (101, 25), (40, 40), (57, 19), (64, 7)):
        steps = theirs.compute_steps_for_sliding_window((size,), (patch,), 0.5)[0]
        assert window_starts(size, patch, 0.5, exact=True) == steps
    each = (40, 25, 6)
    weights = theirs.compute_gaussian(each, 1 / 8, 1, torch.float64, torch.device("cpu"))
    z, y, x = (gaussian_profile(patch, True).double() for patch in each)
    assert torch.allclose(z[:, None, None] * y[:, None] * x, weights, atol=1e-6)


def own_weights(saved: Saved, outputs: int) -> dict[str, torch.Tensor]:
    """A checkpoint's, under nnU-Net's names, of a plain network; drawn without it."""
    planned = saved.plans["configurations"]["mine"]["architecture"]["arch_kwargs"]
    generator = torch.Generator().manual_seed(0)
    features, strides = planned["features_per_stage"], planned["strides"]
    weights: dict[str, torch.Tensor] = {}

    def put(name: str, *shape: int) -> None:
        fan = int(np.prod(shape[1:]))
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        count = shape[1] if "transp" in name else shape[0]
        weights[f"{name}.bias"] = 0.1 * torch.randn(count, generator=generator)

    def norm(name: str, count: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(count, generator=generator)
        weights[f"{name}.bias"] = 0.3 * torch.randn(count, generator=generator)

    before = len(saved.dataset["channel_names"])
    for stage, (count, kernel) in enumerate(zip(features, planned["kernel_sizes"], strict=True)):
        for conv in (0, 1):
            name = f"encoder.stages.{stage}.0.convs.{conv}"
            put(f"{name}.conv", count, before, *kernel)
            norm(f"{name}.norm", count)
            before = count
    for level in range(len(features) - 1):
        low, high = features[-1 - level], features[-2 - level]
        put(f"decoder.transpconvs.{level}", low, high, *strides[-1 - level])
        for conv, given in ((0, 2 * high), (1, high)):
            name = f"decoder.stages.{level}.convs.{conv}"
            put(f"{name}.conv", high, given, *planned["kernel_sizes"][-2 - level])
            norm(f"{name}.norm", high)
        put(head := f"decoder.seg_layers.{level}", outputs, high, *[1] * len(strides[0]))
        weights[f"{head}.weight"] *= 4  # sure of itself: nnU-Net's sums of float16 decide where it is not
    for name, weight in list(weights.items()):  # its modules are there under several names
        part = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        weights[part] = weight
    return weights | {f"decoder.{n}": w for n, w in weights.items() if n.startswith("encoder.")}


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    made = Saved(tmp_path / "trained", plans_of(), described(TWO))
    made.fold(0, own_weights(made, 3), (0, 2))
    return made


def test_the_command_makes_a_model_as_any(saved: Saved, tmp_path: Path, voxelscale: Command) -> None:
    out = tmp_path / "model.vxs"
    code, text, err = voxelscale("--quiet", "import-nnunet", saved.folder, "--out", out)
    assert (code, err, text) == (0, "", f"1 network for front, back in {out}\n")
    bundle = read_bundle(out)
    assert bundle.channels == (Channel(name="MRI", scheme="zscore"),)
    assert bundle.config.augment.mirrored == "zx"
    assert bundle.config.predict.test_time_augmentation
    assert bundle.nnunet is not None
    write_bundle(tmp_path / "again.vxs", bundle)
    again = read_bundle(tmp_path / "again.vxs")
    assert (again.nnunet, again.identity) == (bundle.nnunet, bundle.identity)
    write_scan(smooth(0, (20, 30, 20), (1.0, 1.0, 1.0)), tmp_path / "scans" / "a.nii.gz")
    code, _, err = voxelscale("--quiet", "predict", out, tmp_path / "scans", tmp_path / "found")
    assert code == 0, err
    mask = read_scan(next(tmp_path.glob("found/*/mask.nii.gz")))
    assert set(np.unique(mask.array)) == {0, 1, 2}
    code, _, err = voxelscale("ensemble", out, out, "--out", tmp_path / "b.vxs")
    assert code == 2


def test_what_nnunet_predicted_once(saved: Saved, tmp_path: Path) -> None:
    """Without nnU-Net: voxels and centres of what its predictor (2.8.1) gave of these very weights."""
    import_nnunet(saved.folder, tmp_path / "model.vxs")
    model = Model.load(tmp_path / "model.vxs")
    for spacing, wanted in ONCE.items():
        write_scan(smooth(0, (21, 37, 26), spacing), tmp_path / "a.nii.gz")
        mask = model.predict(tmp_path / "a.nii.gz").mask.array
        assert facts_of(mask) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.usefixtures("peers")
def test_what_was_written_down_is_nnunets(saved: Saved, tmp_path: Path) -> None:
    for spacing, wanted in ONCE.items():
        write_scan(smooth(0, (21, 37, 26), spacing), tmp_path / "a.nii.gz")
        assert facts_of(by_nnunet(saved.folder, (0,), [tmp_path / "a.nii.gz"])) == pytest.approx(wanted)


def facts_of(mask: NDArray[Any]) -> list[float]:
    """Of each class its voxels, and their centre."""
    each = []
    for value in (1, 2):
        places = np.argwhere(mask == value)
        each += [float(len(places)), *places.mean(0).round(4).tolist()]
    return each


ONCE: dict[tuple[float, float, float], list[float]] = {
    (1.0, 1.0, 1.0): [11801.0, 10.0894, 19.2638, 11.3702, 4934.0, 9.8154, 19.936, 11.7491],
    (1.3, 1.0, 0.8): [12254.0, 10.0611, 19.2612, 11.4986, 4659.0, 9.7778, 20.064, 11.4252],
    (4.0, 1.0, 1.0): [11108.0, 10.1211, 19.1312, 11.3066, 5399.0, 9.7831, 20.1046, 11.8322],
}


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("plans", "configurations"), {}, "not understood"),
        (("plans", "image_reader_writer"), "Tiff3DIO", "scans read by Tiff3DIO"),
        (("plans", "transpose_forward"), [0, 0, 2], "no order of three axes"),
        (("plans", "transpose_forward"), 7, "not understood"),
        (("plans", "configurations", "base", "preprocessor_name"), "Mine", "preprocessor_name Mine"),
        (("plans", "configurations", "base", "resampling_fn_data"), "mine", "the data resampled by mine"),
        (("plans", "configurations", "base", "use_mask_for_norm"), [], "rules of nnU-Net are of another"),
        (("plans", "configurations", "base", "patch_size"), [16, 10**12, 16], "a patch of"),
        (("plans", "configurations", "base", "patch_size"), [-1, 8, 8], "patch_size"),
        (("plans", "configurations", "base", "patch_size"), "large", "not understood"),
        (("plans", "configurations", "base", "normalization_schemes"), ["Mine"], "normalised by"),
        (("plans", "configurations", "mine", "spacing"), [1e-9, 1e-9, 1e-9], "a spacing of"),
        (("plans", "configurations", "mine", "spacing"), [float("nan"), 1, 1], "strides|a spacing of"),
        (("plans", "configurations", "mine", "previous_stage"), "3d_lowres", "a cascade"),
        (("plans", "configurations", "mine", "architecture", "network_class_name"), "os.system", "system"),
        (("shape", "n_stages"), 10**9, "not understood"),
        (("shape", "strides"), [[1, 1, 1], [1, 2, 2]], "whose strides are"),
        (("shape", "norm_op"), "torch.nn.modules.batchnorm.BatchNorm3d", "BatchNorm3d"),
        (("shape", "nonlin_kwargs"), {"negative_slope": 0.2}, "another slope"),
        (("shape", "features_per_stage"), [4, 9], "whose features_per_stage are"),
        (("shape", "features_per_stage"), [8, 16], "another network"),
        (("shape", "kernel_sizes"), [[2, 2, 2], [2, 2, 2]], "model.kernels"),
        (("dataset", "labels"), {"background": 0, "a": 1, "b": 7}, "label values that are not"),
        (("dataset", "labels"), "none", "not understood"),
        (("dataset", "channel_names"), {"0": "MRI", "1": "PET"}, "normalised by"),
    ],
)
def test_other_plans_are_one_line(
    saved: Saved, tmp_path: Path, voxelscale: Command, place: tuple[str, ...], value: Any, told: str
) -> None:
    tree: Any = {
        "plans": saved.plans,
        "dataset": saved.dataset,
        "shape": saved.plans["configurations"]["mine"]["architecture"]["arch_kwargs"],
    }
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value
    saved.write()
    code, _, err = voxelscale("import-nnunet", saved.folder, "--out", tmp_path / "model.vxs")
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith(f"error: {saved.folder}")
    assert re.search(told, first)
    assert second.startswith("hint: ")
    assert not (tmp_path / "model.vxs").exists()


def test_files_that_are_none_are_one_line(saved: Saved, tmp_path: Path, voxelscale: Command) -> None:
    def told(*more: object) -> str:
        code, _, err = voxelscale("import-nnunet", saved.folder, "--out", tmp_path / "model.vxs", *more)
        assert code == 2
        assert len(err.splitlines()) == 2
        return err

    assert "there is no such checkpoint" in told("--folds", "3")
    assert "there is no such checkpoint" in told("--checkpoint", "best.pth")
    (saved.folder / "plans.json").write_text("[" * 100_000)
    assert "plans.json: not JSON" in told()
    (saved.folder / "plans.json").write_text("[]")
    assert "plans.json: no table" in told()
    (saved.folder / "plans.json").unlink()
    assert "plans.json: cannot be read" in told()
    saved.write()
    weights = own_weights(saved, 3)
    saved.fold(0, weights | {"encoder.more.weight": torch.ones(2)}, None)
    assert "weights of another network" in told()
    saved.fold(0, weights | {"encoder.stages.0.0.convs.0.norm.running_mean": torch.ones(4)}, None)
    assert "weights of another network" in told()
    weights["encoder.stages.0.0.convs.0.conv.weight"][0, 0, 0, 0, 0] = float("inf")
    saved.fold(0, weights, None)
    assert "is not finite" in told()
    saved.fold(0, own_weights(saved, 3), (5,))
    assert "not understood" in told()
    saved.fold(0, {"a": 1}, None)
    assert "weights of another network" in told()


def test_its_folds_are_exported_as_one(saved: Saved, tmp_path: Path) -> None:
    other = {name: 1.1 * weight for name, weight in own_weights(saved, 3).items()}
    saved.fold(1, other, (0, 2))
    bundle = import_nnunet(saved.folder, tmp_path / "model.vxs")
    assert export_model(tmp_path / "model.vxs", "torchscript", tmp_path / "model.ts") < 1e-4
    network = torch.jit.load(tmp_path / "model.ts")  # type: ignore[no-untyped-call]
    window = torch.randn(1, 1, 16, 24, 16)
    with torch.inference_mode():
        logits = [one.network(torch.device("cpu"))(window) for one in bundle.networks]
        assert torch.allclose(network(window), torch.stack(logits).mean(0).softmax(1), atol=1e-4)
    with pytest.raises(VoxelscaleError, match="MONAI's transforms do not prepare scans as nnU-Net does"):
        export_model(tmp_path / "model.vxs", "monai-bundle", tmp_path / "bundle")


def test_an_ensemble_is_of_networks_that_are_used_alike(
    saved: Saved, tmp_path: Path, voxelscale: Command
) -> None:
    import_nnunet(saved.folder, tmp_path / "a.vxs")
    saved.plans["configurations"]["base"]["use_mask_for_norm"] = [True]
    saved.write()
    import_nnunet(saved.folder, tmp_path / "b.vxs")
    out = tmp_path / "both.vxs"
    code, _, err = voxelscale("ensemble", tmp_path / "a.vxs", tmp_path / "b.vxs", "--out", out)
    assert code == 2
    assert "goes together only with those that are used like it" in err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("peers")
def test_masks_of_real_scans_are_nnunets(saved: Saved, tmp_path: Path) -> None:
    scans = sorted((SHARED / "msd_hippocampus" / "imagesTr").glob("*.nii.gz"))[:3]
    if not scans:
        pytest.skip("no scans beside the checkout")
    import_nnunet(saved.folder, tmp_path / "model.vxs")
    images = [read_scan(path) for path in scans]
    images.append(resample(images[0], images[0].grid.with_spacing((2.1, 0.7, 1.3))))
    for at, image in enumerate(images):
        write_scan(image, tmp_path / f"{at}.nii.gz")
        ours = Model.load(tmp_path / "model.vxs").predict(tmp_path / f"{at}.nii.gz").mask.array
        assert agreement(ours, by_nnunet(saved.folder, (0,), [tmp_path / f"{at}.nii.gz"])) >= 0.999


def test_channels_on_other_lattices_are_refused(saved: Saved, tmp_path: Path) -> None:
    saved.plans, saved.dataset = plans_of(channels=(CT, PET)), described(TWO, (CT, PET))
    saved.write()
    saved.fold(0, own_weights(saved, 3), None)
    bundle = import_nnunet(saved.folder, tmp_path / "model.vxs")
    one = smooth(0, (20, 20, 20), (1.0, 1.0, 1.0))
    other = resample(one, one.grid.with_spacing((2.0, 1.0, 1.0)))
    with pytest.raises(VoxelscaleError, match="the channel PET lies on another lattice than CT"):
        prepare([one, other], bundle)


def test_the_axis_that_is_resampled_by_itself() -> None:
    assert coarse_axis((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)) is None
    assert coarse_axis((4.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == 0
    assert coarse_axis((1.0, 1.0, 1.0), (1.0, 5.0, 1.0)) == 1
    assert coarse_axis((1.0, 4.0, 4.0), (1.0, 1.0, 1.0)) is None


def test_a_spacing_is_what_its_file_gives() -> None:
    assert as_written(4.9999999112232) == as_written(5.0000004218687355) == 5.0
    assert as_written(0.6000000306612532) == float(np.float32(0.6)) == as_written(float(np.float32(0.6)))
    for exact in (1.2, 0.48828125, 0.703125, 2.5001):
        assert as_written(exact) == exact


def test_beyond_the_crop_of_a_turned_scan_is_background(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "trained", CASES["ras"][0], described(TWO))
    saved.fold(0, own_weights(saved, 3), None)
    import_nnunet(saved.folder, tmp_path / "model.vxs")
    scan = rotated(smooth(0, (11, 24, 16), (1.3, 1.0, 0.8)))
    write_scan(scan, tmp_path / "case.nii.gz")
    mask = Model.load(tmp_path / "model.vxs").predict(tmp_path / "case.nii.gz").mask.array
    assert mask.any()
    assert not mask[scan.array == 0].any(), "the first rows and the last columns"


def test_on_the_way_back_the_networks_coarse_axis_comes_first(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "trained", THICK, described(TWO))
    saved.fold(0, own_weights(saved, 3), None)
    bundle = import_nnunet(saved.folder, tmp_path / "model.vxs")
    for spacing in ((1.0, 4.0, 1.0), (1.0, 4.0, 4.0)):
        prepared = prepare([smooth(0, (40, 12, 16), spacing)], bundle)
        assert prepared.coarse == 0, "nnU-Net asks first of the spacing that it begins with"
        ramp = torch.arange(len(prepared.values[0])).view(1, -1, 1, 1).expand(1, *prepared.values.shape[1:])
        whole = torch.cat([logits for _, logits in on_scan(ramp.float(), prepared)], 1)
        assert not whole.frac().any(), "along it logits are those of the nearest slice"
