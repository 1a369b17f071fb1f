"""A validation without a lesion cannot tell models apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Command

from voxelscale.config import Config, dump
from voxelscale.model.bundle import read_bundle
from voxelscale.store import open_store

WARNING = "no lesion in the 1 validation scan: they cannot select a model, so model.vxs will be the last"


@pytest.fixture
def config(tiny: Config, tmp_path: Path) -> Path:
    settings = replace(
        tiny,
        prepare=replace(tiny.prepare, spacing=(2, 1, 1), split=(2, 1, 0), plan=False),
        reading=replace(tiny.reading, allow_empty=True),
        train=replace(tiny.train, samples=24, validate_every=8, checkpoint_every=8),
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(settings))
    return path


def test_the_last_model_is_kept(
    reported: Callable[..., Path], voxelscale: Command, config: Path, tmp_path: Path
) -> None:
    folder, store, run = reported("few_cases"), tmp_path / "store", tmp_path / "run"
    assert voxelscale("prepare", folder, store, "--config", config)[0] == 0
    healthy = [info.case for info in open_store(store).split("val") if info.lesion_volumes_mm3]
    assert not healthy
    code, _, errors = voxelscale("train", store, run, "--config", config)
    assert code == 0, errors
    assert WARNING in errors
    assert read_bundle(run).trained["samples"] == 24
    assert "validation_dice" not in read_bundle(run).trained
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = [event for event in events if event["event"] == "validation"]
    assert [event["samples"] for event in judged] == [8, 16, 24]
    assert not any("dice" in event for event in judged)  # no perfect Dice of two empty masks
    for verb in ("search", "scale"):
        code, _, errors = voxelscale(verb, store, tmp_path / verb, "--config", config)
        assert code == 2
        assert "no lesion in the 1 validation scan: no Dice to compare by" in errors
