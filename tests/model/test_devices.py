"""Networks and losses where no value can be read, on PyTorch's `meta` device: as a GPU must run them.

There whatever waits for the device (`item`, `bool`, a size that depends on data) raises, and so does mixing
with tensors in main memory. Channels-last maps go through our kernels, which compute nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxelscale.classes import LESION, Classes
from voxelscale.config import LossConfig, ModelConfig
from voxelscale.device import to_channels_last
from voxelscale.model.build import build_loss, build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.model.fast import join as joining
from voxelscale.model.fast import kernels
from voxelscale.model.fast.convolution import Conv2d, Conv3d
from voxelscale.model.fast.join import join, mean_pool
from voxelscale.model.fast.pool import max_pool
from voxelscale.model.norm import BatchNorm, GroupNorm, InstanceNorm, make_norm

META = torch.device("meta")
NORMS = ["instance", "group", "batch", "none"]
KINDS = ["plain", "residual", "residual encoder"]
SIZES = {2: (1, 30, 44), 3: (17, 30, 44)}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def network(norm: str, kind: str, dims: int, channels: int = 2, outputs: int = 3) -> nn.Module:
    config = ModelConfig(
        dims=dims,  # type: ignore[arg-type]
        depth=4,
        filters=8,
        norm=norm,  # type: ignore[arg-type]
        residual=kind == "residual",
        blocks=(1, 2, 1, 1) if kind == "residual encoder" else (),
        deep_supervision=True,
    )
    patch = (1, 32, 48) if dims == 2 else (32, 32, 48)
    with META:
        return build_model(config, patch, (1, 1, 1), channels, outputs)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = META) -> Tensor:
    batch, channels, *size = shape
    return torch.randn(batch, *size, channels, device=device).to(dtype).movedim(-1, 1)


def is_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_step_of_every_network_waits_for_nothing(
    dims: int, norm: str, kind: str, light: bool, last: bool
) -> None:
    model = network(norm, kind, dims)
    if last:
        to_channels_last(model)
    if light:
        checkpoint_activations(model)
    image = channels_last(2, 2, *SIZES[dims])
    outputs = model(image if last else image.contiguous())
    loss = build_loss(LossConfig(), Classes(names=("a", "b"), values=((1,), (2,))))
    target = torch.zeros(2, 1, *SIZES[dims], device=META)
    value, dice = loss(outputs, target)
    value.backward()  # type: ignore[no-untyped-call]
    assert dice.shape == (2,)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"small": 0.0, "top_k": 1.0}, {"small": 0.0}, {"top_k": 1.0}])
@pytest.mark.parametrize(
    "classes",
    [
        LESION,
        Classes(names=("a", "b"), values=((1,), (2,))),
        Classes(names=("a", "b"), values=((1,), (2,)), ignore=(9,)),
        Classes(names=("a", "b"), values=((1, 2), (2,)), regions=True, order=(1, 2)),
        Classes(names=("a", "b"), values=((1, 2), (2,)), regions=True, order=(1, 2), ignore=(9,)),
    ],
    ids=["lesion", "classes", "classes-ignore", "regions", "regions-ignore"],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_every_loss_waits_for_nothing(dims: int, classes: Classes, options: dict[str, float]) -> None:
    size = [8, 12, 16][-dims:]
    logits = [torch.randn(2, classes.outputs, *size, device=META, requires_grad=True)]
    logits += [torch.randn(2, classes.outputs, *[n // 2 for n in size], device=META, requires_grad=True)]
    target = torch.zeros(2, 1, *size, device=META)
    value, dice = build_loss(LossConfig(**options), classes)(logits, target)
    value.backward()  # type: ignore[no-untyped-call]
    assert dice.shape == (2,)
    assert [y.grad is not None for y in logits] == [True, True]


# Memory format


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["odd", "even"])
def test_maps_stay_channels_last_in_bfloat16(
    dims: int, norm: str, kind: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under autocast: convolutions in bfloat16, norms with float32 weights.

    On `meta` PyTorch gives a wide convolution's map channels first; cuDNN gives it as its input is.
    """
    pytest.importorskip(
        "triton", reason="Triton's kernels keep maps channels last, and it is not installed"
    )
    model = to_channels_last(network(norm, kind, dims))
    fast: list[bool] = []
    monkeypatch.setattr(joining._Join, "apply", counted(joining._Join.apply, fast))
    maps: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv2d | Conv3d):
            module.to(torch.bfloat16)
            if max(*module.kernel_size, *module.stride) > 1:
                module.register_forward_hook(as_cudnn)
        if isinstance(module, Conv2d | Conv3d | InstanceNorm | GroupNorm | BatchNorm):
            module.register_forward_hook(keep(maps, name))
    shape = (32, 48) if size == "even" else (30, 44) if dims == 2 else (17, 30, 44)
    shape = (32, *shape) if dims == 3 and size == "even" else shape
    model(channels_last(2, 2, *shape, dtype=torch.bfloat16))
    assert len(maps) > 20
    assert [name for name, x in maps.items() if not is_last(x) or x.dtype != torch.bfloat16] == []
    assert len(fast) == 3 if size == "even" else len(fast) < 3, "a join of even sizes copies once"


