"""Our Triton kernels on a processor, by Triton's interpreter; `test_triton.py` runs this file.

It is not collected with the others: the interpreter is chosen for a whole process, before Triton's import.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelscale.classes import Classes
from voxelscale.config import LossConfig, ModelConfig
from voxelscale.device import to_channels_last
from voxelscale.model.build import build_loss, build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.model.fast import kernels, triton_norm, triton_pool
from voxelscale.model.fast.pool import max_pool
from voxelscale.model.norm import BatchNorm, add_norm, make_norm

CPU = torch.device("cpu")
SHAPES = [(2, 5, 3, 5, 7), (1, 8, 9, 8, 11), (2, 16, 9, 11), (1, 70, 2, 3, 2), (2, 1, 4, 6)]


@pytest.fixture(autouse=True)
def processors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_verdicts", Trusting())


class Trusting(dict):  # type: ignore[type-arg]
    """Every device has passed, so that nothing falls back to PyTorch's kernels."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> bool:
        return True


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are divided as large ones are."""
    monkeypatch.setattr(triton_norm, "TILE", 256)
    monkeypatch.setattr(triton_norm, "MOST_TILES", 3)


def channels_last(*shape: int) -> Tensor:
    """Random, ``(batch, channel, ...)``."""
    batch, channels, *size = shape
    return torch.randn(batch, *size, channels).movedim(-1, 1)


def drawn(name: str, channels: int) -> nn.Module:
    """A norm with weights of its own."""
    norm = make_norm(name, channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    return norm


def by_pytorch(norm: nn.Module, x: Tensor, slope: float) -> Tensor:
    """Norm and leaky ReLU in float64, by PyTorch."""
    weight, bias = norm.weight, norm.bias
    if isinstance(norm, BatchNorm):
        y = F.batch_norm(x, None, None, weight, bias, training=True)  # type: ignore[arg-type]
    elif isinstance(norm, nn.GroupNorm):
        y = F.group_norm(x, norm.num_groups, weight, bias)  # type: ignore[arg-type]
    else:
        y = F.instance_norm(x, weight=weight, bias=bias)  # type: ignore[arg-type]
    return F.leaky_relu(y, slope)


def compare(norm: nn.Module, x: Tensor, slope: float, tolerance: float) -> None:
    """Output and all gradients, relative to the largest of each."""
    reference = copy.deepcopy(norm).double()
    mine, theirs = x.clone().requires_grad_(), x.double().contiguous().requires_grad_()
    y, wanted = norm(mine, slope), by_pytorch(reference, theirs, slope)
    assert "Kernel" in type(y.grad_fn).__name__, "the kernel is to be tested"
    assert y.dtype == x.dtype
    assert y.movedim(1, -1).is_contiguous()
    gradient = torch.randn_like(y)
    y.backward(gradient)
    wanted.backward(gradient.double())  # type: ignore[no-untyped-call]
    pairs = [(y, wanted), (mine.grad, theirs.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(norm.parameters(), reference.parameters(), strict=True)]
    for found, right in pairs:
        assert found is not None
        assert right is not None
        assert (found.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slope", [1.0, 0.01])
def test_a_norm_is_pytorchs(name: str, shape: tuple[int, ...], slope: float) -> None:
    torch.manual_seed(0)
    compare(drawn(name, shape[1]), channels_last(*shape) + 2, slope, 1e-5)


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
@pytest.mark.parametrize("shape", [(2, 8, 17, 9), (1, 24, 5, 6, 11), (2, 5, 300, 3)])
@pytest.mark.usefixtures("many_chunks")
def test_a_norm_over_many_chunks_is_pytorchs(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    compare(drawn(name, shape[1]), channels_last(*shape) - 1, 0.1, 1e-5)


def test_many_channels() -> None:
    torch.manual_seed(0)
    compare(drawn("group", 320), channels_last(1, 320, 2, 3, 2), 0.1, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_a_norm_of_16_bits(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    compare(drawn("instance", 8), channels_last(2, 8, 6, 7, 8).to(dtype), 0.01, tolerance)


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
@pytest.mark.usefixtures("many_chunks")
def test_a_large_mean_costs_no_digits(name: str) -> None:
    """The difference of E[x^2] and its mean's square would be off by 6 % of a variance of 1."""
    torch.manual_seed(0)
    compare(drawn(name, 8), channels_last(2, 8, 6, 25, 8) + 1000, 1.0, 2e-4)


