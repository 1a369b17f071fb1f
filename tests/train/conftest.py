"""Runs that several modules hold disturbed ones against."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from tests.train.runs import SAMPLES, final_weights, with_train
from voxelscale.config import Config
from voxelscale.store import Store
from voxelscale.train.launch import start


@pytest.fixture(scope="session")
def config(tiny: Config) -> Config:
    return with_train(tiny, samples=SAMPLES, checkpoint_every=8, keep=3)


@pytest.fixture(scope="session")
def whole_two(config: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of two workers of one sample each that nobody disturbed: over so many steps the
    rounding of one worker's larger batches would be blown up to 1e-4.
    """
    run = tmp_path_factory.mktemp("whole_two") / "run"
    two = replace(config, train=replace(config.train, virtual_workers=2, batch_size=1))
    assert start(two, store.path, run)
    return final_weights(run)
