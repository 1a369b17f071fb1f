from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.config import Config, Triple, from_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.search import feasible
from voxelscale.search.feasible import constraints, cost_of
from voxelscale.train.memory import (
    Storages,
    forward_backward,
    make_network,
    seen_at_once,
    simulate,
    step_memory,
)
from voxelscale.train.optim import make_optimizer

CPU = torch.device("cpu")
CUBIC: Triple = (1.0, 1.0, 1.0)


def training(patch: tuple[int, int, int] = (16, 16, 16), **sections: dict[str, Any]) -> Config:
    model = {"depth": 3, "filters": 4, **sections.pop("model", {})}
    train = {"precision": "fp32", "batch_size": 2, **sections.pop("train", {})}
    return from_dict({"data": {"patch_size": list(patch)}, "model": model, "train": train, **sections})


# Against what trainings take


@pytest.mark.slow
def test_memory_is_that_of_a_process_within_15_percent() -> None:
    """In the mean; one process alone varies by up to a tenth, so each is only held to a quarter.

    What a training may need is the larger of what two took: how a heap happens to be laid out differs.
    """
    auto = {"precision": "auto", "batch_size": 1}  # bf16 takes minutes where it is only emulated
    configs = [
        training((32, 32, 32), model={"filters": 16, "norm": "group"}, train={"batch_size": 4}),
        training((24, 40, 40), model={"filters": 32, "norm": "batch"}, train=auto, optim={"name": "sgd"}),
        training((32, 32, 32), model={"depth": 2, "filters": 8, "kernel_size": 5}, train={"batch_size": 4}),
    ]
    ratios = [
        cost_of(config, CUBIC, "cpu").memory
        / max(step_memory(config, CUBIC, CPU, steps=8) for _ in range(2))
        for config in configs
    ]
    assert all(0.75 < ratio < 1.25 for ratio in ratios), ratios
    assert statistics.mean(ratios) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flop_and_parameters_are_those_of_a_real_pass(
    norm: str, precision: str, checkpointing: bool
) -> None:
    config = training(
        (8, 16, 16),
        model={"norm": norm, "residual": norm == "batch"},
        train={"precision": precision, "samples": 1000, "checkpoint_activations": checkpointing},
    )
    network = make_network(config, CUBIC, CPU)
    with FlopCounterMode(display=False) as counter:
        forward_backward(network, config, CPU, torch.bfloat16 if precision == "bf16" else torch.float32)
    cost = cost_of(config, CUBIC, "cpu")
    assert cost.flop == pytest.approx(counter.get_total_flops() * 1000 / seen_at_once(config), rel=0.01)
    assert cost.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("optimiser", "moments"), [("adamw", 2), ("sgd", 1), ("lars", 1)])
def test_what_is_alive_is_what_a_step_makes(optimiser: str, moments: int) -> None:
    """A little more: PyTorch's formula of a norm's gradient claims a map that its kernel does not make."""
    config = training((32, 32, 32), optim={"name": optimiser})
    with Storages() as real:
        network = make_network(config, CUBIC, CPU)
        weights = sum(p.nbytes for p in network.parameters())
        forward_backward(network, config, CPU, torch.float32)
        expected = real.peak + moments * weights
    assert expected <= simulate(config, CUBIC, torch.float32).alive <= 1.05 * expected


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars", "lamb", "muon"])
def test_an_update_is_counted_where_it_is_the_peak(optimiser: str) -> None:
    """Many weights, few voxels: copies of the weights that an update makes are more than activations."""
    small = {"depth": 2, "filters": 96}
    config = training((8, 8, 8), model=small, optim={"name": optimiser})
    with Storages() as real:
        network = make_network(config, CUBIC, CPU)
        update = make_optimizer(network, config.optim)
        for _ in range(2):
            update.zero_grad()
            forward_backward(network, config, CPU, torch.float32)
            update.step()
    alive = simulate(config, CUBIC, torch.float32).alive
    assert real.peak <= alive <= 1.35 * real.peak


# What counts


def test_what_does_not_count_shares_one_answer() -> None:
    config = training()
    first = cost_of(config, CUBIC, "cpu")
    runs = feasible._simulated.cache_info().misses
    other = replace(
        config,
        optim=replace(config.optim, lr=0.1, weight_decay=0.0, momentum=0.5),
        train=replace(config.train, seed=3, samples=2 * config.train.samples),
    )
    second = cost_of(other, CUBIC, "cpu")
    assert feasible._simulated.cache_info().misses == runs
    assert (second.memory, second.parameters) == (first.memory, first.parameters)
    assert second.flop == pytest.approx(2 * first.flop)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_grows_with_what_is_kept(device: str) -> None:
    def memory(**sections: dict[str, Any]) -> int:
        sections["model"] = {"depth": 2, "filters": 16, **sections.get("model", {})}
        sections["predict"] = {"batch_size": 1}  # a GPU validates beside the training
        return cost_of(training((32, 32, 32), **sections), CUBIC, device).memory

    base = memory()
    assert memory(train={"batch_size": 4}) > 1.5 * base
    assert memory(train={"checkpoint_activations": True}) < base
    assert memory(optim={"name": "adamw"}) > base  # one more moment
    assert memory(optim={"average": 0.1}) > base
    assert memory(train={"virtual_workers": 2}) == base
    # Seen at once, they are one larger micro-batch.
    synced = memory(model={"norm": "sync_batch"}, train={"virtual_workers": 2})
    assert synced == memory(model={"norm": "sync_batch"}, train={"batch_size": 4})


def test_a_gpu_is_not_asked_and_far_too_large_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise AssertionError("it would initialise the device")

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", refuse)
    config = training((512, 512, 512), train={"precision": "auto", "batch_size": 64}, model={"depth": 2})
    cost = cost_of(config, CUBIC, "cuda")
    assert cost.memory > 2**40
    bf16 = replace(config, train=replace(config.train, precision="bf16"))
    assert cost == cost_of(bf16, CUBIC, "cuda")
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


# Constraints


def test_constraints_say_how_far_a_config_is_from_feasible() -> None:
    config = training()
    needed = cost_of(config, CUBIC, "cpu").memory
    assert constraints(config, CUBIC, "cpu", needed) == {"memory": 0.0, "pooling": 0.0}
    assert constraints(config, CUBIC, "cpu", 4 * needed)["memory"] == pytest.approx(-0.75)
    assert constraints(config, CUBIC, "cpu", needed // 4)["memory"] == pytest.approx(3, rel=1e-3)


def test_a_patch_too_small_for_the_depth_is_counted_not_raised() -> None:
    deep = training(model={"depth": 5})
    with pytest.raises(VoxelscaleError, match="cannot be pooled 4 times"):
        cost_of(deep, CUBIC, "cpu")
    found = constraints(deep, CUBIC, "cpu", 2**40)
    assert found["pooling"] == 2
    assert found == {**constraints(training(), CUBIC, "cpu", 2**40), "pooling": 2}
    # A thin patch of thick slices is pooled within its planes.
    assert constraints(training((4, 32, 32), model={"depth": 4}), (5, 1, 1), "cpu", 2**40)["pooling"] == 0