@pytest.mark.parametrize("name", ["instance", "batch"])
@pytest.mark.usefixtures("many_chunks")
def test_a_first_tile_unlike_the_others_costs_few_digits(name: str) -> None:
    """The moments are taken about its mean."""
    torch.manual_seed(0)
    x = channels_last(1, 8, 6, 25, 8)
    x[:, :, 0] = 1000
    compare(drawn(name, 8), x, 1.0, 1e-5)


def test_what_is_constant_has_its_shift() -> None:
    norm = drawn("instance", 8)
    for x in (channels_last(2, 8, 1, 1, 1) * 100, torch.full((1, 5, 4, 8), 1e4).movedim(-1, 1)):
        x.requires_grad_()
        y = norm(x, 1.0)
        assert "Kernel" in type(y.grad_fn).__name__
        assert torch.equal(y, norm.get_parameter("bias").view(1, -1, *[1] * (x.dim() - 2)).expand_as(y))
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert gradient.abs().max() <= 1e-2


def test_a_value_that_is_not_finite_spoils_its_sample_and_channel_alone() -> None:
    torch.manual_seed(0)
    norm, x = drawn("instance", 8), channels_last(2, 8, 6, 7)
    clean = norm(x, 0.1)
    x[1, 3, 2, 2] = torch.inf
    y = norm(x, 0.1)
    assert y[1, 3].isnan().any()
    others = torch.ones(2, 8, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(y[others], clean[others])


@pytest.mark.usefixtures("many_chunks")
def test_a_sample_has_the_same_bits_every_time_and_in_every_batch() -> None:
    torch.manual_seed(0)
    norm, x, gradient = drawn("group", 8), channels_last(3, 8, 9, 40), channels_last(3, 8, 9, 40)
    results = []
    for part in (slice(0, 3), slice(0, 3), slice(1, 2)):
        mine = x[part].clone(memory_format=torch.channels_last).requires_grad_()
        y = norm(mine, 0.1)
        y.backward(gradient[part])
        assert mine.grad is not None
        results.append((y.detach(), mine.grad))
    for one, other in zip(results[0], results[1], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(results[0], results[2], strict=True):
        assert torch.equal(one[1:2], other)


def test_a_gradient_may_come_in_any_format_and_type() -> None:
    torch.manual_seed(0)
    norm, x = drawn("instance", 8), channels_last(2, 8, 4, 5, 6)
    gradient = torch.randn(2, 16, 4, 5, 6)[:, 4:12]
    found = []
    for each in (gradient, gradient.movedim(1, -1).contiguous().movedim(-1, 1)):
        mine = x.clone().requires_grad_()
        norm(mine, 0.1).backward(each)
        assert mine.grad is not None
        found.append(mine.grad)
    assert torch.equal(*found)
    mine = x.clone().requires_grad_()
    norm(mine, 0.1).sum().backward()  # an expanded scalar
    assert mine.grad is not None


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("many_chunks")
def test_a_norm_and_a_sum_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = drawn(name, 8)
    x, added, gradient = (channels_last(2, 8, 5, 26).to(dtype) for _ in range(3))
    reference = copy.deepcopy(norm).double()
    mine = [t.clone().requires_grad_() for t in (x, added)]
    theirs = [t.double().requires_grad_() for t in (x, added)]
    y = add_norm(norm, mine[0], mine[1], 0.1)
    wanted = F.leaky_relu(by_pytorch(reference, theirs[0], 1.0) + theirs[1], 0.1)
    assert "Kernel" in type(y.grad_fn).__name__
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, [*mine, *norm.parameters()], gradient)]
    right = [wanted, *torch.autograd.grad(wanted, [*theirs, *reference.parameters()], gradient.double())]
    for one, other in zip(found, right, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_a_sum_with_another_format_or_type_is_not_in_one_piece() -> None:
    torch.manual_seed(0)
    norm, x, added = drawn("instance", 8), channels_last(2, 8, 5, 6), channels_last(2, 8, 5, 6)
    wanted = add_norm(norm, x, added, 0.1)
    for other in (added.contiguous(), added.double()):
        assert torch.allclose(add_norm(norm, x, other, 0.1).float(), wanted, atol=1e-5)


def test_running_statistics_are_pytorchs() -> None:
    torch.manual_seed(0)
    ours, theirs = make_norm("batch", 8), nn.BatchNorm3d(8)
    for _ in range(2):
        x = 3 + 2 * channels_last(2, 8, 4, 5, 6)
        ours(x, 0.1)
        theirs(x)
    for found, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5)


