"""The state of a training, so that it can go on as if it had never stopped."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from voxelscale.console import notice
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_sealed
from voxelscale.predict.bundle import load_untrusted

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """Beside weights and optimiser: where the run stands.

    Attributes:
        seen: samples trained on; every random number follows from it and the seed.
        best: greatest validation Dice so far, or -1.
        seconds: of training so far, over all restarts.
        digest: of the data set, as in the store's fingerprint.
    """

    seen: int = 0
    best: float = -1.0
    seconds: float = 0.0
    digest: str = ""


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State, keep: int) -> Path:
    """Write ``step``'s file, atomically and with a checksum; then drop all but the last `keep`."""
    content = {
        "format": FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": {"seen": state.seen, "best": state.best, "seconds": state.seconds, "digest": state.digest},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path = folder / f"samples_{state.seen:012d}.ckpt"
    write_sealed(path, buffer.getvalue())
    for old in _files(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, digest: str) -> State:
    """Put the newest whole checkpoint into model and optimiser; a fresh state where there is none.

    A truncated or altered file is named, and the one before it used.

    Raises:
        VoxelscaleError: the checkpoint is of another network or another data set.
    """
    for path in reversed(_files(folder)):
        try:
            content = load_untrusted(path)
        except VoxelscaleError as error:
            notice(f"warning: {error.message}; using the checkpoint before it", level=0)
            continue
        return _restore(path, content, model, optimizer, digest)
    return State(digest=digest)


def _restore(
    path: Path, content: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, digest: str
) -> State:
    state = State(**content["state"])
    if state.digest != digest:
        hint = "train into another folder with --run, or restore the store it began with"
        raise VoxelscaleError(f"{path}: was trained on another data set", hint)
    try:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        hint = "train into another folder with --run"
        raise VoxelscaleError(f"{path}: is of another network ({reason})", hint) from None
    return state


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("samples_*.ckpt"))
