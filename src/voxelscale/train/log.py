"""What a run writes while it goes on: ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxelscale import __version__
from voxelscale.errors import VoxelscaleError
from voxelscale.files import read_json_lines, write_atomic
from voxelscale.train.track import Tracking

if TYPE_CHECKING:
    import torch

STOP_FILE = "stop"
"""A file of this name in the run's folder asks a running training to save and stop."""

OUT_OF_MEMORY = "out_of_memory"
"""The last event, or nearly, of a run that needed more memory than there is."""


class RunLog:
    """Appends events to ``metrics.jsonl`` and mirrors their numbers to TensorBoard.

    A run resumed from a checkpoint first drops the events after it, which will come again, and those that
    say how it ended.

    Args:
        run: its folder.
        seen: samples trained on.
        validated: samples after which the last validation was taken that the checkpoint knows of.
        tracking: where the same numbers are also logged; None: nowhere.

    Raises:
        VoxelscaleError: by every method, where the disk is full.
    """

    def __init__(self, run: Path, seen: int, validated: int, tracking: Tracking | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._tracking, self._diverged = run, tracking, False
        self._path = run / "metrics.jsonl"
        last = {"validation": validated, OUT_OF_MEMORY: -1, "diverged": -1}
        kept = [event for event in read_events(run) if event["samples"] <= last.get(event["event"], seen)]
        write_atomic(self._path, "".join(json.dumps(event) + "\n" for event in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=seen + 1)
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed

    def write(self, event: str, /, **numbers: float | str) -> None:
        """One event; `numbers` must hold ``samples``, and may hold words, which only the file gets."""
        line = {"event": event, **numbers}
        with self._disk_errors():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            scalars = {
                f"{event}/{name}": value
                for name, value in numbers.items()
                if name not in ("samples", "step") and not isinstance(value, str)
            }
            for name, value in scalars.items():
                self._board.add_scalar(name, value, int(numbers["samples"]))
        self._diverged |= event == "diverged"
        if self._tracking and scalars:
            self._tracking.log(scalars, int(numbers["samples"]))

    def close(self, finished: bool = False) -> None:
        """Put everything on disk; `finished`: whether the budget was spent."""
        threading.excepthook = self._hook
        if self._tracking:
            how = "FINISHED" if finished else "FAILED" if self._diverged else "KILLED"
            self._tracking.end(how, [self._run / "model.vxs", self._run / "environment.json"])
        with self._disk_errors(), self._file:
            os.fsync(self._file.fileno())
            self._board.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread would print a traceback; the next event or `close` raises it anyway.
        ours = type(failure.thread).__module__.startswith("tensorboard")
        if not (ours and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "free some space; the same command resumes from the last checkpoint"
            raise VoxelscaleError(f"{self._path}: cannot be written ({error.strerror})", hint) from None


def note_out_of_memory(run: Path, seen: int | None = None) -> None:
    """Note it for the process that started the training, from any rank, with or without a log.

    Args:
        run: its folder.
        seen: samples trained on; None: as many as the log knows of.
    """
    if seen is None:
        seen = max((event["samples"] for event in read_events(run)), default=0)
    line = json.dumps({"event": OUT_OF_MEMORY, "samples": seen})
    # Without it the error is still reported.
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run, in order; a last line cut short by a kill is left out."""
    return read_json_lines(run / "metrics.jsonl")


def environment(device: torch.device, ranks: int, virtual: int, precision: str) -> dict[str, Any]:
    """What a person needs to compare or repeat a run; no host or user names."""
    import torch

    cuda = device.type == "cuda"
    return {
        "voxelscale": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if cuda else {}),  # type: ignore[no-untyped-call]
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "ranks": ranks,
        "virtual_workers": virtual,
        "precision": precision,
    }