def as_cudnn(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    last = inputs[0].movedim(1, -1).is_contiguous()
    return output.movedim(1, -1).contiguous().movedim(-1, 1) if last else output


def counted(function: Any, calls: list[bool]) -> Any:
    def call(*arguments: Any) -> Any:
        calls.append(True)
        return function(*arguments)

    return call


def keep(maps: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        maps[name] = output

    return hook


def test_the_joins_gradients_are_views_of_one() -> None:
    skip = channels_last(2, 8, 4, 6, 8, dtype=torch.bfloat16).requires_grad_()
    packed = channels_last(2, 64, 2, 3, 4, dtype=torch.bfloat16).requires_grad_()
    joined = join(skip, packed, (2, 2, 2))
    assert is_last(joined)
    assert type(joined.grad_fn).__name__ == "_JoinBackward"
    joined.sum().backward()  # type: ignore[no-untyped-call]
    assert packed.grad is not None
    assert packed.grad.dtype == torch.bfloat16


def test_a_one_wide_convolution_is_a_matrix_product() -> None:
    with META:
        conv = Conv3d(8, 16, 1)
    y = conv(channels_last(2, 8, 4, 6, 8))
    assert is_last(y)
    assert "Convolution" not in type(y.grad_fn.next_functions[0][0]).__name__


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
@pytest.mark.parametrize("last", [False, True])
def test_an_activation_in_place_copies_no_view(name: str, last: bool) -> None:
    """Autograd would copy the map behind it (`CopySlices`)."""
    with META:
        norm = make_norm(name, 8)
    x = channels_last(2, 8, 4, 6, 8).requires_grad_()
    seen, left = set(), [norm(x if last else x.contiguous(), 0.01).grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            seen.add(type(node).__name__)
            left += [following for following, _ in node.next_functions]
    assert "CopySlices" not in seen
    assert len(seen) > 1


# Pooling and what remains at a border


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 2)])
@pytest.mark.usefixtures("deterministic")
def test_poolings_are_deterministic_without_triton(
    stride: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "DEVICES", set())
    pool = (nn.MaxPool2d if len(stride) == 2 else nn.MaxPool3d)(stride, ceil_mode=True)
    x = channels_last(2, 8, *[5, 7, 9][-len(stride) :]).requires_grad_()
    for pooled in (max_pool(pool, x), mean_pool(x, stride)):
        size = [-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True)]
        assert list(pooled.shape[2:]) == size
        assert is_last(pooled)
        (gradient,) = torch.autograd.grad(pooled.sum(), x)
        assert gradient.shape == x.shape


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 3, 2)])
def test_means_of_blocks_that_a_border_cuts_off(stride: tuple[int, ...]) -> None:
    """As a GPU takes them, one axis after another, against PyTorch's pooling."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 9, 3, dtype=torch.float64)
    wanted = F.avg_pool3d(x.movedim(-1, 1), stride, ceil_mode=True).movedim(1, -1)
    for axis, step in enumerate(stride, start=1):
        x = joining._means(x, axis, step)
    assert torch.allclose(x, wanted)