def test_under_autocast_and_without_gradients() -> None:
    torch.manual_seed(0)
    norm, x = drawn("group", 8), channels_last(2, 8, 4, 5, 6).bfloat16()
    wanted = norm(x, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x, 0.1), wanted)
    with torch.inference_mode():
        assert torch.equal(norm(x, 0.1), wanted)
    assert wanted.dtype == torch.bfloat16


# Pooling

WINDOWS = [
    ((2, 2, 2), (5, 6, 7)),
    ((1, 2, 2), (3, 4, 5)),
    ((3, 1, 2), (4, 3, 9)),
    ((2, 2), (7, 8)),
    ((2, 3), (3, 20)),
]


@pytest.mark.parametrize(("stride", "size"), WINDOWS)
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        pytest.param(5, torch.bfloat16, id="quick 5"),
        pytest.param(8, torch.float32, id="quick 8"),
        (5, torch.float32),
        (8, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("way", ["kernel", "formulas"])
def test_max_pooling_is_pytorchs(
    stride: tuple[int, ...],
    size: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exactly, with many equal values, with NaN and infinities, at borders."""
    torch.manual_seed(0)
    monkeypatch.setattr(triton_pool, "WINDOWS", 32)
    x = torch.randint(4, (2, *size, channels)).to(dtype)
    flat = x.flatten()
    flat[torch.randperm(len(flat))[: len(flat) // 8]] = torch.nan
    flat[torch.randperm(len(flat))[: len(flat) // 2]] = -torch.inf
    mine = x.movedim(-1, 1).requires_grad_()
    theirs = x.movedim(-1, 1).contiguous().requires_grad_()
    pool = (nn.MaxPool2d if len(stride) == 2 else nn.MaxPool3d)(stride, ceil_mode=True)
    y, wanted = pooled(way)(pool, mine), pool(theirs)
    assert "MaxPoolBackward" in type(y.grad_fn).__name__
    gradient = torch.randn_like(y)
    y.backward(gradient)  # type: ignore[no-untyped-call]
    wanted.backward(gradient)
    assert mine.grad is not None
    assert theirs.grad is not None
    for found, right in ((y, wanted), (mine.grad, theirs.grad)):
        assert torch.equal(found.nan_to_num(77.0), right.nan_to_num(77.0))
        assert found.movedim(1, -1).is_contiguous()


def pooled(way: str) -> Callable[[nn.Module, Tensor], Tensor]:
    if way == "kernel":
        return max_pool
    from voxelscale.model.fast import pool as module

    return lambda pool, x: module._MaxPool.apply(x, module._windows(pool, x.dim() - 2), False)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("options", [{"stride": 1}, {"padding": 1}, {"dilation": 2}, {"ceil_mode": False}])
def test_other_poolings_stay_pytorchs(options: dict[str, int]) -> None:
    pool = nn.MaxPool2d(2, **{"ceil_mode": True, **options})  # type: ignore[arg-type]
    x = channels_last(1, 8, 7, 9)
    assert torch.equal(max_pool(pool, x), pool(x))


# The guard


@pytest.mark.parametrize("module", [triton_norm, triton_pool])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_kernels_pass_their_own_check(module: object, dtype: torch.dtype) -> None:
    assert module.agrees(CPU, dtype)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["_moments", "_merge_moments", "_apply", "_sums", "_merge_sums", "_gradient"]
)
def test_a_norm_that_is_wrong_does_not_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(triton_norm, name, monkeypatch)
    assert not triton_norm.agrees(CPU, torch.bfloat16)


@pytest.mark.parametrize("name", ["_largest", "_spread"])
def test_a_pooling_that_is_wrong_does_not_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(triton_pool, name, monkeypatch)
    assert not triton_pool.agrees(CPU, torch.bfloat16)


def broken(module: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a kernel leave out its last program."""
    kernel, launch = getattr(module, name), kernels.launch

    def less(which: object, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        smaller = (grid[0] - 1, *grid[1:]) if which is kernel else grid
        launch(which, smaller, *arguments, **constants)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "launch", less)
    # What is not written holds anything; here it is 7.
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *n, **how: self.new_full(n, 7, **how))
    monkeypatch.setattr(module, "empty_rows", lambda *like: kernels.empty_rows(*like).fill_(7))


# Networks

NETWORKS = [
    pytest.param("instance", "residual encoder", 3, 3, id="quick instance"),
    pytest.param("group", "plain", 2, 3, id="quick group"),
    pytest.param("batch", "residual encoder", 2, 3, id="quick batch"),
    ("instance", "plain", 3, 4),
    ("instance", "residual", 2, 3),
    ("group", "residual encoder", 3, 2),
    ("batch", "residual", 3, 2),
]
"""Norm, kind, axes and depth; from a depth of 4 on there are several outputs."""


@pytest.mark.parametrize(("norm", "kind", "dims", "depth"), NETWORKS)
def test_a_network_learns_as_it_does_without(
    norm: str, kind: str, dims: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients and statistics, of odd sizes; with batch norm, checkpointing changes nothing."""
    torch.manual_seed(0)
    config = ModelConfig(
        dims=dims,  # type: ignore[arg-type]
        depth=depth,
        filters=2,
        max_filters=6,
        norm=norm,  # type: ignore[arg-type]
        residual=kind == "residual",
        blocks=(1,) * depth if kind == "residual encoder" else (),
        deep_supervision=True,
    )
    patch, size = ((1, 32, 32), (1, 19, 23)) if dims == 2 else ((32, 32, 32), (9, 10, 13))
    model = to_channels_last(build_model(config, patch, (1, 1, 1), 2, 3))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    image = channels_last(2, 2, *size)
    target = torch.randint(3, (2, 1, *size)).float()
    loss = build_loss(LossConfig(top_k=1.0), Classes(names=("a", "b"), values=((1,), (2,))))
    results = []
    ways = [(set(), False), ({"cpu"}, False), ({"cpu"}, True)]
    for devices, light in ways if norm == "batch" else ways[:2]:
        monkeypatch.setattr(kernels, "DEVICES", devices)
        each = copy.deepcopy(model)
        value, _ = loss((checkpoint_activations(each) if light else each)(image), target)
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in each.parameters() if p.grad is not None]
        results.append([value, *gradients, *(b for b in each.buffers() if b.is_floating_point())])
    ordinary, fast, *recomputed = results
    for again in recomputed:
        assert all(torch.equal(one, other) for one, other in zip(fast, again, strict=True))
    largest = max(g.abs().max() for g in gradients)
    for one, other in zip(fast, ordinary, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(largest, other.abs().max())
