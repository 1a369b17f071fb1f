"""What only a GPU can show of our kernels: that they run, in a CUDA graph too, and alike every time."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from voxelscale.config import ModelConfig
from voxelscale.device import autocast, to_channels_last
from voxelscale.model.build import build_model
from voxelscale.model.checkpointing import checkpoint_activations
from voxelscale.model.fast import kernels
from voxelscale.model.norm import InstanceNorm, make_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

GPU = torch.device("cuda")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random, ``(batch, channel, ...)``."""
    batch, channels, *size = shape
    return torch.randn(batch, *size, channels, device=GPU, dtype=dtype).movedim(-1, 1)


@pytest.mark.parametrize("module", ["triton_norm", "triton_pool"])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_kernels_are_used(module: str, dtype: torch.dtype) -> None:
    assert kernels.takes_kernels(channels_last(1, 8, 4, 4, 4, dtype=dtype), module)


@pytest.mark.parametrize("channels", [8, 32, 5, 320])
@pytest.mark.parametrize("size", [(7, 9, 11), (64, 64, 65)])
def test_a_norm_is_that_of_a_processor(channels: int, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm: nn.Module = InstanceNorm(channels)
    x = channels_last(2, channels, *size) + 1000
    reference, theirs = copy.deepcopy(norm).double(), x.double().cpu().contiguous().requires_grad_()
    mine, gradient = x.requires_grad_(), channels_last(2, channels, *size)
    y, wanted = norm.to(GPU)(mine, 0.1), reference(theirs, 0.1)
    y.backward(gradient)
    wanted.backward(gradient.double().cpu())
    assert mine.grad is not None
    assert theirs.grad is not None
    for found, right in ((y, wanted), (mine.grad, theirs.grad)):
        assert (found.double().cpu() - right).abs().max() <= 1e-3 * right.abs().max()


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
def test_a_norm_in_a_cuda_graph(name: str) -> None:
    torch.manual_seed(0)
    norm, x = make_norm(name, 16).to(GPU), channels_last(2, 16, 12, 14, 18)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and asks whether it agrees
        norm(x, 0.1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = norm(x, 0.1)
    x.copy_(channels_last(2, 16, 12, 14, 18))
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, norm(x, 0.1))


@pytest.mark.parametrize("kind", ["plain", "residual encoder"])
@pytest.mark.parametrize("light", [False, True])
@pytest.mark.usefixtures("deterministic")
def test_a_step_has_the_same_gradients_every_time(kind: str, light: bool) -> None:
    torch.manual_seed(0)
    blocks = (1, 2, 1) if kind == "residual encoder" else ()
    model = build_model(ModelConfig(depth=3, filters=16, blocks=blocks), (32, 32, 32), (1, 1, 1)).to(GPU)
    to_channels_last(model)
    image = channels_last(2, 1, 33, 32, 40)
    results = []
    for _ in range(2):
        each = copy.deepcopy(model)
        if light:
            checkpoint_activations(each)
        with autocast(GPU, torch.bfloat16):
            y = each(image)
        y.float().square().mean().backward()
        results.append([y, *(p.grad for p in each.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
