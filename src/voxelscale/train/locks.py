"""Who works in a run's folder: one command, and one training."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError

PATIENCE = 30.0
"""Seconds to wait for another training in the same folder to end."""

TRAINING, COMMAND = ".training.lock", ".command.lock"
"""Files in ``checkpoints/``: rank 0 holds the first, a command that trains on one machine the second."""


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder, and clear away what a killed one left half written.

    The ranks of a killed command end a moment after it, so another one waits for them.

    Raises:
        VoxelscaleError: another training does not end.
    """
    with _held(run, TRAINING):
        for torn in (*run.glob(".*.part"), *(run / "checkpoints").glob(".*.part")):
            torn.unlink(missing_ok=True)
        yield


@contextmanager
def first_in(run: Path) -> Iterator[None]:
    """Keep other commands out of a run's folder, while no training is in it.

    Within it a command may change ``config.yaml`` and ask for a stop: both then mean its own ranks.

    Raises:
        VoxelscaleError: another training does not end.
    """
    with _held(run, COMMAND) as handle:
        with _held(run, TRAINING):
            pass
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield


def is_first(run: Path, process: int) -> bool:
    """Whether this process was the last that was `first_in` the folder."""
    try:
        return (run / "checkpoints" / COMMAND).read_bytes() == str(process).encode()
    except OSError:
        return False


@contextmanager
def _held(run: Path, name: str) -> Iterator[int]:
    path, deadline = run / "checkpoints" / name, time.monotonic() + PATIENCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # For writing, and no folder: NFS gives exclusive locks of nothing else.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        problem = f"{path.parent}: cannot be written ({error.strerror})"
        raise VoxelscaleError(problem, "choose another folder for the run") from None
    try:
        while not _locked(handle, path):
            if time.monotonic() > deadline:
                raise VoxelscaleError(f"{run}: another training is running in it", "stop that one first")
            time.sleep(0.1)
        yield handle
    finally:
        os.close(handle)


def _locked(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if path.name == TRAINING:
            warn(f"{path.parent}: no locks on this disk ({error.strerror}); train there once at a time")
    return True
