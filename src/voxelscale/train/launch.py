"""Starting a training: in this process, as ranks of this machine, or of several (`ranks.launch`)."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from voxelscale import console
from voxelscale.config import Config, dump, load_stored, to_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.model.registry import check_name
from voxelscale.ranks.faults import (
    FAULT_FILE,
    FAULTY,
    LOST,
    environment_of,
    fault_path,
    leave_fault,
    lost_peer,
    restarts,
)
from voxelscale.ranks.launch import BEGAN, RESUME, VERBOSITY, end_with_parent, run_ranks
from voxelscale.ranks.nodes import ALONE, Nodes
from voxelscale.ranks.place import fill
from voxelscale.train.locks import first_in
from voxelscale.train.log import STOP_FILE, read_events
from voxelscale.train.recipes import samples_of
from voxelscale.train.track import FILE as TRACK_FILE
from voxelscale.train.track import SECTIONS

FREE = {
    "train.ranks",
    "train.virtual_workers",
    "train.batch_size",
    "train.threads",
    "train.checkpoint_every",
    "train.checkpoint_seconds",
    "train.keep",
    "train.max_restarts",
    "train.track",
    "train.track_to",
    "train.recipe",
    "data.readers",
    "data.prefetch",
}
"""Keys that may change when a run is resumed: they say how it is computed, not what. The engine checks that
the global batch stays the same, and what the recipe makes of the optimiser's settings."""


def start(config: Config, store: Path, run: Path, nodes: Nodes = ALONE) -> bool:
    """Train until the budget is spent; True, or False where it was asked to stop before.

    A run's folder keeps the config that it was started with; resuming with another is refused.

    Args:
        nodes: the machines that train together; with several, each calls this.

    Raises:
        VoxelscaleError: before anything starts where that can be known; else when a rank failed.
    """
    end_with_parent()
    check_name(config.model.name)
    if nodes.count > 1:
        return _start_with_others(config, store, run, nodes)
    fill()
    if "RANK" in os.environ:  # started by torchrun, srun or mpiexec: this process is a rank
        return _start_as_rank(config, store, run)
    check_claim(run, config)  # before a folder that is not a run's gets a lock
    with first_in(run), kept_config(run):
        claim(run, config)
        (run / STOP_FILE).unlink(missing_ok=True)
        if (config.train.ranks or _devices()) == 1:
            from voxelscale.train.loop import train

            return train(config, store, run).finished
        return _train_by_ranks(config, [store, run], run)


def _start_with_others(config: Config, store: Path, run: Path, nodes: Nodes) -> bool:
    """This machine's ranks of a training on several machines, which share the run's folder.

    Rank 0, on whatever machine, writes the config there; ranks read it from a file of their machine.
    """
    check_claim(run, config)
    with tempfile.TemporaryDirectory(prefix="voxelscale-") as folder:
        ours = Path(folder) / "config.yaml"
        write_atomic(ours, dump(config))
        return _train_by_ranks(config, [store, run, ours], run, nodes)


def _train_by_ranks(config: Config, words: Sequence[Path], run: Path, nodes: Nodes = ALONE) -> bool:
    """Ranks of this machine, which are given `words`; whether the budget was spent when they ended."""
    ranks = config.train.ranks or _devices()
    run_ranks(
        "voxelscale.train.launch",
        list(map(str, words)),
        run,
        ranks=ranks,
        threads=config.train.threads,
        max_restarts=config.train.max_restarts,
        stop=run / STOP_FILE,
        nodes=nodes,
    )
    events = read_events(run)
    return bool(events) and events[-1]["samples"] >= samples_of(config, ranks * nodes.count)


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
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # nobody starts them again
            raise VoxelscaleError(f"{run}: another rank was lost", RESUME) from None
        console.notice(f"a peer was lost: {error}", level=2)
        several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]
        if several and os.environ.get("LOCAL_RANK") == "0":
            console.notice("a rank or a machine was lost; waiting for all of them to continue")
        raise SystemExit(LOST) from None


LEFT = {
    *(
        "arithmetic.json",
        "checkpoints",
        "environment.json",
        "metrics.jsonl",
        "pretrained.json",
        "tensorboard",
        "wandb",
    ),
    *(FAULT_FILE, STOP_FILE, TRACK_FILE),
}
"""What a run that was refused before its first step may leave in its folder."""


