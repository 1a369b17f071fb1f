"""Micro-batches: on a GPU without waiting, on a processor as ever, and with the same noise on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.uploads import META, only_uploads

from voxelscale.config import AugmentConfig, DataConfig, IntTriple
from voxelscale.samples.augment import draw_augmentation
from voxelscale.samples.batch import Normalisation, make_batch
from voxelscale.samples.draws import Draws
from voxelscale.samples.patches import PatchSource, Sample
from voxelscale.samples.transforms.noise import Noise
from voxelscale.store import Store

CPU = torch.device("cpu")
SOME = AugmentConfig(
    p_affine=0.5, p_noise=0, p_blur=0.5, p_gamma=0.5, p_brightness=0.5, p_low_resolution=0.5
)
EVERYTHING = AugmentConfig(p_affine=1, p_noise=1, p_blur=1, p_gamma=1, p_brightness=1, p_low_resolution=1)
DEEP, FLAT = (12, 16, 20), (1, 24, 20)


def normalise(channels: int) -> Any:
    return lambda case: [Normalisation(low=-1000, high=400, mean=-300, std=350)] * channels


def drawn(
    config: AugmentConfig, patch: IntTriple, channels: int, labels: int, count: int = 6
) -> Sequence[Sample]:
    """Samples of random values, each with boxes of so many labels."""
    samples = []
    for index in range(count):
        plan = draw_augmentation(config, Draws(0, index), patch, (2.0, 1.0, 1.0), 2 if patch[0] == 1 else 3)
        random = np.random.default_rng(index)
        region = random.integers(-1100, 500, (channels + 1, *plan.region)).astype(np.int16)
        region[-1] = 0
        for value in range(1, labels + 1):
            z, y, x = (int(random.integers(0, n)) for n in plan.region)
            region[-1, z : z + 4, y : y + 5, x : x + 6] = value
        samples.append(Sample(index=index, case="a", start=(0, 0, 0), region=region, augmentation=plan))
    return samples


@pytest.mark.parametrize("p_affine", [0.0, 1.0])
@pytest.mark.parametrize("patch", [DEEP, FLAT])
@pytest.mark.parametrize(("channels", "labels"), [(1, 0), (1, 1), (2, 3)])
def test_on_a_gpu_nothing_waits_and_each_region_is_copied_once(
    monkeypatch: pytest.MonkeyPatch, p_affine: float, patch: IntTriple, channels: int, labels: int
) -> None:
    samples = drawn(replace(EVERYTHING, p_affine=p_affine), patch, channels, labels, count=3)
    with only_uploads(monkeypatch) as copied:
        image, target = make_batch(samples, patch, normalise(channels), META)
    assert image.shape == (3, channels, *patch)
    assert target.shape == (3, 1, *patch)
    assert image.device == target.device == META
    regions = sum(sample.region[: None if labels else -1].nbytes for sample in samples)
    noise = 3 * channels * 4 * int(np.prod(patch))
    # For each channel the blur and the low resolution have a matrix for each length of a side.
    matrices = 3 * channels * 2 * 4 * sum(n * n for n in set(patch))
    assert sum(copied) == regions + noise + matrices


def test_without_noise_a_processor_makes_what_it_ever_made() -> None:
    """Sums of images and targets, noted when the low resolution last changed."""
    noted = {
        (DEEP, 1, 0): (-938.088852, 8943.676541, 0, 0),
        (DEEP, 1, 1): (-938.088852, 8943.676541, 334, 334),
        (DEEP, 1, 3): (-938.088852, 8943.676541, 1683, 880),
        (DEEP, 2, 0): (-2130.874274, 17841.053835, 0, 0),
        (DEEP, 2, 1): (-2130.874274, 17841.053835, 391, 391),
        (DEEP, 2, 3): (-2130.874274, 17841.053835, 1632, 873),
        (FLAT, 1, 1): (-85.826882, 1507.888182, 94, 94),
        (FLAT, 1, 3): (-85.826882, 1507.888182, 605, 302),
        (FLAT, 2, 3): (-142.619201, 2935.558221, 473, 242),
    }
    for (patch, channels, labels), (total, squares, label, voxels) in noted.items():
        image, target = make_batch(drawn(SOME, patch, channels, labels), patch, normalise(channels), CPU)
        image = image.double()
        assert float(image.sum()) == pytest.approx(total, abs=1e-3)
        assert float(image.square().sum()) == pytest.approx(squares, abs=1e-3)
        assert (int(target.sum()), int((target > 0).sum())) == (label, voxels)


def test_noise_is_a_pure_function_of_its_seed() -> None:
    noise, again = Noise(std=0.5, seed=7), Noise(std=0.5, seed=7)
    assert noise == again
    plain = torch.zeros(6, 7, 8)
    ours = noise(plain.clone(), 1)
    assert torch.equal(ours, again(plain.clone(), 1))
    source = np.random.Generator(np.random.Philox(key=[7, 1], counter=[0, 0, 0, 2]))
    assert np.array_equal(ours.numpy(), np.float32(0.5) * source.standard_normal((6, 7, 8), np.float32))
    assert not torch.equal(ours, noise(plain.clone(), 0))
    assert ours.ravel()[:4].tolist() == pytest.approx(FIRST, abs=1e-6)


FIRST = [0.147025, -0.570406, -0.246564, 0.297646]


def test_noise_and_labels_are_there_before_a_batch_is_made(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = PatchSource(store, DataConfig(patch_size=DEEP, foreground=1.0), EVERYTHING, 0)
    samples = [patches[index] for index in range(3)]
    wanted = make_batch([patches[index] for index in range(3)], DEEP, normalise(1), CPU)
    for name in ("unique", "flatnonzero"):
        monkeypatch.setattr(np, name, lambda *_, name=name: pytest.fail(f"np.{name} is left to the batch"))
    monkeypatch.setattr(
        "voxelscale.samples.transforms.noise.generator",
        lambda *_: pytest.fail("noise is left to the batch"),
    )
    found = make_batch(samples, DEEP, normalise(1), CPU)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert found[1].any()
