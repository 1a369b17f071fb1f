"""A worker's pass: operation by operation, and recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from voxelscale.model.losses import dice_cross_entropy
from voxelscale.model.unet import UNet
from voxelscale.train import passes
from voxelscale.train.passes import TrainingPass, Work

CPU = torch.device("cpu")
LOSS = partial(dice_cross_entropy, top_k=0.1)


def played(work: Work) -> Work:
    """What stands in for a CUDA graph here: the recorded function itself, on the tensors of then."""
    return work


def broken(work: Work) -> Work:
    """A recording that leaves out half of the gradients."""

    def replay() -> None:
        work()
        for each in replay.model.parameters():  # type: ignore[attr-defined]
            each.grad.mul_(0.5)

    return replay


def batches(count: int, size: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [
        (torch.randn(size, 1, 8, 8, 8), (torch.rand(size, 1, 8, 8, 8) > 0.9).float()) for _ in range(count)
    ]


def trained(
    recorder: Callable[[Work], Work] | None, sizes: list[int], norm: str = "batch"
) -> tuple[nn.Module, list[float]]:
    """A network after updates of two micro-batches each, and the losses."""
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4, norm=norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {} if recorder is None else {"graph": True, "recorder": recorder}
    one = TrainingPass(model, LOSS, torch.float32, CPU, **options)  # type: ignore[arg-type]
    losses = []
    for size in sizes:
        one.clear_gradients()
        for inputs, target in batches(2, size):
            loss, dice = one(inputs, target, 0.5)
            losses += [float(loss), float(dice)]
        optimizer.step()
    return model, losses


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_replayed_updates_are_those_of_single_operations(norm: str) -> None:
    """Also where a micro-batch has another size, and with the running statistics of batch norm."""
    sizes = [2, 2, 1, 2, 2]
    recorded: list[Work] = []

    def recorder(work: Work) -> Work:
        recorded.append(work)
        return played(work)

    one, losses = trained(None, sizes, norm)
    other, same = trained(recorder, sizes, norm)
    assert len(recorded) == 1
    assert losses == same
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("fault", ["gradients", "recording"])
def test_a_recording_that_is_wrong_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(passes, "notice", said.append)

    def recorder(work: Work) -> Work:
        if fault == "recording":
            raise torch.OutOfMemoryError("too little")
        replay = broken(work)
        replay.model = model  # type: ignore[attr-defined]
        return replay

    torch.manual_seed(0)
    model, plain = (UNet(dims=3, depth=2, filters=4) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    one = TrainingPass(model, LOSS, torch.float32, CPU, graph=True, recorder=recorder)
    other = TrainingPass(plain, LOSS, torch.float32, CPU)
    for inputs, target in batches(3):
        for each in (one, other):
            each.clear_gradients()
            each(inputs, target)
    for ours, right in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert right.grad is not None
        assert torch.equal(ours.grad, right.grad)
    assert len(said) == 1
    assert "no CUDA graph" in said[0]


def test_a_weight_that_takes_no_part_gets_no_gradient() -> None:
    """It would be decayed; recorded or not."""
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.all["used"](x)
            return y

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    one = TrainingPass(Part(), loss, torch.float32, CPU, graph=True, recorder=played)
    for _ in range(3):
        one.clear_gradients()
        value, figure = one(torch.ones(4, 2), torch.ones(4, 1))
    assert torch.isnan(figure)
    assert float(value) > 0
    assert all(p.grad is not None for p in model["used"].parameters())
    assert all(p.grad is None for p in model["unused"].parameters())
