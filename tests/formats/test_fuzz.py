"""Mutated files: no reader crashes, hangs, raises anything of its own, or takes memory for them.

Every input is a function of (seed, number), and a fault is told with both. The seed is fixed, so that a
run says something about the change at hand; this looks elsewhere, or repeats a run that did::

    VOXELSCALE_FUZZ_SEED=7 pytest -m slow tests/formats/test_fuzz.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.formats.mutation import write_valid
from tests.formats.watched import Child

BATCH = 200
MIB = 300.0


def fuzz(folder: Path, seed: int, seconds: float) -> tuple[int, int, list[str]]:
    """Inputs tried, how many of them were read, and the faults found."""
    valid, work = folder / "valid", folder / "work"
    write_valid(valid)
    work.mkdir()
    tried, read = 0, 0
    faults: list[str] = []
    with Child() as child:
        child.ask(
            {"fuzz": seed, "first": 0, "count": 1, "valid": str(valid), "work": str(work)}, patience=120
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(faults) < 50:
            job = {"fuzz": seed, "first": tried, "count": BATCH, "valid": str(valid), "work": str(work)}
            outcome = child.ask(job, patience=120)
            at = int((work / "at").read_text())
            if outcome.kind in ("died", "hung"):
                faults.append(f"seed {seed}, input {at}: {outcome.kind}: {outcome.message}")
                tried = at + 1
                continue
            if outcome.kind != "read":
                faults.append(outcome.message)
            if outcome.grown_mib > MIB:
                faults.append(f"seed {seed}, inputs from {tried}: {outcome.grown_mib:.0f} MiB")
            read += int(outcome.hint or 0)
            tried += BATCH
    return tried, read, faults


def check(folder: Path, seed: int, seconds: float) -> None:
    start = time.monotonic()
    tried, read, faults = fuzz(folder, seed, seconds)
    took = time.monotonic() - start
    print(f"seed {seed}: {tried} inputs, {tried / took:.0f} a second, {read} read, {len(faults)} faults")
    assert not faults, "\n".join(faults)
    assert tried >= BATCH
    assert 0 < read < tried  # neither has every mutant been refused unread, nor none


def test_mutants_for_a_moment(tmp_path: Path) -> None:
    check(tmp_path, seed=1, seconds=1.5)


@pytest.mark.slow
def test_many_mutants(tmp_path: Path) -> None:
    seed = int(os.environ.get("VOXELSCALE_FUZZ_SEED", 2))
    check(tmp_path, seed, seconds=10)
