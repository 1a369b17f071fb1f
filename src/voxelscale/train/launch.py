"""Starting a training: here in this process, or as ranks under torchrun's engine.

The command itself stays out of the ranks' process group. It asks them to stop by a file in the run's
folder, which works for every number of ranks and machines, and ends with them.
"""

from __future__ import annotations

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

from voxelscale import console
from voxelscale.config import Config, dump, from_dict, load, to_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.registry import check_name
from voxelscale.train.fault import (
    FAULT_FILE,
    FAULTY,
    LOST,
    fault_path,
    leave_fault,
    lost_peer,
    read_fault,
    restarts,
    told_at,
)
from voxelscale.train.log import STOP_FILE, read_events

PARENT = "VOXELSCALE_PARENT"
"""Environment variable: the process that started this command, with which it ends."""

GO_ON = "the same command resumes from the last checkpoint"

FREE = {
    "train.ranks",
    "train.virtual_workers",
    "train.batch_size",
    "train.threads",
    "train.checkpoint_every",
    "train.checkpoint_seconds",
    "train.keep",
    "train.max_restarts",
    "data.readers",
    "data.prefetch",
}
"""Keys that may change when a run is resumed: they say how it is computed, not what. Their product, the
global batch, must stay the same; the engine checks that."""


def start(config: Config, store: Path, run: Path) -> bool:
    """Train until the budget is spent; True, or False where it was asked to stop before.

    A run's folder keeps the config that it was started with; resuming with another is refused.

    Raises:
        VoxelscaleError: before anything starts where that can be known; else when a rank failed.
    """
    if parent := os.environ.pop(PARENT, ""):
        _end_with(int(parent))
    check_name(config.model.name)
    if "RANK" in os.environ:  # started by torchrun or srun: this process is a rank
        return _start_as_rank(config, store, run)
    claim(run, config)
    (run / STOP_FILE).unlink(missing_ok=True)
    ranks = config.train.ranks or _devices()
    if ranks == 1:
        from voxelscale.train.loop import train

        return train(config, store, run).finished
    return _start_ranks(config, store, run, ranks)


def fit_to_memory(config: Config, store: Path) -> Config:
    """The config with the largest patch, of its own patch's proportions, whose training fits here.

    Raises:
        VoxelscaleError: none fits, or this is one of several ranks, which could find different ones.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise VoxelscaleError(
            "--fit-memory: cannot be found by several processes at once",
            "find it with one process, then give torchrun --set data.patch_size=...",
        )
    import statistics

    from voxelscale.device import default_device
    from voxelscale.store import open_store
    from voxelscale.train.memory import fit_patch, with_patch

    opened, device = open_store(store), default_device()
    shapes = zip(*(info.shape for info in opened.split("train")), strict=True)
    limit = [round(statistics.median(axis)) for axis in shapes]
    sharers = 1 if device.type == "cuda" else max(1, config.train.ranks)
    checkpointing = config.train.checkpoint_activations
    patch = fit_patch(
        config, opened.spacing, device, checkpointing=checkpointing, sharers=sharers, limit=limit
    )
    console.notice(f"the largest patch that fits: {' x '.join(map(str, patch))} voxels")
    return with_patch(config, patch)


def _start_as_rank(config: Config, store: Path, run: Path) -> bool:
    """Another launcher may restart this rank: an error that only a person can fix is not reported again."""
    try:
        claim(run, config)
    except VoxelscaleError:
        if os.environ.get("LOCAL_RANK", "0") != "0" or restarts():
            raise SystemExit(FAULTY) from None
        raise
    fault = fault_path(run)
    if restarts() and fault.exists():
        raise SystemExit(FAULTY)
    if not restarts() and os.environ["RANK"] == "0":
        for old in (fault, run / STOP_FILE):
            old.unlink(missing_ok=True)
    try:
        return _train_as_rank(config, store, run)
    except VoxelscaleError as error:
        if leave_fault(fault, error):
            raise
        raise SystemExit(FAULTY) from None


def _train_as_rank(config: Config, store: Path, run: Path) -> bool:
    """One rank's share; one that has lost a peer ends without a word, to be started again with it."""
    from voxelscale.train.loop import train

    if restarts() and os.environ["RANK"] == "0":
        console.warn(f"a rank was lost; resuming from the last checkpoint, restart {restarts()}")
    try:
        return train(config, store, run).finished
    except Exception as error:
        if not lost_peer(error):
            raise
        console.notice(f"a peer was lost: {error}", level=2)
        raise SystemExit(LOST) from None


