from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from voxelscale.config import IntTriple
from voxelscale.errors import VoxelscaleError
from voxelscale.infer.sliding_window import (
    Share,
    Windows,
    flip_axes,
    predict_boxes,
    predict_volume,
    window_starts,
)
from voxelscale.model.unet import UNet


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@settings(max_examples=30)
@given(
    st.tuples(*[st.integers(1, 24)] * 3),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.floats(0, 0.9),
    st.integers(1, 5),
)
def test_a_network_that_looks_at_one_voxel_is_reproduced(
    size: IntTriple, patch: IntTriple, overlap: float, batch: int
) -> None:
    torch.manual_seed(0)
    volume = torch.randn(size)
    probability = predict_volume(
        Identity(), volume, Windows(patch=patch, overlap=overlap, batch_size=batch)
    )
    assert probability.shape == volume.shape
    assert torch.allclose(probability, volume.sigmoid(), atol=1e-5)


@given(st.integers(1, 300), st.integers(1, 100), st.floats(0, 0.95))
def test_windows_cover_the_axis_with_at_least_the_overlap(size: int, patch: int, overlap: float) -> None:
    starts = window_starts(size, patch, overlap)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    if size > patch:
        assert starts[-1] == size - patch
        steps = [b - a for a, b in pairwise(starts)]
        assert max(steps) <= max(1, patch * (1 - overlap))


def test_logits_are_averaged_with_gaussian_weights() -> None:
    """Against a sum over windows written out, without the lattice's separability."""
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4).eval()
    volume, patch, overlap = torch.randn(14, 20, 25), (8, 12, 10), 0.4
    axes = [(torch.arange(p) - (p - 1) / 2) / (p / 8) for p in patch]
    z, y, x = (torch.exp(-(a**2) / 2).clamp_min(0.01) for a in axes)
    weight = torch.einsum("i,j,k->ijk", z, y, x)
    total, weights = torch.zeros_like(volume), torch.zeros_like(volume)
    lattice = [window_starts(n, p, overlap) for n, p in zip(volume.shape, patch, strict=True)]
    for start in product(*lattice):
        box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        with torch.inference_mode():
            total[box] += weight * model(volume[box][None, None])[0, 0]
        weights[box] += weight
    ours = predict_volume(model, volume, Windows(patch=patch, overlap=overlap))
    assert torch.allclose(ours, (total / weights).sigmoid(), atol=1e-5)


def test_a_row_of_windows_is_monais() -> None:
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4).eval()
    volume, patch = torch.randn(16, 16, 40), (16, 16, 16)
    ours = predict_volume(model, volume, Windows(patch=patch))
    with torch.inference_mode():
        theirs = sliding_window_inference(
            volume[None, None], patch, 2, model, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )
    assert isinstance(theirs, Tensor)
    # Off the middle MONAI clamps the product of the three Gaussians, not each of them.
    apart = (ours - theirs[0, 0].sigmoid())[7:9, 7:9].abs()
    assert apart.max() < 0.02


def test_the_batch_does_not_matter_and_neither_does_precision_much() -> None:
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4).eval()
    volume = torch.randn(20, 30, 25)
    one = predict_volume(model, volume, Windows(patch=(16, 16, 16), batch_size=1))
    five = predict_volume(model, volume, Windows(patch=(16, 16, 16), batch_size=5))
    half = predict_volume(model, volume, Windows(patch=(16, 16, 16), precision=torch.bfloat16))
    assert torch.allclose(one, five, atol=1e-5)
    assert (one - half).abs().max() < 0.02


def test_mirrored_copies_make_the_prediction_symmetric() -> None:
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4).eval()
    volume = torch.randn(16, 16, 16)
    plain = predict_volume(model, volume, Windows(patch=(16, 16, 16)))
    mirrored = predict_volume(model, volume.flip(2), Windows(patch=(16, 16, 16))).flip(2)
    assert (plain - mirrored).abs().max() > 1e-3
    first = predict_volume(model, volume, Windows(patch=(16, 16, 16), flips="zyx"))
    second = predict_volume(model, volume.flip(2), Windows(patch=(16, 16, 16), flips="zyx")).flip(2)
    assert torch.allclose(first, second, atol=1e-5)
    assert len(flip_axes((16, 16, 16))) == 8
    assert len(flip_axes((1, 16, 16))) == 4
    assert flip_axes((16, 16, 16), "zx") == [(), (2,), (4,), (2, 4)]
    assert flip_axes((16, 16, 16), "") == [()]


def test_two_dimensional_windows() -> None:
    model = UNet(dims=2, depth=2, filters=4).eval()
    volume = torch.randn(5, 40, 33)
    ours = predict_volume(model, volume, Windows(patch=(1, 40, 33)))
    with torch.inference_mode():
        assert torch.allclose(ours, model(volume[:, None])[:, 0].sigmoid(), atol=1e-5)


