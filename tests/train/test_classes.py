"""Training on several channels and classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.regions import write_regions
from tests.train.runs import apart, final_weights, with_train
from voxelscale.config import Config, PrepareConfig, ReadingConfig
from voxelscale.dataset import DataSet
from voxelscale.errors import VoxelscaleError
from voxelscale.store import Store, open_store
from voxelscale.store.prepare import prepare
from voxelscale.train.launch import start

STEPS, BATCH = 6, 4

CLASSES = {"rest": 1, "core": 2, "enhancing": 3, "ignore": 4}
"""The regions' values as classes that exclude each other."""


@pytest.fixture(scope="module", params=["regions", "classes"])
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    data = write_regions(tmp_path_factory.mktemp("data") / "data", cases=5)
    reading = ReadingConfig(labels=CLASSES if request.param == "classes" else None)
    out = tmp_path_factory.mktemp("store")
    prepare(DataSet(path=data, reading=reading).cases, out, PrepareConfig(workers=1), reading)
    return open_store(out)


def test_workers_are_equal_with_deep_supervision(tiny: Config, any_store: Store, tmp_path: Path) -> None:
    # The lowest level of the decoder has no head: of four levels there is one.
    model = replace(tiny.model, deep_supervision=True, depth=4)
    data = replace(tiny.data, patch_size=(32, 32, 32))
    # Which voxels are the hardest is a step function: a rounding apart may choose another one. AdamW
    # divides a gradient by its size: where that is all rounding, it moves a weight as far as any other.
    optim = replace(tiny.optim, name="sgd", lr=0.01, momentum=0.9)
    config = replace(tiny, model=model, data=data, optim=optim, loss=replace(tiny.loss, top_k=1.0))

    def weights(name: str, **how: Any) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"samples": STEPS * BATCH, "checkpoint_every": STEPS * BATCH, **how}
        assert start(with_train(config, **settings), any_store.path, tmp_path / name)
        return final_weights(tmp_path / name)

    ways: dict[str, dict[str, int]] = {
        "one": {"ranks": 1, "batch_size": 4},
        "ranks": {"ranks": 2, "batch_size": 2},
        "mixed": {"ranks": 1, "virtual_workers": 2, "batch_size": 2},
    }
    first = {name: weights(f"first_{name}", samples=BATCH, **how) for name, how in ways.items()}
    last = {name: weights(name, **how) for name, how in ways.items()}
    assert any(name.startswith("supervision.") for name in last["one"])
    moved = apart(last["one"], first["one"])  # since the first update
    for other in ("ranks", "mixed"):
        assert apart(first[other], first["one"]) <= 1e-6
        # Later a rounding may let a maximum fall the other way: 1e-4 to 2.5e-2 were seen, by processor.
        assert apart(last[other], last["one"]) <= 3e-2 * moved


def test_a_rule_for_a_class_that_is_not_there_is_refused_before_training(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    wrong = replace(tiny, predict=replace(tiny.predict, largest_only=("nodule",)))
    with pytest.raises(VoxelscaleError, match=r"predict\.largest_only names nodule") as caught:
        start(wrong, store.path, tmp_path / "run")
    assert caught.value.hint == "its classes are lesion"
    right = replace(tiny, predict=replace(tiny.predict, largest_only=("lesion",)))
    assert start(replace(right, train=replace(right.train, samples=4)), store.path, tmp_path / "run")
