"""Exported networks in their own runtimes, against the model; scans predicted by MONAI and the example."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from tests.conftest import SHARED, Command
from tests.several import bundle_of

from voxelscale.channels import Channel
from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, load
from voxelscale.formats import read_scan, write_scan
from voxelscale.geometry import Scan, affine_from_itk, crop_or_pad
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, write_bundle
from voxelscale.model.false_positives import FalsePositiveNet
from voxelscale.model.plain import PlainUNet
from voxelscale.model.unet import UNet, fold_batch_norms
from voxelscale.store import Store
from voxelscale.train.launch import start
from voxelscale.tune import export
from voxelscale.tune.exported import exported
from voxelscale.tune.monai_bundle import inference_of, run_bundle, write_texts

CPU = torch.device("cpu")
ORGANS = Classes(names=("liver", "tumour"), values=((5,), (2, 3)))
REGIONS = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
PET_CT = (Channel(), Channel(name="PET", scheme="zscore"))
COLOURS = (Channel(name="R", scheme="rgb"), Channel(name="B", scheme="minmax"))
SMALL = ["data.patch_size=[8,16,16]", "model.depth=2", "model.filters=4", "predict.skip_air=false"]
FLAT = ["data.patch_size=[1,16,24]", "model.dims=2", "model.depth=3", "model.filters=4"]


def made(
    config: Config,
    classes: Classes = LESION,
    channels: tuple[Channel, ...] = (Channel(),),
    seed: int = 0,
) -> Bundle:
    """A network that was never trained, but is sure of itself."""
    torch.manual_seed(seed)
    spacing = (3.1, 2.1, 2.1)
    network = build_model(config.model, config.data.patch_size, spacing, len(channels), classes.outputs)
    for name, weight in network.named_parameters():
        if name.endswith("up.bias") or ".norm" in name:  # each voxel of a block has its own
            torch.nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.3)
    weights = network.state_dict()
    weights["head.weight"] *= 3
    weights["head.bias"] *= 0
    return bundle_of(config, weights, spacing, classes, channels)


def in_onnx(path: Path) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], dict[str, Any]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["voxelscale"])
    return lambda image: np.asarray(session.run(None, {"image": image})[0]), facts


def in_torch(path: Path) -> tuple[Callable[[NDArray[Any]], NDArray[Any]], dict[str, Any]]:
    files = {"voxelscale.json": ""}
    network: Any
    if path.suffix == ".pt2":
        network = torch.export.load(path, extra_files=files).module()
    else:
        network = torch.jit.load(path, _extra_files=files)  # type: ignore[no-untyped-call]
    return lambda image: np.asarray(network(torch.from_numpy(image))), json.loads(files["voxelscale.json"])


def ours(bundle: Bundle, image: NDArray[np.float32], softmax: bool) -> NDArray[Any]:
    """By hand: HU clipped and scaled, other channels as they are; logits; their probabilities."""
    each = []
    for one in bundle.networks:
        given = image.copy()
        for at, channel in enumerate(one.channels):
            if channel.scheme == "ct":
                given[:, at] = (np.clip(image[:, at], -1000, 400) + 400) / 300
            elif channel.scheme == "rgb":
                given[:, at] /= 255
        values = torch.from_numpy(given)
        with torch.inference_mode():
            flat = values.ndim == 4
            logits = one.network(CPU)(values.unsqueeze(2) if flat else values)
            logits = logits.squeeze(2) if flat else logits
            each.append((logits.softmax(1) if softmax else logits.sigmoid()).numpy())
    return np.asarray(np.mean(each, axis=0))


MODELS: dict[str, tuple[list[str], Classes, tuple[Channel, ...]]] = {
    "lesion": (SMALL, LESION, (Channel(),)),
    "organs-pet": ([*SMALL, "model.norm=batch", "model.residual=true"], ORGANS, PET_CT),
    "regions-resenc": ([*SMALL, "model.blocks=[1,2]"], REGIONS, (Channel(),)),
    "flat-colours": ([*FLAT, "model.norm=group"], ORGANS, COLOURS),
    "flat-resenc": ([*FLAT, "model.blocks=[1,1,1]"], LESION, (Channel(),)),
    "strided": ([*SMALL, "model.downsampling=strided"], LESION, (Channel(),)),
}


@pytest.fixture(params=MODELS)
def bundle(request: pytest.FixtureRequest, tiny: Config) -> Bundle:
    sets, classes, channels = MODELS[request.param]
    return made(load(sets=sets, base=tiny), classes, channels)


@pytest.mark.parametrize(("kind", "free"), [("onnx", True), ("torchscript", False)])
def test_its_own_runtime_gives_the_models_probabilities(
    bundle: Bundle, kind: str, free: bool, tmp_path: Path, voxelscale: Command
) -> None:
    write_bundle(tmp_path / "model.vxs", bundle)
    out = tmp_path / "exported"
    more = ["--free-patch"] if free else []
    code, text, err = voxelscale("export", tmp_path / "model.vxs", "--to", kind, "--out", out, *more)
    assert (code, err) == (0, "")
    assert text.startswith(f"{kind} in {out}; its probabilities differ from the model's by ")
    check(bundle, *(in_onnx if kind == "onnx" else in_torch)(out), free=free)
    assert {path.name for path in tmp_path.iterdir()} == {"model.vxs", "exported"}


def check(bundle: Bundle, network: Any, facts: dict[str, Any], *, free: bool, anyhow: bool = True) -> None:
    dims, softmax = bundle.config.model.dims, bundle.classes is ORGANS
    patch = bundle.patch[-dims:]
    random = np.random.default_rng(1)
    step = np.asarray(facts["free_patch_multiple_of"])
    assert set(step) <= ({1} if anyhow else {2, 4})
    for shape in [patch, *([tuple(np.add(patch, 3 * step))] if free else [])]:
        image = random.normal(-200, 300, (3, len(bundle.channels), *shape)).astype(np.float32)
        for at, channel in enumerate(bundle.channels):
            if channel.scheme in ("zscore", "minmax"):
                image[:, at] = (image[:, at] + 200) / 300
        found = network(image)
        assert found == pytest.approx(ours(bundle, image, softmax), abs=1e-4)
        assert found.std() > 0.01
    assert facts["spacing_zyx_mm"] == [3.1, 2.1, 2.1]
    assert facts["patch"] == list(patch)
    assert facts["free_patch"] is bool(free)
    assert facts["activation"] == ("softmax" if softmax else "sigmoid")
    names = list(bundle.classes.names)
    assert facts["outputs"] == (["background", *names] if softmax else names)
    assert [one["name"] for one in facts["channels"]] == [channel.name for channel in bundle.channels]
    if bundle.of_ct:
        bounds = {key: facts["channels"][0][key] for key in ("low", "high", "mean", "std")}
        assert bounds == {"low": -1000, "high": 400, "mean": -400, "std": 300}


@pytest.mark.parametrize(
    ("name", "free"),
    [("organs-pet", False), *(pytest.param(name, True, marks=pytest.mark.slow) for name in MODELS)],
)
def test_a_program_of_torch_export(name: str, free: bool, tiny: Config, tmp_path: Path) -> None:
    sets, classes, channels = MODELS[name]
    bundle = made(load(sets=sets, base=tiny), classes, channels)
    write_bundle(tmp_path / "model.vxs", bundle)
    assert (
        export.export_model(tmp_path / "model.vxs", "torch-export", tmp_path / "model.pt2", free=free)
        < 1e-4
    )
    check(bundle, *in_torch(tmp_path / "model.pt2"), free=free, anyhow=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [0, 1, 3])
def test_of_pytorchs_own_layers_it_is_the_same_network(name: str, more: int, tiny: Config) -> None:
    sets, classes, channels = MODELS[name]
    bundle = made(load(sets=sets, base=tiny), classes, channels)
    network = bundle.network(CPU)
    assert isinstance(network, UNet)
    plain = PlainUNet(network).eval()
    kinds = {
        type(module).__module__.partition(".")[0]
        for module in plain.modules()
        if not list(module.children())
    }
    assert kinds == {"torch"}
    dims = bundle.config.model.dims
    image = torch.randn(2, len(channels), *(n + more for n in bundle.patch[-dims:]))
    with torch.inference_mode():
        assert torch.allclose(plain(image), fold_batch_norms(network)(image), atol=1e-4)


def test_an_ensemble_is_the_mean_of_its_networks(tiny: Config, tmp_path: Path, voxelscale: Command) -> None:
    config = load(sets=SMALL, base=tiny)
    first, second = made(config), made(config, seed=1)
    both = replace(first, others=(second,))
    write_bundle(tmp_path / "both.vxs", both)
    assert export.export_model(tmp_path / "both.vxs", "onnx", tmp_path / "both.onnx") < 1e-4
    network, facts = in_onnx(tmp_path / "both.onnx")
    image = np.random.default_rng(0).normal(-200, 300, (1, 1, 8, 16, 16)).astype(np.float32)
    assert network(image) == pytest.approx(ours(both, image, False), abs=1e-4)
    assert facts["networks"] == 2
    other = replace(second, spacing=(3.2, 2.1, 2.1))
    write_bundle(tmp_path / "other.vxs", replace(first, others=(other,)))
    arguments = ["export", tmp_path / "other.vxs", "--to", "onnx", "--out", tmp_path / "other.onnx"]
    code, _, err = voxelscale(*arguments)
    assert code == 2
    assert "different spacings or patches" in err
    assert not (tmp_path / "other.onnx").exists()


def test_a_file_that_is_not_the_model_is_refused(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voxelscale: Command
) -> None:
    write_bundle(tmp_path / "model.vxs", made(load(sets=SMALL, base=tiny)))

    def wrong(bundle: Bundle) -> Any:
        network = exported(bundle)
        network.get_buffer("mean0").add_(1.0)  # HU
        return network

    monkeypatch.setattr(export, "exported", wrong)
    out = tmp_path / "model.ts"
    code, _, err = voxelscale("export", tmp_path / "model.vxs", "--to", "torchscript", "--out", out)
    assert code == 2
    assert "its probabilities differ from the model's by" in err
    assert "more than 0.0001; it was removed" in err
    assert {path.name for path in tmp_path.iterdir()} == {"model.vxs"}


def test_what_cannot_be_written_is_one_line(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voxelscale: Command
) -> None:
    reduced = {name: weight.clone() for name, weight in FalsePositiveNet().state_dict().items()}
    write_bundle(
        tmp_path / "model.vxs", replace(made(load(sets=SMALL, base=tiny)), false_positives=reduced)
    )

    def run(kind: str, out: Path) -> tuple[int, str, str]:
        return voxelscale("export", tmp_path / "model.vxs", "--to", kind, "--out", out)

    assert "known: onnx, torch-export, torchscript, monai-bundle" in run("tflite", tmp_path / "a")[2]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "holds files already" in run("monai-bundle", tmp_path / "full")[2]
    assert (tmp_path / "full" / "mine.txt").exists()
    assert "a folder, not a file" in run("onnx", tmp_path / "full")[2]
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    code, _, err = run("onnx", tmp_path / "a.onnx")
    assert code == 2
    assert err.splitlines()[-1] == "hint: pip install 'voxelscale[export]'"
    code, _, err = voxelscale(
        "-v", "export", tmp_path / "model.vxs", "--to", "torchscript", "--out", tmp_path / "a"
    )
    assert code == 0
    assert "false-positive reduction is not exported" in err


@pytest.fixture(scope="module")
def trained(tiny: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some hundred updates; its predictions take no regard to lungs, air and sizes."""
    run = tmp_path_factory.mktemp("trained") / "run"
    sets = ["train.samples=800", "train.batch_size=4", "optim.name=adamw", "optim.lr=0.01"]
    sets += ["augment.enabled=false", "predict.skip_air=false", "predict.lungs=false"]
    sets += ["predict.min_volume_mm3=0"]
    start(load(sets=sets, base=tiny), store.path, run)
    return run


