"""The sliding window as a GPU does it, on tensors without contents and with stand-ins for its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.uploads import META, only_uploads
from torch import Tensor, nn

from voxelscale.classes import LESION
from voxelscale.infer import sliding_window, transfer
from voxelscale.infer.labels import predict_labels
from voxelscale.infer.memory import PassSize
from voxelscale.infer.sliding_window import Windows, predict_boxes, predict_volume
from voxelscale.infer.transfer import landed, to_host
from voxelscale.model.unet import UNet

SIZE, PATCH = (12, 21, 16), (8, 12, 10)


def network(channels: int = 1, outputs: int = 1) -> nn.Module:
    return UNet(dims=3, depth=2, filters=4, in_channels=channels, classes=outputs).eval().to(META)


def scan(channels: int = 1, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randint(-1000, 400, (channels, *size), dtype=torch.int16)


def normalised(stored: Tensor) -> Tensor:
    return stored.float() / 500


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A GPU with so many free bytes."""
    for module in (transfer, sliding_window):
        monkeypatch.setattr(module, "free_memory", lambda device: free)


@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("size", [SIZE, (5, 21, 9)])
def test_windows_go_without_a_wait(
    monkeypatch: pytest.MonkeyPatch, free: int, channels: int, outputs: int, size: tuple[int, int, int]
) -> None:
    """A volume goes up once where there is room, else window by window; its boxes stay on the GPU."""
    with_free(monkeypatch, free)
    volume, within = scan(channels, size), torch.zeros(size, dtype=torch.bool)
    within[:, 12:] = True
    windows = Windows(patch=PATCH, flips="zyx", batch_size=3)
    passes: list[int] = []
    model = network(channels, outputs)
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    with only_uploads(monkeypatch) as copied:
        boxes = predict_boxes(
            model, volume, windows, outputs, prepare=normalised, within=within, device=META
        )
        for box, probability in boxes:
            assert probability.device == META
            assert probability.shape == (outputs, *(side.stop - side.start for side in box))
    framed = [max(n, p) for n, p in zip(size, PATCH, strict=True)]
    lines = 4 * (sum(PATCH) + sum(framed))
    voxels = math.prod(framed) if free else math.prod(PATCH) * sum(passes) // 8
    assert sum(copied) == lines + 2 * channels * voxels


def test_labels_and_a_division_into_parts_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, three, windows = network(), network(outputs=3), Windows(patch=PATCH)
    with only_uploads(monkeypatch):
        labels = predict_labels(one, scan(), windows, LESION, 0.5, device=META)
        parts = list(predict_boxes(three, scan(), windows, 3, device=META, largest=6500))
    assert labels.device == META
    assert labels.shape == SIZE
    assert len({(box[1].start, box[2].start) for box, _ in parts}) > 1


def test_a_volume_waits_once_a_box(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[int, ...]] = []

    def copy(values: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        def wait() -> Tensor:
            waits.append(tuple(values.shape))
            return torch.full(values.shape, 0.25, dtype=dtype)

        return wait

    monkeypatch.setattr(transfer, "to_host", copy)
    model = network()
    with only_uploads(monkeypatch):
        found = predict_volume(model, scan(), Windows(patch=PATCH), device=META, dtype=torch.float16)
    assert found.device.type == "cpu"
    assert found.dtype == torch.float16
    assert (found == 0.25).all()
    rows = len(sliding_window.window_starts(SIZE[0], PATCH[0], 0.5))
    assert len(waits) == rows


def test_a_box_is_waited_for_when_the_next_one_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    def copy(values: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        name, arrive = f"{int(values[0])}", to_host(values, dtype)
        did.append(f"copy {name}")

        def wait() -> Tensor:
            did.append(f"wait {name}")
            return arrive()

        return wait

    def boxes() -> Iterator[tuple[str, Tensor]]:
        slab = torch.zeros(2)
        for number in range(3):
            yield f"box {number}", slab.fill_(number)  # which is changed before it is waited for

    monkeypatch.setattr(transfer, "to_host", copy)
    found = [(name, values.tolist()) for name, values in landed(boxes(), torch.float32)]
    assert found == [(f"box {n}", [n, n]) for n in range(3)]
    assert did == ["copy 0", "copy 1", "wait 0", "copy 2", "wait 1", "wait 2"]


class Counting(nn.Module):
    """Notes how many windows come at a time, and has memory for at most `most`."""

    def __init__(self, most: int = 10**6) -> None:
        super().__init__()
        self.most, self.seen = most, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return x


@pytest.mark.parametrize(("free", "following"), [(0, 4), (2 * 7 * 1000, 7), (2**40, 11)])
def test_so_many_windows_follow_as_half_of_what_is_free_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, following: int
) -> None:
    def measured(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
        return work(), 4 * 1000

    with_free(monkeypatch, free)
    monkeypatch.setattr(sliding_window, "MOST_VOXELS", 4**3 * 11 + 7)
    monkeypatch.setattr(sliding_window, "with_peak", measured)
    monkeypatch.setattr(transfer, "to_host", lambda values, dtype: lambda: torch.zeros(values.shape))
    for grow in (True, False):
        model = Counting()
        windows = Windows(patch=(4, 4, 4), batch_size=4, grow=grow)
        predict_volume(model, scan(size=(4, 30, 30)), windows, device=META)
        assert model.seen[0] == 4
        assert set(model.seen[1:-1]) == {following if grow else 4}
        assert sum(model.seen) == 14**2


def test_a_processor_takes_as_many_as_configured() -> None:
    model = Counting()
    predict_volume(model, scan(size=(4, 30, 30)), Windows(patch=(4, 4, 4), batch_size=4, grow=True))
    assert set(model.seen) == {4}


def test_windows_that_did_not_fit_are_not_tried_again() -> None:
    model = Counting(most=2)
    volume = torch.randn(4, 30, 30)
    found = predict_volume(model, volume, Windows(patch=(4, 4, 4), batch_size=8))
    assert torch.allclose(found, volume.sigmoid(), atol=1e-5)
    assert model.seen[:2] == [8, 4]
    assert set(model.seen[2:]) == {2}


def test_a_size_that_failed_bounds_those_that_follow() -> None:
    size = PassSize(now=4, most=32)
    size.grow(each=10, free=200)
    assert (size.now, size.most) == (10, 10)
    size.halve(10)
    assert (size.now, size.most) == (5, 5)
    size.halve(1)
    assert size.now == 1
