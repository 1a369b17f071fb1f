from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from voxelscale.config import OptimConfig
from voxelscale.model.unet import UNet
from voxelscale.train.optim import learning_rate, make_optimizer, set_learning_rate


def test_norms_and_biases_do_not_decay() -> None:
    model = UNet(dims=3, depth=2, filters=4)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_adamw_by_hand() -> None:
    """One step of Loshchilov and Hutter's algorithm 2: at the first step the moments cancel to a sign."""
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, OptimConfig(lr=0.1, weight_decay=0.5))
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wanted = before * (1 - 0.1 * 0.5) - 0.1 * torch.ones_like(before)
    assert torch.allclose(layer.weight, wanted, atol=1e-6)


def test_sgd_by_hand() -> None:
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, OptimConfig(name="sgd", lr=0.1, weight_decay=0.0, momentum=0.9))
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    # Nesterov: the first step goes 1 + m, the second 1 + m (1 + m).
    wanted = before - 0.1 * (1.9 + 1 + 0.9 * 1.9)
    assert torch.allclose(layer.weight, wanted, atol=1e-6)


@given(st.sampled_from(["poly", "cosine", "constant"]), st.floats(0, 0.5), st.integers(1, 10**6))
def test_the_rate_rises_then_never_rises_again(schedule: str, warmup: float, samples: int) -> None:
    config = OptimConfig(schedule=schedule, warmup=warmup, lr=0.3)  # type: ignore[arg-type]
    rates = [learning_rate(config, round(samples * i / 50), samples) for i in range(51)]
    peak = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak:]))
    assert 0 < rates[0] <= 0.3
    assert rates[-1] == pytest.approx(0.3 if schedule == "constant" else 0.0, abs=1e-9)


def test_schedules_at_half_time() -> None:
    halves = {"poly": 0.5**0.9, "cosine": (1 + math.cos(math.pi / 2)) / 2, "constant": 1.0}
    for schedule, half in halves.items():
        config = OptimConfig(schedule=schedule, warmup=0.0, lr=2.0)  # type: ignore[arg-type]
        assert learning_rate(config, 500, 1000) == pytest.approx(2 * half)


def test_setting_the_rate() -> None:
    optimizer = make_optimizer(UNet(depth=1, filters=2), OptimConfig())
    set_learning_rate(optimizer, 0.123)
    assert {g["lr"] for g in optimizer.param_groups} == {0.123}