def dice(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(2 * ((one > 0) & (other > 0)).sum() / ((one > 0).sum() + (other > 0).sum()))


EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_sliding_window.py"


@pytest.mark.slow
def test_the_example_predicts_a_chest_as_predict_does(
    trained: Path, scans: Path, tmp_path: Path, voxelscale: Command
) -> None:
    image = turned_scan(read_scan(sorted(scans.glob("images/*"))[0]))
    assert agreement_of_the_example(trained / "model.vxs", [image], tmp_path, voxelscale) >= 0.99


@pytest.mark.parametrize(
    "name",
    [
        "organs-pet",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("lesion", "flat-resenc", "regions-resenc")),
    ],
)
def test_the_example_predicts_as_predict_does(
    name: str, tiny: Config, tmp_path: Path, voxelscale: Command
) -> None:
    """Smooth noise, on a lattice as nobody has it, smaller than the patch along an axis."""
    sets, classes, channels = MODELS[name]
    sets = [*sets, "predict.skip_air=false", "predict.lungs=false", "predict.min_volume_mm3=0"]
    # Without a norm logits are in the hundreds, which float32's probabilities do not hold.
    sets += ["model.norm=instance", "predict.candidates=0.5", "predict.refuse_unusable=false"]
    config = load(sets=sets, base=tiny)
    write_bundle(tmp_path / "model.vxs", made(config, classes, channels))
    images = []
    for at in range(len(channels)):
        values = ndimage.gaussian_filter(np.random.default_rng(at).normal(0, 1, (7, 25, 31)), 2)
        affine = affine_from_itk((3, -7, 11), (1.7, 2.6, 3.3), np.eye(3))
        images.append(turned_scan(Scan(np.rint(values / values.std() * 300 - 300), affine)))
    assert agreement_of_the_example(tmp_path / "model.vxs", images, tmp_path, voxelscale) >= 0.99


