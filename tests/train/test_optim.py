from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from voxelscale.config import OptimConfig, load, to_dict
from voxelscale.config.renamed import with_first_names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of
from voxelscale.model.unet import UNet
from voxelscale.train.optim import (
    AveragedWeights,
    learning_rate,
    make_optimizer,
    orthogonalise,
    peak_rate,
    set_learning_rate,
)


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
    optimizer = make_optimizer(layer, OptimConfig(name="adamw", lr=0.1, weight_decay=0.5))
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


def _stepped(config: OptimConfig, weight: torch.Tensor, slopes: list[torch.Tensor]) -> torch.Tensor:
    """A kernel after updates with the given gradients."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    optimizer = make_optimizer(layer, config)
    for slope in slopes:
        layer.weight.grad = slope.clone()
        optimizer.step()
    return layer.weight.detach()


WEIGHT = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
SLOPES = [
    torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]]),
    torch.tensor([[-0.3, 0.1, 0.2], [0.0, -0.4, 0.6]]),
]


def test_lars_by_hand() -> None:
    """Algorithm 1 of You, Gitman and Ginsburg 2017, two updates."""
    config = OptimConfig(name="lars", lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.02)
    wanted, velocity = WEIGHT.clone(), torch.zeros_like(WEIGHT)
    for slope in SLOPES:
        rate = 0.02 * wanted.norm() / (slope.norm() + 0.1 * wanted.norm())
        velocity = 0.9 * velocity + 0.5 * rate * (slope + 0.1 * wanted)
        wanted = wanted - velocity
    assert torch.allclose(_stepped(config, WEIGHT, SLOPES), wanted, atol=1e-6)


def test_lamb_by_hand() -> None:
    """Algorithm 2 of You et al. 2020, two updates, phi the identity."""
    config = OptimConfig(name="lamb", lr=0.1, weight_decay=0.05, betas=(0.8, 0.9), eps=1e-6)
    wanted, mean, square = WEIGHT.clone(), torch.zeros_like(WEIGHT), torch.zeros_like(WEIGHT)
    for t, slope in enumerate(SLOPES, start=1):
        mean = 0.8 * mean + 0.2 * slope
        square = 0.9 * square + 0.1 * slope**2
        ratio = (mean / (1 - 0.8**t)) / ((square / (1 - 0.9**t)).sqrt() + 1e-6) + 0.05 * wanted
        wanted = wanted - 0.1 * wanted.norm() / ratio.norm() * ratio
    assert torch.allclose(_stepped(config, WEIGHT, SLOPES), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_norms_and_biases_are_not_adapted(name: str) -> None:
    """Their rate is the optimiser's own, whatever their norm: the papers' exclusions."""
    layer = nn.Linear(3, 2)
    layer.bias.data = torch.tensor([1e-3, 2e-3])
    before = layer.bias.detach().clone()
    optimizer = make_optimizer(layer, OptimConfig(name=name, lr=0.1, weight_decay=0.5, momentum=0.0))  # type: ignore[arg-type]
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.tensor([0.5, -2.0])
    optimizer.step()
    step = torch.tensor([0.05, -0.2]) if name == "lars" else torch.tensor([0.1, -0.1])
    assert torch.allclose(layer.bias, before - step, atol=1e-5)


def test_muon_turns_the_gradient_orthogonal() -> None:
    torch.manual_seed(0)
    slope = torch.randn(4, 6)
    config = OptimConfig(name="muon", lr=0.1, weight_decay=0.0, momentum=0.0)
    step = -_stepped(config, torch.zeros(4, 6), [slope]) / 0.1
    u, _, v = torch.linalg.svd(slope, full_matrices=False)
    # The same singular vectors; values near 1, times 0.2 sqrt(6).
    inner = u.T @ step @ v.T / (0.2 * math.sqrt(6))
    assert torch.allclose(inner, torch.diag(inner.diag()), atol=1e-3)
    assert inner.diag().min() > 0.6
    assert inner.diag().max() < 1.3


def test_orthogonal_matrices_are_those_of_the_iteration_on_singular_values() -> None:
    """Wide, tall and square ones, of full and of low rank, together; the reference decomposes each."""
    torch.manual_seed(0)
    shapes = [(8, 216), (8, 27), (216, 8), (16, 16), (5, 3), (8, 64)]
    matrices = [torch.randn(shape) for shape in shapes]
    matrices += [torch.randn(8, 2) @ torch.randn(2, 27), torch.zeros(8, 27)]
    scales = [1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.2, 1.0]
    for matrix, scale, found in zip(matrices, scales, orthogonalise(matrices, scales), strict=True):
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        values = values / values.norm().clamp_min(1e-30)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        assert found.shape == matrix.shape
        assert torch.allclose(found.double(), scale * u * values @ v, atol=2e-4)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3, 3), (4, 6, 2, 3), (4, 6, 1, 1, 1)])
def test_muon_does_not_depend_on_how_the_weights_lie_in_memory(shape: tuple[int, ...]) -> None:
    """Channels last, with gradients of either layout, and with the input channels outermost."""
    torch.manual_seed(0)
    start, slopes = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    config = OptimConfig(name="muon", lr=0.1)
    wanted = _stepped(config, start, slopes)
    last = torch.channels_last_3d if len(shape) == 5 else torch.channels_last
    turned = start.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (start.contiguous(memory_format=last), turned):
        for gradients in (slopes, [slope.contiguous(memory_format=last) for slope in slopes]):
            assert torch.allclose(_stepped(config, other, gradients), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "rate", "momentum", "decay", "factor"),
    [
        ("adamw", 1e-3, None, 1e-2, 4.0),
        ("lamb", 1e-2, None, 1e-2, 4.0),
        ("muon", 5e-3, 0.95, 1e-2, 4.0),
        ("sgd", 1e-2, 0.99, 3e-5, 16.0),
        ("lars", 1.0, 0.9, 5e-4, 16.0),
    ],
)
def test_each_optimiser_has_defaults_of_its_own(
    name: str, rate: float, momentum: float | None, decay: float, factor: float
) -> None:
    """nnU-Net's SGD, the papers' LARS and Muon; the rate of 16 times the batch."""
    config = load(None, [f"optim.name={name}", "optim.scaling=null", "optim.lr=0.01"]).optim
    kernels, others = make_optimizer(UNet(depth=1, filters=2), config).param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (decay, 0.0)
    assert kernels.get("momentum") == momentum
    assert peak_rate(config, 16 * config.reference_batch) == pytest.approx(0.01 * factor)
    given = load(None, [f"optim.name={name}", "optim.momentum=0.5", "optim.weight_decay=0.25"]).optim
    kernels, _ = make_optimizer(UNet(depth=1, filters=2), given).param_groups
    assert kernels["weight_decay"] == 0.25
    assert kernels.get("momentum") == (None if momentum is None else 0.5)
    assert peak_rate(given, 1024) == kernels["lr"] == rate, "no scaling unless it is asked for"


def test_the_defaults_are_known_by_the_digests_of_before() -> None:
    """AdamW's are those that every optimiser had; so a run of SGD is another one now, and says so."""

    def digest(*sets: str) -> str:
        return digest_of(with_first_names(to_dict(load(None, list(sets)))))

    before = ["optim.lr=0.001", "optim.momentum=0.99", "optim.weight_decay=0.01"]
    assert digest("optim.name=adamw") == digest("optim.name=adamw", *before)
    assert digest("optim.name=lamb", before[0]) == digest("optim.name=lamb", *before)
    assert digest("optim.scaling=null") == digest("optim.scaling=sqrt")
    for name in ("sgd", "lars", "muon"):
        assert digest(f"optim.name={name}") != digest(f"optim.name={name}", *before)
    with pytest.raises(VoxelscaleError, match=r"optim\.momentum is 1\.0"):
        load(None, ["optim.momentum=1"])


