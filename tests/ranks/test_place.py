"""A rank's place, from what launchers say."""

from __future__ import annotations

from pathlib import Path

import pytest

from voxelscale.errors import VoxelscaleError
from voxelscale.ranks.place import OURS, PORTS, fill, first_host, tasks_of_node, without

# As srun of Slurm 22.05 gave them to the third of four tasks on two machines (shortened).
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "login1,node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
PALS = {
    "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_LOCAL_SIZE": "4",
    "PALS_APID": "0bc1",
}


def place(told: dict[str, str]) -> tuple[str | None, ...]:
    """What `fill` makes of it, but for the port."""
    filled = dict(told)
    fill(filled)
    return tuple(filled.get(name) for name in OURS[:-1])


def test_srun() -> None:
    assert place(SRUN) == ("2", "4", "0", "2", "node1")


def test_a_batch_script_and_a_step_of_one_task_are_one_process() -> None:
    for told in (BATCH_SCRIPT, {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}):
        assert place(told) == (None,) * 5


def test_all_ranks_of_a_step_have_one_port_and_other_steps_others() -> None:
    def port(**told: str) -> int:
        filled = {**SRUN, **told}
        fill(filled)
        return int(filled["MASTER_PORT"])

    assert port(SLURM_PROCID="0", SLURM_NODEID="0") == port(SLURM_PROCID="3", SLURM_LOCALID="1")
    steps = {port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="18"), port(SLURM_RESTART_COUNT="1")}
    assert len(steps) == 4
    assert all(number in PORTS for number in steps)


def test_open_mpi_on_one_machine_and_within_a_batch_script() -> None:
    assert place(OPEN_MPI) == ("1", "2", "1", "2", "127.0.0.1")
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert place({**several, **BATCH_SCRIPT})[4] == "node1"


def test_pals_with_the_machines_of_a_pbs_job(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("x1000\nx1000\nx1001\n")
    assert place({**PALS, "PBS_NODEFILE": str(nodes)}) == ("5", "8", "1", "4", "x1000")


def test_what_is_given_is_kept() -> None:
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234", "WORLD_SIZE": "4"}
    filled = {**SRUN, **given}
    fill(filled)
    assert filled.items() >= given.items()
    assert filled["RANK"] == "2"


def test_torchrun_within_a_task_of_srun_is_not_touched() -> None:
    told = {**SRUN, "TORCHELASTIC_RUN_ID": "run", "RANK": "9", "WORLD_SIZE": "16"}
    filled = dict(told)
    fill(filled)
    assert filled == told


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE is set, but MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE is set, but MASTER_PORT is not"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_STEP_NUM_TASKS is set, but SLURM_PROCID is not"),
        ({**SRUN, "WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but this is rank 2 of 4"),
        ({**SRUN, "SLURM_DISTRIBUTION": "arbitrary"}, "WORLD_SIZE is set, but MASTER_ADDR is not"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is set, but OMPI_COMM_WORLD_SIZE is not"),
        (PALS, "WORLD_SIZE is set, but MASTER_ADDR is not"),
    ],
)
def test_half_of_it_is_an_error_that_names_the_other(told: dict[str, str], problem: str) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        place(told)
    assert caught.value.message == problem


def test_a_process_of_its_own_is_one() -> None:
    for told in (SRUN, OPEN_MPI, PALS, {"RANK": "1", "WORLD_SIZE": "2"}):
        assert place(without({**told, "HOME": "/root"})) == (None,) * 5
    assert without({"HOME": "/root", **SRUN})["HOME"] == "/root"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("a-b2,c[1-2]", "a-b2"),
        ("rack[1-2]n[03,5].site", "rack1n03.site"),
        ("", ""),
    ],
)
def test_the_first_machine_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("tasks", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3])]
)
def test_tasks_of_each_machine(tasks: str, counts: list[int]) -> None:
    assert [tasks_of_node(tasks, node) for node in range(len(counts))] == counts
    with pytest.raises(VoxelscaleError):
        tasks_of_node(tasks, len(counts))
