"""Ranks that wait for each other."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from voxelscale.errors import VoxelscaleError
from voxelscale.ranks.faults import lost_peer
from voxelscale.ranks.meeting import WAIT, interface_of, is_here, meet, reach
from voxelscale.ranks.nodes import Nodes


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one; nobody waits longer than a second or two."""
    monkeypatch.setenv(WAIT, "1.5")
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def test_ranks_that_all_come_share_a_store(port: int) -> None:
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: meet("127.0.0.1", port, rank, 3), range(3)))
    stores[1].set("word", "yes")
    assert [store.get("word") for store in stores] == [b"yes"] * 3


def test_a_rank_0_that_is_not_there_is_named(port: int) -> None:
    with pytest.raises(
        VoxelscaleError, match=rf"^127\.0\.0\.1:{port} was not reached within 2 s \(Connect"
    ):
        meet("127.0.0.1", port, 1, 2)


def test_ranks_that_do_not_come_are_counted(port: int) -> None:
    with pytest.raises(VoxelscaleError, match=f"^1 of 2 ranks came to 127.0.0.1:{port} within 2 s$"):
        meet("127.0.0.1", port, 0, 2)


def test_a_port_that_is_taken_is_an_error(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(VoxelscaleError, match=f"the meeting at 127.0.0.1:{port} failed"):
            meet("127.0.0.1", port, 0, 2)


def test_under_torchrun_a_meeting_that_fails_is_a_lost_peer(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(dist.DistError) as caught:
            meet("127.0.0.1", port, 0, 2)
    assert lost_peer(caught.value)


def test_an_unknown_name_is_an_error(port: int) -> None:
    with pytest.raises(VoxelscaleError, match=f"nowhere.invalid:{port} was not reached"):
        reach("nowhere.invalid", port)


def test_which_machine_and_interface_an_address_is_of() -> None:
    assert is_here("localhost")
    assert is_here("127.0.1.1")
    assert not is_here("192.0.2.1")
    assert not is_here("nowhere.invalid")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == ""


@pytest.mark.parametrize("meeting", ["", "node1", ":29500", "node1:", "node1:x", "node1:0", "node1:65536"])
def test_a_place_to_meet_that_is_none(meeting: str) -> None:
    with pytest.raises(VoxelscaleError, match=r"--nodes 2 --meet .*: not possible"):
        Nodes.of(2, meeting)


def test_a_place_to_meet() -> None:
    assert Nodes.of(2, "node1:29500") == Nodes(count=2, host="node1", port=29500)
    assert Nodes.of(2, "fe80::1:29500").host == "fe80::1"