def agreement_of_the_example(model: Path, images: list[Scan], folder: Path, voxelscale: Command) -> float:
    """Dice of what is of one class in its mask and in that of predict."""
    pytest.importorskip("onnxruntime")
    export.export_model(model, "onnx", folder / "model.onnx", free=True)
    files = [folder / "scans" / f"case_{at:04}.nii.gz" for at in range(len(images))]
    for image, file in zip(images, files, strict=True):
        write_scan(image, file)
    code, _, err = voxelscale("predict", model, folder / "scans", folder / "out")
    assert code == 0, err
    arguments = [folder / "model.onnx", folder / "mask.nii.gz", *files]
    subprocess.run([sys.executable, EXAMPLE, *arguments], check=True)
    ours, theirs = (
        read_scan(path) for path in (next(folder.glob("out/*/mask.nii.gz")), folder / "mask.nii.gz")
    )
    assert theirs.grid.same_as(images[0].grid)
    assert (ours.array > 0).sum() > 100
    assert (ours.array == 0).sum() > 100
    same = (ours.array == theirs.array) & (ours.array > 0)
    return float(2 * same.sum() / ((ours.array > 0).sum() + (theirs.array > 0).sum()))


def turned_scan(image: Scan) -> Scan:
    """The same voxels with other axes."""
    affine = image.affine[:, [1, 2, 0, 3]].copy()
    affine[:3, 3] += affine[:3, 0] * (image.array.shape[1] - 1)
    affine[:3, 0] *= -1
    return Scan(np.ascontiguousarray(image.array.transpose(1, 2, 0)[::-1]), affine)


