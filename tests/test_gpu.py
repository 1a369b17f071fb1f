"""Input, prediction and validation on a GPU give what a processor gives; needs one."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxelscale.classes import Classes
from voxelscale.config import AugmentConfig, Config, DataConfig
from voxelscale.geometry import Grid
from voxelscale.infer import transfer
from voxelscale.infer.sliding_window import Windows, predict_boxes, predict_volume
from voxelscale.model.unet import UNet
from voxelscale.predict.maps import Maps
from voxelscale.ranks.workers import Workers
from voxelscale.samples.ahead import on_device
from voxelscale.samples.batch import Normalisation, make_batch
from voxelscale.samples.patches import PatchSource, Sample
from voxelscale.store import Store
from voxelscale.train.checkpoint import State
from voxelscale.train.loop import patch_task
from voxelscale.train.validate import start_validation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EVERYTHING = AugmentConfig(p_affine=1, p_noise=1, p_blur=1, p_gamma=1, p_brightness=1, p_low_resolution=1)
HOW = Normalisation(low=-1000, high=400, mean=-300, std=350)
PATCH = (24, 32, 40)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are computed in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def samples(store: Store, count: int) -> list[Sample]:
    source = PatchSource(store, DataConfig(patch_size=PATCH, foreground=1.0), EVERYTHING, 0)
    return [source[index] for index in range(count)]


def made(of: list[Sample], device: torch.device) -> tuple[Tensor, Tensor]:
    return make_batch(of, PATCH, lambda case: [HOW], device)


def test_a_batch_is_the_processors(store: Store) -> None:
    of = samples(store, 6)
    (image, target), (image_there, target_there) = made(of, CPU), made(of, GPU)
    # The processor's interpolation is exact to about 0.001 voxel (`by_planes`).
    assert (image_there.cpu() - image).abs().max() < 5e-3
    assert (target_there.cpu() != target).float().mean() < 1e-3


def test_batches_that_were_made_ahead_are_whole(store: Store) -> None:
    """While the caller's stream is busy, and the memory of earlier batches is used again."""
    of = samples(store, 8)
    wanted = [made([sample], GPU)[0].double().sum() for sample in of]
    stream = ([of[number % 8]] for number in range(64))
    weight = torch.randn(4096, 4096, device=GPU)
    sums: list[Tensor] = []
    for _, (image, _target) in on_device(stream, lambda batch: made(list(batch), GPU), GPU):
        weight = (weight @ weight).div_(64).clamp_(-1, 1)
        sums.append(image.double().sum())
        image.fill_(torch.nan)
    assert torch.allclose(torch.stack(sums), torch.stack(wanted * 8), rtol=1e-5)


def test_a_thread_that_works_ahead_can_be_left(store: Store) -> None:
    of = samples(store, 2)
    batches = on_device(iter([of] * 50), lambda batch: made(list(batch), GPU), GPU)
    assert len(list(islice(batches, 3))) == 3
    batches.close()


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return UNet(dims=3, depth=2, filters=4, classes=outputs).eval()


@pytest.mark.parametrize("free", [0, 2**40])
@pytest.mark.parametrize("grow", [False, True])
def test_a_prediction_is_the_processors(monkeypatch: pytest.MonkeyPatch, free: int, grow: bool) -> None:
    monkeypatch.setattr(transfer, "free_memory", lambda device: free)
    volume = torch.randint(-1000, 400, (90, 70, 60), dtype=torch.int16)
    windows = Windows(patch=(32, 32, 32), grow=grow)

    def predict(device: torch.device) -> Tensor:
        model = network().to(device)
        return predict_volume(model, volume, windows, prepare=HOW, device=device)

    assert (predict(GPU) - predict(CPU)).abs().max() < 1e-3


def test_maps_are_the_processors() -> None:
    classes = Classes(names=("one", "two"), values=((1,), (2,)))
    volume, grid = (
        torch.randint(-1000, 400, (1, 50, 40, 60), dtype=torch.int16),
        Grid((50, 40, 60), np.eye(4)),
    )

    def maps(device: torch.device) -> Maps:
        found = Maps(classes, grid, 0.1)
        boxes = predict_boxes(
            network(3).to(device),
            volume,
            Windows(patch=(32, 32, 32)),
            3,
            lambda logits: logits.softmax(0),
            prepare=HOW,
            device=device,
        )
        for box, probability in boxes:
            found.add(box, probability)
        return found

    ours, theirs = maps(GPU), maps(CPU)
    whole = slice(0, 50), slice(0, 40), slice(0, 60)
    for at in range(3):
        apart = np.abs(ours.within(at, whole) - theirs.within(at, whole))
        assert (apart > 2e-3).mean() < 1e-3  # but for voxels at the least probability that is kept


def test_a_validation_is_the_processors(tiny: Config, store: Store) -> None:
    config = replace(tiny, predict=replace(tiny.predict, patch_size=(16, 16, 16)))
    figures = []
    for device in (CPU, GPU):
        task = patch_task(config, store, device)
        model = task.model.eval().requires_grad_(False)
        workers = Workers(rank=0, ranks=1, virtual=1, device=device)
        started = start_validation(task, model, workers, torch.float32, State(digest=""), 0)
        assert started is not None
        figures.append(started.figures(workers)["dice_pooled"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)
