"""Folds of a cross-validation at the same time, each by a process of its own on devices of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from voxelscale import console
from voxelscale.config import Config, dump, load_stored
from voxelscale.console import Progress, notice, warn
from voxelscale.dataset import DataSet
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.folds import check, run_folds
from voxelscale.experiments.once import INTERRUPTED, samples_seen
from voxelscale.experiments.shares import Share, share_devices
from voxelscale.files import write_atomic
from voxelscale.ranks.launch import PARENT
from voxelscale.ranks.place import without
from voxelscale.train.recipes import samples_of

LOOK = 0.5
"""Seconds between looks at the processes."""


@dataclass(frozen=True, kw_only=True)
class _Running:
    """A fold's process."""

    fold: int
    share: Share
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def fault(self) -> VoxelscaleError | None:
        """Its error, once it has ended; None where it is done or was stopped. What else it said is passed
        on."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        self.errors.close()
        code = self.process.returncode
        fault: VoxelscaleError | None = None
        if code not in (0, INTERRUPTED, -signal.SIGTERM):
            fault = VoxelscaleError(
                f"fold {self.fold}: {lines[-1] if lines else f'ended with exit code {code}'}",
                "the same command resumes",
            )
            with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):
                reported = json.loads(lines[-1])
                fault = VoxelscaleError(f"fold {self.fold}: {reported['message']}", reported["hint"])
                lines = lines[:-1]
        for line in lines:
            if line.startswith("warning: "):
                warn(f"fold {self.fold}: {line.removeprefix('warning: ')}")
        return fault


def jobs_for(config: Config, folds: int) -> int:
    """Folds at a time where nothing is said: as many as there are GPUs for, each with ``train.ranks``."""
    from voxelscale.device import visible_gpus

    return max(1, min(folds, len(visible_gpus()) // max(1, config.train.ranks)))


def run_at_once(
    config: Config, store: Path, data: DataSet, out: Path, folds: Sequence[int], jobs: int
) -> bool:
    """As `run_folds`, with `jobs` folds at a time; the GPUs and cores are shared out over them.

    After an error the folds that are running go on to their end, and no other begins.

    Args:
        jobs: at least 1.

    Raises:
        VoxelscaleError: as `run_folds`.
    """
    check(config, out)
    waiting, shares = list(folds), share_devices(jobs)
    running: list[_Running] = []
    faults: list[VoxelscaleError] = []
    codes: list[int] = []
    samples = samples_of(config, config.train.ranks)

    def seen() -> int:
        return sum(min(samples, samples_seen(out / f"fold_{fold}" / "run")) for fold in folds)

    try:
        with Progress("cv", samples * len(folds), done=seen()) as progress:
            while running or (waiting and not faults):
                while waiting and not faults and not shares.empty():
                    running.append(_begin(config, store, data, out, waiting.pop(0), shares.get()))
                time.sleep(LOOK)
                faults += _ended(running, shares, codes)
                names = ", ".join(str(one.fold) for one in running)
                progress.update(seen(), f"training or predicting fold {names}" if names else "")
    except KeyboardInterrupt:
        _stop(running)
        return False
    finally:
        for one in running:
            one.process.kill()
    if faults:
        raise faults[0]
    return not any(codes)  # what else than this command has stopped one of them


def _ended(running: list[_Running], shares: SimpleQueue[Share], codes: list[int]) -> list[VoxelscaleError]:
    """Take those that have ended off the list and note their exit codes; their errors."""
    faults = []
    for one in [one for one in running if one.process.poll() is not None]:
        running.remove(one)
        codes.append(one.process.returncode)
        shares.put(one.share)
        if (fault := one.fault()) is not None:
            faults.append(fault)
            if running:
                warn(f"{fault.message}; the other folds continue")
    return faults


def _begin(config: Config, store: Path, data: DataSet, out: Path, fold: int, share: Share) -> _Running:
    ranks = config.train.ranks or max(1, len(share.gpus))
    threads = config.train.threads or share.threads(ranks)
    path = out / f"fold_{fold}" / "cv.yaml"
    write_atomic(path, dump(replace(config, train=replace(config.train, threads=threads))))
    facts = {"store": str(store), "scans": str(data.path), "layout": data.layout, "out": str(out)}
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "voxelscale.experiments.at_once", str(fold), str(path), json.dumps(facts)],
        env={
            **without(os.environ),
            "OMP_NUM_THREADS": str(share.threads()),
            PARENT: str(os.getpid()),
            **share.environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    return _Running(fold=fold, share=share, process=process, errors=errors)


def _stop(running: Sequence[_Running]) -> None:
    """Ask them to save and stop, and wait for it; a second Ctrl-C ends them at once."""
    notice("\nthe folds save and stop; once more to stop at once")
    for one in running:
        one.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt):
        for one in running:
            one.process.wait()


def _main(fold: int, path: Path, facts: dict[str, Any]) -> int:
    """A fold's process."""
    console.set_verbosity(0)
    config, store = load_stored(path), Path(facts["store"])
    data = DataSet(
        path=Path(facts["scans"]),
        reading=config.reading,
        layout=facts["layout"],
        splits=config.prepare.splits,
        key_folder=store,
    )
    try:
        return 0 if run_folds(config, store, data, Path(facts["out"]), [fold]) else INTERRUPTED
    except VoxelscaleError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])))
