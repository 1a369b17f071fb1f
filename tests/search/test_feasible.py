from __future__ import annotations

import platform
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
from voxelscale.train.memory import Storages, make_network, moments_kept, play, seen_at_once, step_memory

CPU = torch.device("cpu")
CUBIC: Triple = (1.0, 1.0, 1.0)
KNOWN = platform.libc_ver()[0] == "glibc" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def training(patch: tuple[int, int, int] = (16, 16, 16), **sections: dict[str, Any]) -> Config:
    model = {"depth": 3, "filters": 4, **sections.pop("model", {})}
    train = {"precision": "fp32", "batch_size": 2, **sections.pop("train", {})}
    return from_dict({"data": {"patch_size": list(patch)}, "model": model, "train": train, **sections})


# Against what trainings take


@pytest.mark.skipif(not KNOWN, reason="the heap and the kernels' work space are glibc's and AVX-512's")
@pytest.mark.parametrize(
    "config",
    [
        training((32, 32, 32), model={"filters": 16, "norm": "group"}, train={"batch_size": 4}),
        training(
            (24, 40, 40),
            model={"filters": 32, "norm": "batch"},
            train={"precision": "bf16", "batch_size": 1},
            optim={"name": "sgd"},
        ),
        training((32, 32, 32), model={"depth": 2, "filters": 8, "kernel_size": 5}, train={"batch_size": 4}),
    ],
    ids=["group fp32", "wide bf16", "kernel 5"],
)
def test_memory_is_that_of_a_process_within_15_percent(config: Config) -> None:
    threads = torch.get_num_threads()
    model = cost_of(config, CUBIC, "cpu", threads=threads).memory
    measured = [step_memory(config, CUBIC, CPU, steps=8)]
    if abs(model / measured[0] - 1) > 0.1:
        # A heap's layout differs between processes by up to a tenth.
        measured += [step_memory(config, CUBIC, CPU, steps=8) for _ in range(2)]
    assert model == pytest.approx(statistics.median(measured), rel=0.15)


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
    network = make_network(config, CUBIC, CPU, checkpointing)
    with FlopCounterMode(display=False) as counter:
        play(network, config, CPU, torch.bfloat16 if precision == "bf16" else torch.float32)
    cost = cost_of(config, CUBIC, "cpu")
    assert cost.flop == pytest.approx(counter.get_total_flops() * 1000 / seen_at_once(config), rel=0.01)
    assert cost.parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars"])
def test_on_a_gpu_memory_is_what_is_alive(optimiser: str) -> None:
    config = training((32, 32, 32), optim={"name": optimiser})
    with Storages() as real:
        network = make_network(config, CUBIC, CPU, False)
        weights = sum(p.nbytes for p in network.parameters())
        play(network, config, CPU, torch.float32)
        expected = real.peak + moments_kept(config) * weights
    assert cost_of(config, CUBIC, "cuda").memory == pytest.approx(expected, rel=0.02)


# What counts


def test_what_does_not_count_shares_one_answer() -> None:
    config = training()
    first = cost_of(config, CUBIC, "cpu")
    runs = feasible._step_cost.cache_info().misses
    other = replace(
        config,
        optim=replace(config.optim, lr=0.1, weight_decay=0.0, momentum=0.5),
        train=replace(config.train, seed=3, samples=2 * config.train.samples),
    )
    second = cost_of(other, CUBIC, "cpu")
    assert feasible._step_cost.cache_info().misses == runs
    assert (second.memory, second.parameters) == (first.memory, first.parameters)
    assert second.flop == pytest.approx(2 * first.flop)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_grows_with_what_is_kept(device: str) -> None:
    def memory(**sections: dict[str, Any]) -> int:
        sections["model"] = {"filters": 16, **sections.get("model", {})}
        return cost_of(training(**sections), CUBIC, device).memory  # type: ignore[arg-type]

    base = memory()
    weights = 4 * cost_of(training(model={"filters": 16}), CUBIC, device).parameters
    assert memory(train={"batch_size": 4}) > 1.5 * base
    assert memory(train={"checkpoint_activations": True}) < base
    # On CPUs some of it finds holes in the heap.
    assert memory(optim={"average": 0.1}) > base + (0.5 if device == "cpu" else 0.9) * weights
    assert memory(optim={"name": "sgd"}) < base
    assert memory(train={"virtual_workers": 2}) > base
    assert memory(train={"ranks": 2}) == memory(train={"virtual_workers": 2})
    # Seen at once, they are one larger micro-batch.
    synced = memory(model={"norm": "sync_batch"}, train={"virtual_workers": 2})
    assert synced == memory(model={"norm": "sync_batch"}, train={"batch_size": 4})


def test_threads_have_work_space_of_their_own_in_bfloat16_on_cpus() -> None:
    narrow, plain = training((32, 32, 32), train={"precision": "bf16"}), training((32, 32, 32))
    few, many = (cost_of(narrow, CUBIC, "cpu", threads=n).memory for n in (1, 64))
    assert many > 1.5 * few
    few, many = (cost_of(plain, CUBIC, "cpu", threads=n).memory for n in (1, 64))
    assert many == few
    few, many = (cost_of(narrow, CUBIC, "cuda", threads=n).memory for n in (1, 64))
    assert many == few


def test_a_gpu_is_not_asked_and_far_too_large_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise AssertionError("it would initialise the device")

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", refuse)
    config = training((512, 512, 512), train={"precision": "auto", "batch_size": 64}, model={"depth": 5})
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


# The heap


def test_free_blocks_are_joined_and_the_smallest_that_is_large_enough_is_taken() -> None:
    heap = feasible._Heap()
    first, small, second, third, last = (heap.take(n) for n in (64_000, 6400, 64_000, 64_000, 6400))
    top = heap.top
    for address in (first, second, third):
        heap.give(address)
    assert heap.take(32_000) == first, "not out of the larger hole"
    assert heap.take(120_000) == second
    assert heap.top == top
    for address in (small, last):
        heap.give(address)
    assert heap.peak == 64_000 * 3 + 6400 * 2


def test_the_end_of_the_heap_is_used_again() -> None:
    heap = feasible._Heap()
    heap.take(6400)
    heap.give(heap.take(64_000))
    top = heap.top
    assert heap.take(32_000) == 6400
    heap.take(16_000)
    assert heap.top == top


def test_a_pinned_block_does_not_fit_a_tensor_of_its_own_size() -> None:
    for pinned in (False, True):
        heap = feasible._Heap()
        before = heap.take(6400)
        block, after = heap.take(64_000, pinned), heap.take(64_000, pinned)
        heap.take(6400)
        top = heap.top
        heap.give(block)
        heap.give(after)
        if pinned:
            assert heap.take(64_000) > after
            assert heap.take(63_000) in (block, after)
        else:
            assert heap.take(120_000) == block
            assert heap.top == top
        assert before == 0
