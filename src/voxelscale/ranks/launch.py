"""Running a command as several ranks of one machine or of each of several, under torchrun's engine.

The process that starts them stays out of their process group. It asks them to stop by a file, which works
for every number of ranks and machines, and they end with it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxelscale import console
from voxelscale.errors import VoxelscaleError
from voxelscale.ranks.faults import (
    FAULT_FILE,
    FAULTY,
    LOST,
    environment_of,
    fault_path,
    leave_fault,
    read_fault,
)
from voxelscale.ranks.meeting import is_here
from voxelscale.ranks.nodes import ALONE, Nodes, launch_with_others
from voxelscale.ranks.place import without

PR_SET_PDEATHSIG = 1
"""The number in linux/prctl.h."""

PARENT = "VOXELSCALE_PARENT"
"""Environment variable: the process that started this one, with which it ends."""

VERBOSITY = "VOXELSCALE_VERBOSITY"

RESUME = "the same command resumes from the last checkpoint"


FAULT_GRACE = 10.0
"""Seconds that an engine has to end by itself once one of its ranks has left an error."""

BEGAN = "began"
"""A file of this name beside that of the fault: ranks of this machine have started."""


def run_ranks(
    module: str,
    words: Sequence[str],
    run: Path,
    *,
    ranks: int,
    threads: int,
    max_restarts: int,
    stop: Path,
    nodes: Nodes = ALONE,
) -> None:
    """Run ``python -m MODULE rank WORDS`` in every rank, until all of them have ended.

    They are in a session of their own, out of reach of the terminal's Ctrl-C. An error that a rank leaves
    is read from its ``VOXELSCALE_FAULT_FILE``; over several machines from the run's folder.

    Args:
        ranks: on this machine.
        threads: CPU threads of each rank; 0: the cores shared out over them.
        max_restarts: how often all of them start again after one was lost.
        stop: a file; Ctrl-C creates it, and the ranks are to save and stop.
        nodes: the machines; with several, each runs this.

    Raises:
        VoxelscaleError: what the first rank with an error left, how a rank ended, or that the machines did
            not meet in `longest_wait` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="voxelscale-") as folder:
        fault, several = Path(folder) / FAULT_FILE, nodes.count > 1
        if several and is_here(nodes.host):
            (run / FAULT_FILE).unlink(missing_ok=True)  # of an earlier start
        numbers = [str(ranks), str(max_restarts), str(nodes.count), nodes.host, str(nodes.port)]
        engine = subprocess.Popen(
            [sys.executable, "-m", "voxelscale.ranks.launch", *numbers, str(run), module, *words],
            env={**_environment(threads, ranks), **environment_of(fault)},
            start_new_session=True,
        )
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            code = _wait(engine, stop, fault if several else None)
        finally:
            signal.signal(signal.SIGTERM, before)
        if left := read_fault(fault) or (read_fault(run / FAULT_FILE) if several else None):
            raise left
    if code != 0:
        raise VoxelscaleError(f"{run}: the training failed (exit code {code})", f"see above; {RESUME}")


def end_with_parent(*, by_kernel: bool = False) -> None:
    """End when the process that started this one is gone, if it wants that: none is left behind.

    Args:
        by_kernel: on Linux the kernel also kills it then, even where native code hangs and holds Python's
            lock, as Gloo may when its peers are gone. Only for a process that its parent's main thread
            started: the kernel looks at that thread (prctl(2), PR_SET_PDEATHSIG).
    """
    if not (parent := os.environ.pop(PARENT, "")):
        return
    if by_kernel and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def _environment(threads: int, ranks: int) -> dict[str, str]:
    threads = threads or max(1, (os.cpu_count() or 1) // ranks)
    ours = {
        "OMP_NUM_THREADS": str(threads),
        VERBOSITY: str(console.verbosity()),
        PARENT: str(os.getpid()),
    }
    silent = {"TORCH_CPP_LOG_LEVEL": "FATAL"} if console.verbosity() < 2 else {}
    return {**silent, **without(os.environ), **ours}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait(engine: subprocess.Popen[bytes], stop: Path, fault: Path | None) -> int:
    try:
        return _ended(engine, fault)
    except KeyboardInterrupt:
        if fault and not fault.with_name(BEGAN).exists():  # still waiting for the other machines
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()
            raise
        try:
            stop.touch()
        except OSError:
            engine.terminate()  # it asks the ranks, and waits half a minute
        console.notice("\nstopping after this step; once more to stop at once")
    try:
        return _ended(engine, fault)
    except KeyboardInterrupt:
        os.killpg(engine.pid, signal.SIGKILL)
        stop.unlink(missing_ok=True)
        raise


def _ended(engine: subprocess.Popen[bytes], fault: Path | None) -> int:
    """The engine's exit code, once it has ended.

    Over several machines (`fault` is where ranks leave errors) it may start its ranks again after an error
    that will come again, to wait for those of another machine whose engine has given up. It is ended then.

    Raises:
        VoxelscaleError: what a rank left.
    """
    while fault:
        try:
            return engine.wait(0.2)
        except subprocess.TimeoutExpired:
            if left := read_fault(fault):
                break
    else:
        return engine.wait()
    try:
        engine.wait(FAULT_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()
    raise left


def _engine(ranks: int, max_restarts: int, nodes: Nodes, run: Path, command: Sequence[str]) -> int:
    """torchrun's engine with `ranks` processes on this machine; the exit code of the job.

    A rank that dies takes the others with it, and all of them start again from the last checkpoint, at
    most `max_restarts` times.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if int(os.environ[VERBOSITY]) < 2:
        logging.disable()  # it reports a lost rank at length; the command does in two lines
    os.environ[PARENT] = str(os.getpid())
    options: dict[str, Any] = {
        "min_nodes": nodes.count,
        "max_nodes": nodes.count,
        "nproc_per_node": ranks,
        "run_id": "voxelscale" if nodes.count > 1 else f"voxelscale-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": nodes.meeting,
        "max_restarts": max_restarts,
    }
    try:
        if nodes.count > 1:
            launch_with_others(nodes, options, command)
        else:
            elastic_launch(LaunchConfig(**options), sys.executable)(*command)
    except VoxelscaleError as error:
        leave_fault(fault_path(run), error)
        return 1
    except ChildFailedError as error:
        # The first to end by itself: the others were lost with it, or stopped because of it.
        number, failed = min(
            error.failures.items(), key=lambda f: (f[1].exitcode in (LOST, FAULTY), f[1].timestamp)
        )
        after = f", after {max_restarts} restarts" if max_restarts else ""
        how = f"rank {number} {_end_of(failed.exitcode)}{after}"
        leave_fault(fault_path(run), VoxelscaleError(f"{run}: {how}", RESUME))
        return 1
    except SignalException:
        return 0  # the ranks were asked to save and stop
    return 0


def _end_of(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}, see above"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")


def _main(arguments: Sequence[str]) -> int:
    ranks, max_restarts, number, host, port, run, module, *words = arguments
    end_with_parent()
    console.set_verbosity(int(os.environ[VERBOSITY]))
    nodes = Nodes(count=int(number), host=host, port=int(port))
    return _engine(int(ranks), int(max_restarts), nodes, Path(run), ["-m", module, "rank", *words])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
