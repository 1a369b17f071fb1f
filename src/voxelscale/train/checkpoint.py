"""The state of a training, so that it can be resumed as if it had never stopped."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from voxelscale.console import warn
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic, write_sealed
from voxelscale.model.bundle import load_untrusted
from voxelscale.train.optim import KEPT, AveragedWeights

FORMAT = 2
BEST = "best.ckpt"


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run besides weights and optimiser.

    Attributes:
        seen: samples trained on; every random number follows from it and the seed.
        validated: samples after which the last finished validation was taken.
        best: highest validation score so far, or -1.
        seconds: of training so far, over all restarts.
        digest: of the data set, as in the store's fingerprint.
        global_batch: samples of a full update; 0 where the checkpoint does not say.
        optim: digest of the optimiser's settings, the recipe applied; "" where it does not say.
    """

    seen: int = 0
    validated: int = 0
    best: float = -1.0
    seconds: float = 0.0
    digest: str = ""
    global_batch: int = 0
    optim: str = ""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint fills and is filled from."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedWeights | None


class Writer:
    """Writes checkpoints beside the training, atomically and with a checksum, one at a time.

    What goes wrong (a full disk) is raised by the next call, as it would be without the thread; the
    checkpoints before stay as they were.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flying: Future[None] | None = None

    def save(self, trained: Trained, state: State) -> None:
        """Copy the state now; write ``samples_<seen>.ckpt``, then drop all but the last few."""
        content = {
            "format": FORMAT,
            "model": dict(trained.model.state_dict()),
            "optimizer": trained.optimizer.state_dict(),
            "average": trained.average.weights if trained.average else {},
            "state": asdict(state),
        }
        copied = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
        self._submit(lambda: self._write(copied, state.seen))

    def keep_best(self, seen: int) -> None:
        """Make the checkpoint at `seen` samples ``best.ckpt``, too."""
        self._submit(lambda: self._link_best(seen))

    def finish(self) -> None:
        """Wait until everything is on disk."""
        if self._flying is not None:
            flying, self._flying = self._flying, None
            flying.result()

    def close(self) -> None:
        """End the thread; what is being written is finished first."""
        self._pool.shutdown(wait=True)

    def _submit(self, work: Callable[[], None]) -> None:
        self.finish()
        self._flying = self._pool.submit(work)

    def _write(self, content: dict[str, Any], seen: int) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_sealed(self._folder / _name(seen), buffer.getvalue())
        until = [path for path in _files(self._folder) if path.name <= _name(seen)]
        for old in until[: -self._keep]:
            old.unlink(missing_ok=True)

    def _link_best(self, seen: int) -> None:
        # Another name of the same file: no space, and nothing that a kill could tear.
        whole, link = self._folder / _name(seen), self._folder / f".{BEST}.part"
        if not whole.is_file():
            return  # the run was resumed from the best one, and it is the best again
        link.unlink(missing_ok=True)
        try:
            os.link(whole, link)
            os.replace(link, self._folder / BEST)
        except OSError:  # a file system without hard links
            write_atomic(self._folder / BEST, whole.read_bytes())


def load_newest(folder: Path, trained: Trained, digest: str) -> State:
    """Put the newest whole checkpoint into model and optimiser; a fresh state where there is none.

    A truncated or altered file is named, set aside as ``*.damaged``, and the one before it used, at
    last the best one. Rank 0 chooses for all ranks.

    Raises:
        VoxelscaleError: no checkpoint is whole, or it is of another network or another data set.
    """
    grouped = dist.is_initialized()
    chosen: list[tuple[Path | None, dict[str, Any]]] = [(None, {})]
    if not grouped or dist.get_rank() == 0:
        chosen = [_newest_whole(folder)]
    if grouped:
        names = [str(chosen[0][0] or "")]
        dist.broadcast_object_list(names, src=0)
        if dist.get_rank() != 0 and names[0]:
            chosen = [(Path(names[0]), load_untrusted(Path(names[0])))]
    path, content = chosen[0]
    return _restore(path, content, trained, digest) if path else State(digest=digest)


def _newest_whole(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that can be read; those after it get another name, out of the way.

    Raises:
        VoxelscaleError: there are checkpoints, but none is whole.
    """
    damaged: list[Path] = []
    best = [folder / BEST] if (folder / BEST).is_file() else []
    for path in (*reversed(_files(folder)), *best):
        try:
            content = load_untrusted(path)
        except VoxelscaleError as error:
            warn(f"{error.message}; using the checkpoint before it")
            damaged.append(path)
            continue
        for other in damaged:
            other.rename(other.with_suffix(".damaged"))
        return path, content
    if damaged:
        hint = "put back a copy of one, or delete the folder to begin again"
        raise VoxelscaleError(f"{folder}: no checkpoint in it is intact", hint)
    return None, {}


def _restore(path: Path, content: dict[str, Any], trained: Trained, digest: str) -> State:
    hint = "train into another folder"
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise VoxelscaleError(f"{path}: checkpoint format {found}, not {FORMAT}", hint)
    state = _state_in(path, content)
    if state.digest != digest:
        raise VoxelscaleError(
            f"{path}: was trained on another data set", f"{hint}, or restore the store it was started with"
        )
    try:
        trained.model.load_state_dict(content["model"])
        _check_optimizer(trained.optimizer, content["optimizer"])
        trained.optimizer.load_state_dict(content["optimizer"])
        if trained.average:
            for name, weight in trained.average.weights.items():
                weight.copy_(content["average"][name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VoxelscaleError(f"{path}: is of another network ({reason})", hint) from None
    return state


def _state_in(path: Path, content: dict[str, Any]) -> State:
    """The state of the run, as in the checkpoint; its types and ranges are not checked yet."""
    try:
        state = State(**content["state"])
        counts = (state.seen, state.validated, state.global_batch)
        whole = all(type(count) is int and count >= 0 for count in counts)
        whole = whole and all(type(n) in (int, float) for n in (state.best, state.seconds))
        if whole and isinstance(state.digest, str) and isinstance(state.optim, str):
            return state
    except (KeyError, TypeError):
        pass
    hint = "put back a copy of it, or delete it to resume from another one"
    raise VoxelscaleError(f"{path}: the state of the run is not in it", hint)


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raise a ValueError where what PyTorch would take unseen fails, or misleads, the next update."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in saved["state"].items():
        if set(entries) not in KEPT:  # our own rules would start the missing part from zero
            raise ValueError(f"the optimizer's state of a weight is {', '.join(entries) or 'empty'}")
        for name, value in entries.items():
            of_one = isinstance(value, Tensor) and value.dim() > 0
            if of_one and value.shape != parameters[number].shape:
                raise ValueError(f"the optimizer's {name} has another shape than its weight")
            if not isinstance(value, Tensor | int | float | None):
                raise ValueError(f"the optimizer's {name} is no number")
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for name in ours.keys() & theirs.keys() - {"params"}:
            number = isinstance(ours[name], int | float) and isinstance(theirs[name], int | float)
            if not number and type(ours[name]) is not type(theirs[name]):
                raise ValueError(f"the optimizer's {name} is {str(theirs[name])[:40]!r}")


def _name(seen: int) -> str:
    return f"samples_{seen:012d}.ckpt"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("samples_*.ckpt"))
