"""Other networks and arithmetic than the default, from the store to a prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train.runs import apart, final_weights
from voxelscale.config import AugmentConfig, Config
from voxelscale.dataset.listing import list_sources
from voxelscale.errors import VoxelscaleError
from voxelscale.formats import read_scan
from voxelscale.model.bundle import read_bundle
from voxelscale.predict.predictor import Predictor
from voxelscale.store import Store
from voxelscale.train.launch import start

EVERY_TIME = AugmentConfig(p_affine=1, p_noise=1, p_blur=1, p_gamma=1, p_brightness=1, p_low_resolution=1)


def short(config: Config, **model: object) -> Config:
    return replace(
        config,
        train=replace(config.train, samples=16, checkpoint_every=16),
        model=replace(config.model, **model),  # type: ignore[arg-type]
        augment=EVERY_TIME,
    )


@pytest.mark.parametrize("residual", [False, True])
def test_two_dimensions(tiny: Config, store: Store, scans: Path, tmp_path: Path, residual: bool) -> None:
    flat = replace(tiny, data=replace(tiny.data, patch_size=(1, 24, 20)))
    config = short(flat, dims=2, residual=residual, kernel_size=5)
    assert start(config, store.path, tmp_path / "run")
    bundle = read_bundle(tmp_path / "run")
    predictor = Predictor(bundle, bundle.config.predict, torch.device("cpu"), torch.float32)
    image = read_scan(list_sources(scans)[0].image)
    probability = predictor.probability(image)
    assert probability.shape == image.array.shape
    assert np.isfinite(probability).all()
    assert 0 <= probability.min() <= probability.max() <= 1


def test_bfloat16_and_sgd(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = short(tiny)
    config = replace(config, optim=replace(config.optim, name="sgd", momentum=0.9, schedule="cosine"))
    half = replace(config, train=replace(config.train, precision="bf16"))
    assert start(config, store.path, tmp_path / "full")
    assert start(half, store.path, tmp_path / "half")
    assert 0 < apart(final_weights(tmp_path / "half"), final_weights(tmp_path / "full")) < 0.01


def test_a_loss_that_is_not_finite_is_reported(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = short(tiny, norm="none")
    config = replace(
        config, optim=replace(config.optim, name="sgd", lr=1e30, warmup=0.0, gradient_clipping=0.0)
    )
    with pytest.raises(VoxelscaleError, match="diverged"):
        start(config, store.path, tmp_path / "run")


def test_another_data_set_is_refused(tiny: Config, store: Store, scans: Path, tmp_path: Path) -> None:
    from voxelscale.store.prepare import prepare

    run = tmp_path / "run"
    assert start(short(tiny), store.path, run)
    prepare(list_sources(scans)[:4], tmp_path / "other", tiny.prepare)
    with pytest.raises(VoxelscaleError, match="another data set"):
        start(short(tiny), tmp_path / "other", run)


def test_going_on_inside_a_batch_is_refused(tiny: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = short(tiny)
    assert start(config, store.path, run)
    longer = replace(config, train=replace(config.train, samples=40))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("samples: 16", "samples: 40"))
    with pytest.raises(VoxelscaleError, match="within a batch of 5"):
        start(replace(longer, train=replace(longer.train, batch_size=5)), store.path, run)
