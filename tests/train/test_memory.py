from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from voxelscale.classes import LESION, Classes
from voxelscale.config import Config, IntTriple, LossConfig, ModelConfig, Triple, from_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_loss, build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.model.losses import dice_cross_entropy
from voxelscale.model.unet import plan_pooling
from voxelscale.train import memory, plan
from voxelscale.train.memory import available_memory, estimate_memory, require_memory, step_memory
from voxelscale.train.patch_sizes import scaled_patches, with_patch
from voxelscale.train.plan import fit_patch

CPU = torch.device("cpu")
CUBIC: Triple = (1.0, 1.0, 1.0)
NORMS = ["instance", "group", "batch", "sync_batch", "none"]


def small(norm: str = "instance", patch: IntTriple = (16, 16, 16), **train: object) -> Config:
    model = {"depth": 3, "filters": 4, "norm": norm}
    return from_dict(
        {
            "data": {"patch_size": list(patch)},
            "model": model,
            "train": {"precision": "fp32", "batch_size": 2, **train},
        }
    )


def backward(model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of one pass, and the running statistics after it."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(image)
    loss, _ = dice_cross_entropy(logits, (image > 0).float())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **{name: b.clone() for name, b in model.named_buffers()}}


# Activation checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_checkpointing_changes_neither_gradients_nor_statistics(
    norm: str, residual: bool, dtype: torch.dtype
) -> None:
    config = small(norm)
    torch.manual_seed(0)
    model = build_model(replace(config.model, residual=residual), (16, 16, 16), CUBIC)
    light = checkpoint_activations(copy.deepcopy(model))
    image = torch.randn(2, 1, 16, 16, 16)
    plain, again = backward(model, image, dtype), backward(light, image, dtype)
    assert list(light.state_dict()) == list(model.state_dict())
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    if "batch" in norm:
        # Moved once from 0 and 1, and counted once.
        counts = [b for name, b in light.named_buffers() if name.endswith("num_batches_tracked")]
        assert counts
        assert all(int(count) == 1 for count in counts)
        assert all(m.momentum == 0.1 for m in light.modules() if hasattr(m, "num_batches_tracked"))


