"""A training command as a child process: asked to save and stop, or killed, with all its ranks.

It is in a session of its own, out of reach of the terminal's Ctrl-C, so that who started it decides what
becomes of it; it ends when that process is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from voxelscale.config import Config, dump
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.ranks.launch import PARENT
from voxelscale.ranks.place import without
from voxelscale.train.locks import is_first
from voxelscale.train.log import STOP_FILE

PATIENCE = 25.0
"""Seconds that the ranks of a killed command are waited for; they notice after one or two, if there is no
other load."""


@dataclass
class Child:
    """A running ``voxelscale train``, of `start_child`.

    Attributes:
        run: its folder.
        process: the command; its ranks may be others.
    """

    run: Path
    process: subprocess.Popen[bytes]
    _errors: BinaryIO = field(repr=False)
    _said: str = field(default="", repr=False)
    _asked: bool = field(default=False, repr=False)
    _until: float = field(default=math.inf, repr=False)

    def poll(self) -> int | None:
        """Its exit code, as of `subprocess`; None where it, or a rank of it, still runs."""
        code = self.process.poll()
        if code is None:
            if self._asked:
                self._touch()
        elif not self._errors.closed:
            self._until = min(self._until, time.monotonic() + PATIENCE)
            if not self._all_gone():
                return None
            self._end()
        return code

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code once it has ended; None where it still runs after so many seconds."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (code := self.poll()) is None:
            left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
            if left <= 0:
                break
            time.sleep(left)
        return code

    def ask_to_stop(self) -> None:
        """Let it save and stop after the step it is at, all ranks together; it then ends with code 130.

        It must be polled or waited for: one that has only just been started forgets what was asked before.
        """
        self._asked = True
        self.poll()

    def kill(self) -> None:
        """End it at once; its ranks are gone, too, when this returns."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.wait()
        self._forget()  # no matter who asked

    def fault(self) -> VoxelscaleError:
        """Its error, after it failed."""
        code = self.poll()
        lines = self._said.strip().splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
        (*_, said) = errors or lines or [f"ended without a word, with exit code {code}"]
        said = said.removeprefix(f"{self.run}: ")
        return VoxelscaleError(f"{self.run}: {said}", hints[-1] if hints else "")

    def _touch(self) -> None:
        if not is_first(self.run, self.process.pid):
            return  # it has not taken the folder yet, in which another one may train
        try:
            (self.run / STOP_FILE).touch()
        except OSError:
            self._asked = False  # a second signal would not let it save
            self.process.terminate()

    def _end(self) -> None:
        self._errors.seek(0)
        self._said = self._errors.read().decode(errors="replace")
        self._errors.close()
        if self._asked:
            self._forget()

    def _forget(self) -> None:
        if is_first(self.run, self.process.pid):
            (self.run / STOP_FILE).unlink(missing_ok=True)

    def _all_gone(self) -> bool:
        """Whether no process is left that can write to its stderr: all of them hold the lock set there."""
        if time.monotonic() > self._until:
            return True
        try:
            fcntl.flock(self._errors, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


def start_child(
    config: Config, store: Path, run: Path, *, threads: int, environment: Mapping[str, str] = {}
) -> Child:
    """Start ``voxelscale train`` in `run`, or resume it there; the config is stored next to it.

    Args:
        config: of the training, written to ``<run>.yaml``.
        threads: of the numerical libraries, in each process.
        environment: laid over this process's own.

    Raises:
        VoxelscaleError: the config cannot be written.
    """
    path = run.with_suffix(".yaml")
    write_atomic(path, dump(config))
    command = [sys.executable, "-m", "voxelscale.cli", "--quiet", "train", str(store), str(run)]
    ours = {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    # Off the run's disk, which may be what is full. Everybody in the training holds this opening of the
    # file and with it the lock, and this process another.
    with tempfile.NamedTemporaryFile(prefix="voxelscale-") as theirs:
        errors = open(theirs.name, "rb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(theirs, fcntl.LOCK_SH)
        process = subprocess.Popen(
            [*command, "--config", str(path)],
            env={**without(os.environ), **ours, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
        )
    return Child(run, process, errors)
