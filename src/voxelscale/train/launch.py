"""Starting a training: here in this process, or as ranks under torchrun's engine.

The command itself stays out of the ranks' process group. It asks them to stop by a file in the run's
folder, which works for every number of ranks and machines, and ends with them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from voxelscale import console
from voxelscale.config import Config, dump, from_dict, load, to_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.registry import check_name
from voxelscale.train.log import STOP_FILE, read_events

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
"""Keys that may change when a run goes on: they say how it is computed, not what."""


FAULT_FILE = "fault.json"
"""Where a rank leaves what a person must mend."""


def start(config: Config, store: Path, run: Path) -> bool:
    """Train until the budget is spent; True, or False where it was asked to stop before.

    A run's folder keeps the config it was begun with; going on with another is refused.

    Raises:
        VoxelscaleError: before anything starts where that can be known; else when a rank failed.
    """
    check_name(config.model.name)
    claim(run, config)
    if "RANK" in os.environ:  # started by torchrun or srun: this process is a rank
        from voxelscale.train.loop import train

        return train(config, store, run).finished
    ranks = config.train.ranks or _devices()
    if ranks == 1:
        from voxelscale.train.loop import train

        return train(config, store, run).finished
    return _start_ranks(config, store, run, ranks)


def claim(run: Path, config: Config) -> None:
    """Make the run's folder with its ``config.yaml``, or check that it was begun with this config.

    Raises:
        VoxelscaleError: it was begun with another, or the folder holds something else.
    """
    path, chief = run / "config.yaml", os.environ.get("RANK", "0") == "0"
    if path.is_file():
        begun = _flat(to_dict(load(path)))
        now = _flat(to_dict(config))
        trained = ("data.", "augment.", "model.", "loss.", "optim.", "train.", "predict.")
        changed = [k for k in now if now[k] != begun.get(k) and k.startswith(trained) and k not in FREE]
        if changed:
            key = changed[0]
            raise VoxelscaleError(
                f"{run}: was begun with {key}={begun.get(key)}, not {now[key]}",
                "choose another folder with --run, or go on with the config it holds",
            )
    elif chief and run.is_dir() and any(run.iterdir()):
        raise VoxelscaleError(f"{run}: holds files but no run", "choose an empty or new folder with --run")
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
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // ranks)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VOXELSCALE_VERBOSITY": str(console.verbosity()),
    }
    restarts = str(config.train.max_restarts)
    command = [sys.executable, "-m", "voxelscale.train.launch"]
    command += ["engine", str(ranks), restarts, str(store), str(run)]
    (run / FAULT_FILE).unlink(missing_ok=True)
    engine = subprocess.Popen(command, env=environment, start_new_session=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _wait(engine, run)
    finally:
        signal.signal(signal.SIGTERM, before)
    if fault := _read_fault(run):
        raise fault
    if code != 0:
        raise VoxelscaleError(
            f"{run}: the training failed, and after {restarts} restarts again",
            "see the error above; the same command goes on from the last checkpoint",
        )
    events = read_events(run)
    return bool(events) and events[-1]["samples"] >= config.train.samples


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait(engine: subprocess.Popen[bytes], run: Path) -> int:
    try:
        return engine.wait()
    except KeyboardInterrupt:
        (run / STOP_FILE).touch()
        console.notice("\nstopping after this step; once more to stop at once")
    try:
        return engine.wait()
    except KeyboardInterrupt:
        os.killpg(engine.pid, signal.SIGKILL)
        (run / STOP_FILE).unlink(missing_ok=True)
        raise


def _engine(ranks: int, restarts: int, store: str, run: str) -> int:
    """torchrun's engine with `ranks` processes on this machine; the exit code of the job.

    A rank that dies takes the others with it, and all of them start again from the last checkpoint, at
    most `restarts` times.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _end_with_parent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"voxelscale-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
    )
    rank = [sys.executable, "-m", "voxelscale.train.launch", "rank", store, run]
    try:
        elastic_launch(config, rank[0])(*rank[1:])
    except ChildFailedError:
        return 1
    return 0


def _rank(store: str, run: str) -> int:
    """One rank. What a person must mend is left in the run's folder, for the command to tell once.

    It ends as if all were well: what no restart can mend must not be restarted.
    """
    from voxelscale.train.loop import train

    _end_with_parent()
    console.set_verbosity(int(os.environ.get("VOXELSCALE_VERBOSITY", "1")))
    if (Path(run) / FAULT_FILE).exists():
        return 0
    try:
        train(from_dict(to_dict(load(Path(run) / "config.yaml"))), Path(store), Path(run))
    except VoxelscaleError as error:
        _leave_fault(Path(run), error)
    return 0


def _leave_fault(run: Path, error: VoxelscaleError) -> None:
    """The first rank's counts; the others may only have lost their peer."""
    words = json.dumps({"message": error.message, "hint": error.hint})
    try:
        with (run / FAULT_FILE).open("x", encoding="utf-8") as handle:
            handle.write(words)
    except FileExistsError:
        return
    except OSError:
        # The very disk is at fault: the log is all that is left.
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr, flush=True)


def _read_fault(run: Path) -> VoxelscaleError | None:
    try:
        words = json.loads((run / FAULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    (run / FAULT_FILE).unlink(missing_ok=True)
    return VoxelscaleError(words["message"], words["hint"])


def _end_with_parent() -> None:
    """End when the process that started this one is gone: a killed command leaves no ranks behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def _main(arguments: Sequence[str]) -> int:
    role, *rest = arguments
    if role == "engine":
        return _engine(int(rest[0]), int(rest[1]), rest[2], rest[3])
    return _rank(rest[0], rest[1])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