@given(st.sampled_from(["none", "linear", "sqrt"]), st.integers(1, 64), st.integers(1, 1024))
def test_scaling_rules(rule: str, reference: int, batch: int) -> None:
    config = OptimConfig(lr=0.01, scaling=rule, reference_batch=reference)  # type: ignore[arg-type]
    factor = {"none": 1.0, "linear": batch / reference, "sqrt": (batch / reference) ** 0.5}[rule]
    assert peak_rate(config, batch) == pytest.approx(0.01 * factor)
    capped = replace(config, max_lr=0.02)
    assert peak_rate(capped, batch) == pytest.approx(min(0.02, 0.01 * factor))
    assert peak_rate(config, reference) == pytest.approx(0.01)


def test_steps_of_the_rate() -> None:
    config = OptimConfig(schedule="step", warmup=0.0, lr=1.0, step_at=(0.5, 0.75), step_factor=0.1)
    rates = [learning_rate(config, seen, 100) for seen in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_schedule_is_that_of_samples_for_any_batch() -> None:
    config = OptimConfig(schedule="cosine", warmup=0.1)
    for batch in (1, 8, 64):
        assert learning_rate(config, 5120, 10_240, batch) == pytest.approx(
            learning_rate(config, 5120, 10_240)
        )


def test_averaged_weights_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = AveragedWeights(layer, 0.1)
    expected = 0.0
    for step in range(1, 21):
        layer.weight.data.fill_(float(step))
        average.update(layer, seen=10 * step, global_batch=10, samples=200)
        keep = math.exp(-10 / min(0.1 * 200, 0.1 * 10 * step))
        expected = keep * expected + (1 - keep) * step
    assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-5)


def test_the_average_is_the_same_stretch_of_the_run_for_any_batch() -> None:
    """Weights that rise linearly with samples: the lag is the time constant, whatever the batch."""
    lags = []
    for batch in (1, 10):
        layer = nn.Linear(1, 1, bias=False)
        average = AveragedWeights(layer, 0.05)
        for seen in range(batch, 10_001, batch):
            layer.weight.data.fill_(float(seen))
            average.update(layer, seen, batch, 10_000)
        lags.append(10_000 - float(average.weights["weight"]))
    assert lags == pytest.approx([500, 500], rel=0.02)