def test_checkpointing_with_deep_supervision_changes_no_gradient() -> None:
    config = ModelConfig(depth=5, filters=4, deep_supervision=True)
    torch.manual_seed(0)
    model = build_model(config, (64, 64, 64), CUBIC, 1, 3)
    light = checkpoint_activations(copy.deepcopy(model))
    loss = build_loss(LossConfig(), Classes(names=("a", "b"), values=((1,), (2,))))
    image, target = torch.randn(1, 1, 32, 32, 32), torch.randint(0, 3, (1, 1, 32, 32, 32)).float()
    for each in (model, light):
        loss(each(image), target)[0].backward()  # type: ignore[no-untyped-call]
    for one, other in zip(model.parameters(), light.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def two_ranks(work: Callable[[int, str], None], folder: Path) -> None:
    start = torch.multiprocessing.start_processes  # type: ignore[attr-defined]
    start(work, (str(folder),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]


def supervised_ranks(rank: int, folder: str) -> None:
    """Gradients of a network with deep supervision and three classes, of two samples on two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    network, loss, image, target = supervised_case()
    wrapped = DistributedDataParallel(network, broadcast_buffers=False)
    one = slice(rank, rank + 1)
    loss(wrapped(image[one]), target[one])[0].backward()  # type: ignore[no-untyped-call]
    torch.save([p.grad for p in network.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def supervised_case() -> tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]], Tensor, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(depth=5, filters=4, deep_supervision=True)
    network = build_model(config, (64, 64, 64), CUBIC, 2, 4).double()
    target = torch.randint(0, 4, (2, 1, 32, 32, 32)).float()
    target[1, :, :20] = -1  # the samples differ in how many voxels take part
    image = torch.randn(2, 2, 32, 32, 32, dtype=torch.float64)
    return network, build_loss(LossConfig(), THREE), image, target


def test_ranks_with_deep_supervision_have_the_gradients_of_one(tmp_path: Path) -> None:
    two_ranks(supervised_ranks, tmp_path)
    network, loss, image, target = supervised_case()
    loss(network(image), target)[0].backward()  # type: ignore[no-untyped-call]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (name, wanted), gradient in zip(network.named_parameters(), found, strict=True):
            assert wanted.grad is not None
            assert torch.allclose(gradient, wanted.grad, rtol=1e-7, atol=1e-9), name


def test_checkpointing_saves_fewer_tensors_and_is_idle_without_gradients() -> None:
    config = small()
    torch.manual_seed(0)
    model = build_model(config.model, (16, 16, 16), CUBIC)
    light = checkpoint_activations(copy.deepcopy(model))
    image = torch.randn(2, 1, 16, 16, 16)

    def saved(net: nn.Module) -> int:
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(image)
        return sum(kept.values())

    assert saved(light) < 0.5 * saved(model)
    with torch.no_grad():
        assert torch.equal(light(image), model(image))


def rank_gradients(rank: int, folder: str) -> None:
    """Gradients under DDP, with and without checkpointing, in both kinds of graph."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    found = {}
    for norm in ("batch", "sync_batch"):
        for static in (False, True):
            torch.manual_seed(0)
            plain = build_model(small(norm).model, (16, 16, 16), CUBIC)
            light = checkpoint_activations(copy.deepcopy(plain))
            for name, model in (("plain", plain), ("light", light)):
                wrapped = DistributedDataParallel(
                    model, gradient_as_bucket_view=True, static_graph=static, broadcast_buffers=False
                )
                for step in range(2):
                    wrapped.zero_grad()
                    torch.manual_seed(10 * step + rank)
                    result = backward(wrapped, torch.randn(1, 1, 16, 16, 16))
                found[norm, static, name] = {k: v.clone() for k, v in result.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_checkpointing_under_ddp(tmp_path: Path) -> None:
    two_ranks(rank_gradients, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for found in both:
        for (norm, static, name), result in found.items():
            for key, value in found[norm, static, "plain"].items():
                assert torch.allclose(result[key], value, atol=1e-6), (norm, static, name, key)
    first, second = (found["batch", False, "light"] for found in both)
    weights = [key for key in first if key.endswith("weight")]
    assert all(torch.equal(first[key], second[key]) for key in weights)


# What a step needs


def test_storages_are_counted_from_birth_to_death() -> None:
    with memory.Storages() as storages:
        a = torch.zeros(1000)
        b = a + 1
        view = b.view(10, 100)
        assert storages.live == 8000
        del a, b
        assert storages.live == 4000
        view.add_(1)
        del view
    assert (storages.live, storages.peak) == (0, 8000)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("norm", ["instance", "batch", "sync_batch"])
def test_the_estimate_is_that_of_a_real_pass(norm: str, checkpointing: bool) -> None:
    """Fake tensors live and die as real ones do; the real pass's peak is counted in the same way."""
    config = small(norm, checkpoint_activations=checkpointing)
    with memory.Storages() as real:
        model = memory.make_network(config, CUBIC, CPU)
        memory.forward_backward(model, config, CPU, torch.float32)
    weights = sum(p.numel() * 4 for p in model.parameters())
    step = memory.simulate(config, CUBIC, torch.float32)
    assert step.alive == pytest.approx(real.peak + weights, rel=0.02)


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_the_estimate_of_large_maps_is_that_of_a_real_pass(norm: str) -> None:
    """Large maps go through the norms' own way on CPUs."""
    config = small(norm, (32, 48, 48))
    config = replace(config, model=replace(config.model, depth=2, filters=8))
    with memory.Storages() as real:
        model = memory.make_network(config, CUBIC, CPU)
        memory.forward_backward(model, config, CPU, torch.float32)
    weights = sum(p.numel() * 4 for p in model.parameters())
    step = memory.simulate(config, CUBIC, torch.float32)
    assert step.alive == pytest.approx(real.peak + weights, rel=0.1)


def test_the_estimate_grows_with_batch_patch_and_moments() -> None:
    def alive(config: Config) -> int:
        return memory.simulate(config, CUBIC, torch.float32).alive

    base = alive(small())
    assert alive(small(batch_size=4)) > 1.5 * base
    assert alive(small(patch=(32, 16, 16))) > 1.5 * base
    assert alive(small(checkpoint_activations=True)) < base
    adamw = replace(small(), optim=replace(small().optim, name="adamw"))
    weights = sum(p.numel() * 4 for p in build_model(adamw.model, (16, 16, 16), CUBIC).parameters())
    assert alive(adamw) - base == pytest.approx(weights), "a second moment"


def test_a_large_batch_is_distinguished_from_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    told = memory.simulate(small(batch_size=7), CUBIC, torch.float32)
    monkeypatch.setattr(memory, "MOST_SIMULATED", 7)
    whole = memory.simulate(small(batch_size=7), CUBIC, torch.float32)
    assert told.flop == pytest.approx(whole.flop)
    assert told.parameters == whole.parameters
    assert told.alive == pytest.approx(whole.alive, rel=0.06)


THREE = Classes(names=("a", "b", "c"), values=((1,), (2,), (3,)), ignore=(9,))
REGIONS = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
SEVERAL: list[tuple[Classes, dict[str, Any]]] = [
    (THREE, {"depth": 5, "deep_supervision": True}),
    (REGIONS, {"kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))}),
    (THREE, {"blocks": (1, 2, 2)}),
]


def several(model: dict[str, Any], **train: Any) -> Config:
    config = small(patch=(64, 64, 64) if "depth" in model else (16, 16, 16), **train)
    return replace(config, model=replace(config.model, **model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("classes", "model"), SEVERAL)
def test_the_estimate_of_several_channels_and_classes_is_that_of_a_real_pass(
    classes: Classes, model: dict[str, Any], checkpointing: bool
) -> None:
    """But for the loss, which takes a processor's shortcuts where tensors have contents."""
    kind: dict[str, Any] = {"channels": 2, "classes": classes}
    config = several(model, checkpoint_activations=checkpointing)
    with memory.Storages() as real:
        network = memory.make_network(config, CUBIC, CPU, **kind)
        memory.forward_backward(network, config, CPU, torch.float32, **kind)
    weights = sum(p.numel() * 4 for p in network.parameters())
    step = memory.simulate(config, CUBIC, torch.float32, **kind)
    assert step.alive == pytest.approx(real.peak + weights, rel=0.1)
    assert step.flop == pytest.approx(real.flop)
    assert step.alive > memory.simulate(config, CUBIC, torch.float32).alive


def test_more_classes_need_more_and_the_bound_is_above() -> None:
    """A hundred maps of logits outweigh a narrow network; a bound that is cheap must know them."""
    many = Classes(names=tuple(map(str, range(117))), values=tuple((n,) for n in range(1, 118)))
    config = several({"depth": 4})
    few, more = (estimate_memory(config, CUBIC, CPU, channels=4, classes=kind) for kind in (LESION, many))
    assert more > few + 4 * 2 * 117 * 64**3, "a float32 map of each sample and class is alive at least"
    assert more < require_memory(config, CUBIC, CPU, channels=4, classes=many)


@pytest.mark.parametrize(
    "model", [{"depth": 5, "preset": "resenc_m", "filters": 32}, {"blocks": (8, 8, 8)}]
)
def test_the_bound_is_above_a_residual_encoders_step(model: dict[str, Any]) -> None:
    config = several(model)
    assert memory._rough_bound(config, 1, LESION) - memory.OWN > estimate_memory(config, CUBIC, CPU)


def test_the_estimate_is_near_a_processs_resident_memory() -> None:
    config = replace(small(patch=(64, 64, 64)), model=replace(small().model, filters=8))
    estimated = estimate_memory(config, CUBIC, CPU)
    # A second time only where need be: how a heap happens to be laid out differs.
    measured = (step_memory(config, CUBIC, CPU) for _ in range(2))
    # The library's workspaces come on top: much for a narrow network as this, little for the default.
    assert any(0.5 * bytes_ < estimated < 1.25 * bytes_ for bytes_ in measured)


def test_the_configured_loss_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[LossConfig] = []

    def recorded(config: LossConfig, classes: Classes) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        used.append(config)
        return build_loss(config, classes)

    monkeypatch.setattr(memory, "build_loss", recorded)
    config = replace(small(), loss=LossConfig(small=0.0, top_k=0.2))
    memory.simulate(config, CUBIC, torch.float32)
    assert used == [config.loss]


# What there is


def write_group(folder: Path, version: int, limit: str, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limits = {1: "memory.limit_in_bytes", 2: "memory.max"}
    usages = {1: "memory.usage_in_bytes", 2: "memory.current"}
    (folder / limits[version]).write_text(limit)
    (folder / usages[version]).write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(tmp_path: Path, version: int) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    top = root if version == 2 else root / "memory"
    own.write_text("0::/slurm/job\n" if version == 2 else "7:cpu:/x\n4:memory:/slurm/job\n")
    write_group(top / "slurm" / "job", version, "1000" if version == 1 else "max", 100, 0)
    write_group(top / "slurm", version, "800", 300, 50)
    bounds = memory._group_bounds(root, own)
    assert min(bounds) == 800 - 300 + 50
    assert len(bounds) == (2 if version == 1 else 1)
    assert memory._group_bounds(tmp_path / "none", tmp_path / "none") == []


def test_available_memory_is_positive_and_no_more_than_the_machine_has() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert 0 < available_memory(CPU) <= total


def test_too_large_a_step_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    needed = estimate_memory(config, CUBIC, CPU)
    assert needed <= require_memory(config, CUBIC, CPU), "a bound is enough where there is plenty"
    monkeypatch.setattr(memory, "available_memory", lambda _: 2 * needed)
    assert require_memory(config, CUBIC, CPU, sharers=2) == needed
    with pytest.raises(VoxelscaleError, match=r"2 patches of 16x16x16 voxels needs .* GiB") as raised:
        require_memory(config, CUBIC, CPU, sharers=3)
    assert "--fit-memory" in raised.value.hint
    assert "checkpointing" in raised.value.hint


def test_a_gpu_is_refused_what_its_tensors_alone_exceed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans leave memory for the input, a validation and the allocator, not measured on a GPU yet."""
    config, cuda = small(), torch.device("cuda", 0)
    alive = memory.simulate(config, CUBIC, torch.float32).alive
    planned = estimate_memory(config, CUBIC, cuda)
    # Three micro-batches of two images and labels, in float32, are there beside the step.
    assert planned > alive + 3 * 2 * 2 * 4 * 16**3
    wider = replace(config, predict=replace(config.predict, batch_size=2 * config.predict.batch_size))
    assert estimate_memory(wider, CUBIC, cuda) > planned
    monkeypatch.setattr(memory, "available_memory", lambda _: (alive + planned) // 2)
    assert require_memory(config, CUBIC, cuda) == alive
    monkeypatch.setattr(memory, "available_memory", lambda _: alive - 1)
    with pytest.raises(VoxelscaleError, match="voxels needs"):
        require_memory(config, CUBIC, cuda)


# The patch that fits


def product(pools: tuple[tuple[int, ...], ...], axis: int) -> int:
    whole = 1
    for pool in pools:
        whole *= pool[axis]
    return whole


@pytest.mark.parametrize(
    ("patch", "spacing"), [((16, 16, 16), CUBIC), ((8, 16, 16), (2.5, 1.0, 1.0)), ((8, 12, 16), CUBIC)]
)
def test_the_largest_patch_that_fits(patch: IntTriple, spacing: Triple) -> None:
    config = small(patch=patch)
    room = memory.FIXED + 3 * (estimate_memory(config, spacing, CPU) - memory.FIXED)
    found = fit_patch(config, spacing, CPU, available=room, verify=False)
    budget = room * (1 - plan.HEADROOM)
    assert estimate_memory(with_patch(config, found), spacing, CPU) <= budget
    ladder = list(scaled_patches(config, spacing))
    larger = ladder[ladder.index(found) + 1]
    assert estimate_memory(with_patch(config, larger), spacing, CPU) > budget
    assert max(found) > max(patch)
    pools = plan_pooling(found, spacing, config.model.depth)
    for axis, n in enumerate(found):
        assert n % product(pools, axis) == 0
        # Proportions are kept to within one multiple of the strides.
        assert abs(n - patch[axis] * max(found) / max(patch)) <= product(pools, axis)


def test_the_patch_shrinks_stops_at_the_limit_and_may_not_fit() -> None:
    config = small(patch=(32, 32, 32))
    room = estimate_memory(config, CUBIC, CPU)
    assert fit_patch(config, CUBIC, CPU, available=room // 2, verify=False) < (32, 32, 32)
    limited = fit_patch(config, CUBIC, CPU, available=10**12, limit=(40, 99, 99), verify=False)
    assert limited == (40, 40, 40)
    with pytest.raises(VoxelscaleError, match="needs"):
        fit_patch(config, CUBIC, CPU, available=1000, verify=False)


def test_two_dimensional_patches_stay_slices() -> None:
    config = small(patch=(1, 32, 32))
    config = replace(config, model=replace(config.model, dims=2))
    room = int(1.5 * estimate_memory(config, CUBIC, CPU))
    z, y, x = fit_patch(config, CUBIC, CPU, available=room, verify=False)
    assert z == 1
    assert y == x > 32


def test_what_does_not_fit_when_tried_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    tried: list[IntTriple] = []

    def measured(config: Config, *_: object, **__: object) -> int:
        tried.append(config.data.patch_size)
        if len(tried) == 1:
            raise VoxelscaleError("killed")
        return 10**9 if len(tried) == 2 else 1

    monkeypatch.setattr(plan, "step_memory", measured)
    room = 4 * estimate_memory(config, CUBIC, CPU)
    found = fit_patch(config, CUBIC, CPU, available=room)
    assert found == tried[2] < tried[1] < tried[0]
