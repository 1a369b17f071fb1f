"""What the tests of training share: running it, and looking at its weights."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from voxelscale.config import Config, dump
from voxelscale.model.bundle import load_untrusted
from voxelscale.store import Store

SAMPLES = 160
"""Budget of the runs that are disturbed."""


def with_train(config: Config, norm: str = "instance", **train: int) -> Config:
    return replace(
        config,
        train=replace(config.train, **train),  # type: ignore[arg-type]
        model=replace(config.model, norm=norm),  # type: ignore[arg-type]
    )


def final_weights(run: Path, part: str = "model") -> dict[str, Tensor]:
    """Weights and buffers of the newest checkpoint: the model's, or the moving average's."""
    newest = sorted((run / "checkpoints").glob("samples_*.ckpt"))[-1]
    weights: dict[str, Tensor] = load_untrusted(newest)[part]
    return weights


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """||a - b|| / ||b|| over all weights and running statistics."""
    assert a.keys() == b.keys()
    return float((_flat(a) - _flat(b)).norm() / _flat(b).norm())


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([w.double().flatten() for w in weights.values() if w.is_floating_point()])


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seen_in(run: Path) -> Sequence[int]:
    """Samples after which there is a checkpoint."""
    return sorted(int(p.stem.split("_")[1]) for p in (run / "checkpoints").glob("samples_*.ckpt"))


def command(config: Config, store: Store | Path, run: Path, *more: str) -> list[str]:
    """`voxelscale train` with this config."""
    path = run.parent / "config_used.yaml"
    path.write_text(dump(config))
    folder = store if isinstance(store, Path) else store.path
    base = [sys.executable, "-m", "voxelscale.cli", "train", str(folder), str(run)]
    return [*base, "--config", str(path), *more]


def two_ranks(config: Config, store: Store | Path, run: Path, **train: int) -> list[str]:
    """The same on two ranks of one sample each."""
    settings = {"ranks": 2, "batch_size": 1, **train}
    words = [word for key, value in settings.items() for word in ("--set", f"train.{key}={value}")]
    return command(config, store, run, *words)


def begin(arguments: list[str], run: Path, least: int) -> subprocess.Popen[str]:
    """Start it and wait until it has seen `least` samples."""
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (seen_in(run) and seen_in(run)[-1] >= least):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def finish(arguments: list[str]) -> None:
    """Run it to a good end."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def told(errors: str) -> list[str]:
    """The two lines of an error, nothing of which was told twice or with a traceback."""
    assert "Traceback" not in errors, errors
    lines = errors.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, errors
    assert lines[-2].startswith("error: "), errors
    assert lines[-1].startswith("hint: "), errors
    return lines[-2:]


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def rank_processes(run: Path) -> list[int]:
    """The processes that are ranks of a run."""
    commands = [(pid, words) for pid, words in processes() if str(run) in words]
    return [pid for pid, words in commands if "voxelscale.train.launch rank" in words]


def processes() -> list[tuple[int, str]]:
    """Other processes, with their command lines."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            found.append((int(folder.name), words))
    return found
