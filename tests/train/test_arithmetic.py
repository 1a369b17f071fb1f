"""How a training computes: what is tried, what is taken, and that a step never waits for the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from voxelscale import device as room
from voxelscale.config import OptimConfig
from voxelscale.device import Arithmetic
from voxelscale.model.unet import UNet
from voxelscale.train import arithmetic
from voxelscale.train.arithmetic import Trial, Wanted, bf16_agrees, choose_arithmetic

CPU = torch.device("cpu")
SHAPE = (1, 1, 8, 8, 8)


def tiny() -> nn.Module:
    return UNet(dims=3, depth=2, filters=4)


def chosen(make_model: object = tiny, **wanted: object) -> Arithmetic:
    trial = Trial(
        make_model=make_model,  # type: ignore[arg-type]
        loss=lambda output, target: (output - target).square().mean(),
        shape=SHAPE,
        device=CPU,
        optim=OptimConfig(),
    )
    return choose_arithmetic(trial, Wanted(**wanted))  # type: ignore[arg-type]


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
    monkeypatch.setattr(arithmetic, "notice", told.append)
    assert bf16_agrees(tiny, SHAPE, CPU)
    assert not bf16_agrees(WrongInHalf, SHAPE, CPU)
    assert chosen(precision="bf16", channels_last=True).precision == "bf16"
    found = chosen(WrongInHalf, precision="bf16", channels_last=True)
    assert found.precision == "fp32"
    assert len(told) == 1
    assert "disagrees" in told[0]


def test_the_fastest_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(room, "seconds_of", lambda step, device: next(seconds))
    found = chosen(precision="fp32")
    assert found == Arithmetic(precision="fp32", channels_last=False, compile=False)


def test_what_the_user_decided_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "seconds_of", lambda step, device: pytest.fail("timed"))
    state = torch.random.get_rng_state()
    found = chosen(precision="fp32", channels_last=False, compile=True)
    assert found == Arithmetic(precision="fp32", channels_last=False, compile=True)
    chosen(precision="bf16", channels_last=True)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_processor_that_is_slower_in_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "choose_precision", lambda wanted, device: torch.bfloat16)
    for faster, wanted in (([5.0, 3.0, 5.0, 3.0], "fp32"), ([3.0, 5.0, 3.0, 5.0], "bf16")):
        seconds = iter(faster)
        monkeypatch.setattr(room, "seconds_of", lambda step, device, seconds=seconds: next(seconds))
        found = chosen(precision="auto", channels_last=True)
        assert found.precision == wanted
