"""The examples as a user runs them, on two tiny scans, held against each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.runs import apart
from voxelscale.train import load_weights

ROOT = Path(__file__).parents[1]
SIZES = ["--samples", "12", "--width", "4"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(start: list[str], script: str, *arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [*start, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("plain") / "weights.pt"
    told = run([sys.executable], "plain_loop.py", scans, out, "--batch", 4, *SIZES)
    assert "12 patches: loss" in told
    weights: dict[str, Tensor] = torch.load(out, weights_only=True)
    return weights


def test_the_same_weights_as_a_plain_loop(plain: dict[str, Tensor], scans: Path, tmp_path: Path) -> None:
    told = run([sys.executable], "with_voxelscale.py", scans, tmp_path / "run", "--batch", 4, *SIZES)
    assert "12 patches seen" in told
    assert apart(load_weights(tmp_path / "run"), plain) <= 1e-5


def test_two_ranks_and_two_virtual_workers(plain: dict[str, Tensor], scans: Path, tmp_path: Path) -> None:
    arguments = ["--batch", 2, *SIZES, "--set", "train.threads=1"]
    run(TORCHRUN, "with_voxelscale.py", scans, tmp_path / "ranks", *arguments)
    virtual = [*arguments, "--set", "train.virtual_workers=2"]
    run([sys.executable], "with_voxelscale.py", scans, tmp_path / "virtual", *virtual)
    ranks, emulated = load_weights(tmp_path / "ranks"), load_weights(tmp_path / "virtual")
    assert apart(ranks, emulated) <= 1e-4
    assert apart(ranks, plain) <= 1e-4


def test_they_differ_in_a_few_lines() -> None:
    one, other = (
        set((ROOT / "examples" / name).read_text().splitlines())
        for name in ("plain_loop.py", "with_voxelscale.py")
    )
    assert len(other - one) <= 12
