"""The model file of any classes and channels, and what is not one."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Command

from voxelscale.channels import Channel
from voxelscale.classes import LESION, NODULE, Classes
from voxelscale.config import Config, load
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_sealed
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, Calibration, load_untrusted, read_bundle, write_bundle
from voxelscale.model.false_positives import FalsePositiveNet
from voxelscale.samples.batch import Normalisation

ORGANS = Classes(names=("liver", "tumour"), values=((1,), (2, 3)), ignore=(9,))
REGIONS = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
PET_CT = (Channel(), Channel(name="PET", scheme="zscore"))
HU = Normalisation(low=-1000.0, high=400.0, mean=-400.0, std=300.0)


def made(config: Config, classes: Classes, channels: tuple[Channel, ...], seed: int = 0) -> Bundle:
    """A network that was never trained."""
    torch.manual_seed(seed)
    size = len(channels), classes.outputs
    network = build_model(config.model, config.data.patch_size, (5.0, 4.0, 4.0), *size)
    return Bundle(
        config=config,
        weights=network.state_dict(),
        spacing=(5.0, 4.0, 4.0),
        normalisation=HU,
        trained={},
        classes=classes,
        channels=channels,
        normalisations=tuple(HU if channel.scheme == "ct" else None for channel in channels),
    )


@pytest.mark.parametrize("classes", [LESION, ORGANS, REGIONS])
@pytest.mark.parametrize("channels", [PET_CT, (Channel(),), (Channel(name="T1", scheme="zscore"),)])
def test_what_is_written_is_read(
    tiny: Config, tmp_path: Path, classes: Classes, channels: tuple[Channel, ...]
) -> None:
    bundle = made(tiny, classes, channels)
    write_bundle(tmp_path / "model.vxs", bundle)
    again = read_bundle(tmp_path)
    assert again.classes == classes
    assert again.channels == channels
    assert again.identity == bundle.identity
    image = torch.randn(1, len(channels), 16, 16, 16)
    with torch.inference_mode():
        logits = again.network(torch.device("cpu"))(image)
        assert logits.shape == (1, classes.outputs, 16, 16, 16)
        assert torch.allclose(logits, bundle.network(torch.device("cpu"))(image))
    for number, channel in enumerate(channels):
        assert again.normalisation_at(number) == (HU if channel.scheme == "ct" else None)


def test_a_file_of_binary_ct_is_as_it_was(tiny: Config, tmp_path: Path) -> None:
    plain = replace(made(tiny, LESION, (Channel(),)), normalisations=())
    named = replace(plain, classes=NODULE, channels=(Channel(name="CT scan"),), normalisations=(HU,))
    assert named.identity == plain.identity
    for name, bundle in (("a", plain), ("b", named)):
        write_bundle(tmp_path / name, bundle)
        assert set(load_untrusted(tmp_path / name)) == {
            *("format", "config", "weights", "spacing", "normalisation", "trained", "judge", "calibration")
        }
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    others = [
        replace(made(tiny, ORGANS, (Channel(),)), classes=replace(ORGANS, names=("a", "b"))),
        made(tiny, ORGANS, (Channel(),)),
        made(tiny, ORGANS, (Channel(name="MR", scheme="zscore"),)),
    ]
    assert len({plain.identity, *(other.identity for other in others)}) == 4


def test_what_deep_supervision_needs_is_left_out(tiny: Config, tmp_path: Path) -> None:
    bundle = made(tiny, ORGANS, PET_CT)
    more = {**bundle.weights, "supervision.0.weight": torch.zeros(3)}
    config = replace(tiny, model=replace(tiny.model, deep_supervision=True))
    write_bundle(tmp_path / "model.vxs", replace(bundle, config=config, weights=more))
    assert set(read_bundle(tmp_path).weights) == set(bundle.weights)
    assert read_bundle(tmp_path).identity == bundle.identity
    read_bundle(tmp_path).network(torch.device("cpu"))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no classes": lambda c: c.pop("classes"),
    "classes of another kind": lambda c: c.update(classes=[1]),
    "a name that is none": lambda c: c["classes"].update(names=["liver", 3]),
    "a name of lines": lambda c: c["classes"].update(names=["liver", "a\nb"]),
    "an empty name": lambda c: c["classes"].update(names=["liver", ""]),
    "a long name": lambda c: c["classes"].update(names=["liver", "a" * 10_000]),
    "one name twice": lambda c: c["classes"].update(names=["liver", "liver"]),
    "one value twice": lambda c: c["classes"].update(values=[[1], [1]]),
    "a value that is none": lambda c: c["classes"].update(values=[[1], [2.5]]),
    "a large value": lambda c: c["classes"].update(values=[[1], [2**40]]),
    "many values": lambda c: c["classes"].update(values=[[1], list(range(2, 2**17))]),
    "a class too many": lambda c: c["classes"].update(names=["a", "b", "c"], values=[[1], [2], [3]]),
    "regions that contradict each other": lambda c: c["classes"].update(regions=True),
    "no channels": lambda c: c.update(channels=[], normalisations=[]),
    "a channel too many": lambda c: c.update(
        channels=[*c["channels"], {"name": "T2", "scheme": "zscore"}],
        normalisations=[*c["normalisations"], None],
    ),
    "very many channels": lambda c: c.update(
        channels=[{"name": "T2", "scheme": "zscore"}] * 10**5, normalisations=[None] * 10**5
    ),
    "a scheme that is none": lambda c: c["channels"][1].update(scheme="best"),
    "no normalisation of CT": lambda c: c.update(normalisations=[None, None]),
    "a normalisation too many": lambda c: c.update(normalisations=[asdict(HU), asdict(HU)]),
    "a normalisation too few": lambda c: c.update(normalisations=[asdict(HU)]),
    "an infinite number": lambda c: c["normalisations"][0].update(low=-math.inf),
    "a number of text": lambda c: c["normalisations"][0].update(low="-1000"),
    "a number without end": lambda c: c["normalisations"][0].update(low=-(10**400)),
    "no deviation": lambda c: c["normalisations"][0].update(std=0.0),
    "a judge": lambda c: c.update(judge=FalsePositiveNet().state_dict()),
    "a calibration": lambda c: c.update(
        calibration=asdict(Calibration(scores=(0.0, 1.0), probabilities=(0.0, 0.5)))
    ),
    "a large patch": lambda c: c["config"]["predict"].update(patch_size=[1024, 1024, 1024]),
    "another format": lambda c: c.update(format=4),
    "the format of binary CT": lambda c: c.update(format=1),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_nobody_wrote_is_refused(tiny: Config, tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.vxs"
    write_bundle(path, made(tiny, ORGANS, PET_CT))
    content = load_untrusted(path)
    HOSTILE[what](content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())
    with pytest.raises(VoxelscaleError) as caught:
        read_bundle(path)
    assert str(path) in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 300


def test_networks_of_one_ensemble_have_one_task(voxelscale: Command, tiny: Config, tmp_path: Path) -> None:
    each = {
        "a": made(tiny, ORGANS, PET_CT),
        "b": made(tiny, ORGANS, PET_CT, seed=1),
        "c": made(tiny, REGIONS, PET_CT),
        "d": made(tiny, LESION, (Channel(),)),
        "e": made(load(sets=["model.filters=6"], base=tiny), NODULE, (Channel(),)),
    }
    for name, bundle in each.items():
        write_bundle(tmp_path / f"{name}.vxs", bundle)
    out = tmp_path / "out.vxs"
    for first, second in (("a", "c"), ("a", "d"), ("d", "c")):
        names = (tmp_path / f"{first}.vxs", tmp_path / f"{second}.vxs")
        code, _, err = voxelscale("ensemble", *names, "--out", out)
        assert code == 2
        assert f"{second}.vxs: finds the " in err
        assert not out.exists()
    for first, second in (("a", "b"), ("d", "e")):
        names = (tmp_path / f"{first}.vxs", tmp_path / f"{second}.vxs")
        assert voxelscale("ensemble", *names, "--out", out)[0] == 0
        assert [one.identity for one in read_bundle(out).networks] == [
            each[first].identity,
            each[second].identity,
        ]
        out.unlink()


def test_other_networks_in_a_file_have_the_same_task(tiny: Config, tmp_path: Path) -> None:
    mixed = replace(made(tiny, ORGANS, PET_CT), others=(made(tiny, REGIONS, PET_CT),))
    write_bundle(tmp_path / "model.vxs", mixed)
    with pytest.raises(VoxelscaleError, match="different classes or channels"):
        read_bundle(tmp_path)
