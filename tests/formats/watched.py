"""Readers in a child process, so that a crash, a hang or a hunger for memory is seen and named.

Run as a module it is the child: it takes jobs as lines of JSON on stdin and answers each with one on
stdout. Its peak of memory is reset before every job.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CEILING = 3 << 30
"""Bytes of address space above the start at which the kernel refuses: so that a fault of a reader does
not take the machine with it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a job.

    Attributes:
        kind: ``read``, ``refused`` (a VoxelscaleError), ``raised`` (another one), ``died`` or ``hung``.
        message: of the error; the traceback, where it was not ours.
        seconds: of processor time.
        grown_mib: the peak of memory above that before the job.
    """

    kind: str
    message: str = ""
    hint: str = ""
    seconds: float = 0.0
    grown_mib: float = 0.0


class Child:
    """One child process, started anew when it has died; `heavy` where it is to run commands."""

    def __init__(self, heavy: bool = False) -> None:
        self._heavy = heavy
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, job: dict[str, Any], patience: float = 60.0) -> Outcome:
        """Let the child do a job and say what came of it."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], patience)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return Outcome(**json.loads(line))
        kind = "died" if ready else "hung"
        self._end()
        self._errors.seek(0)
        return Outcome(kind=kind, message=self._errors.read()[-3000:], seconds=patience)

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.formats.watched", *["heavy"] * self._heavy],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def run_job(job: dict[str, Any]) -> Outcome:
    """A job in this process: ``read`` (what, path) or ``command`` (arguments)."""
    from voxelscale.errors import VoxelscaleError

    before, start = _reset_peak(), time.process_time()
    out: dict[str, Any] = {}
    try:
        if "fuzz" in job:
            out = _fuzz(**job)
        elif "command" in job:
            out = _command(job["command"])
        else:
            out = _read(job["read"], Path(job["path"]))
    except VoxelscaleError as error:
        out = {"kind": "refused", "message": error.message, "hint": error.hint}
    except BaseException:
        out = {"kind": "raised", "message": traceback.format_exc()[-3000:]}
    seconds = time.process_time() - start
    return Outcome(**out, seconds=seconds, grown_mib=(_status("VmHWM") - before) / 1024)


def _read(what: str, path: Path) -> dict[str, Any]:
    from voxelscale.formats import read_label, read_scan

    if what == "bundle":
        from voxelscale.model.bundle import read_bundle

        read_bundle(path)
    elif what == "store":
        from voxelscale.store import open_store

        open_store(path)
    elif what == "pair":
        return {"kind": "read", "message": str(_read_pair(path))}
    else:
        scan = (read_label if what == "label" else read_scan)(path)
        return {"kind": "read", "message": f"{scan.array.shape}"}
    return {"kind": "read"}


def _read_pair(label: Path) -> int:
    """Voxels of the lesions that a label says of the DICOM series in ``ct`` beside it."""
    from voxelscale.config import ReadingConfig
    from voxelscale.dataset.reading import read_case
    from voxelscale.dataset.source import Source, identity

    image = label.parent / "ct"
    patient, series = identity(image) or ("", "")
    source = Source(case="case", patient=patient, image=image, labels=(label,), series=series)
    return int(read_case(source, ReadingConfig())[1].mask.array.sum())


SLOW = 2.0
"""Seconds of processor time that no small file may take."""


def _fuzz(fuzz: int, first: int, count: int, valid: str, work: str) -> dict[str, Any]:
    """Read mutants `first` to `first + count` of seed `fuzz`; the number of each stands in `work`/at."""
    import numpy as np
    from tests.formats.mutation import Mutants

    from voxelscale.errors import VoxelscaleError
    from voxelscale.formats import read_label, read_scan

    mutants = Mutants(Path(valid), Path(work), fuzz)
    faults, read = [], 0
    for index in range(first, first + count):
        kind, path = mutants.write(index)
        (Path(work) / "at").write_text(str(index))
        start, fault = time.process_time(), ""
        try:
            scan = (read_scan if index % 4 else read_label)(path)
            assert scan.array.dtype.kind != "f" or np.isfinite(scan.array).all()
            assert min(scan.spacing) > 0
            read += 1
        except VoxelscaleError as error:
            if "\n" in error.message or not error.hint or "fit into memory" in error.message:
                fault = repr(error.message)
        except Exception:
            fault = traceback.format_exc()[-1500:]
        if time.process_time() - start > SLOW:
            fault += f" {time.process_time() - start:.1f} s"
        if fault:
            faults.append(f"seed {fuzz}, input {index} ({kind}): {fault}")
    return {"kind": "faults" if faults else "read", "message": "\n".join(faults[:20]), "hint": str(read)}


def _command(arguments: list[str]) -> dict[str, Any]:
    """The command line's main function; refused is exit code 2 with an error and a hint, no more."""
    from voxelscale import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["voxelscale", *arguments]
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    lines = err.getvalue().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    if code == 2 and errors and hints and "Traceback" not in err.getvalue():
        return {"kind": "refused", "message": errors[0], "hint": hints[0]}
    return {"kind": "read" if code == 0 else "raised", "message": err.getvalue()[-3000:]}


def _reset_peak() -> int:
    """KiB in memory now; the peak is counted from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def limit_memory() -> None:
    """Let the kernel refuse what would be far too much."""
    most = _status("VmSize") * 1024 + CEILING
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def warm_up(heavy: bool) -> None:
    """Import what the readers import, so that it counts to nobody's memory or time."""
    import pydicom  # noqa: F401
    import SimpleITK  # noqa: F401

    if heavy:
        import torch

        torch.set_num_threads(1)


def main() -> None:
    """Answer until stdin ends."""
    faulthandler.enable()
    answers = sys.stdout
    sys.stdout = sys.stderr
    warm_up("heavy" in sys.argv[1:])
    limit_memory()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(vars(run_job(json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
