from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from voxelscale import device as room
from voxelscale.device import (
    Arithmetic,
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


def test_inference_is_in_the_precision_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "has_bf16", lambda device: True)
    # float32 is timed first.
    for faster, dtype in (([3.0, 5.0, 3.0, 5.0], torch.float32), ([5.0, 3.0, 5.0, 3.0], torch.bfloat16)):
        seconds = iter(faster)
        monkeypatch.setattr(room, "seconds_of", lambda step, device, seconds=seconds: next(seconds))
        assert choose_inference(tiny().eval(), SHAPE, CPU, "auto") == dtype
    monkeypatch.setattr(room, "seconds_of", lambda step, device: pytest.fail("timed"))
    assert choose_inference(tiny().eval(), SHAPE, CPU, "bf16") == torch.bfloat16


@pytest.mark.parametrize("trained", ["auto", "bf16", "fp32"])
def test_inference_is_never_in_an_emulated_bfloat16(monkeypatch: pytest.MonkeyPatch, trained: str) -> None:
    """A model that was trained in it elsewhere, such as the starter, took minutes for a window."""
    monkeypatch.setattr(room, "has_bf16", lambda device: False)
    assert choose_inference(tiny().eval(), SHAPE, CPU, trained) == torch.float32


def test_the_record_comes_back() -> None:
    way = Arithmetic(precision="bf16", channels_last=True, compile=False)
    assert Arithmetic.from_dict(json.loads(json.dumps(way.to_dict()))) == way
    assert way.dtype == torch.bfloat16
    # Records of before there were graphs.
    early = {"precision": "bf16", "channels_last": True, "compile": False}
    assert Arithmetic.from_dict(early) == way
    unknown = ({"precision": "fp8"}, {"compile": "yes"}, {"graph": 1})
    for record in ({}, *({**way.to_dict(), **change} for change in unknown)):
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
