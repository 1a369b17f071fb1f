"""A rank that fails: its error is reported once, however many ranks and restarts there are.

The first rank with an error that a person must fix writes it to a file. The others, which have only
lost a peer, end without a word, and ranks that are started again find the file and end at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from voxelscale.errors import VoxelscaleError

FAULT_FILE = "fault.json"
FAULTY, LOST = 2, 3
"""Exit codes of a rank: there is an error to fix; a peer was lost."""

SIGNS_OF_LOSS = (
    *("connect", "closed by peer", "reset by peer", "broken pipe", "timed out", "timeout"),
    *("remote process", "network error", "communicator was aborted", "socket"),
)
"""In messages of Gloo and NCCL: a peer, or the way to it, is gone."""

_PLACE = "VOXELSCALE_FAULT_FILE"


def fault_path(run: Path) -> Path:
    """The file of the error: in the run's folder, or where the command that starts the ranks wants it.

    That is not on the run's disk, which may be full.
    """
    return Path(os.environ.get(_PLACE) or run / FAULT_FILE)


def environment_of(path: Path) -> dict[str, str]:
    """What the environment of ranks must hold so that they leave their fault at `path`."""
    return {_PLACE: str(path)}


def leave_fault(path: Path, error: VoxelscaleError) -> bool:
    """Whether this rank was the first."""
    words = json.dumps({"message": error.message, "hint": error.hint})
    try:
        with path.open("x", encoding="utf-8") as handle:
            handle.write(words)
    except FileExistsError:
        return False
    except OSError:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
    return True


def read_fault(path: Path) -> VoxelscaleError | None:
    """What was left there, if anything was."""
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return VoxelscaleError(words["message"], words["hint"])
    except (OSError, ValueError, KeyError):
        return None


def restarts() -> int:
    """How often torchrun's engine has started this rank again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, as Gloo, NCCL and the store put it.

    Any other fault of theirs (two ranks on one GPU, a type that cannot be reduced) would come again after a
    restart: it is reported instead.
    """
    from torch.distributed import DistBackendError, DistError

    if isinstance(error, DistError) and not isinstance(error, DistBackendError):
        return True  # the store or the network
    words = str(error).lower()
    ours = isinstance(error, DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in words)
    return ours and any(sign in words for sign in SIGNS_OF_LOSS)