@contextmanager
def kept_config(run: Path | None) -> Iterator[None]:
    """After an error within it the run's ``config.yaml`` is what it was: a config that is refused goes.

    A new run's goes where nothing was trained with it, so that the command can be corrected.
    """
    path = None if run is None or os.environ.get("RANK", "0") != "0" else run / "config.yaml"
    before = b""
    if path:
        with suppress(OSError):
            before = path.read_bytes()
    try:
        yield
    except (VoxelscaleError, SystemExit) as error:
        # The disk may be full, and the first error is the one to report.
        with suppress(VoxelscaleError, OSError):
            if path and before and path.read_bytes() != before:
                write_atomic(path, before)
            elif path and not before and isinstance(error, VoxelscaleError) and not _begun(path.parent):
                path.unlink()
        raise


def _begun(run: Path) -> bool:
    """Whether a training in the folder has come to its first step."""
    trained = any(event["samples"] > 0 for event in read_events(run))
    return trained or any((run / "checkpoints").glob("*.ckpt")) or any(run.glob("*.vxs"))


def claim(run: Path, config: Config) -> None:
    """Make the run's folder with its ``config.yaml``, or check that it was started with this config.

    Raises:
        VoxelscaleError: it was started with another one, or the folder holds something else.
    """
    chief = os.environ.get("RANK", "0") == "0"
    if chief or (run / "config.yaml").is_file():
        check_claim(run, config)
    if chief:
        if run.is_dir() and not (run / "config.yaml").is_file():
            for name in ("metrics.jsonl", "arithmetic.json", "pretrained.json", TRACK_FILE):
                (run / name).unlink(missing_ok=True)
        # The optimisers' defaults may change, those of the run may not.
        write_atomic(run / "config.yaml", dump(_settled(config)))


def check_claim(run: Path, config: Config) -> None:
    """Check that the run's folder is new, or was started with this config.

    Raises:
        VoxelscaleError: it was started with another one, or the folder holds something else.
    """
    path = run / "config.yaml"
    if path.is_file():
        begun, now = (to_dict(_settled(one)) for one in (load_stored(path), config))
        # Batch norm's statistics are those of each worker's own batch, and a batch grows by whole workers.
        growing = config.optim.grow_from > 0 or config.train.recipe != "none"
        free = FREE - {"train.batch_size"} if config.model.norm == "batch" or growing else FREE
        for name in SECTIONS:
            for key, value in now[name].items():
                if value != begun[name][key] and f"{name}.{key}" not in free:
                    raise VoxelscaleError(
                        f"{run}: was started with {name}.{key}={begun[name][key]}, not {value}",
                        "choose another folder for the run, or resume with the config that it holds",
                    )
    elif run.is_dir() and (_begun(run) or any(one.name not in LEFT for one in run.iterdir())):
        raise VoxelscaleError(f"{run}: holds files but no run", "choose an empty or new folder for the run")


def _settled(config: Config) -> Config:
    return replace(config, optim=config.optim.settled())


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 1


def _rank(store: Path, run: Path) -> int:
    """One rank under this package's own engine, which reports an error that was left for it, once.

    An engine starts all ranks again when one fails, which is of no use after such an error. So the others,
    and those started again, end as if all were well, and with them the engine.
    """
    fault = fault_path(run)
    if fault.exists():
        return 0
    try:
        _train_as_rank(load_stored(run / "config.yaml"), store, run)
    except VoxelscaleError as error:
        leave_fault(fault, error)
        return FAULTY
    return 0


def _rank_of_several(store: Path, run: Path, config: Path) -> int:
    """The same on one of several machines: the error is left in the run's folder, where all find it."""
    fault_path(run).with_name(BEGAN).touch()
    os.environ.update(environment_of(run / FAULT_FILE))
    if restarts() and fault_path(run).exists():
        return 0
    try:
        _start_as_rank(load_stored(config), store, run)
    except VoxelscaleError as error:
        leave_fault(fault_path(run), error)
        return FAULTY
    return 0


def _main(arguments: Sequence[str]) -> int:
    _, store, run, *config = arguments  # "rank" first, as a process's name for people
    end_with_parent(by_kernel=True)
    console.set_verbosity(int(os.environ.get(VERBOSITY, "1")))
    if config:
        return _rank_of_several(Path(store), Path(run), Path(config[0]))
    return _rank(Path(store), Path(run))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
