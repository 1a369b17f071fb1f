"""This process's place among those that a launcher started: torchrun, Slurm's srun, Open MPI, PALS, PMI.

Each launcher tells it in variables of its own. `fill` gives it in torchrun's, which PyTorch reads too.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from voxelscale.errors import VoxelscaleError

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""torchrun's variables."""

PORTS = range(20_000, 30_000)
"""Ports of rank 0: below those that Linux gives to outgoing connections (32768 to 60999)."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The variables in which a launcher tells a process its place; of several names the first that is set.

    Attributes:
        size: number of processes that were started together.
        rank: this one's number among them.
        local, locals: its number among those of this machine, and how many they are.
        hosts: Slurm's list of the machines, that of rank 0 first; or a file with one machine a line.
        job: what tells two jobs, or two starts within a job, apart.
    """

    name: str
    size: tuple[str, ...]
    rank: tuple[str, ...]
    local: tuple[str, ...]
    locals: tuple[str, ...]
    hosts: tuple[str, ...]
    job: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """Those that make a process one of several."""
        return {*self.size, *self.rank, *self.local, *self.locals}


# An mpiexec that starts its processes by srun leaves them srun's variables, so srun comes last.
LAUNCHERS = (
    Launcher(
        name="Open MPI",
        size=("OMPI_COMM_WORLD_SIZE",),
        rank=("OMPI_COMM_WORLD_RANK",),
        local=("OMPI_COMM_WORLD_LOCAL_RANK",),
        locals=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        hosts=("SLURM_JOB_NODELIST", "PBS_NODEFILE"),
        job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "PBS_JOBID"),
    ),
    Launcher(
        name="mpiexec",
        size=("PMI_SIZE",),
        rank=("PALS_RANKID", "PMI_RANK"),
        local=("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK", "MPI_LOCALRANKID"),
        locals=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE", "MPI_LOCALNRANKS"),
        hosts=("SLURM_JOB_NODELIST", "PBS_NODEFILE"),
        job=("PALS_APID", "SLURM_JOB_ID", "PBS_JOBID"),
    ),
    Launcher(
        name="srun",
        size=("SLURM_STEP_NUM_TASKS",),
        rank=("SLURM_PROCID",),
        local=("SLURM_LOCALID",),
        locals=("SLURM_STEP_TASKS_PER_NODE",),
        hosts=("SLURM_STEP_NODELIST",),
        job=("SLURM_JOB_ID",),
    ),
)
"""https://slurm.schedmd.com/srun.html, https://docs.open-mpi.org (mpirun, environment variables); PALS' and
PMI's as their mpiexec sets them."""


def fill(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set those of torchrun's variables that are missing, from what another launcher says.

    Nothing is set for a process that was started alone. A batch script is one, too: Slurm gives it
    SLURM_PROCID=0 and the number of the tasks that its job may start. torchrun sets all of them itself.

    Raises:
        VoxelscaleError: some of the variables are missing, or contradict the launcher.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return
    place = _place_by_launcher(environment)
    for name in ("RANK", "WORLD_SIZE"):
        if place and environment.get(name) not in (None, place[name]):
            problem = (
                f"{name} is {environment[name]}, but this is rank {place['RANK']} of {place['WORLD_SIZE']}"
            )
            raise VoxelscaleError(problem, f"unset {name}: the launcher gives it")
    for name, value in place.items():
        if value:
            environment.setdefault(name, value)
    _check(environment)


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to be started alone, whoever started this one."""
    named = set(OURS).union(*(launcher.names for launcher in LAUNCHERS))
    return {name: value for name, value in environment.items() if name not in named}


def forget() -> None:
    """Take this process, from now on, for one that was started alone."""
    for name in os.environ.keys() - without(os.environ).keys():
        del os.environ[name]


def first_host(hosts: str) -> str:
    """The first machine of Slurm's list: ``gpu007`` of ``gpu[007-009,12],login1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else "")


def tasks_of_node(tasks: str, node: int) -> int:
    """Number of tasks on a node, of Slurm's list for all nodes, as ``2(x3),1``.

    Raises:
        VoxelscaleError: the list does not name that node.
    """
    each: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        each += [int(number)] * int(times or 1)
    if node >= len(each):
        raise VoxelscaleError(
            f"SLURM_STEP_TASKS_PER_NODE={tasks} does not name node {node}", "set LOCAL_WORLD_SIZE"
        )
    return each[node]


def _place_by_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, those that are not known empty; none where no launcher started several."""

    def said(names: Sequence[str]) -> str:
        return next((environment[name] for name in names if environment.get(name)), "")

    for launcher in LAUNCHERS:
        size, rank, srun = said(launcher.size), said(launcher.rank), launcher.name == "srun"
        if rank and not size and not srun:
            raise _missing(launcher.size[0], launcher.rank[0])
        if int(size or 1) == 1:
            continue
        if not rank:
            raise _missing(launcher.rank[0], launcher.size[0])
        locals_, start = said(launcher.locals), said(launcher.job)
        if srun:
            locals_ = str(tasks_of_node(locals_, int(environment.get("SLURM_NODEID", 0))))
            start += f".{environment.get('SLURM_STEP_ID')}.{environment.get('SLURM_RESTART_COUNT')}"
        host = _host_of_first(said(launcher.hosts), environment)
        return {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": said(launcher.local),
            "LOCAL_WORLD_SIZE": locals_,
            "MASTER_ADDR": "127.0.0.1" if locals_ == size else host,
            "MASTER_PORT": str(PORTS[zlib.crc32(start.encode()) % len(PORTS)]),
        }
    return {}


def _host_of_first(hosts: str, environment: Mapping[str, str]) -> str:
    """The machine of rank 0; empty where that is not known."""
    if environment.get("SLURM_DISTRIBUTION") == "arbitrary":
        return ""  # rank 0 may be anywhere
    if hosts.startswith("/"):
        try:
            with open(hosts, encoding="utf-8") as lines:
                return next(lines, "").strip()
        except OSError:
            return ""
    return first_host(hosts)


def _check(environment: Mapping[str, str]) -> None:
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank and not size:
        raise _missing("WORLD_SIZE", "RANK")
    if size and not rank and size != "1":
        raise _missing("RANK", "WORLD_SIZE")
    if rank and size and size != "1":
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise _missing(name, "WORLD_SIZE")


def _missing(name: str, given: str) -> VoxelscaleError:
    hint = (
        f"set {name} in every process (Open MPI: mpirun -x {name}=...), or start it with srun or torchrun"
    )
    return VoxelscaleError(f"{given} is set, but {name} is not", hint)
