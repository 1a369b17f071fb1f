"""A Slurm of the test's own: munged, slurmctld, and a slurmd on each machine, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cluster.machines import Machines, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
REQUIRED = "VOXELSCALE_REQUIRE_SLURM"
"""Environment variable: a test without Slurm fails instead of being skipped."""

CONFIG = """
ClusterName=test
SlurmctldHost=control({control})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MinJobAge=300
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A running one.

    Attributes:
        folder: of its files.
        machines: its nodes.
    """

    folder: Path
    machines: Machines

    def run(self, *command: str | Path) -> str:
        """What a command on the control machine prints.

        Raises:
            AssertionError: it failed.
        """
        told = {**environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        words = self.machines.on("control", command)
        done = subprocess.run(words, env=told, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *command: str | Path) -> str:
        """The number of a job that is queued: sbatch's arguments, the script and its own."""
        return self.run("sbatch", "--parsable", *command).strip()

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))
        assert found
        return found.group(1)

    def wait(self, job: str, *states: str, seconds: float = 120) -> None:
        """Until the job is in one of these states."""
        until = time.monotonic() + seconds
        while (now := self.state(job)) not in states:
            assert time.monotonic() < until, (now, self.run("scontrol", "show", "job", job))
            time.sleep(0.2)


@contextlib.contextmanager
def slurm(folder: Path, machines: Machines) -> Iterator[Slurm]:
    """A Slurm on these machines; the test is skipped where it cannot be had."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    if missing:
        _give_up(f"not installed: {', '.join(missing)}")
    made = Slurm(folder, machines)
    started: list[subprocess.Popen[bytes]] = []
    try:
        _configure(folder, machines)
        for machine, words in _daemons(folder, machines):
            started.append(_start(folder, machines.on(machine, words)))
            _wait_for_munge(folder)
        try:
            _wait_for_nodes(made)
        except AssertionError as error:
            _give_up(f"Slurm does not start: {error}")
        yield made
    finally:
        for daemon in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in started:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)


def _give_up(why: str) -> None:
    if REQUIRED in os.environ:
        pytest.fail(why)
    pytest.skip(why)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _configure(folder: Path, machines: Machines) -> None:
    (folder / "state").mkdir()
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    cores = os.cpu_count() or 1
    nodes = [f"NodeName={n} NodeAddr={machines.address(n)} CPUs={cores}" for n in machines.names]
    port = 20_000 + os.getpid() % 10_000  # the control machine shares its ports with other tests'
    config = CONFIG.format(folder=folder, control=machines.address("control"), port=port)
    (folder / "slurm.conf").write_text("\n".join([*nodes, config]))


def _daemons(folder: Path, machines: Machines) -> list[tuple[str, Sequence[str]]]:
    munge = ["munged", "-F", "--force", f"--socket={folder}/munge", f"--key-file={folder}/key"]
    munge += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("log", "pid", "seed")]
    config = ["-D", "-f", f"{folder}/slurm.conf"]
    nodes: list[tuple[str, Sequence[str]]] = [(n, ["slurmd", *config, "-N", n]) for n in machines.names]
    return [("control", munge), ("control", ["slurmctld", *config]), *nodes]


def _start(folder: Path, words: Sequence[str]) -> subprocess.Popen[bytes]:
    with (folder / "daemons.log").open("ab") as log:
        told = {**environment(), "PATH": f"{environment()['PATH']}:/usr/sbin:/sbin"}
        return subprocess.Popen(
            words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=told
        )


def _wait_for_munge(folder: Path) -> None:
    until = time.monotonic() + 10
    while not (folder / "munge").exists() and time.monotonic() < until:
        time.sleep(0.05)


def _wait_for_nodes(made: Slurm) -> None:
    until, idle = time.monotonic() + 30, ""
    while time.monotonic() < until:
        with contextlib.suppress(AssertionError):
            idle = made.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip()
        if idle == str(len(made.machines.names)):
            return
        time.sleep(0.2)
    raise AssertionError((made.folder / "daemons.log").read_text()[-2000:])
