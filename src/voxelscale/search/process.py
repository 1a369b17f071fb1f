"""A worker as a process of its own: where it works, how it is started and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from voxelscale import console
from voxelscale.errors import VoxelscaleError
from voxelscale.search.definition import STORAGE, Search, reopen
from voxelscale.search.place import Place
from voxelscale.search.storage import is_storage_trouble
from voxelscale.search.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Started:
    """A worker's process."""

    process: subprocess.Popen[bytes]
    place: Place
    errors: IO[bytes]

    def said(self) -> list[str]:
        """What it has written on stderr."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip().splitlines()

    def fault(self) -> VoxelscaleError:
        """Why it ended, where that was not well."""
        said = self.said()
        if (code := self.process.returncode) < 0:
            how = f"a worker was killed by {signal.Signals(-code).name}"
            return VoxelscaleError(how, "the same command resumes")
        try:
            fault = json.loads(said[-1])
            return VoxelscaleError(fault["message"], fault["hint"])
        except (IndexError, ValueError, KeyError, TypeError):
            words = said[-1] if said else f"exit code {code}"
            return VoxelscaleError(f"a worker ended: {words}", "the same command resumes")


def start_worker(search: Search, place: Place) -> Started:
    """A worker as a process in a session of its own, out of reach of the terminal's Ctrl-C."""
    facts = {"out": str(search.out), "store": str(search.store), **asdict(place)}
    environment = {**os.environ, "VOXELSCALE_VERBOSITY": str(console.verbosity())}
    if url := search.config.search.storage:
        environment[STORAGE] = url  # with its password, which is in no file
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "voxelscale.search.process", str(os.getpid()), json.dumps(facts)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=errors if console.verbosity() < 2 else None,
        start_new_session=True,
    )
    return Started(process=process, place=place, errors=errors)


def _main(parent: int, facts: dict[str, Any]) -> int:
    """A worker's process; it stops on SIGTERM, SIGINT and when the command that started it is gone."""
    console.set_verbosity(int(os.environ.get("VOXELSCALE_VERBOSITY", "1")))
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    place = Place(devices=tuple(facts["devices"]), gpus=tuple(facts["gpus"]), sharers=facts["sharers"])
    try:
        search = reopen(Path(facts["out"]), Path(facts["store"]))
        Worker(search, place, lambda: asked or os.getppid() != parent).go()
    except VoxelscaleError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}), file=sys.stderr)
        return 2
    except Exception as error:
        if not is_storage_trouble(error):
            raise
        problem = str(getattr(error, "orig", error)).strip().splitlines()[0]
        fault = {"message": f"the storage is out of reach: {problem}", "hint": "the same command resumes"}
        print(json.dumps(fault), file=sys.stderr)
        return 2
    return 130 if asked else 0


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), json.loads(sys.argv[2])))
