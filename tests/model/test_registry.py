"""A network of another package, from its entry point through training to a prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Command

from voxelscale.config import Config, ModelConfig, dump
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_model
from voxelscale.model.bundle import read_bundle
from voxelscale.store import Store

CODE = """
from torch import nn
def make(config, patch_size, spacing):
    assert len(patch_size) == len(spacing) == 3
    return nn.Conv3d(1, 1, config.kernel_size, padding="same")
def several(config, patch_size, spacing, channels=1, outputs=1):
    return nn.Conv3d(channels, outputs, config.kernel_size, padding="same")
def faulty(config, patch_size, spacing, **options):
    return 1 + "a"
def number(config, patch_size, spacing):
    return 3
"""


def install(folder: Path, package: str, lines: str) -> None:
    module = package.replace("-", "_")
    (folder / f"{module}_nets.py").write_text(CODE)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[voxelscale.models]\n{lines}\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    install(folder, "tiny-nets", "one_kernel = tiny_nets_nets:make")
    install(folder, "wide-nets", "several = wide_nets_nets:several\nfaulty = wide_nets_nets:faulty")
    broken = "number = more_nets_nets:number\nlost = no_such_module:make\nunet = more_nets_nets:number"
    install(folder, "more-nets", broken)
    install(folder, "twin-nets", "number = twin_nets_nets:number")


def build(name: str) -> torch.nn.Module:
    return build_model(ModelConfig(name=name), (64, 64, 64), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["one_kernel", "tiny-nets", "tiny-nets:one_kernel"])
@pytest.mark.usefixtures("installed")
def test_a_network_is_found_by_its_name_or_package(name: str) -> None:
    assert isinstance(build(name), torch.nn.Conv3d)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("one_kernal", "no network is called one_kernal", "did you mean one_kernel"),
        ("unett", "no network is called unett", "unet"),
        ("number", "2 networks are called number", "more-nets:number, twin-nets:number"),
        ("twin-nets:number", "made a int", "torch.nn.Module"),
        ("lost", "cannot be loaded", "reinstall"),
        ("os:system", "no network is called os:system", "known here: unet"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_what_is_no_network_is_reported(name: str, message: str, hint: str) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        build(name)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.usefixtures("installed")
def test_a_network_of_several_channels_and_outputs() -> None:
    arguments = (64, 64, 64), (1.0, 1.0, 1.0), 2, 3
    model = build_model(ModelConfig(name="several"), *arguments)
    assert model(torch.zeros(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
    with pytest.raises(VoxelscaleError, match="no keywords channels and outputs: here 2 and 3"):
        build_model(ModelConfig(name="one_kernel"), *arguments)
    with pytest.raises(TypeError, match="unsupported operand"):
        build_model(ModelConfig(name="faulty"), *arguments)


@pytest.mark.usefixtures("installed")
def test_no_package_takes_our_own_name() -> None:
    assert type(build("unet")).__name__ == "UNet"


@pytest.mark.usefixtures("installed")
def test_train_and_predict(
    voxelscale: Command, tiny: Config, store: Store, scans: Path, tmp_path: Path
) -> None:
    settings = replace(tiny, train=replace(tiny.train, samples=8))
    (tmp_path / "config.yaml").write_text(dump(settings))
    train = ["train", store.path, tmp_path / "run", "--config", tmp_path / "config.yaml", "-q"]
    assert voxelscale(*train, "--set", "model.name=one_kernal")[0] == 2
    assert not (tmp_path / "run").exists(), "a wrong name must not begin a run"
    assert voxelscale(*train, "--set", "model.name=one_kernel")[0] == 0
    bundle = read_bundle(tmp_path / "run")
    assert set(bundle.weights) == {"weight", "bias"}
    image = sorted((scans / "images").iterdir())[0]
    assert voxelscale("predict", tmp_path / "run", image, tmp_path / "out", "-q")[0] == 0
    assert json.loads(next((tmp_path / "out").glob("*/case.json")).read_text())["key"]
