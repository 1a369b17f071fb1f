from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from voxelscale import device as room
from voxelscale.device import (
    Arithmetic,
    bf16_agrees,
    choose_arithmetic,
    choose_inference,
    keep_freed_memory,
    to_channels_last,
)
from voxelscale.errors import VoxelscaleError
from voxelscale.model.unet import UNet

CPU = torch.device("cpu")
SHAPE = (1, 1, 8, 8, 8)


def tiny() -> nn.Module:
    return UNet(dims=3, depth=2, filters=4)


class WrongInHalf(nn.Module):
    """A network whose convolution is wrong in bfloat16 only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y.flip(2) if y.dtype == torch.bfloat16 else y


def test_bf16_is_probed_and_refused_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(room, "notice", told.append)
    assert bf16_agrees(tiny, SHAPE, CPU)
    assert not bf16_agrees(WrongInHalf, SHAPE, CPU)
    assert choose_arithmetic(tiny, SHAPE, CPU, precision="bf16", channels_last=True).precision == "bf16"
    found = choose_arithmetic(WrongInHalf, SHAPE, CPU, precision="bf16", channels_last=True)
    assert found.precision == "fp32"
    assert len(told) == 1
    assert "disagrees" in told[0]


def test_the_fastest_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(room, "seconds_of", lambda step, device: next(seconds))
    found = choose_arithmetic(tiny, SHAPE, CPU, precision="fp32", rounds=2)
    assert found == Arithmetic(precision="fp32", channels_last=False, compile=False)


def test_what_the_user_decided_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "seconds_of", lambda step, device: pytest.fail("timed"))
    state = torch.random.get_rng_state()
    found = choose_arithmetic(tiny, SHAPE, CPU, precision="fp32", channels_last=False, compile=True)
    assert found == Arithmetic(precision="fp32", channels_last=False, compile=True)
    choose_arithmetic(tiny, SHAPE, CPU, precision="bf16", channels_last=True)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_processor_that_is_slower_in_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "choose_precision", lambda wanted, device: torch.bfloat16)
    for faster, wanted in (([5.0, 3.0, 5.0, 3.0], "fp32"), ([3.0, 5.0, 3.0, 5.0], "bf16")):
        seconds = iter(faster)
        monkeypatch.setattr(room, "seconds_of", lambda step, device, seconds=seconds: next(seconds))
        found = choose_arithmetic(tiny, SHAPE, CPU, precision="auto", channels_last=True)
        assert found.precision == wanted
    # Of inference float32 is timed first.
    for faster, dtype in (([3.0, 5.0, 3.0, 5.0], torch.float32), ([5.0, 3.0, 5.0, 3.0], torch.bfloat16)):
        seconds = iter(faster)
        monkeypatch.setattr(room, "seconds_of", lambda step, device, seconds=seconds: next(seconds))
        assert choose_inference(tiny().eval(), SHAPE, CPU, "auto") == dtype
    monkeypatch.setattr(room, "seconds_of", lambda step, device: pytest.fail("timed"))
    assert choose_inference(tiny().eval(), SHAPE, CPU, "bf16") == torch.bfloat16


def test_the_record_comes_back() -> None:
    way = Arithmetic(precision="bf16", channels_last=True, compile=False)
    assert Arithmetic.from_dict(json.loads(json.dumps(way.to_dict()))) == way
    assert way.dtype == torch.bfloat16
    for record in ({}, {**way.to_dict(), "precision": "fp8"}, {**way.to_dict(), "compile": "yes"}):
        with pytest.raises(VoxelscaleError, match="recorded arithmetic"):
            Arithmetic.from_dict(record)


@pytest.mark.parametrize("dims", [2, 3])
def test_everything_stays_channels_last_from_one_channel_on(dims: int) -> None:
    model = to_channels_last(UNet(dims=dims, depth=2, filters=4, norm="none"))
    formats = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda _, __, y: formats.append(y.movedim(1, -1).is_contiguous()))
    model(torch.randn(2, 1, *[8] * dims))
    assert formats
    assert all(formats)


def test_freed_memory_can_be_kept() -> None:
    import platform

    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