def claim(run: Path, config: Config) -> None:
    """Make the run's folder with its ``config.yaml``, or check that it was started with this config.

    Raises:
        VoxelscaleError: it was started with another one, or the folder holds something else.
    """
    path, chief = run / "config.yaml", os.environ.get("RANK", "0") == "0"
    if path.is_file():
        begun = _flat(to_dict(load(path)))
        now = _flat(to_dict(config))
        trained = ("data.", "augment.", "model.", "loss.", "optim.", "train.", "predict.")
        # Batch norm's statistics are those of each worker's own batch.
        free = FREE - {"train.batch_size"} if config.model.norm == "batch" else FREE
        changed = [k for k in now if now[k] != begun.get(k) and k.startswith(trained) and k not in free]
        if changed:
            key = changed[0]
            raise VoxelscaleError(
                f"{run}: was started with {key}={begun.get(key)}, not {now[key]}",
                "choose another folder for the run, or resume with the config that it holds",
            )
    elif chief and run.is_dir() and any(run.iterdir()):
        raise VoxelscaleError(f"{run}: holds files but no run", "choose an empty or new folder for the run")
    if chief:
        write_atomic(path, dump(config))


def _flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 1


def _start_ranks(config: Config, store: Path, run: Path, ranks: int) -> bool:
    """Ranks under torchrun's engine in a session of their own, out of reach of the terminal's Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="voxelscale-") as folder:
        fault = Path(folder) / FAULT_FILE
        words = [str(os.getpid()), str(ranks), str(config.train.max_restarts), str(store), str(run)]
        engine = subprocess.Popen(
            [sys.executable, "-m", "voxelscale.train.launch", "engine", *words],
            env={**_environment(config, ranks), **told_at(fault)},
            start_new_session=True,
        )
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            code = _wait(engine, run)
        finally:
            signal.signal(signal.SIGTERM, before)
        if left := read_fault(fault):
            raise left
    if code != 0:
        raise VoxelscaleError(
            f"{run}: the training failed (exit code {code})",
            f"see above; {GO_ON}",
        )
    events = read_events(run)
    return bool(events) and events[-1]["samples"] >= config.train.samples


def _environment(config: Config, ranks: int) -> dict[str, str]:
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // ranks)
    ours = {"OMP_NUM_THREADS": str(threads), "VOXELSCALE_VERBOSITY": str(console.verbosity())}
    silent = {"TORCH_CPP_LOG_LEVEL": "FATAL"} if console.verbosity() < 2 else {}
    return {**silent, **os.environ, **ours}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait(engine: subprocess.Popen[bytes], run: Path) -> int:
    try:
        return engine.wait()
    except KeyboardInterrupt:
        try:
            (run / STOP_FILE).touch()
        except OSError:
            engine.terminate()  # it passes the request on, and waits half a minute
        console.notice("\nstopping after this step; once more to stop at once")
    try:
        return engine.wait()
    except KeyboardInterrupt:
        os.killpg(engine.pid, signal.SIGKILL)
        (run / STOP_FILE).unlink(missing_ok=True)
        raise


def _engine(ranks: int, most: int, store: str, run: str) -> int:
    """torchrun's engine with `ranks` processes on this machine; the exit code of the job.

    A rank that dies takes the others with it, and all of them start again from the last checkpoint, at
    most `most` times.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if int(os.environ["VOXELSCALE_VERBOSITY"]) < 2:
        logging.disable()  # it reports a lost rank at length; the command does in two lines
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"voxelscale-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=most,
    )
    rank = [sys.executable, "-m", "voxelscale.train.launch", "rank", str(os.getpid()), store, run]
    try:
        elastic_launch(config, rank[0])(*rank[1:])
    except ChildFailedError as error:
        number, failed = min(
            error.failures.items(), key=lambda f: (f[1].exitcode in (LOST, FAULTY), f[1].timestamp)
        )
        how = f"rank {number} {_end_of(failed.exitcode)}{f', after {most} restarts' if most else ''}"
        leave_fault(fault_path(Path(run)), VoxelscaleError(f"{run}: {how}", GO_ON))
        return 1
    except SignalException:
        return 0  # the ranks were asked to save and stop
    return 0


def _end_of(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}, see above"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")


def _rank(store: str, run: str) -> int:
    """One rank. An error that a person must fix is left for the command to report once.

    Started again after that it ends as if all were well, and with it the engine.
    """
    console.set_verbosity(int(os.environ.get("VOXELSCALE_VERBOSITY", "1")))
    fault = fault_path(Path(run))
    if fault.exists():
        return 0
    try:
        config = from_dict(to_dict(load(Path(run) / "config.yaml")))
        _train_as_rank(config, Path(store), Path(run))
    except VoxelscaleError as error:
        leave_fault(fault, error)
        return FAULTY
    return 0


def _end_with(parent: int) -> None:
    """End when the process that started this one is gone: a killed command leaves no ranks behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def _main(arguments: Sequence[str]) -> int:
    role, parent, *rest = arguments
    _end_with(int(parent))
    if role == "engine":
        return _engine(int(rest[0]), int(rest[1]), rest[2], rest[3])
    return _rank(rest[0], rest[1])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