def test_volumes_smaller_than_the_window_are_padded_with_air() -> None:
    volume = torch.rand(3, 4, 5)
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x

    predict_volume(Spy(), volume, Windows(patch=(8, 8, 8)))
    padded = torch.full((8, 8, 8), float(volume.min()))
    padded[2:5, 2:6, 1:6] = volume
    assert torch.equal(seen[0][0, 0], padded)


@settings(max_examples=15)
@given(
    st.tuples(*[st.integers(4, 30)] * 3),
    st.tuples(*[st.integers(3, 12)] * 3),
    st.floats(0, 0.8),
    st.integers(1, 3),
    st.integers(2, 4),
    st.integers(0, 2**31),
)
def test_what_is_within_is_as_without_the_mask(
    size: IntTriple, patch: IntTriple, overlap: float, batch: int, threads: int, seed: int
) -> None:
    """Threads and left-out windows change nothing where it counts; elsewhere there is nothing."""
    random = torch.Generator().manual_seed(seed)
    model = nn.Conv3d(1, 1, 3, padding=1)
    volume = torch.randint(-1000, 400, size, generator=random, dtype=torch.int16)
    within = torch.zeros(size, dtype=torch.bool)
    corner = [int(torch.randint(n, (1,), generator=random)) for n in size]
    within[tuple(slice(c, c + 5) for c in corner)] = True
    windows = Windows(patch=patch, overlap=overlap, batch_size=batch)

    def prepare(hu: Tensor) -> Tensor:
        return hu.float() / 500

    whole = predict_volume(model, volume, windows, prepare=prepare)
    several = replace(windows, threads=threads)
    part = predict_volume(model, volume, several, prepare=prepare, within=within)
    assert torch.allclose(part[within], whole[within], atol=1e-6)
    assert not part[~within].any()


def test_windows_without_anything_within_are_not_looked_at() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x

    within = torch.zeros(32, 32, 32, dtype=torch.bool)
    within[28:, :4, :4] = True
    predict_volume(Spy(), torch.randn(32, 32, 32), Windows(patch=(8, 8, 8), overlap=0.5), within=within)
    assert sum(seen) == 1
    seen.clear()
    nowhere = torch.zeros_like(within)
    empty = predict_volume(Spy(), torch.randn(32, 32, 32), Windows(patch=(8, 8, 8)), within=nowhere)
    assert not seen
    assert not empty.any()


def test_half_the_memory_is_nearly_as_exact_and_threads_are_given_back() -> None:
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4).eval()
    volume = torch.randn(40, 30, 25)
    windows = Windows(patch=(16, 16, 16), threads=3, batch_size=1)
    before = torch.get_num_threads()
    exact = predict_volume(model, volume, windows)
    half = predict_volume(model, volume, windows, dtype=torch.float16)
    assert torch.get_num_threads() == before
    assert half.dtype == torch.float16
    assert (exact - half.float()).abs().max() < 5e-4


def test_a_fault_of_the_network_comes_out_of_the_threads() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        predict_volume(Broken(), torch.randn(20, 20, 20), Windows(patch=(8, 8, 8), threads=2))


@pytest.mark.parametrize("parts", [2, 3, 40])
def test_several_processes_give_what_one_gives(parts: int) -> None:
    """Simulated one after another: the first comes last and adds what the others would have sent."""
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4).eval()
    volume, windows = torch.randn(30, 33, 20), Windows(patch=(8, 12, 10), batch_size=2)
    within = torch.zeros(volume.shape, dtype=torch.bool)
    within[3:12, :20] = within[20:] = True
    whole = predict_volume(model, volume, windows, within=within)
    sent: list[list[Tensor]] = []
    for part in reversed(range(1, parts)):
        sent.append([])
        share = Share(part=part, parts=parts, combine=lambda sums: sent[-1].append(sums.clone()))
        predict_volume(model, volume, windows, within=within, share=share)
    assert len({len(slabs) for slabs in sent}) == 1
    arrived = iter(zip(*sent, strict=True))

    def combine(sums: Tensor) -> None:
        sums += sum(next(arrived))

    first = predict_volume(
        model, volume, windows, within=within, share=Share(part=0, parts=parts, combine=combine)
    )
    assert torch.allclose(first, whole, atol=1e-6)
    assert next(arrived, None) is None


def filled(
    model: nn.Module, volume: Tensor, windows: Windows, outputs: int, **rules: object
) -> tuple[Tensor, int]:
    """Every voxel's logits, and the number of boxes; each voxel is in one box."""
    out = torch.full((outputs, *volume.shape[1:]), torch.nan)
    boxes = 0
    for box, logits in predict_boxes(model, volume, windows, outputs, torch.clone, **rules):  # type: ignore[arg-type]
        assert out[:, *box].isnan().all()
        out[:, *box] = logits
        boxes += 1
    assert not out.isnan().any()
    return out, boxes


MIRRORED: dict[str, list[tuple[int, ...]]] = {
    "": [()],
    "yx": [(), (3,), (4,), (3, 4)],
    "zyx": [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)],
}


