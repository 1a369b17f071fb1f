"""The loss of a step is there one step later where there is something to wait for."""

from __future__ import annotations

import math

import pytest
import torch

from voxelscale.ranks.workers import Workers
from voxelscale.train.meter import Meter

ALONE = Workers(rank=0, ranks=1, virtual=1, device=torch.device("cpu"))


def test_no_loss_is_not_a_loss_of_zero() -> None:
    meter = Meter(ALONE)
    meter._delayed = True  # as with several ranks, or a GPU
    for loss in (0.5, 0.25):
        meter.add(torch.tensor(loss), torch.tensor(0.125))
        meter.end_step(4)
        if loss == 0.5:
            assert math.isnan(meter.read()["loss"])
        else:
            assert meter.read()["loss"] == 0.5
    meter.land()
    assert meter.read()["loss"] == pytest.approx(0.375)
    assert meter.read()["dice"] == pytest.approx(0.125)
