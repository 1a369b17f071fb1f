"""Starting a training: here in this process, or as ranks (`voxelscale.ranks.launch`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from voxelscale import console
from voxelscale.config import Config, dump, load_stored, to_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.registry import check_name
from voxelscale.ranks.faults import FAULTY, LOST, fault_path, leave_fault, lost_peer, restarts
from voxelscale.ranks.launch import VERBOSITY, end_with_parent, run_ranks
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
"""Keys that may change when a run is resumed: they say how it is computed, not what. Their product, the
global batch, must stay the same; the engine checks that."""


def start(config: Config, store: Path, run: Path) -> bool:
    """Train until the budget is spent; True, or False where it was asked to stop before.

    A run's folder keeps the config that it was started with; resuming with another is refused.

    Raises:
        VoxelscaleError: before anything starts where that can be known; else when a rank failed.
    """
    end_with_parent()
    check_name(config.model.name)
    if "RANK" in os.environ:  # started by torchrun or srun: this process is a rank
        return _start_as_rank(config, store, run)
    with kept_config(run):
        claim(run, config)
        (run / STOP_FILE).unlink(missing_ok=True)
        ranks = config.train.ranks or _devices()
        if ranks == 1:
            from voxelscale.train.loop import train

            return train(config, store, run).finished
        run_ranks(
            "voxelscale.train.launch",
            store,
            run,
            ranks=ranks,
            threads=config.train.threads,
            max_restarts=config.train.max_restarts,
            stop=run / STOP_FILE,
        )
        events = read_events(run)
        return bool(events) and events[-1]["samples"] >= config.train.samples


def _start_as_rank(config: Config, store: Path, run: Path) -> bool:
    """One rank of somebody else's torchrun or srun, which may start it again after an error.

    An error that a person must fix is raised by one rank, the first time.

    Raises:
        SystemExit: silently, where another rank or an earlier start has reported the error.
    """
    fault, again = fault_path(run), restarts() > 0
    with kept_config(run):
        try:
            claim(run, config)
        except VoxelscaleError:
            # Every rank comes to the same; the first one of each machine reports it.
            if again or os.environ.get("LOCAL_RANK", "0") != "0":
                raise SystemExit(FAULTY) from None
            raise
        if again and fault.exists():
            raise SystemExit(FAULTY)
        if not again and os.environ["RANK"] == "0":
            for old in (fault, run / STOP_FILE):
                old.unlink(missing_ok=True)
        try:
            return _train_as_rank(config, store, run)
        except VoxelscaleError as error:
            if leave_fault(fault, error):
                raise
            raise SystemExit(FAULTY) from None


def _train_as_rank(config: Config, store: Path, run: Path) -> bool:
    """One rank's share; one that has lost a peer ends silently, to be started again with it."""
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


@contextmanager
def kept_config(run: Path | None) -> Iterator[None]:
    """After an error within it the run's ``config.yaml`` is what it was: a config that is refused goes."""
    path = None if run is None or os.environ.get("RANK", "0") != "0" else run / "config.yaml"
    before = b""
    if path:
        with suppress(OSError):
            before = path.read_bytes()
    try:
        yield
    except (VoxelscaleError, SystemExit):
        # The disk may be full, and the first error is the one to report.
        with suppress(VoxelscaleError, OSError):
            if path and before and path.read_bytes() != before:
                write_atomic(path, before)
        raise


def claim(run: Path, config: Config) -> None:
    """Make the run's folder with its ``config.yaml``, or check that it was started with this config.

    Raises:
        VoxelscaleError: it was started with another one, or the folder holds something else.
    """
    config = replace(config, optim=config.optim.settled())  # its defaults may change, the run's may not
    path, chief = run / "config.yaml", os.environ.get("RANK", "0") == "0"
    if path.is_file():
        begun = _flat(to_dict(replace(stored := load_stored(path), optim=stored.optim.settled())))
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


def _rank(store: str, run: str) -> int:
    """One rank under this package's own engine, which reports an error that was left for it, once.

    An engine starts all ranks again when one fails, which is of no use after such an error. So the others,
    and those started again, end as if all were well, and with them the engine.
    """
    end_with_parent()
    console.set_verbosity(int(os.environ.get(VERBOSITY, "1")))
    fault = fault_path(Path(run))
    if fault.exists():
        return 0
    try:
        config = load_stored(Path(run) / "config.yaml")
        _train_as_rank(config, Path(store), Path(run))
    except VoxelscaleError as error:
        leave_fault(fault, error)
        return FAULTY
    return 0


def _main(arguments: Sequence[str]) -> int:
    _, store, run = arguments  # "rank" first, as a process's name for people
    return _rank(store, run)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