@pytest.mark.parametrize("flips", MIRRORED)
def test_several_channels_and_classes_by_definition(flips: str) -> None:
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4, in_channels=2, classes=3).eval()
    volume, patch, overlap = torch.randn(2, 14, 20, 25), (8, 12, 10), 0.4
    axes = [(torch.arange(p) - (p - 1) / 2) / (p / 8) for p in patch]
    z, y, x = (torch.exp(-(a**2) / 2).clamp_min(0.01) for a in axes)
    weight = torch.einsum("i,j,k->ijk", z, y, x)
    total, weights = torch.zeros(3, 14, 20, 25), torch.zeros(14, 20, 25)
    lattice = [window_starts(n, p, overlap) for n, p in zip(volume.shape[1:], patch, strict=True)]
    for start in product(*lattice):
        box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        mirrored = MIRRORED[flips]
        with torch.inference_mode():
            given = volume[:, *box][None]
            copies = [model(given.flip(axes)).flip(axes)[0] for axes in mirrored]
        total[:, *box] += weight * torch.stack(copies).mean(0)
        weights[box] += weight
    ours, _ = filled(model, volume, Windows(patch=patch, overlap=overlap, flips=flips), 3)
    assert torch.allclose(ours, total / weights, atol=1e-5)


def test_channels_are_padded_with_their_own_minimum() -> None:
    volume = torch.stack([torch.rand(3, 4, 5), 7 + torch.rand(3, 4, 5)])
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x

    ours, _ = filled(Spy(), volume, Windows(patch=(8, 8, 8)), 2)
    assert torch.allclose(ours, volume)
    for channel, passed in zip(volume, seen[0][0], strict=True):
        padded = torch.full((8, 8, 8), float(channel.min()))
        padded[2:5, 2:6, 1:6] = channel
        assert torch.equal(passed, padded)


@settings(max_examples=20)
@given(
    st.tuples(*[st.integers(4, 24)] * 3),
    st.tuples(*[st.integers(3, 12)] * 3),
    st.sampled_from([0.0, 0.3, 0.5]),
    st.integers(1, 40),
    st.integers(1, 2),
    st.booleans(),
)
def test_parts_give_exactly_what_the_whole_gives(
    size: IntTriple, patch: IntTriple, overlap: float, columns: int, threads: int, bounded: bool
) -> None:
    """Each of the parts is at most as large as was asked for, or a voxel wide."""
    torch.manual_seed(0)
    model = nn.Conv3d(2, 3, 3, padding=1)
    volume = torch.randn(2, *size)
    windows = Windows(patch=patch, overlap=overlap, batch_size=1, threads=threads)
    within = torch.rand(size) < 0.01 if bounded else None
    whole, _ = filled(model, volume, windows, 3, within=within, largest=2**62)
    most = columns * patch[0] * 3 * 4
    parts, _ = filled(model, volume, windows, 3, within=within, largest=most)
    assert torch.equal(parts, whole)
    for (_, y, x), _logits in predict_boxes(model, volume, windows, 3, largest=most):
        wide, long = y.stop - y.start, x.stop - x.start
        assert wide * long <= columns or min(wide, long) == 1


def test_several_processes_do_the_same_parts() -> None:
    torch.manual_seed(0)
    model = UNet(dims=3, depth=2, filters=4, classes=3).eval()
    volume, windows = torch.randn(1, 20, 33, 20), Windows(patch=(8, 12, 10), batch_size=2)
    most = 8 * 20 * 10 * 3 * 4
    whole, boxes = filled(model, volume, windows, 3, largest=most)
    assert boxes > len(window_starts(20, 8, 0.5)), "there is one part only"
    sent: list[list[Tensor]] = []
    for part in (1, 2):
        sent.append([])
        share = Share(part=part, parts=3, combine=lambda sums: sent[-1].append(sums.clone()))
        filled(model, volume, windows, 3, largest=most, share=share)
    assert all(sums.is_contiguous() for sums in sent[0])
    arrived = iter(zip(*sent, strict=True))

    def combine(sums: Tensor) -> None:
        sums += sum(next(arrived))

    first, _ = filled(
        model, volume, windows, 3, largest=most, share=Share(part=0, parts=3, combine=combine)
    )
    assert torch.allclose(first, whole, atol=1e-5)
    assert next(arrived, None) is None


def test_a_network_of_other_outputs_is_refused() -> None:
    with pytest.raises(VoxelscaleError, match="1 outputs instead of 3"):
        filled(Identity(), torch.randn(1, 9, 9, 9), Windows(patch=(8, 8, 8)), 3)


class Small(nn.Module):
    """A network on a device with memory for at most `most` windows at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return x - x.mean((2, 3, 4), keepdim=True)


def test_windows_that_do_not_fit_together_go_one_after_another() -> None:
    volume = torch.randn(20, 24, 28)
    windows = Windows(patch=(8, 8, 8), batch_size=7)
    whole = predict_volume(Small(7), volume, windows)
    assert torch.equal(predict_volume(Small(2), volume, windows), whole)
    with pytest.raises(
        VoxelscaleError, match="a window of 8 x 8 x 8 voxels needs more memory than cpu has"
    ):
        predict_volume(Small(0), volume, windows)
