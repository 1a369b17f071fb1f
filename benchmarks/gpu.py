"""Whether Voxelscale computes correctly on a machine with one GPU, and how fast; in at most 8 minutes.

    python benchmarks/gpu.py --out DIR                    everything; on a processor tiny sizes
    python benchmarks/gpu.py --out DIR --only speed,memory
    torchrun --standalone --nproc-per-node 8 benchmarks/gpu.py --nodes --out DIR     several GPUs

Every phase is a process of its own with a time limit. A phase that fails, crashes or takes too long is a
row of the results, and the next one begins. ``DIR/results.jsonl`` gets one JSON line a phase as it ends,
``DIR/log.txt`` what the phases print. The exit code is 0 where all phases were right or skipped, else 1.
Needed are PyTorch, NumPy and PyYAML, and no network; see "On a GPU" in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAULT = "VOXELSCALE_GPU_FAULT"
"""``PHASE=crash`` or ``PHASE=hang`` in the environment: what the test of this script lets happen."""
OWN = 4.0
"""Seconds of the overall limit that are kept for the table."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the check.

    Attributes:
        module: in `benchmarks.gpu_phases`, whose function has the phase's name.
        limit: seconds that it may take.
        least: seconds below which it is not worth starting.
    """

    module: str
    limit: float
    least: float = 10.0


PHASES = {
    "facts": Phase(module="machine", limit=45),
    "ceilings": Phase(module="machine", limit=45),
    "correctness": Phase(module="correctness", limit=100, least=25),
    "speed": Phase(module="steps", limit=120, least=25),
    "synchronisations": Phase(module="runs", limit=50),
    "training": Phase(module="runs", limit=90, least=40),
    "prediction": Phase(module="volumes", limit=60, least=20),
    "convolutions": Phase(module="machine", limit=60, least=15),
    "memory": Phase(module="steps", limit=60, least=15),
    "resume": Phase(module="runs", limit=50),
    "ranks": Phase(module="ranks", limit=70, least=15),
    "compiled": Phase(module="steps", limit=150, least=45),
}
"""In this order: what matters most comes first, what may take longest last."""

Row = dict[str, Any]


def run_all(names: list[str], out: Path, seconds: float, limit: float | None, tiny: bool) -> list[Row]:
    """Every phase in turn, within so many seconds in all."""
    ends = time.monotonic() + seconds - OWN
    rows = []
    with (
        tempfile.TemporaryDirectory() as work,
        open(out / "results.jsonl", "w", encoding="utf-8") as results,
        open(out / "log.txt", "wb") as log,
    ):
        for name in names:
            phase, left = PHASES[name], ends - time.monotonic()
            most = min(phase.limit if limit is None else limit, left)
            if left < phase.least:
                row = row_of(name, "skipped", "no time left")
            else:
                log.write(f"\n== {name}\n".encode())
                log.flush()
                row = run_phase(name, Path(work), most, tiny, log)
            rows.append(row)
            results.write(json.dumps(row) + "\n")
            results.flush()
            print(line_of(row), flush=True)
    return rows


def run_phase(name: str, work: Path, limit: float, tiny: bool, log: Any) -> Row:
    """One phase in a process of its own, which is ended with all that it started after `limit` seconds."""
    command = [sys.executable, __file__, "--phase", name, "--out", str(work)]
    command += ["--limit", str(limit)] + ["--tiny"] * tiny
    began = time.monotonic()
    # So that the log holds all that a phase printed before it was ended, and where it crashed.
    more = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    child = subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **more}
    )
    try:
        code: int | None = child.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end_session(child)
    seconds = time.monotonic() - began
    found = read_record(work / f"{name}.json")
    why = found.get("why", "")
    if found.get("status") not in ("ok", "failed", "skipped"):  # it did not live to say
        found["status"] = "failed"
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        why = f"over its limit of {limit:.0f} s" if code is None else f"crashed: {how}; see log.txt"
        why = "; ".join([why, *found.get("wrong", [])])
    return row_of(name, found["status"], why, seconds, found.get("figures"), found.get("says", ""))


def end_session(child: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read_record(path: Path) -> Row:
    try:
        found: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def row_of(
    name: str,
    status: str,
    why: str = "",
    seconds: float = 0.0,
    figures: dict[str, Any] | None = None,
    says: str = "",
) -> Row:
    return {
        "phase": name,
        "status": status,
        "why": why,
        "seconds": round(seconds, 1),
        "says": says,
        "figures": figures or {},
    }


def line_of(row: Row) -> str:
    words = "; ".join(part for part in (row["why"], row["says"]) if part)
    return f"{row['phase']:17}{row['status']:8}{row['seconds']:7.1f} s  {words}"


def child(name: str, out: Path, tiny: bool, limit: float) -> int:
    """A phase, or a rank of one, in this process."""
    for folder in (str(ROOT / "src"), str(ROOT)):
        sys.path.insert(0, folder)
    from benchmarks.gpu_phases import common

    fault = os.environ.get(FAULT, "")
    if fault == f"{name}=crash":
        os.abort()
    module = PHASES[name].module if name in PHASES else "ranks"
    function = getattr(importlib.import_module(f"benchmarks.gpu_phases.{module}"), name)
    if fault == f"{name}=hang":
        function = hanging(function)
    return common.carry_out(name, function, out, tiny, limit)


def hanging(function: Any) -> Any:
    """A phase that does its work and never ends."""

    def hang(*arguments: Any) -> None:
        function(*arguments)
        time.sleep(3600)

    return hang


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default="", help=f"phases, with commas; of {', '.join(PHASES)}")
    parser.add_argument("--seconds", type=float, default=480, help="limit of the whole")
    parser.add_argument("--limit", type=float, help="limit of every phase, seconds, instead of its own")
    parser.add_argument("--tiny", action="store_true", help="small sizes, as on a processor")
    parser.add_argument("--nodes", action="store_true", help="weak scaling, under torchrun")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(PHASES)
    if unknown := [name for name in names if name not in PHASES]:
        parser.error(f"no phase {unknown[0]}; there are {', '.join(PHASES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    limit = arguments.limit or arguments.seconds
    if arguments.phase:
        return child(arguments.phase, arguments.out, arguments.tiny, limit)
    if arguments.nodes:
        return child("nodes", arguments.out, arguments.tiny, limit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the phase ends with this process
    rows = run_all(names, arguments.out, arguments.seconds, arguments.limit, arguments.tiny)
    counts = {s: sum(row["status"] == s for row in rows) for s in ("ok", "failed", "skipped")}
    print(f"\n{', '.join(f'{number} {status}' for status, number in counts.items())}")
    for row in rows:
        print(line_of(row))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
