"""Anyone's network, loss and samples through the engine."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.train.runs import apart, identical
from voxelscale.config import Config, load
from voxelscale.errors import VoxelscaleError
from voxelscale.samples.order import item_of
from voxelscale.train import fit, load_weights, locks
from voxelscale.train.locks import alone_in
from voxelscale.train.log import STOP_FILE

SETTINGS = ["optim.lr=0.05", "train.precision=fp32", "train.threads=1", "train.batch_size=2"]
SETTINGS += ["optim.name=sgd", "optim.momentum=0.9", "train.checkpoint_every=4"]


def settings(*more: str) -> Config:
    return load(sets=[*SETTINGS, "train.samples=24", *more])


def network(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1)
    )


def draw(index: int) -> tuple[Any, Any]:
    x = np.random.default_rng(index).standard_normal(4).astype(np.float32)
    return x, np.array([x[0] - 2 * x[1]], np.float32)


class Endless:
    """Samples without a length."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return draw(index)


def test_the_weights_are_those_of_a_plain_loop_over_a_finite_set() -> None:
    """Schedule and clipping off; items in the order that `item_of` says."""
    items = [draw(i) for i in range(7)]
    config = settings(
        "optim.schedule=constant", "optim.warmup=0", "optim.gradient_clipping=0", "optim.weight_decay=0"
    )
    fitted, plain = network(0.0), network(0.0)
    result = fit(fitted, F.mse_loss, items, config)
    assert (result.seen, result.finished) == (24, True)
    rule = torch.optim.SGD(plain.parameters(), 0.05, 0.9, nesterov=True)
    for first in range(0, 24, 2):
        pairs = [items[item_of(i, 7, config.train.seed)] for i in (first, first + 1)]
        x, y = (torch.tensor(np.stack(part)) for part in zip(*pairs, strict=True))
        rule.zero_grad()
        F.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call]
        rule.step()
    assert apart(fitted.state_dict(), plain.state_dict()) <= 1e-6


def test_nothing_is_written_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, state = network(), torch.random.get_rng_state()
    assert fit(model, F.mse_loss, Endless(), settings(), validate=lambda model: 1.0).best == 1.0
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers are left alone"


def test_nested_samples_and_an_own_collate() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, inputs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            a, b = inputs["pair"]
            return {"sum": self.layer(a + b)}

    def loss(output: dict[str, Tensor], target: tuple[Tensor]) -> Tensor:
        return (output["sum"][:, 0] - target[0]).square().mean()

    items = [({"pair": (np.ones(2, np.float32), torch.ones(2))}, (float(i % 2),)) for i in range(4)]
    assert fit(Two(), lambda o, t: loss(o, (t[0].float(),)), items, settings()).finished
    numbers = [1.0, 2.0, 3.0]
    collate = lambda batch: (torch.tensor(batch)[:, None], torch.tensor(batch)[:, None])  # noqa: E731
    assert fit(nn.Linear(1, 1), F.mse_loss, numbers, settings(), collate=collate).finished


def test_the_best_model_is_kept_whatever_the_sign_of_its_score(tmp_path: Path) -> None:
    scores = iter([-7.0, -5.0, -6.0])
    seen: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    config = settings("train.validate_every=8")
    model = network()
    result = fit(model, F.mse_loss, Endless(), config, run=tmp_path / "run", validate=validate)
    assert result.best == -5.0
    assert identical(load_weights(tmp_path / "run"), seen[1])
    assert identical(dict(model.state_dict()), seen[2])


def test_averaged_weights_with_their_own_statistics(tmp_path: Path) -> None:
    config = settings("optim.ema=0.5", "train.recalibrate=6")
    model = network(0.0)
    seen: list[dict[str, Tensor]] = []

    def validate(kept: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in kept.state_dict().items()})
        return 0.0

    fit(model, F.mse_loss, Endless(), config, validate=validate)
    assert identical(dict(model.state_dict()), seen[-1])
    plain = network(0.0)
    fit(plain, F.mse_loss, Endless(), settings())
    assert apart(dict(model.state_dict()), dict(plain.state_dict())) > 1e-3


def test_stopped_it_saves_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """Dropout included: its masks follow the sample clock."""
    whole = network()
    fit(whole, F.mse_loss, Endless(), settings())
    run = tmp_path / "run"

    def validate(model: nn.Module) -> float:
        (run / STOP_FILE).touch()
        return 0.0

    config = settings("train.validate_every=8")
    first = fit(network(), F.mse_loss, Endless(), config, run=run, validate=validate)
    assert not first.finished
    assert 0 < first.seen < 24
    again = network()
    result = fit(again, F.mse_loss, Endless(), config, run=run, validate=lambda model: 0.0)
    assert (result.seen, result.finished) == (24, True)
    assert identical(dict(again.state_dict()), dict(whole.state_dict()))


def test_a_folder_is_for_one_training_and_an_old_stop_is_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    with alone_in(run), pytest.raises(VoxelscaleError, match="another training is running"):
        fit(network(), F.mse_loss, Endless(), settings(), run=run)
    (run / STOP_FILE).touch()  # asked of a training that was killed before it saw it
    assert fit(network(), F.mse_loss, Endless(), settings(), run=run).finished


SCRIPT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.train.test_fit import Endless, network, settings
from torch.nn import functional as F
from voxelscale.train import fit
for name in ("first", "second"):
    model = network()
    if int(__import__("os").environ["RANK"]):
        torch.nn.init.zeros_(model[0].weight)  # every rank must start from rank 0's
    config = settings("optim.ema=0.2")
    fit(model, F.mse_loss, Endless(), config, run=Path({folder!r}) / name)
"""


def test_two_ranks_equal_two_virtual_workers_and_fit_can_be_called_twice(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT).format(root=root, folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    virtual = network()
    config = settings("optim.ema=0.2", "train.virtual_workers=2")
    fit(virtual, F.mse_loss, Endless(), config)
    for name in ("first", "second"):
        assert apart(load_weights(tmp_path / name), dict(virtual.state_dict())) <= 1e-4


@pytest.mark.parametrize(
    ("samples", "more", "message"),
    [
        ([], "train.ranks=1", "there are none"),
        (iter([1]), "train.ranks=1", "no samples by number"),
        ([np.zeros(4, np.float32)] * 3, "train.ranks=1", "not a pair"),
        ([draw(0)], "train.ranks=2", "one process"),
    ],
)
def test_what_a_user_can_fix_is_reported(samples: Any, more: str, message: str) -> None:
    with pytest.raises(VoxelscaleError, match=message):
        fit(network(), F.mse_loss, samples, settings(more))


@pytest.mark.parametrize("setting", ["train.start_from=model.vxs", "optim.pretrained_lr=0.1"])
def test_weights_that_it_does_not_read_are_refused(setting: str) -> None:
    with pytest.raises(VoxelscaleError, match=f"fit: {setting.partition('=')[0]} is for voxelscale train"):
        fit(nn.Linear(1, 1), nn.MSELoss(), [], load(sets=[setting]))


def test_other_samples_and_other_files_are_refused(tmp_path: Path) -> None:
    fit(network(), F.mse_loss, [draw(i) for i in range(5)], settings(), run=tmp_path / "run")
    with pytest.raises(VoxelscaleError, match="another data set"):
        fit(network(), F.mse_loss, [draw(i) for i in range(6)], settings(), run=tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("samples_*"))[-1]
    with pytest.raises(VoxelscaleError, match="no weights"):
        load_weights(newest)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, voxelscale.train, voxelscale.train.launch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
