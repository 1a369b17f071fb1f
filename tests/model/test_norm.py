from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from voxelscale.model.fast import norm as fast
from voxelscale.model.fast.join import _Join, unpack_strides
from voxelscale.model.norm import make_norm


@pytest.fixture(autouse=True)
def every_size_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "ROWS_FROM", {True: 1, False: 1})


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random, ``(batch, channel, ...)``."""
    batch, channels, *size = shape
    return torch.randn(batch, *size, channels, dtype=dtype).movedim(-1, 1)


@pytest.mark.parametrize(("samples", "groups"), [(True, 0), (False, 0), (True, 2)])
@pytest.mark.parametrize("slope", [1.0, 0.1])
@pytest.mark.parametrize("size", [(3, 2), (2, 1, 3)])
def test_gradients_of_rows_norm(samples: bool, groups: int, slope: float, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = channels_last(2, 4, *size).requires_grad_()
    weight, bias = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def normalise(*args: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = fast._RowsNorm.apply(*args, samples, groups, slope, 1e-5)[0]  # type: ignore[no-untyped-call]
        return result

    assert torch.autograd.gradcheck(normalise, (x, weight, bias))


@pytest.mark.parametrize("name", ["instance", "batch", "group"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rows_norm_is_pytorchs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    ours = make_norm(name, 8)
    theirs: nn.Module = {
        "instance": nn.InstanceNorm3d(8, affine=True),
        "batch": nn.BatchNorm3d(8),
        "group": nn.GroupNorm(2, 8),
    }[name]
    for module in (ours, theirs):
        torch.manual_seed(1)
        nn.init.uniform_(module.weight, 0.5, 1.5)  # type: ignore[arg-type]
        nn.init.normal_(module.bias)  # type: ignore[arg-type]
    x = (channels_last(3, 8, 5, 6, 7) + 2).to(dtype)
    gradient = channels_last(3, 8, 5, 6, 7).to(dtype)
    mine, reference = x.clone().requires_grad_(), x.float().requires_grad_()
    ours(mine, 0.01).backward(gradient)
    F.leaky_relu(theirs(reference), 0.01).backward(gradient.float())  # type: ignore[no-untyped-call]
    with torch.no_grad():
        pairs = [(ours(x, 0.01), F.leaky_relu(theirs(x.float()), 0.01)), (mine.grad, reference.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    pairs += list(zip(ours.buffers(), theirs.buffers(), strict=True))
    for found, wanted in pairs:
        assert found is not None
        assert wanted is not None
        assert (found.float() - wanted.float()).abs().max() <= tolerance * wanted.abs().max()


def test_the_join_is_unpacking_and_concatenation() -> None:
    torch.manual_seed(0)
    skip, packed = channels_last(2, 3, 2, 3, 4).requires_grad_(), channels_last(2, 8, 2, 3, 2)
    packed = packed[:, :4].contiguous().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    stride = (1, 1, 2)
    joined = _Join.apply(skip, packed, stride)  # type: ignore[no-untyped-call]
    assert torch.equal(joined, torch.cat([skip, unpack_strides(packed, stride)], 1))
    assert torch.autograd.gradcheck(lambda a, b: _Join.apply(a, b, stride), (skip, packed))  # type: ignore[no-untyped-call]