def test_the_texts_of_a_bundle(tiny: Config, tmp_path: Path) -> None:
    bundle = made(load(sets=SMALL, base=tiny), ORGANS, PET_CT)
    write_texts(bundle, tmp_path, free=True)
    inference = json.loads((tmp_path / "configs" / "inference.json").read_text())
    known = {"torch": torch, "functools": functools}
    image = torch.arange(1.0, 17).reshape(2, 2, 2, 2)
    image[1, 0] = 0
    scaled = eval(inference["preprocessing"]["transforms"][4]["func"][1:], known)(image)
    assert torch.equal(scaled[0], image[0])
    assert scaled[1, 1].mean() == pytest.approx(0, abs=1e-6)
    assert scaled[1, 1].std(correction=0) == pytest.approx(1)
    assert (scaled[1, 0] < -3).all()
    to_mask = eval(inference["to_mask"][1:], known)
    assert to_mask(torch.eye(3).reshape(3, 3, 1, 1)).flatten().tolist() == [0, 5, 2]
    metadata = json.loads((tmp_path / "configs" / "metadata.json").read_text())
    asked_for = [
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
    ]
    asked_for += ["task", "description", "authors", "copyright", "network_data_format", "schema"]
    for key in asked_for:  # by MONAI's specification
        assert metadata[key]
    given, found = metadata["network_data_format"]["inputs"], metadata["network_data_format"]["outputs"]
    assert (given["image"]["num_channels"], found["pred"]["num_channels"]) == (2, 3)
    assert found["pred"]["channel_def"] == {"0": "background", "1": "liver", "2": "tumour"}


def test_regions_are_written_over_each_other(tiny: Config) -> None:
    bundle = made(load(sets=SMALL, base=tiny), REGIONS)
    to_mask = eval(inference_of(bundle)["to_mask"][1:], {"torch": torch, "functools": functools})
    found = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.9, 0.9, 0.1]]).reshape(2, 4, 1, 1)
    assert to_mask(found).flatten().tolist() == [1, 2, 2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["organs-pet", "flat-colours"])
def test_monai_verifies_and_runs_a_bundle(
    name: str, tiny: Config, tmp_path: Path, voxelscale: Command
) -> None:
    pytest.importorskip("ignite")
    sets, classes, channels = MODELS[name]
    bundle = made(load(sets=sets, base=tiny), classes, channels)
    write_bundle(tmp_path / "model.vxs", bundle)
    out = tmp_path / "bundle"
    code, text, err = voxelscale("export", tmp_path / "model.vxs", "--to", "monai-bundle", "--out", out)
    assert (code, err) == (0, "")
    assert float(text.split(" by ")[1].split()[0]) < 1e-4
    command = [sys.executable, "-m", "monai.bundle", "verify_net_in_out", "network", "--device", "cpu"]
    command += ["--config_file", f"{out}/configs/inference.json", "--bundle_root", str(out)]
    command += ["--meta_file", f"{out}/configs/metadata.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_monai_predicts_a_scan_as_predict_does(
    trained: Path, scans: Path, tmp_path: Path, voxelscale: Command
) -> None:
    """A part of a scan that one window holds at the model's spacing: MONAI lays several elsewhere."""
    pytest.importorskip("ignite")
    export.export_model(trained, "monai-bundle", tmp_path / "bundle")
    image, label = (read_scan(sorted(scans.glob(f"{kind}/*"))[0]) for kind in ("images", "labels"))
    middle = np.argwhere(label.array > 0).mean(0).round().astype(int)
    turned = turned_scan(crop_or_pad(image, (middle - 8).tolist(), (17, 17, 17), -1024))
    write_scan(turned, tmp_path / "scans" / "case.nii.gz")
    free = ["--set", "predict.refuse_unusable=false"]
    assert voxelscale("predict", trained, tmp_path / "scans", tmp_path / "out", *free)[0] == 0
    run_bundle(tmp_path / "bundle", tmp_path / "scans", tmp_path / "masks")
    ours, theirs = (
        read_scan(next(tmp_path.glob(where))) for where in ("out/*/mask.nii.gz", "masks/*.nii.gz")
    )
    assert theirs.grid.same_as(turned.grid)
    assert ours.array.sum() > 10
    assert dice(ours.array, theirs.array) >= 0.99


@pytest.mark.slow
def test_monai_predicts_a_real_scan_as_predict_does(
    tiny: Config, tmp_path: Path, voxelscale: Command
) -> None:
    """MRI, by the statistics of the whole image, in one window."""
    pytest.importorskip("ignite")
    scans = sorted((SHARED / "msd_hippocampus" / "imagesTr").glob("*.nii.gz"))
    if not scans:
        pytest.skip("no scans beside the checkout")
    sets = ["data.patch_size=[32,48,32]", "model.depth=3", "model.filters=4", "predict.min_volume_mm3=0"]
    bundle = made(load(sets=sets, base=tiny), ORGANS, (Channel(name="MRI", scheme="zscore"),))
    write_bundle(tmp_path / "model.vxs", replace(bundle, spacing=(1.0, 1.0, 1.0)))
    write_scan(crop_or_pad(read_scan(scans[0]), (1, 1, 1), (32, 48, 32)), tmp_path / "scans" / "a.nii.gz")
    assert voxelscale("predict", tmp_path / "model.vxs", tmp_path / "scans", tmp_path / "out")[0] == 0
    export.export_model(tmp_path / "model.vxs", "monai-bundle", tmp_path / "bundle")
    run_bundle(tmp_path / "bundle", tmp_path / "scans", tmp_path / "masks")
    ours, theirs = (
        read_scan(next(tmp_path.glob(where))) for where in ("out/*/mask.nii.gz", "masks/*.nii.gz")
    )
    assert theirs.grid.same_as(ours.grid)
    assert {0, 2, 5} == set(np.unique(ours.array))
    assert (ours.array == theirs.array).mean() >= 0.999
